"""Validation loss against parameters, data and compute: AIM beside MAE that hides 50 % and 75 %, with fitted curves.

python benchmarks/scaling.py [--workdir=runs/scaling] [--methods=aim,mae50,mae75] [--ladder=cpu|paper] [--sizes=...]
                             [--shares=1,0.5,0.25,0.125] [--epochs=30] [--images=FOLDER] [--held_out=PATH] [--seed=0]
                             [--config.KEY=VALUE ...] [--plan] [--docs] [--quick]

A run is a shipped recipe of one size on one share of the images, with a schedule that ends with it. A share of the
images is trained on for the same share of the steps: every image is seen equally often, and the images seen are the
amount of data. `--ladder=cpu` trains small towers on scanned digits, or on `--images`, a folder per class;
`--ladder=paper` the published sizes on `--config.data.path`, judged on `--held_out`. `--plan` prints parameters, FLOPs,
steps, images and share of the compute of every run, and trains nothing. A run has its own folder under the workdir: it
is not made again, and one that was stopped goes on. Writes WORKDIR/scaling.json, .md and .png; `--docs` also writes
them into docs/. `--quick` shows in a minute or two that it all works; its numbers mean nothing.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from scaling_report import METHODS, Run, draw, fitted, plan_table, report, write_docs
from self_supervised import Data, built_in, checked, finished, own

from vlm_jax import distributed
from vlm_jax.config import Config, load_config
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import MixtureConfig, SourceConfig, SubsetConfig
from vlm_jax.evals.held_out_loss import HeldOutLossConfig
from vlm_jax.main import keep_compiled_programs, split_overrides
from vlm_jax.mesh import tree_path
from vlm_jax.models.masked_autoencoder import PixelDecoderConfig
from vlm_jax.models.pixel_head import PixelHeadConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.objectives.images import ImagesConfig
from vlm_jax.schedule import Cosine
from vlm_jax.schema import ConfigError
from vlm_jax.train import train

ROOT = Path(__file__).parent.parent
LADDERS = ("cpu", "paper")
PAPER = {
    "aim": {"600m": "aim_600m", "1b": "aim_1b", "3b": "aim_3b", "7b": "aim_7b"},
    "mae": {"b16": "mae_b16", "l16": "mae_l16", "h14": "mae_h14"},
}
# Small towers are wide rather than deep: few steps teach deep ones little.
WIDTHS = {"w16": 16, "w32": 32, "w64": 64, "w128": 128, "w256": 256}
DEPTH, HEAD_WIDTH = 2, 16
HEAD = {"width": 64, "depth": 2, "heads": 2, "mlp_dim": 128}  # pixel head or decoder: one for all sizes, as published
BATCH_SIZE = 16
RATE = 4e-3  # peak learning rate of head or decoder
TOWER_RATE = 0.8  # that of a tower times its width to the power 1.5: found on a quarter of the digits
WARMUP = 0.3  # of a run: MAE's wide towers forget what they see when few small batches move them fast from the start


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What is trained.

    Attributes:
        sizes: names by method, from the smallest tower.
        shares: of the images and of the steps, from the largest.
        epochs: how often small towers see an image.
        data: images of small towers; None trains the published sizes on those of the config.
        held_out: where the loss is taken.
        common: overrides of every config.
    """

    sizes: Mapping[str, tuple[str, ...]]
    shares: tuple[float, ...]
    epochs: float
    data: Data | None
    held_out: HeldOutLossConfig
    common: Mapping[str, str]

    def runs(self) -> list[tuple[Config, Run]]:
        """Every run, not made yet; raises `ConfigError`."""
        return [
            planned(self, method, size, share)
            for method, sizes in self.sizes.items()
            for size in sizes
            for share in self.shares
        ]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of every config; raises `ConfigError`."""
    parser = argparse.ArgumentParser(description="Loss against parameters, data and compute.", allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/scaling"), help="runs and the report")
    parser.add_argument("--methods", default=",".join(METHODS), help="which methods")
    parser.add_argument("--ladder", default="cpu", help="cpu: small towers; paper: the published sizes")
    parser.add_argument("--sizes", default="", help="some of the ladder's sizes, as --plan names them; default: all")
    parser.add_argument("--shares", default="1,0.5,0.25,0.125", help="shares of the images and of the steps")
    parser.add_argument("--epochs", type=float, default=30.0, help="how often small towers see an image")
    parser.add_argument("--images", default="", help="images of your own for small towers: a folder per class")
    parser.add_argument("--held_out", default="", help="for --ladder=paper: the images whose loss is taken")
    parser.add_argument("--seed", default="0", help="seed of every run")
    parser.add_argument("--distributed", default="auto", help="as of vlm_jax.main")
    parser.add_argument("--plan", action="store_true", help="print the runs and train nothing")
    parser.add_argument("--docs", action="store_true", help="also write tables and picture into docs/")
    parser.add_argument("--quick", action="store_true", help="a few steps of three small towers")
    overrides, rest = split_overrides(arguments)
    flags = parser.parse_args(rest)
    flags.methods = flags.methods.split(",")
    for name, values, known in (("methods", flags.methods, METHODS), ("ladder", [flags.ladder], LADDERS)):
        for value in values:
            if value not in known:
                raise ConfigError(f"--{name} has {value!r}; there are {', '.join(known)}")
    if flags.epochs <= 0:
        raise ConfigError(f"--epochs={flags.epochs:g} must be positive")
    if flags.docs and (flags.quick or flags.plan):
        raise ConfigError("--docs writes numbers that mean something; --quick and --plan have none")
    if flags.ladder == "paper" and not flags.plan and not flags.held_out:
        raise ConfigError("--ladder=paper needs --held_out=PATH, the images whose loss is taken")
    return flags, overrides


def ladder_of(flags: argparse.Namespace, overrides: Mapping[str, str]) -> Ladder:
    """What the flags ask for; raises `ConfigError`."""
    data = None
    if flags.ladder == "cpu":
        data = own(flags.images, flags.workdir) if flags.images else built_in("digits")
    held_out = HeldOutLossConfig("validation", (data or built_in("digits")).test, path=flags.held_out)
    if flags.quick:
        held_out = dataclasses.replace(held_out, limit=40)
    known = {method: tuple(WIDTHS if data else PAPER[family(method)]) for method in flags.methods}
    sizes = chosen_sizes(flags.sizes or (",".join(list(WIDTHS)[:3]) if flags.quick else ""), known)
    epochs = 0.2 if flags.quick else flags.epochs
    return Ladder(sizes, shares_of(flags.shares), epochs, data, held_out, {"seed": flags.seed, **overrides})


def chosen_sizes(text: str, known: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Those of each method that a list names; all for no list. A curve needs three."""
    wanted = text.split(",") if text else [size for sizes in known.values() for size in sizes]
    for size in wanted:
        if not any(size in sizes for sizes in known.values()):
            names = "; ".join(f"{method}: {', '.join(sizes)}" for method, sizes in known.items())
            raise ConfigError(f"--sizes has {size!r}; there are {names}")
    chosen = {method: tuple(size for size in sizes if size in wanted) for method, sizes in known.items()}
    for method, sizes in chosen.items():
        if len(sizes) < 3:
            raise ConfigError(
                f"--sizes={text} leaves {len(sizes)} of {method}'s {', '.join(known[method])}; floor, scale and "
                "exponent of a curve need three"
            )
    return chosen


