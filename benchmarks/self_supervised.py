"""Pre-training on images alone: what AIM, MAE, SimMIM and BEiT teach the same small ViT, judged on held-out images.

python benchmarks/self_supervised.py [--workdir=runs/self_supervised] [--data=digits,shapes] [--images=FOLDER]
                                     [--methods=aim,mae,simmim,beit] [--budget=1] [--seed=0] [--config.KEY=VALUE ...]
                                     [--docs] [--quick]

Every run is a shipped recipe in its `:smoke` form with the tower, data and steps of this file, made by the training
loop itself. Beside the methods stand the same tower with random weights and one that learned from labels alone. Linear
probe, attentive probe and k-NN judge the frozen tower; then it is fine-tuned on the labels. `--images` takes the place
of `--data`: a folder per class, or `train` and `val` folders of such; without these every fifth image is held out.
Digits and shapes are learned side by side, in two processes.
A run has its own folder under the workdir: it is not made again, and one that was stopped goes on. Writes
WORKDIR/self_supervised.json, .md and .png and pictures of reconstructions; `--docs` also writes them into docs/.
`--quick` shows in a few minutes that it all works; its numbers mean nothing.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from self_supervised_data import Data, built_in, class_count, own
from self_supervised_report import METHODS, draw, join_pictures, table, write_docs

from vlm_jax import platforms
from vlm_jax.config import Config, load_config, to_json
from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.evals.accuracy import AccuracyConfig
from vlm_jax.evals.attentive_probe import AttentiveProbeConfig
from vlm_jax.evals.base import EvalConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.evals.linear_probe import LinearProbeConfig
from vlm_jax.evals.probe_training import ProbeTraining
from vlm_jax.evals.reconstructions import ReconstructionsConfig
from vlm_jax.main import keep_compiled_programs, split_overrides
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.dvae import DvaeModelConfig
from vlm_jax.models.masked_autoencoder import PixelDecoderConfig
from vlm_jax.models.pixel_head import PixelHeadConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.dvae import Annealed, DvaeConfig
from vlm_jax.objectives.images import ImagesConfig
from vlm_jax.objectives.mixing import MixingConfig
from vlm_jax.schedule import Cosine
from vlm_jax.schema import ConfigError, override, validate
from vlm_jax.train import train
from vlm_jax.warm_start import InitFrom

ROOT = Path(__file__).parent.parent
RECIPES = {
    "random": "vit_s16_supervised",
    "aim": "aim_600m",
    "mae": "mae_b16",
    "simmim": "simmim_vit_b16",
    "beit": "beit_b16",
    "dvae": "dvae",
    "supervised": "vit_s16_supervised",
    "fine_tuned": "finetune_mae_b16",
}
RATES = {
    "random": 0.0,
    "aim": 2e-3,
    "mae": 2e-3,
    "simmim": 2e-3,
    "beit": 2e-3,
    "dvae": 5e-3,
    "supervised": 1e-3,
    "fine_tuned": 1e-3,
}
CODES = 64  # of the visual tokenizer
PREPROCESS = PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is that costs time."""

    steps: int = 900  # of pre-training and of learning from labels alone, for 16 patches; of the tokenizer a third
    tuning_steps: int = 225  # of fine-tuning, for 16 patches
    batch_size: int = 64
    width: int = 96  # of the tower; a head for each 32
    depth: int = 4
    limit: int = 0  # held-out images; 0: all
    train_limit: int = 0  # images with labels that the probes see; 0: all
    probe_epochs: int = 30  # of the attentive probe

    def of(self, data: Data) -> "Scale":
        """By the data's length, and as many fewer steps as an image has more patches than 16, for those cost more."""
        factor = data.length * 16 / data.patches
        steps, tuning = (max(round(count * factor), 1) for count in (self.steps, self.tuning_steps))
        return dataclasses.replace(self, steps=steps, tuning_steps=tuning)


