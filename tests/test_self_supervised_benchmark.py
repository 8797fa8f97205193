"""The comparison of methods on images alone: equal terms by the configs, its report, and a run that is made once."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import self_supervised as benchmark
import self_supervised_report as report
from PIL import Image

from vlm_jax.data.images import decode
from vlm_jax.data.sources import ClassFoldersConfig
from vlm_jax.schema import ConfigError

SCALE = benchmark.Scale()


def folders(root: Path, images: Mapping[str, int]) -> None:
    """A folder of one-colour images per class."""
    for label, (name, count) in enumerate(images.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((8, 8, 3), (40 * label, index, 0), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_all_methods_have_one_tower_one_view_and_one_length(name: str, tmp_path: Path) -> None:
    data = benchmark.built_in(name)
    rows = ("random", *report.METHODS, "supervised")
    runs = {method: benchmark.run_config(method, data, SCALE, tmp_path, {"seed": "3"}) for method in rows}
    towers = [benchmark.tower_of(config) for config in runs.values()]
    assert len({dataclasses.replace(tower, pool="none", mask_token=False) for tower in towers}) == 1
    assert (towers[0].width, towers[0].depth, towers[0].patches) == (96, 4, 16)
    assert {(c.seed, c.data.batch_size) for c in runs.values()} == {(3, SCALE.batch_size)}
    assert {(c.data.augment, c.data.preprocess) for c in runs.values()} == {(data.augment, benchmark.PREPROCESS)}
    assert {runs[method].train.steps for method in rows[1:]} == {SCALE.steps}
    assert {runs[method].data.source for method in report.METHODS} == {data.unlabelled}
    # nothing that judges is trained on, and every row is judged by the same evaluations
    judges = [
        tuple(e for e in c.evals if e.kind() in ("linear_probe", "attentive_probe", "knn")) for c in runs.values()
    ]
    assert len(set(judges)) == 1 and len(judges[0]) == 3
    assert all(evaluation.source == data.test != evaluation.train_source for evaluation in judges[0])  # pyright: ignore
    for method in rows[:-1]:
        tuned = benchmark.tuning_config(method, runs[method], data, SCALE, tmp_path, {})
        assert benchmark.tower_of(tuned).pool == "mean"
        assert tuned.init_from.path == str(tmp_path / name / method)
        assert (tuned.data.source, tuned.data.preprocess) == (data.labelled, runs[method].data.preprocess)


def test_held_out_images_of_ones_own(tmp_path: Path) -> None:
    folders(tmp_path / "own", {"cat": 11, "dog": 5})
    data = benchmark.own(str(tmp_path / "own"), tmp_path / "runs")
    assert data.name == "own"
    train, test = (source.build("") for source in (data.labelled, data.test))
    assert (len(train), len(test)) == (9 + 4, 2 + 1)
    seen = [[tuple(decode(source[i]["image"])[0, 0]) for i in range(len(source))] for source in (train, test)]
    assert not set(seen[0]) & set(seen[1]) and len(set(seen[0] + seen[1])) == 16
    assert train.class_names == test.class_names == ("cat", "dog")
    again = benchmark.own(str(tmp_path / "own"), tmp_path / "runs")
    assert len(again.test.build("")) == 3
    # folders that are split already stay as they are
    shutil.copytree(tmp_path / "own", tmp_path / "split" / "train")
    shutil.copytree(tmp_path / "own", tmp_path / "split" / "val")
    data = benchmark.own(str(tmp_path / "split"), tmp_path / "runs")
    assert data.test == ClassFoldersConfig(path=str(tmp_path / "split" / "val"))


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path / "few", {"cat": 4})
    for arguments, words in (
        (["--methods=dino"], "--methods has 'dino'; there are aim, mae, simmim, beit"),
        ([f"--images={tmp_path}/none"], "is no folder with a folder of images for each class"),
        ([f"--images={tmp_path}/few"], "holds 4 images; a class needs 5"),
        (["--quick", "--docs"], "--quick has none"),
        (["--budget=0"], "--budget=0.0 must be positive"),
    ):
        assert benchmark.main([*arguments, f"--workdir={tmp_path / 'runs'}"]) == 2
        assert words in capsys.readouterr().err


def test_the_report_stands_between_its_marks(tmp_path: Path) -> None:
    page = shutil.copy(benchmark.ROOT / "docs" / "self_supervised.md", tmp_path)
    before, after = (Path(page).read_text().split(mark)[i] for mark, i in ((report.BEGIN, 0), (report.END, 1)))
    weak = dict.fromkeys(report.MEASURES, 0.5)
    rows = {"random": weak, "mae": weak | {"linear_probe": 0.75}}
    table = report.table("digits", rows)
    assert "| MAE | **75.0%** | **50.0%** | **50.0%** | **50.0%** | **56.2%** |" in table
    assert "| random weights | 50.0% | **50.0%** | **50.0%** | **50.0%** | 50.0% |" in table
    for name in ("self_supervised.png", "self_supervised_digits.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "docs").mkdir()
    shutil.move(page, tmp_path / "docs")
    for text in ("an older table", table):
        report.write_docs(text, tmp_path, ["digits"], tmp_path / "docs")
    written = (tmp_path / "docs" / "self_supervised.md").read_text()
    assert written.startswith(before) and written.endswith(after)
    assert table in written and "an older table" not in written
    assert "![Reconstructions of digits](self_supervised_digits.png)" in written
    (tmp_path / "docs" / "self_supervised.md").write_text("no marks")
    with pytest.raises(ConfigError, match="has lost its marks"):
        report.write_docs(table, tmp_path, ["digits"], tmp_path / "docs")


@pytest.mark.slow
def test_a_quick_run_of_every_method_and_its_continuation(tmp_path: Path) -> None:
    arguments = ("--quick", f"--workdir={tmp_path}")
    made = command.benchmark("self_supervised", *arguments).count("--- ")
    assert made == 1 + 2 * 5 + 1  # tokenizer; five towers and their fine-tuning; labels alone
    results: dict[str, Any] = json.loads((tmp_path / "self_supervised.json").read_text())["results"]
    assert list(results["digits"]) == ["random", *report.METHODS, "supervised"]
    for row in results["digits"].values():
        assert all(0 <= row[measure] <= 1 for measure in report.MEASURES)
    for name in ("self_supervised.png", "self_supervised_digits.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    shutil.rmtree(tmp_path / "digits" / "aim_fine_tuned")
    output = command.benchmark("self_supervised", *arguments)
    assert [line for line in output.splitlines() if line.startswith("--- ")] == [
        f"--- {tmp_path}/digits/aim_fine_tuned"
    ]
    assert list(json.loads((tmp_path / "self_supervised.json").read_text())["results"]["digits"]) == list(
        results["digits"]
    )
