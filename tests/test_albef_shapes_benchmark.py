"""ALBEF on drawn scenes: runs that differ in one thing, the report, and a run that is made once."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import albef_shapes as benchmark
import command
import pytest

from vlm_jax.config import Config
from vlm_jax.data.sources import MismatchedConfig
from vlm_jax.schema import ConfigError


def test_the_runs_differ_in_captions_and_distillation_alone() -> None:
    flags, overrides = benchmark.parse(["--share=0.4", "--budget=0.5", "--seed=3", "--config.data.batch_size=32"])
    runs = {run: benchmark.run_config(run, flags, overrides) for run in benchmark.RUNS}
    true, distilled, plain = runs.values()
    assert distilled.data.source == MismatchedConfig(true.data.source, share=0.4)
    shares: list[Any] = [config.objective.distillation for config in runs.values()]  # pyright: ignore
    assert shares == [0.4, 0.4, 0.0]

    def rest(config: Config) -> Config:
        data = dataclasses.replace(config.data, source=true.data.source)
        objective = dataclasses.replace(config.objective, distillation=0.4)  # pyright: ignore
        return dataclasses.replace(config, name="", data=data, objective=objective)

    assert rest(true) == rest(distilled) == rest(plain)
    assert (true.seed, true.data.batch_size) == (3, 32)
    # what judges is never trained on, and its captions are true
    test: Any = true.evals[0].source
    assert (test.split, test.count) == ("test", 256)


def test_the_report_stands_between_its_marks(tmp_path: Path) -> None:
    page = Path(shutil.copy(benchmark.ROOT / "docs" / "albef.md", tmp_path))
    before, after = (page.read_text().split(mark)[i] for mark, i in ((benchmark.BEGIN, 0), (benchmark.END, 1)))
    found = dict.fromkeys(benchmark.MEASURES.values(), 0.5)
    table = benchmark.table({"true": found, "plain": found | {"retrieval/shapes/matching_accuracy": 0.25}}, 0.3)
    assert "| | true captions | 30% wrong, without distillation |" in table
    assert "| mean of the two | 50.0% | 25.0% |" in table
    for text in ("an older table", table):
        benchmark.write_between(page, benchmark.BEGIN, benchmark.END, text)
    written = page.read_text()
    assert written.startswith(before) and written.endswith(after)
    assert table in written and "an older table" not in written
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="has lost its marks"):
        benchmark.write_between(page, benchmark.BEGIN, benchmark.END, table)


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--runs=clean"], "--runs has 'clean'; there are true, distilled, plain"),
        (["--quick", "--docs"], "--quick has none"),
        (["--budget=0"], "--budget=0.0 must be positive"),
        (["--share=2"], "share = 2.0 must lie in"),
    ):
        assert benchmark.main([*arguments, f"--workdir={tmp_path / 'runs'}"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_of_all_and_its_continuation(tmp_path: Path) -> None:
    arguments = ("--quick", f"--workdir={tmp_path}")
    assert command.benchmark("albef_shapes", *arguments).count("--- ") == 4
    results = json.loads((tmp_path / "albef_shapes.json").read_text())["results"]
    assert list(results) == list(benchmark.RUNS)
    assert all(0 <= value <= 1 for found in results.values() for value in found.values())
    shutil.rmtree(tmp_path / "plain")
    output = command.benchmark("albef_shapes", *arguments)
    assert [line for line in output.splitlines() if line.startswith("--- ")] == [f"--- {tmp_path}/plain"]
    assert json.loads((tmp_path / "albef_shapes.json").read_text())["results"] == results