QUICK = Scale(2, 2, batch_size=16, width=32, depth=2, limit=40, train_limit=80, probe_epochs=1)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of every config."""
    parser = argparse.ArgumentParser(description="Pre-training on images alone, compared.", allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/self_supervised"), help="runs and the report")
    parser.add_argument("--data", default="digits,shapes", help="which built-in images: digits, shapes")
    parser.add_argument("--images", default="", help="images of your own: a folder per class; replaces --data")
    parser.add_argument("--methods", default=",".join(METHODS), help="what is compared with random weights and labels")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the steps of every run")
    parser.add_argument("--seed", default="0", help="seed of every run")
    parser.add_argument("--docs", action="store_true", help="also write table and pictures into docs/")
    parser.add_argument("--quick", action="store_true", help="two steps of the first images for each method")
    overrides, rest = split_overrides(arguments)
    flags = parser.parse_args(rest)
    flags.data, flags.methods = flags.data.split(","), flags.methods.split(",")
    for name, known in (("data", ("digits", "shapes")), ("methods", tuple(METHODS))):
        for value in getattr(flags, name):
            if value not in known:
                raise ConfigError(f"--{name} has {value!r}; there are {', '.join(known)}")
    if flags.budget <= 0:
        raise ConfigError(f"--budget={flags.budget} must be positive")
    if flags.docs and flags.quick:
        raise ConfigError("--docs writes numbers that mean something; --quick has none")
    return flags, overrides


def scale_of(flags: argparse.Namespace) -> Scale:
    """Sizes and steps by `--quick` and `--budget`."""
    scale = QUICK if flags.quick else Scale()
    steps, tuning = (max(round(flags.budget * count), 1) for count in (scale.steps, scale.tuning_steps))
    return dataclasses.replace(scale, steps=steps, tuning_steps=tuning)


def probes(data: Data, scale: Scale) -> tuple[EvalConfig, ...]:
    """The evaluations of a frozen tower.

    All see the patches, for not every method trains a class token, and every block, for what a classifier needs is not
    with every method in the last one.
    """
    sources: dict[str, Any] = {"limit": scale.limit, "train_source": data.labelled, "train_limit": scale.train_limit}
    lambdas = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
    training = ProbeTraining(
        learning_rates=(1e-3, 3e-3, 1e-2), weight_decays=(0.05,), epochs=scale.probe_epochs, batch_size=256
    )
    return (
        LinearProbeConfig(data.name, data.test, features="blocks", lambdas=lambdas, max_iterations=300, **sources),
        AttentiveProbeConfig(
            data.name,
            data.test,
            training=training,
            heads=scale.width // 32,
            layers=tuple(range(scale.depth)),
            **sources,
        ),
        KnnConfig(data.name, data.test, features="blocks", **sources),
    )


def tower(data: Data, scale: Scale, pool: Literal["none", "mean"] = "none", mask_token: bool = False) -> ViTConfig:
    """The tower of every row. Without a class token, which only some methods would train."""
    return ViTConfig(
        image_size=data.image_size,
        patch_size=data.patch_size,
        width=scale.width,
        depth=scale.depth,
        heads=scale.width // 32,
        mlp_dim=4 * scale.width,
        activation="gelu",
        norm_eps=1e-6,
        pool=pool,
        class_token=False,
        pos_embed="sincos",
        mask_token=mask_token,
        pre_norm=False,
        patch_bias=True,
        init="mae",
    )


def own_changes(method: str, data: Data, scale: Scale, workdir: Path) -> dict[str, Any]:
    """What is a method's own beside the tower: its head or decoder, and what it hides."""
    tokenizer = DvaeModelConfig(data.code_size, CODES, width=16, blocks=1, decoder_width=32)
    match method:
        case "random":
            return {"optimizer.weight_decay": 0.0}
        case "aim":
            width, heads = scale.width, scale.width // 32
            return {"objective.model.head": PixelHeadConfig(width=width, depth=2, heads=heads, mlp_dim=2 * width)}
        case "mae":
            return {
                "objective.model.decoder": PixelDecoderConfig(width=64, depth=2, heads=2, mlp_dim=256),
                # A quarter of 16 patches is too little to see, and most patches are too flat to be normalised.
                "objective.model.mask_ratio": 0.5,
                "objective.model.normalise_pixels": False,
            }
        case "simmim":
            return {"objective.model.cell": data.patch_size, "objective.model.mask_ratio": 0.5}
        case "beit":
            renamed = ((r"tokenizer/(.*)", r"\1"),)
            path, skip = str(workdir / data.name / "dvae"), ("image/.*", "head/.*")
            least = max(round(0.08 * data.patches), 1)  # as 16 of the published 196
            return {
                "objective.model.vocab_size": CODES,
                "objective.model.tokenizer": tokenizer,
                "objective.model.masks": BlockMasks(count=round(0.4 * data.patches), least=least),
                "init_from": InitFrom(path=path, map=renamed, skip=skip),
            }
        case "dvae":
            # The weight has to be there before the encoder leaves for a single code, the easiest way without noise.
            kl_weight = Annealed(0.0, 10.0, max(scale.steps // 20, 1))
            return {
                "objective": DvaeConfig(
                    model=tokenizer, temperature=Annealed(1.0, 0.25, scale.steps), kl_weight=kl_weight
                ),
                "train.ema_decay": None,  # that of the recipe would still hold the first weights
            }
    return {}


def run_config(method: str, data: Data, scale: Scale, workdir: Path, common: Mapping[str, str]) -> Config:
    """The config of a run from random weights."""
    if method == "dvae":  # convolutions are dear on CPUs, and few codes soon learned
        scale = dataclasses.replace(scale, steps=max(scale.steps // 3, 1))
    config = load_config(f"{ROOT}/configs/{RECIPES[method]}.py:smoke")
    changes = schedule_changes(RATES[method], 1 if method == "random" else scale.steps, scale.batch_size)
    changes |= {"data.source": data.unlabelled, "data.augment": data.augment, "evals": ()}
    if method != "dvae":
        pool = "mean" if method in ("random", "supervised") else "none"
        image = tower(data, scale, pool, mask_token=method in ("simmim", "beit"))
        changes |= {"objective.model.image": image, "data.preprocess": PREPROCESS, "evals": probes(data, scale)}
    if method in METHODS:
        changes["evals"] += (ReconstructionsConfig(data.name, data.test, pictured=4),)
    if method in ("random", "supervised"):
        changes |= {"data.source": data.labelled, "objective.model.classes": class_count(data)}
        changes["evals"] += (AccuracyConfig(data.name, data.test, limit=scale.limit),)
    return checked(config, f"{data.name}_{method}", changes | own_changes(method, data, scale, workdir) | dict(common))


def tuning_config(
    method: str, start: Config, data: Data, scale: Scale, workdir: Path, common: Mapping[str, str]
) -> Config:
    """The config of the fine-tuning of a run's tower, by the mean of its patches; few steps call for few tricks."""
    hides = tower_of(start).mask_token
    unused = ("(?!image/).*", "image/mask_token") if hides else ("(?!image/).*",)
    changes = schedule_changes(RATES["fine_tuned"], scale.tuning_steps, scale.batch_size) | {
        "objective.model": ClassifierConfig(image=tower(data, scale, "mean"), classes=class_count(data), head_init=0.0),
        "objective.mixing": MixingConfig(),
        "parts.image.layer_decay": 0.75,
        "data.source": data.labelled,
        "data.preprocess": PREPROCESS,
        "data.augment": data.augment,
        "init_from": InitFrom(path=str(workdir / data.name / method), skip=("head/.*",), ignore=unused),
        "evals": (AccuracyConfig(data.name, data.test, limit=scale.limit),),
    }
    config = load_config(f"{ROOT}/configs/{RECIPES['fine_tuned']}.py:smoke")
    return checked(config, f"{data.name}_{method}_fine_tuned", changes | dict(common))


def schedule_changes(rate: float, steps: int, batch_size: int) -> dict[str, Any]:
    """Length and learning rate of a run."""
    return {
        "data.batch_size": batch_size,
        "optimizer.learning_rate": rate,
        "optimizer.schedule": Cosine(warmup_steps=steps // 10),
        "train.steps": steps,
        "train.log_every": max(steps // 5, 1),
        "checkpoint.every": max(steps // 2, 1),
        "checkpoint.keep": 1,
    }


def checked(config: Config, name: str, changes: Mapping[str, Any]) -> Config:
    """The config under another name and with changes; raises `ConfigError`."""
    config = override(config, {"name": name, **changes})
    validate(config)
    return config


def tower_of(config: Config) -> ViTConfig:
    """The image tower."""
    assert isinstance(config.objective, ImagesConfig) and isinstance(config.objective.image_tower, ViTConfig)
    return config.objective.image_tower


def prepare(workdir: Path) -> None:
    """Makes the folder of several runs, which share compiled programs and the memory of this process."""
    if platforms.computes_on_cpu():
        platforms.keep_freed_memory()
    workdir.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(workdir / "compilation_cache"))


def finished(config: Config, folder: Path) -> dict[str, float]:
    """The metrics of a run: those in its folder if this config made them, else it is begun or continued there.

    Among them "seconds", those of its steps.
    """

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text()) if (folder / name).exists() else {}

    done = read("goodput.json").get("step") == config.train.steps
    if not done or read("config.json") != to_json(config) or (config.evals and not read("eval.json")):
        print(f"--- {folder}", flush=True)
        if code := train(config, str(folder)):
            raise SystemExit(code)  # a signal: saved, and the same command goes on from there
    return read("eval.json") | {"seconds": read("goodput.json")["seconds"]["step"]}


def compare(
    data: Data, methods: Sequence[str], scale: Scale, workdir: Path, common: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Top-1 by row and measure."""
    rows = {}
    for method in ("random", *methods, "supervised"):
        if method == "beit":
            finished(run_config("dvae", data, scale, workdir, common), workdir / data.name / "dvae")
        config = run_config(method, data, scale, workdir, common)
        found = finished(config, workdir / data.name / method)
        row = {kind: found[f"{kind}/{data.name}/top1"] for kind in ("linear_probe", "attentive_probe")}
        row["knn"] = found[f"knn/{data.name}/k20_top1"]
        if method == "supervised":
            row["fine_tuned"] = found[f"accuracy/{data.name}/top1"]
        else:
            tuning = tuning_config(method, config, data, scale, workdir, common)
            tuned = finished(tuning, workdir / data.name / f"{method}_fine_tuned")
            row["fine_tuned"] = tuned[f"accuracy/{data.name}/top1"]
        rows[method] = row
    return rows


def make_runs(
    kinds: Sequence[Data], methods: Sequence[str], scale: Scale, workdir: Path, common: Mapping[str, str]
) -> None:
    """Makes the runs of several kinds of images, each kind in a process of its own: towers this small leave cores idle.

    Ends this program with the exit code of the first that does not succeed; a signal reaches them all.
    """
    several = multiprocessing.get_context("spawn")
    processes = [
        several.Process(target=make_runs_of, args=(data, methods, scale, workdir, common), daemon=True)
        for data in kinds
    ]
    # Children that are daemons are stopped, and save, when this process exits: which a signal alone would not do.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode if process.exitcode > 0 else 1)


def make_runs_of(data: Data, methods: Sequence[str], scale: Scale, workdir: Path, common: Mapping[str, str]) -> None:
    """`compare` in a process of its own."""
    prepare(workdir)
    compare(data, methods, scale.of(data), workdir, common)


def main(arguments: list[str], docs: Path = ROOT / "docs") -> int:
    """The program."""
    try:
        flags, overrides = parse(arguments)
        scale, workdir = scale_of(flags), flags.workdir
        prepare(workdir)
        kinds = [own(flags.images, workdir)] if flags.images else [built_in(name) for name in flags.data]
        kinds, common = kinds[: 1 if flags.quick else None], {"seed": flags.seed, **overrides}
        results = {data.name: compare(data, flags.methods, scale.of(data), workdir, common) for data in kinds}
        for name in results:
            join_pictures(workdir / name, flags.methods, workdir / f"self_supervised_{name}.png")
        report = "\n\n".join(table(name, rows) for name, rows in results.items())
        found = {"scale": dataclasses.asdict(scale), "seed": flags.seed, "overrides": overrides, "results": results}
        (workdir / "self_supervised.json").write_text(json.dumps(found, indent=1))
        (workdir / "self_supervised.md").write_text(report + "\n")
        draw(results, workdir / "self_supervised.png")
        if flags.docs:
            write_docs(report, workdir, list(results), docs)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
