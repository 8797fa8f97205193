"""A vision-language model from nothing: words, sight, both joined, questions answered, and the model given away.

python benchmarks/vlm_shapes.py [--workdir=runs/vlm_shapes] [--budget=1] [--seed=0] [--config.KEY=VALUE ...]
                                [--without_transformers] [--docs] [--quick]

Four runs of drawn scenes, each begun from those before it: a language model (configs/lm_tiny.py:shapes), CLIP
(configs/clip_shapes.py), and LLaVA's two stages (configs/vlm_shapes_stage1.py, vlm_shapes_stage2.py). Then what was
learned is asked: held-out questions with their images, with blank ones, and the best guess of who sees none; a PNG file
is asked about by `python -m vlm_jax.chat`; and the model, exported, gives the same answers in transformers. A run has
its own folder under the workdir: it is not made again, and one that was stopped goes on. Writes WORKDIR/vlm_shapes.json
and .md; `--docs` also writes the report into docs/tutorial_vlm.md. `--quick` shows in a minute or two that it all
works; its numbers mean nothing. `--config.KEY=VALUE` changes stage 2.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pages import write_between
from PIL import Image
from self_supervised import checked, finished, prepare

from vlm_jax.config import Config, load_config
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.interop.commands import export_weights
from vlm_jax.loading import Model, load
from vlm_jax.main import split_overrides
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.schema import ConfigError

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- written by benchmarks/vlm_shapes.py -->", "<!-- end -->"
RUNS = {  # folder -> config, what it learns
    "words": ("lm_tiny.py:shapes", "the language model"),
    "sight": ("clip_shapes.py", "CLIP"),
    "stage1": ("vlm_shapes_stage1.py", "stage 1, the projector"),
    "stage2": ("vlm_shapes_stage2.py", "stage 2, everything"),
}
EXPORTED = 16  # questions that are also answered by transformers


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of stage 2."""
    parser = argparse.ArgumentParser(description="A vision-language model from nothing.", allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/vlm_shapes"), help="runs and the report")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the steps of every run")
    parser.add_argument("--seed", default="0", help="seed of every run")
    parser.add_argument("--without_transformers", action="store_true", help="leave out the comparison of the export")
    parser.add_argument("--docs", action="store_true", help="also write the report into docs/tutorial_vlm.md")
    parser.add_argument("--quick", action="store_true", help="six steps of each run")
    overrides, rest = split_overrides(arguments)
    flags = parser.parse_args(rest)
    if flags.budget <= 0:
        raise ConfigError(f"--budget={flags.budget} must be positive")
    if flags.docs and flags.quick:
        raise ConfigError("--docs writes numbers that mean something; --quick has none")
    if not flags.without_transformers and not all(map(importlib.util.find_spec, ("transformers", "torch"))):
        raise ConfigError(
            "transformers and torch, which read the exported model, are not installed: "
            "pip install -e '.[parity]', or give --without_transformers"
        )
    return flags, overrides


def run_config(run: str, flags: argparse.Namespace, overrides: Mapping[str, str]) -> Config:
    """The config of a run, which begins from those before it."""
    name, variant = RUNS[run][0].partition(":")[::2]
    if flags.quick:
        variant = "_".join(filter(None, (variant, "smoke")))
    config = load_config(f"{ROOT}/configs/{name}" + f":{variant}" * bool(variant))
    steps = max(round(flags.budget * config.train.steps), 1)
    changes: dict[str, Any] = {"seed": flags.seed, "train.steps": steps}
    if run == "stage1":
        changes["init_from.path"] = str(flags.workdir / "words")
        changes["init_from.parts.tower.path"] = str(flags.workdir / "sight")
    if run == "stage2":
        changes |= {"init_from.path": str(flags.workdir / "stage1"), **overrides}
    return checked(config, run, changes)


def best_guess(source: ShapesConfig, count: int) -> dict[str, float]:
    """Accuracy by kind of who knows 20,000 other questions and their answers, and sees no image.

    Args:
        source: the held-out questions, one a conversation.
        count: how many of them are asked.
    """
    train = dataclasses.replace(source, split="train", count=20_000).build("")
    known: dict[str, collections.Counter[str]] = {}
    for index in range(len(train)):
        record = train[index]
        known.setdefault(record["turns"][0].text, collections.Counter())[record["answer"]] += 1
    right: dict[str, list[bool]] = {"": []}
    test = source.build("")
    for index in range(min(count, len(test))):
        record = test[index]
        answers = known.get(record["turns"][0].text)
        hit = bool(answers) and answers.most_common(1)[0][0] == record["answer"]
        right[""].append(hit)
        right.setdefault(record["kind"], []).append(hit)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


def asked_in_terminal(checkpoint: Path, source: ShapesConfig, folder: Path) -> dict[str, str]:
    """A held-out question about an image file, answered by the program that users have."""
    record = next(r for r in map(source.build("").__getitem__, range(len(source.build("")))) if r["kind"] == "color")
    path = folder / "scene.png"
    Image.fromarray(record["images"][0].load()).save(path)
    question = record["turns"][0].text.replace("<image>", "").strip()
    command = ["-m", "vlm_jax.chat", f"--checkpoint={checkpoint}", f"--image={path}", f"--prompt={question}"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT)
    return {"question": question, "answer": done.stdout.strip(), "known": record["answer"]}


