"""Curves, tables and the picture of `scaling.py`, and their place in its page. Runs nothing."""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pages import write_between
from scaling_fit import Fit, FitError, envelope, fit, optimal_exponent, power

METHODS = {"aim": "AIM", "mae50": "MAE 50 %", "mae75": "MAE 75 %"}
BEGIN, END = "<!-- written by benchmarks/scaling.py -->", "<!-- end -->"
CURVES = {
    "parameters": "loss by parameters N, all images",
    "data": "loss by images seen D, best size",
    "joint": "loss by N and D, all runs",
    "compute": "least loss by FLOPs C",
}
LETTERS = {"parameters": ("N",), "data": ("D",), "joint": ("N", "D"), "compute": ("C",)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: what is known before it is made, and what it found.

    Attributes:
        method: key of `METHODS`.
        size: name of the tower.
        share: of the images and of the steps.
        parameters: in the blocks of the tower.
        all_parameters: with embeddings, head or decoder.
        steps: optimiser steps.
        images: images seen.
        flops: model FLOPs of the whole training.
        loss: on held-out images; NaN before it is made.
        seconds: of its steps.
    """

    method: str
    size: str
    share: float
    parameters: int
    all_parameters: int
    steps: int
    images: int
    flops: float
    loss: float = math.nan
    seconds: float = math.nan


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted curve, or why there is none.

    Attributes:
        fit: the curve.
        refusal: why there is none.
        optimal: a of N ~ C ** a, where this curve tells it: by its exponents, or along the runs on the envelope.
    """

    fit: Fit | None = None
    refusal: str = ""
    optimal: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) if self.fit else {"refusal": self.refusal}


def fitted(runs: Sequence[Run]) -> dict[str, dict[str, Curve]]:
    """The curves of `CURVES` by method."""
    return {method: dict(_curves([run for run in runs if run.method == method])) for method in _methods(runs)}


def _curves(runs: Sequence[Run]) -> Iterator[tuple[str, Curve]]:
    best = frontier(runs)
    for name, points in (("parameters", whole(runs)), ("data", best_sizes(runs)), ("joint", runs), ("compute", best)):
        losses = [run.loss for run in points]
        try:
            found = fit(losses, *([_value(run, letter) for run in points] for letter in LETTERS[name]))
        except FitError as error:
            yield name, Curve(refusal=str(error))
            continue
        optimal = optimal_exponent(found.law) if name == "joint" else math.nan
        if name == "compute":
            optimal = power([run.flops for run in points], [run.parameters for run in points])
        yield name, Curve(found, optimal=optimal)


def _value(run: Run, letter: str) -> float:
    return {"N": run.parameters, "D": run.images, "C": run.flops}[letter]


def _methods(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs))


def whole(runs: Sequence[Run]) -> list[Run]:
    """Those on the largest share of the images."""
    return [run for run in runs if run.share == max(run.share for run in runs)]


def best_sizes(runs: Sequence[Run]) -> list[Run]:
    """The best size on each share of the images: the data alone limit it (Kaplan et al., section 4.1)."""
    shares = dict.fromkeys(run.share for run in runs)
    return [min((run for run in runs if run.share == share), key=lambda run: run.loss) for share in shares]


def frontier(runs: Sequence[Run]) -> list[Run]:
    """Those that no other run beats with as little compute."""
    return [runs[i] for i in envelope([run.flops for run in runs], [run.loss for run in runs])]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def plan_table(runs: Sequence[Run]) -> str:
    """What is known of every run before it is made."""
    total = sum(run.flops for run in runs)
    head = ["method", "size", "share", "tower's blocks", "parameters", "steps", "images seen", "FLOPs", "of all FLOPs"]
    rows = [
        [
            METHODS[run.method],
            run.size,
            f"{run.share:g}",
            f"{run.parameters:,}",
            f"{run.all_parameters:,}",
            f"{run.steps:,}",
            f"{run.images:,}",
            f"{run.flops:.2e}",
            f"{run.flops / total:.1%}",
        ]
        for run in runs
    ]
    return f"{_markdown(head, rows)}\n\n{len(runs)} runs, {total:.2e} FLOPs"