def shares_of(text: str) -> tuple[float, ...]:
    """The shares, from the largest. A curve needs three."""
    try:
        shares = tuple(sorted({float(part) for part in text.split(",")}, reverse=True))
    except ValueError:
        shares = ()
    if len(shares) < 3 or not 0 < shares[-1] <= shares[0] <= 1:
        raise ConfigError(f"--shares={text} must be at least three different numbers in (0, 1], as 1,0.5,0.25")
    return shares


def family(method: str) -> str:
    """`mae` of `mae50`."""
    return method.rstrip("0123456789")


def planned(ladder: Ladder, method: str, size: str, share: float) -> tuple[Config, Run]:
    """A run's config, and what is known of it before it is made."""
    whole = paper_config(method, size, ladder) if ladder.data is None else small_config(method, size, ladder)
    steps = max(round(share * whole.train.steps), 1)
    schedule = whole.optimizer.schedule
    changes: dict[str, Any] = {
        "train.steps": steps,
        "optimizer.schedule": dataclasses.replace(schedule, warmup_steps=round(share * schedule.warmup_steps)),
        "data.source": share_of(whole.data, share),
        "data.path": "",
        "evals": (ladder.held_out,),
    }
    config = checked(whole, f"scaling_{method}_{size}_{share:g}", changes)
    tower, everything = parameter_counts(config.objective, config.data.preprocess)
    images = steps * config.data.batch_size
    flops = config.objective.train_flops() * images
    return config, Run(method, size, share, tower, everything, steps, images, flops)


