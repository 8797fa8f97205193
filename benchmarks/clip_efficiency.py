"""Zero-shot accuracy against images seen, by method: figure 2 of the CLIP paper (Radford et al. 2021) at CPU size.

python benchmarks/clip_efficiency.py [--workdir=runs/efficiency] [--data=digits,shapes] [--methods=...] [--steps=256]
                                     [--rates=0.0003,0.001,0.003] [--seeds=0] [--config.KEY=VALUE ...] [--quick]

Every method trains the variant of its name of configs/efficiency_digits.py and configs/efficiency_shapes.py: the same
image tower, the same images in the same order, the same optimiser. The learning rate is chosen for each method by the
mean accuracy of its curve over the given rates, on the first seed; the other seeds repeat the best. A finished run lies
in the workdir and is not made again. Writes WORKDIR/efficiency.json, .md and .png. `--quick` shows in seconds that it
all works; its numbers mean nothing.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vlm_jax.assemble import build_evaluators, build_program, build_run_tokenizer
from vlm_jax.config import Config, load_config, to_json
from vlm_jax.data.pipeline import TrainLoader
from vlm_jax.main import split_overrides
from vlm_jax.mesh import MeshConfig, make_mesh
from vlm_jax.schema import ConfigError, override

CONFIGS = Path(__file__).parent.parent / "configs"
# in the order of the paper's figure, and then its other comparison
METHODS = {
    "caption": "transformer predicts the caption",
    "bag_of_words": "prediction of the bag of words",
    "contrastive_bag": "contrastive, bag of words",
    "contrastive": "contrastive, transformer",
    "contrastive_mlp": "contrastive, transformer, non-linear projection",
}
QUICK = {"data.batch_size": "16"}
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the lowest best accuracy, at which the methods' images are compared
Curve = dict[str, Any]  # "images": [...], "top1": [...], and what it was made with


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of the configs."""
    parser = argparse.ArgumentParser(description="Zero-shot accuracy against images seen.", allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/efficiency"), help="finished runs and the report")
    parser.add_argument("--data", default="digits,shapes", help="which configs/efficiency_NAME.py")
    parser.add_argument("--methods", default=",".join(METHODS), help="variants of these configs")
    parser.add_argument("--steps", type=int, default=256, help="optimiser steps of a run")
    parser.add_argument("--rates", default="0.0003,0.001,0.003", help="learning rates that each method tries")
    parser.add_argument("--seeds", default="0", help="seeds; the rates are tried on the first")
    parser.add_argument("--quick", action="store_true", help="two steps of digits for each method")
    overrides, rest = split_overrides(arguments)
    flags = parser.parse_args(rest)
    for name in ("data", "methods", "rates", "seeds"):
        setattr(flags, name, getattr(flags, name).split(","))
    if flags.quick:
        flags.data, flags.rates, flags.steps, overrides = flags.data[:1], flags.rates[:1], 2, QUICK | overrides
    for method in flags.methods:
        if method not in METHODS:
            raise ConfigError(f"--methods has {method!r}; there are {', '.join(METHODS)}")
    return flags, overrides


def points(steps: int) -> list[int]:
    """The steps after which a run is evaluated: two for each doubling, from 16 on, and the last."""
    powers = (round(16 * 2 ** (k / 2)) for k in range(2 * math.ceil(math.log2(steps)) + 1))
    return sorted({*(step for step in powers if step < steps), steps})


def run(config: Config, cache_dir: str) -> Curve:
    """Trains on one device, and evaluates zero-shot after each of the `points`."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = build_program(config, mesh)
    source = config.data.build_source(cache_dir)
    tokenizer = build_run_tokenizer(config, source, None)
    make_example = config.objective.make_example(tokenizer, config.data)
    loader = TrainLoader(source, make_example, config.data.batch_size, config.seed, mesh, 0, config.data)
    curve: Curve = {"images": [], "top1": [], "config": to_json(config)}
    begin, evaluating = time.perf_counter(), 0.0
    try:
        with jax.set_mesh(mesh):
            ((_, evaluator),) = build_evaluators(config, program.objective, tokenizer, mesh, cache_dir)
            state = program.setup.init()
            for step in range(1, config.train.steps + 1):
                state, _ = program.step(state, next(loader))
                if step in points(config.train.steps):
                    jax.block_until_ready(state.params)
                    start = time.perf_counter()
                    metrics = evaluator.run(state.params, step).metrics
                    evaluating += time.perf_counter() - start
                    curve["images"].append(step * config.data.batch_size)
                    curve["top1"].append(next(value for key, value in metrics.items() if key.endswith("/top1")))
    finally:
        loader.close()
    seconds = time.perf_counter() - begin
    return curve | {"seconds": seconds, "seconds_of_evaluation": evaluating}


def finished(config: Config, path: Path, cache_dir: str) -> Curve:
    """The curve of a config: the one at `path` if that config made it, else a new one, which is kept there."""
    if path.exists():
        curve = json.loads(path.read_text())
        if curve["config"] == to_json(config):
            return curve
        print(f"{path} was made by another config; running it again", flush=True)
    curve = run(config, cache_dir)
    path.write_text(json.dumps(curve))
    numbers = " ".join(f"{value:.2f}" for value in curve["top1"])
    print(f"{path.stem:40} {curve['seconds']:5.0f} s  {numbers}", flush=True)
    return curve


def config_of(data: str, method: str, rate: str, seed: str, steps: int, overrides: Mapping[str, str]) -> Config:
    """The config of one run, with its zero-shot evaluation alone."""
    changes = {"optimizer.learning_rate": rate, "train.steps": str(steps), "seed": seed, **overrides}
    config = load_config(f"{CONFIGS}/efficiency_{data}.py:{method}", changes)
    return dataclasses.replace(config, evals=tuple(entry for entry in config.evals if entry.kind() == "zero_shot"))


def method_curve(flags: argparse.Namespace, overrides: Mapping[str, str], data: str, method: str) -> Curve:
    """The mean curve over the seeds, at the learning rate that is best on the first."""

    def one(rate: str, seed: str) -> Curve:
        config = config_of(data, method, rate, seed, flags.steps, overrides)
        if flags.quick:
            config = override(config, {f"evals.{data}.limit": 20, f"evals.{data}.empty_classes": "skip"})
        path = flags.workdir / f"{data}-{method}-{rate}-{seed}.json"
        return finished(config, path, str(flags.workdir / "index"))

    tried = {rate: one(rate, flags.seeds[0]) for rate in flags.rates}
    best = max(tried, key=lambda rate: sum(tried[rate]["top1"]))
    curves = [tried[best], *(one(best, seed) for seed in flags.seeds[1:])]
    top1 = [sum(values) / len(values) for values in zip(*(curve["top1"] for curve in curves), strict=True)]
    spread = [max(values) - min(values) for values in zip(*(curve["top1"] for curve in curves), strict=True)]
    return {
        "images": curves[0]["images"],
        "top1": top1,
        "spread_over_seeds": spread,
        "learning_rate": float(best),
        "seconds": sum(curve["seconds"] for curve in curves) / len(curves),
        "final_top1_by_rate": {rate: curve["top1"][-1] for rate, curve in tried.items()},
    }


def images_to_reach(curve: Mapping[str, Sequence[float]], accuracy: float) -> float | None:
    """Images after which a curve first reaches an accuracy, linear in the logarithm between points; None: never."""
    images, top1 = curve["images"], curve["top1"]
    for index, value in enumerate(top1):
        if value >= accuracy:
            if index == 0:
                return float(images[0])
            share = (accuracy - top1[index - 1]) / (value - top1[index - 1])
            return float(images[index - 1] * (images[index] / images[index - 1]) ** share)
    return None


def targets(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> list[float]:
    """Accuracies that every method reaches: shares of the lowest of their best ones."""
    lowest = min(max(curve["top1"]) for curve in curves.values())
    return [share * lowest for share in SHARES]


def table(data: str, curves: Mapping[str, Any]) -> str:
    """Markdown: images that each method needs, and how many times fewer that is than the first method needs."""
    levels = targets(curves)
    names = list(curves)
    head = ["method", "learning rate", "best top-1", *(f"images to {level:.1%}" for level in levels)]
    lines = [f"**{data}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    needed = {name: [images_to_reach(curve, level) for level in levels] for name, curve in curves.items()}
    for name in names:
        cells = []
        for own, first in zip(needed[name], needed[names[0]], strict=True):
            assert own is not None and first is not None, "every method reaches the lowest of the best accuracies"
            cells.append(f"{own:,.0f} ({first / own:.2g}x)")
        curve = curves[name]
        row = [METHODS[name], f"{curve['learning_rate']:g}", f"{max(curve['top1']):.1%}", *cells]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy against images seen, on a logarithmic axis, a panel for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 4.2), layout="constrained")
    for index, (data, curves) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), index + 1)
        for name, curve in curves.items():
            axes.plot(curve["images"], [100 * value for value in curve["top1"]], marker=".", label=METHODS[name])
        axes.set(title=data, xlabel="images seen", ylabel="zero-shot top-1 (%)", xscale="log", ylim=(0, 100))
        axes.grid(alpha=0.3)
    # Below the panels: the curves use all of their area.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    """The program."""
    try:
        flags, overrides = parse(arguments)
        flags.workdir.mkdir(parents=True, exist_ok=True)
        results = {
            data: {method: method_curve(flags, overrides, data, method) for method in flags.methods}
            for data in flags.data
        }
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = "\n\n".join(table(data, curves) for data, curves in results.items())
    (flags.workdir / "efficiency.json").write_text(json.dumps(results, indent=1))
    (flags.workdir / "efficiency.md").write_text(report + "\n")
    draw(results, flags.workdir / "efficiency.png")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
