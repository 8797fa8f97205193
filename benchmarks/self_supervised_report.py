"""Tables and pictures of `self_supervised.py`, and their place in its page. Runs nothing."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread
from pages import write_between

METHODS = {"aim": "AIM", "mae": "MAE", "simmim": "SimMIM", "beit": "BEiT"}
NAMES = {"random": "random weights", **METHODS, "supervised": "labels alone"}  # rows of the table
MEASURES = {
    "linear_probe": "linear probe",
    "attentive_probe": "attentive probe",
    "knn": "k-NN",
    "fine_tuned": "fine-tuned",
}
BEGIN, END = "<!-- written by benchmarks/self_supervised.py -->", "<!-- end -->"


def table(name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: top-1 by row and measure, and its mean over the measures; the best of each stands out."""
    rows = {
        method: {**row, "mean": sum(row[measure] for measure in MEASURES) / len(MEASURES)}
        for method, row in rows.items()
    }
    columns = {**MEASURES, "mean": "mean"}
    head = ["tower", *columns.values()]
    best = {measure: max(row[measure] for row in rows.values()) for measure in columns}
    lines = [f"**{name}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method, row in rows.items():
        shown = {measure: f"{row[measure]:.1%}" for measure in columns}
        cells = [f"**{text}**" if row[measure] == best[measure] else text for measure, text in shown.items()]
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Bars of every measure by row, a panel for each kind of images."""
    figure = Figure(figsize=(6 * len(results), 4.2), layout="constrained")
    for index, (name, rows) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), index + 1)
        for place, (method, row) in enumerate(rows.items()):
            left = [group + (place - len(rows) / 2) * 0.8 / len(rows) for group in range(len(MEASURES))]
            heights = [100 * row[measure] for measure in MEASURES]
            axes.bar(left, heights, 0.75 / len(rows), align="edge", label=NAMES[method])
        axes.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
        axes.set(title=name, ylabel="held-out top-1 (%)", ylim=(0, 100))
        axes.grid(axis="y", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)


def join_pictures(folder: Path, methods: Sequence[str], path: Path) -> None:
    """The newest pictures of reconstructions of the methods, side by side under their names."""
    pictures = {method: imread(max((folder / method / "pictures").glob("reconstructions-*.png"))) for method in methods}
    shapes = [picture.shape for picture in pictures.values()]
    widths, height = [shape[1] / 180 for shape in shapes], max(shape[0] for shape in shapes) / 180
    figure = Figure(figsize=(sum(widths), height + 0.3), layout="constrained")
    for axes, (method, picture) in zip(
        figure.subplots(1, len(pictures), squeeze=False, width_ratios=widths)[0], pictures.items(), strict=True
    ):
        axes.imshow(picture)
        axes.set_title(METHODS[method], fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=180)


def write_docs(report: str, workdir: Path, names: Sequence[str], docs: Path) -> None:
    """Puts the report between the marks of the page, and the pictures beside it."""
    pictures = ["self_supervised.png", *(f"self_supervised_{name}.png" for name in names)]
    for picture in pictures:
        shutil.copyfile(workdir / picture, docs / picture)
    titles = ["Held-out top-1", *(f"Reconstructions of {name}" for name in names)]
    shown = [f"![{title}]({picture})" for title, picture in zip(titles, pictures, strict=True)]
    write_between(docs / "self_supervised.md", BEGIN, END, "\n\n".join([report, *shown]))
