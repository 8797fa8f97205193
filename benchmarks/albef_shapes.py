"""ALBEF on drawn scenes: what matching adds to contrast, and what distillation does when captions are wrong.

python benchmarks/albef_shapes.py [--workdir=runs/albef_shapes] [--runs=true,distilled,plain] [--share=0.3] [--budget=1]
                                  [--seed=0] [--config.KEY=VALUE ...] [--docs] [--quick]

Three runs of configs/albef_shapes.py, one after the other: on true captions; and with a share of the scenes captioned
by other scenes, with and without the averaged model in the targets. The first goes on with captions that name one
object (configs/albef_grounding.py:shapes). All are judged on the same held-out scenes and true captions. A run has its
own folder under the workdir: it is not made again, and one that was stopped goes on. Writes WORKDIR/albef_shapes.json
and .md; `--docs` also writes the table into docs/albef.md and the maps of the model tuned on phrases beside it.
`--quick` shows in a minute or two that it all works; its numbers mean nothing.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import write_between
from self_supervised import checked, finished, prepare

from vlm_jax.config import Config, load_config
from vlm_jax.data.sources import MismatchedConfig
from vlm_jax.main import split_overrides
from vlm_jax.schema import ConfigError

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- written by benchmarks/albef_shapes.py -->", "<!-- end -->"
RUNS = {
    "true": "true captions",
    "distilled": "{share:.0%} wrong, with distillation",
    "plain": "{share:.0%} wrong, without distillation",
}
MEASURES = {  # title -> what stands in eval.json
    "text R@1, contrast": "retrieval/shapes/image_to_text_r1",
    "text R@1, matching": "retrieval/shapes/image_to_text_r1_reranked",
    "image R@1, contrast": "retrieval/shapes/text_to_image_r1",
    "image R@1, matching": "retrieval/shapes/text_to_image_r1_reranked",
    "right of own pairs": "retrieval/shapes/matching_accuracy_own",
    "right of hard pairs": "retrieval/shapes/matching_accuracy_hard",
    "mean of the two": "retrieval/shapes/matching_accuracy",
    "points at the named object": "grounding/objects/pointing",
    "with its patch": "grounding/objects/pointing_patch",
    "the same, tuned on phrases": "tuned/grounding/objects/pointing",
}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of every config."""
    parser = argparse.ArgumentParser(description="ALBEF on drawn scenes.", allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/albef_shapes"), help="runs and the report")
    parser.add_argument("--runs", default=",".join(RUNS), help=f"which of {', '.join(RUNS)}")
    parser.add_argument("--share", type=float, default=0.3, help="of the scenes that have a wrong caption")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the steps of every run")
    parser.add_argument("--seed", default="0", help="seed of every run")
    parser.add_argument("--docs", action="store_true", help="also write the table into docs/albef.md")
    parser.add_argument("--quick", action="store_true", help="six steps of a tiny model")
    overrides, rest = split_overrides(arguments)
    flags = parser.parse_args(rest)
    flags.runs = flags.runs.split(",")
    for run in flags.runs:
        if run not in RUNS:
            raise ConfigError(f"--runs has {run!r}; there are {', '.join(RUNS)}")
    if flags.budget <= 0:
        raise ConfigError(f"--budget={flags.budget} must be positive")
    if flags.docs and flags.quick:
        raise ConfigError("--docs writes numbers that mean something; --quick has none")
    return flags, overrides


def run_config(run: str, flags: argparse.Namespace, overrides: Mapping[str, str]) -> Config:
    """The config of a run."""
    config = load_config(f"{ROOT}/configs/albef_shapes.py" + ":smoke" * flags.quick)
    steps = max(round(flags.budget * config.train.steps), 1)
    changes: dict[str, Any] = {"seed": flags.seed, "train.steps": steps, "checkpoint.every": max(steps // 3, 1)}
    if flags.budget != 1:
        changes["optimizer.schedule.warmup_steps"] = steps // 10
        changes["objective.distillation_steps"] = steps // 5
    if run != "true":
        changes["data.source"] = MismatchedConfig(config.data.source, share=flags.share)
    if run == "plain":
        changes["objective.distillation"] = 0.0
    return checked(config, f"albef_shapes_{run}", changes | dict(overrides))


def tuned_config(flags: argparse.Namespace, pretrained: Config) -> Config:
    """Captions that name one object, for the model of the true captions."""
    config = load_config(f"{ROOT}/configs/albef_grounding.py:shapes")
    changes: dict[str, Any] = {
        "seed": flags.seed,
        "init_from.path": str(flags.workdir / "true"),
        "objective.model": vars(pretrained.objective)["model"],
    }
    if flags.quick:
        smoke = {"train.steps": 6, "checkpoint.every": 6, "optimizer.schedule.warmup_steps": 2}
        changes |= smoke | {"objective.queue": vars(pretrained.objective)["queue"], "evals.objects.limit": 48}
    return checked(config, "albef_shapes_tuned", changes)


def table(results: Mapping[str, Mapping[str, float]], share: float) -> str:
    """Markdown: a row for each measure, a column for each run."""
    lines = [f"| | {' | '.join(RUNS[run].format(share=share) for run in results)} |", f"|---|{'---|' * len(results)}"]
    for title, key in MEASURES.items():
        shown = (f"{found[key]:.1%}" if key in found else "" for found in results.values())
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: list[str], docs: Path = ROOT / "docs") -> int:
    """The program."""
    try:
        flags, overrides = parse(arguments)
        configs = {run: run_config(run, flags, overrides) for run in flags.runs}
        prepare(flags.workdir)
        results = {}
        for run, config in configs.items():
            found = finished(config, flags.workdir / run)
            if run == "true":
                tuned = finished(tuned_config(flags, config), flags.workdir / "tuned")
                found |= {f"tuned/{key}": value for key, value in tuned.items()}
            results[run] = {key: found[key] for key in MEASURES.values() if key in found}
        text = table(results, flags.share)
        saved = {"steps": configs[flags.runs[0]].train.steps, "share": flags.share, "seed": flags.seed}
        saved |= {"overrides": overrides, "results": results}
        (flags.workdir / "albef_shapes.json").write_text(json.dumps(saved, indent=1))
        (flags.workdir / "albef_shapes.md").write_text(text + "\n")
        if flags.docs:
            write_between(docs / "albef.md", BEGIN, END, text)
            for maps in sorted((flags.workdir / "tuned" / "pictures").glob("grounding-objects-maps-*.png")):
                shutil.copy(maps, docs / "albef_grounding.png")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
