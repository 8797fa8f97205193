"""The chain from words and sight to answers: what begins from what, the best guess, the report, and a quick run."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import command
import pytest
import vlm_shapes as benchmark

from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.sources.shapes_chat import QUESTIONS

ALONE = "--without_transformers"
RESULTS: dict[str, Any] = {
    "runs": {run: {"steps": 10, "seconds": 90.0} for run in benchmark.RUNS},
    "asked": {"exact_match": 0.95, "exact_match/color": 0.9, "exact_match_blank": 0.2},
    "guess": {"": 0.25, "color": 0.125},
    "chat": {"question": "What?", "answer": "red", "known": "red"},
    "exported": (15, 16),
}


def test_each_run_begins_from_those_before_it() -> None:
    flags, overrides = benchmark.parse(
        ["--workdir=there", "--budget=0.5", "--seed=3", "--config.optimizer.learning_rate=7e-4", ALONE]
    )
    words, sight, stage1, stage2 = (benchmark.run_config(run, flags, overrides) for run in benchmark.RUNS)
    assert stage1.init_from.path == "there/words"
    assert [(part.name, part.path) for part in stage1.init_from.parts] == [("tower", "there/sight")]
    assert stage2.init_from.path == "there/stage1" and stage2.init_from.tokenizer
    assert (stage2.seed, stage2.optimizer.learning_rate) == (3, 7e-4)  # pyright: ignore[reportAttributeAccessIssue]
    assert stage1.optimizer.learning_rate != 7e-4  # pyright: ignore[reportAttributeAccessIssue]
    frozen = [{part.name for part in config.parts if part.frozen} for config in (words, sight, stage1, stage2)]
    assert frozen == [set(), set(), {"above", "image", "decoder"}, {"above", "image"}]
    # what is asked was never trained on
    train: Any = stage2.data.source
    test: Any = stage2.evals[0].source  # pyright: ignore[reportAttributeAccessIssue]
    assert (train.split, test.split, test.conversations, test.max_rounds) == ("train", "test", QUESTIONS, 1)


def test_the_best_guess_without_an_image_is_chance() -> None:
    source = ShapesConfig(split="test", count=2000, seed=2, image_size=48, conversations=QUESTIONS)
    found = benchmark.best_guess(source, 1500)
    for kind, chance in {"color": 1 / 8, "shape": 1 / 6, "count": 1 / 3, "more": 1 / 3, "position": 1 / 9}.items():
        assert abs(found[kind] - chance) < 0.1
    assert 0.12 < found[""] < 0.28


def test_the_report(tmp_path: Path) -> None:
    text = benchmark.report(RESULTS)
    assert "| stage 2, everything | 10 | 1.5 |" in text
    assert "| all | 95.0% | 20.0% | 25.0% |" in text
    assert "| color | 90.0% |  | 12.5% |" in text
    assert "15 of 16 questions" in text
    assert "questions as" not in benchmark.report(RESULTS | {"exported": None})
    page = Path(shutil.copy(benchmark.ROOT / "docs" / "tutorial_vlm.md", tmp_path))
    benchmark.write_between(page, benchmark.BEGIN, benchmark.END, text)
    assert text in page.read_text()


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--quick", "--docs"], "--quick has none"),
        (["--budget=0"], "--budget=0.0 must be positive"),
        (["--config.data.batch_siz=2"], "batch_siz"),
    ):
        assert benchmark.main([*arguments, ALONE, f"--workdir={tmp_path / 'runs'}"]) == 2
        assert words in capsys.readouterr().err


def test_answers_of_the_exported_model(tmp_path: Path) -> None:
    """The tokens that transformers writes from the exported files are those that are written here."""
    pytest.importorskip("transformers")
    flags, _ = benchmark.parse(["--quick", f"--workdir={tmp_path}"])
    config = benchmark.run_config("stage2", flags, {})
    config = dataclasses.replace(
        config, init_from=type(config.init_from)(), evals=(), train=dataclasses.replace(config.train, steps=2)
    )
    benchmark.finished(config, tmp_path / "stage2")
    source: Any = config.data.source
    asked = dataclasses.replace(source, split="test", max_rounds=1, conversations=("color", "compare", "text"))
    assert benchmark.same_answers(tmp_path / "stage2", asked, tmp_path / "exported", 4) == (16, 16)


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ("--quick", f"--workdir={tmp_path}")
    assert command.benchmark("vlm_shapes", *arguments).count("--- ") == 4
    results = json.loads((tmp_path / "vlm_shapes.json").read_text())
    assert results["exported"] == [16, 16]
    assert results["chat"]["question"].startswith("What colour")
    assert "--- " not in command.benchmark("vlm_shapes", *arguments)