def small_config(method: str, size: str, ladder: Ladder) -> Config:
    """The recipe's smoke form with a small tower, on all images."""
    data, kind, width = ladder.data, family(method), WIDTHS[size]
    assert data is not None, "the published sizes have configs of their own"
    config = load_config(f"{ROOT}/configs/{next(iter(PAPER[kind].values()))}.py:smoke")
    assert isinstance(config.objective, ImagesConfig) and isinstance(config.objective.image_tower, ViTConfig)
    blocks = {"width": width, "depth": DEPTH, "heads": width // HEAD_WIDTH, "mlp_dim": 4 * width}
    pixels = {"image_size": data.image_size, "patch_size": data.patch_size}
    steps = max(round(len(data.unlabelled.build("")) * ladder.epochs / BATCH_SIZE), 4)
    changes: dict[str, Any] = {
        "objective.model.image": dataclasses.replace(config.objective.image_tower, **blocks, **pixels, remat="none"),
        "data.source": data.unlabelled,
        "data.augment": data.augment,
        "data.batch_size": BATCH_SIZE,
        "optimizer.learning_rate": RATE,
        "parts.image.lr": TOWER_RATE / width**1.5 / RATE,
        "optimizer.schedule": Cosine(warmup_steps=round(WARMUP * steps)),
        "train.steps": steps,
        "train.log_every": max(steps // 5, 1),
        "checkpoint.every": steps,
        "checkpoint.keep": 1,
    }
    if kind == "aim":
        changes["objective.model.head"] = PixelHeadConfig(**HEAD)
    else:
        changes["objective.model.decoder"] = PixelDecoderConfig(**HEAD)
    return checked(config, size, changes | hidden(method) | dict(ladder.common))


def paper_config(method: str, size: str, ladder: Ladder) -> Config:
    """The published recipe of a size, on all images, for as many steps as that of the smallest."""
    recipes = PAPER[family(method)]
    smallest, own = (
        load_config(f"{ROOT}/configs/{recipe}.py", ladder.common)
        for recipe in (next(iter(recipes.values())), recipes[size])
    )
    length = {"train.steps": smallest.train.steps, "optimizer.schedule": smallest.optimizer.schedule}
    return checked(own, size, length | hidden(method))


def hidden(method: str) -> dict[str, Any]:
    """What an MAE of this name hides."""
    share = method.removeprefix("mae")
    return {"objective.model.mask_ratio": int(share) / 100} if share != method else {}


def share_of(data: DataConfig, share: float) -> SourceConfig:
    """A share of the images of a config; the parts of a mixture keep their weights."""
    if isinstance(data.source, MixtureConfig) and not data.path:
        parts = (
            dataclasses.replace(part, source=SubsetConfig(part.source, share=share)) for part in data.source.sources
        )
        return dataclasses.replace(data.source, sources=tuple(parts))
    return SubsetConfig(data.source, path=data.path, share=share)


@functools.cache
def parameter_counts(method: ObjectiveConfig, preprocess: PreprocessConfig) -> tuple[int, int]:
    """(those in the blocks of the tower, all): the first are Kaplan et al.'s, without embeddings and without a head."""
    params, _ = jax.eval_shape(method.build(preprocess, jnp.float32).init, jax.random.key(0))
    leaves = [(tree_path(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    return sum(size for path, size in leaves if path.startswith("image/blocks/")), sum(size for _, size in leaves)


def make(config: Config, run: Run, workdir: Path) -> Run:
    """The run with what it found: as it lies in its folder, or made there."""
    folder = workdir / run.method / f"{run.size}_{run.share:g}"
    if jax.process_count() > 1:  # all train, or find that nothing is left; only then are the files of the first there
        if code := train(config, str(folder)):
            raise SystemExit(code)
        multihost_utils.sync_global_devices(config.name)
    found = finished(config, folder)
    jax.clear_caches()  # no other run has its shapes and its schedule
    return dataclasses.replace(run, loss=found["held_out_loss/validation/loss"], seconds=found["seconds"])


def main(arguments: list[str], docs: Path = ROOT / "docs") -> int:
    """The program."""
    try:
        flags, overrides = parse(arguments)
        distributed.start(flags.distributed)
        ladder = ladder_of(flags, overrides)
        plan = ladder.runs()
        if flags.plan:
            print(plan_table([run for _, run in plan]))
            return 0
        workdir = flags.workdir
        workdir.mkdir(parents=True, exist_ok=True)
        keep_compiled_programs(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(workdir / "compilation_cache"))
        runs = [make(config, run, workdir) for config, run in plan]
        if jax.process_index():
            return 0  # the first process writes
        curves = fitted(runs)
        text = report(runs, curves)
        found = {
            "ladder": flags.ladder,
            "seed": flags.seed,
            "overrides": overrides,
            "runs": [dataclasses.asdict(run) for run in runs],
            "fits": {method: {name: curve.to_json() for name, curve in by.items()} for method, by in curves.items()},
        }
        (workdir / "scaling.json").write_text(json.dumps(found, indent=1))
        (workdir / "scaling.md").write_text(text + "\n")
        draw(runs, curves, workdir / "scaling.png")
        if flags.docs:
            write_docs(text, workdir, docs)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