def same_answers(checkpoint: Path, source: ShapesConfig, folder: Path, tokens: int) -> tuple[int, int]:
    """(questions that the exported model answers in transformers as it does here, questions)."""
    export_weights(checkpoint, folder, family="hf")
    model = load(checkpoint)
    rows = prompts(model, source, EXPORTED)
    ours = np.asarray(answers(model, rows, tokens))
    theirs = transformers_answers(model, rows, folder, tokens)
    ends = [_ended(ids, model.tokenizer.eos_id) for ids in (*ours, *theirs)]  # pyright: ignore
    return sum(a == b for a, b in zip(ends[:EXPORTED], ends[EXPORTED:], strict=True)), len(rows["text"])


def _ended(ids: np.ndarray, eos_id: int) -> list[int]:
    found = ids.tolist()
    return found[: found.index(eos_id)] if eos_id in found else found


def prompts(model: Model, source: ShapesConfig, count: int) -> dict[str, np.ndarray]:
    """The first questions of a source as a batch of rows, padded on the left."""
    data: DataConfig = model.config.data
    objective: Any = model.config.objective
    maker = objective.make_example(model.tokenizer, data)
    records = source.build("")
    rows = [maker.prompt(records[index]) for index in range(count)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def answers(model: Model, rows: Mapping[str, np.ndarray], tokens: int) -> jax.Array:
    """The likeliest tokens of each answer, int32 [B, tokens]."""
    objective: Any = model.config.objective.build(model.config.data.preprocess, np.float32)  # pyright: ignore
    config = GenerationConfig(tokens, eos_ids=(model.tokenizer.eos_id,), pad_id=model.tokenizer.pad_id)  # pyright: ignore
    return objective.answer(model.params, rows, config).ids


def transformers_answers(model: Model, rows: Mapping[str, np.ndarray], folder: Path, tokens: int) -> list[np.ndarray]:
    """What the exported files answer there, row by row."""
    import torch
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    view = model.config.data.preprocess
    mean, std = np.asarray(view.mean, np.float32), np.asarray(view.std, np.float32)
    found = []
    for text, slots, segments, tiles, count in zip(
        *(rows[key] for key in ("text", "tile_slots", "segments", "tiles", "tile_count")), strict=True
    ):
        used = segments > 0
        ids = np.where(slots >= 0, theirs.config.image_token_id, text)[used]
        pixels = ((tiles[: int(count)] / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        given = torch.tensor(ids[None].astype(np.int64))
        shown = {"pixel_values": torch.tensor(pixels.astype(np.float32))} if count else {}
        with torch.no_grad():
            written = theirs.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                **shown,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=model.tokenizer.eos_id,  # pyright: ignore[reportOptionalMemberAccess]
                pad_token_id=model.tokenizer.pad_id,  # pyright: ignore[reportOptionalMemberAccess]
            )
        found.append(written[0, len(ids) :].numpy())
    return found


def report(results: Mapping[str, Any]) -> str:
    """Markdown: time of each run, accuracy by kind of question, the answer in the terminal, the export."""
    lines = ["| run | steps | minutes |", "|---|---|---|"]
    for run, (_, title) in RUNS.items():
        found = results["runs"][run]
        lines.append(f"| {title} | {found['steps']} | {found['seconds'] / 60:.1f} |")
    lines += [
        "",
        "| held-out questions | right | with blank images | best guess without an image |",
        "|---|---|---|---|",
    ]
    for kind, title in (("", "all"), *((kind, kind) for kind in sorted(set(results["guess"]) - {""}))):
        name = f"exact_match/{kind}" if kind else "exact_match"
        blank = results["asked"].get(name.replace("exact_match", "exact_match_blank"))
        shown = "" if blank is None else f"{blank:.1%}"
        lines.append(f"| {title} | {results['asked'][name]:.1%} | {shown} | {results['guess'][kind]:.1%} |")
    chat = results["chat"]
    lines += ["", f"In the terminal: “{chat['question']}” – “{chat['answer']}” (it is {chat['known']})."]
    if results["exported"] is not None:
        same, count = results["exported"]
        lines += ["", f"transformers gives the exported model's answers to {same} of {count} questions as it is here."]
    return "\n".join(lines)


def run_all(flags: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Trains what is not trained yet, asks, and gives away."""
    configs = {run: run_config(run, flags, overrides) for run in RUNS}
    found = {run: finished(config, flags.workdir / run) for run, config in configs.items()}
    vqa = configs["stage2"].evals[0]
    assert isinstance(vqa, VqaConfig) and isinstance(vqa.source, ShapesConfig)
    prefix, checkpoint = f"vqa/{vqa.name}/", flags.workdir / "stage2"
    asked = {key.removeprefix(prefix): value for key, value in found["stage2"].items() if key.startswith(prefix)}
    exported = None
    if not flags.without_transformers:
        exported = same_answers(checkpoint, vqa.source, flags.workdir / "exported", vqa.max_new_tokens)
    chat = asked_in_terminal(checkpoint, vqa.source, flags.workdir)
    return {
        "runs": {
            run: {"steps": config.train.steps, "seconds": found[run]["seconds"]} for run, config in configs.items()
        },
        "asked": asked,
        "guess": best_guess(vqa.source, int(asked["examples"])),
        "chat": chat,
        "exported": exported,
        "seed": flags.seed,
        "overrides": dict(overrides),
    }


def main(arguments: list[str], docs: Path = ROOT / "docs") -> int:
    """The program."""
    try:
        flags, overrides = parse(arguments)
        prepare(flags.workdir)
        results = run_all(flags, overrides)
        text = report(results)
        (flags.workdir / "vlm_shapes.json").write_text(json.dumps(results, indent=1))
        (flags.workdir / "vlm_shapes.md").write_text(text + "\n")
        if flags.docs:
            write_between(docs / "tutorial_vlm.md", BEGIN, END, text)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