def report(runs: Sequence[Run], curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """Markdown: the losses of every method by size and images, and the curves through them."""
    parts = []
    for method in _methods(runs):
        own = [run for run in runs if run.method == method]
        parts.append(f"**{METHODS[method]}**: loss on held-out images\n\n{_losses(own)}")
    parts.append(f"**Curves**\n\n{_fits(curves)}")
    seconds = sum(run.seconds for run in runs)
    parts.append(f"{len(runs)} runs, {sum(run.flops for run in runs):.1e} FLOPs, {seconds / 60:.0f} minutes of steps.")
    return "\n\n".join(parts)


def _losses(runs: Sequence[Run]) -> str:
    shares = sorted({run.share for run in runs})
    head = ["parameters of the blocks", *(f"{_at(runs, share=share)[0].images:,} images seen" for share in shares)]
    rows = []
    for size in dict.fromkeys(run.size for run in runs):
        own = [_at(runs, share=share, size=size)[0] for share in shares]
        rows.append([f"{own[0].parameters:,}", *(f"{run.loss:.4f}" for run in own)])
    return _markdown(head, rows)


def _at(runs: Sequence[Run], **values: Any) -> list[Run]:
    return [run for run in runs if all(getattr(run, name) == value for name, value in values.items())]


def _fits(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    rows = []
    for method, by_name in curves.items():
        for name, curve in by_name.items():
            if curve.fit is None:
                rows.append([METHODS[method], CURVES[name], curve.refusal, "", "", ""])
                continue
            found = curve.fit
            intervals = "; ".join(
                f"{exponent:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")
                for exponent, (low, high) in zip(found.law.exponents, found.intervals, strict=True)
            )
            optimal = "" if math.isnan(curve.optimal) else f"{curve.optimal:.2f}"
            rows.append([METHODS[method], CURVES[name], formula(curve, name), intervals, f"{found.error:.1%}", optimal])
    return _markdown(["method", "curve", "fit", "exponents (90 %)", "error", "a of N ~ C^a"], rows)


def formula(curve: Curve, name: str) -> str:
    """`0.25 + 1.3 N^-0.21`."""
    assert curve.fit is not None, "only a fit has a formula"
    law = curve.fit.law
    terms = zip(law.scales, LETTERS[name], law.exponents, strict=True)
    return " + ".join([f"{law.floor:.3g}", *(f"{scale:.3g} {x}^-{exponent:.2f}" for scale, x, exponent in terms)])


def draw(runs: Sequence[Run], curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Loss against parameters, images and FLOPs: a colour a method, all runs pale, the fitted ones and curves full."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (name, choose, title) in zip(
        panels,
        (
            ("parameters", whole, "parameters of the tower's blocks (curve: all images)"),
            ("data", best_sizes, "images seen (curve: the best size)"),
            ("compute", frontier, "FLOPs of training (curve: the best runs)"),
        ),
        strict=True,
    ):
        for index, method in enumerate(curves):
            _draw_method([run for run in runs if run.method == method], curves[method][name], name, choose, axes, index)
        axes.set(xscale="log", xlabel=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right")
    panels[0].set_ylabel("loss on held-out images")
    figure.savefig(path, dpi=110)


def _draw_method(runs: Sequence[Run], curve: Curve, name: str, choose: Any, axes: Any, index: int) -> None:
    letter, colour = LETTERS[name][0], f"C{index}"
    points, label = choose(runs), METHODS[runs[0].method]
    axes.scatter([_value(run, letter) for run in runs], [run.loss for run in runs], color=colour, alpha=0.25, s=18)
    x = [_value(run, letter) for run in points]
    if curve.fit is not None:
        label += f": {formula(curve, name)}"
        line = np.geomspace(min(x), max(x), 100)
        axes.plot(line, curve.fit.law(line), color=colour)
    axes.scatter(x, [run.loss for run in points], color=colour, s=26, label=label)


def write_docs(text: str, workdir: Path, docs: Path) -> None:
    """Puts the report between the marks of the page, and the picture beside it."""
    shutil.copyfile(workdir / "scaling.png", docs / "scaling.png")
    picture = "![Loss on held-out images against parameters, images seen and FLOPs](scaling.png)"
    write_between(docs / "scaling.md", BEGIN, END, f"{text}\n\n{picture}")
