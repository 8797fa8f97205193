"""The efficiency benchmark: its arithmetic, and a run of seconds that is not made twice."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "clip_efficiency.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clip_efficiency", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_how_many_times_fewer_images(benchmark: Any) -> None:
    """A method that learns four times as fast, whatever the accuracy, and one that starts above it."""
    slow = {"images": [100, 200, 400, 800], "top1": [0.1, 0.2, 0.3, 0.4], "learning_rate": 0.001}
    fast = {"images": [100, 200, 400, 800], "top1": [0.3, 0.4, 0.5, 0.6], "learning_rate": 0.003}
    assert benchmark.images_to_reach(slow, 0.2) == 200
    assert benchmark.images_to_reach(slow, 0.25) == pytest.approx(200 * 2**0.5)
    assert benchmark.images_to_reach(slow, 0.5) is None
    assert benchmark.images_to_reach(fast, 0.2) == 100
    assert benchmark.targets({"caption": slow, "contrastive": fast}) == pytest.approx([0.1, 0.2, 0.3, 0.36])
    table = benchmark.table("digits", {"caption": slow, "contrastive": fast})
    assert "| contrastive, transformer | 0.003 | 60.0% | 100 (1x) | 100 (2x) | 100 (4x) | 152 (4x) |" in table
    assert benchmark.points(64) == [16, 23, 32, 45, 64]


def test_a_quick_run_and_its_continuation(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["caption", "bag_of_words"]
    arguments = ["--quick", f"--workdir={tmp_path}", f"--methods={','.join(methods)}"]
    assert benchmark.main(arguments) == 0
    results = json.loads((tmp_path / "efficiency.json").read_text())["digits"]
    assert list(results) == methods
    for curve in results.values():
        assert curve["images"] == [32]
        assert 0 <= curve["top1"][0] <= 1
    assert (tmp_path / "efficiency.png").stat().st_size > 10_000
    configs = [json.loads(path.read_text())["config"] for path in tmp_path.glob("digits-*.json")]
    assert len({json.dumps(config["data"]) + json.dumps(config["optimizer"]) for config in configs}) == 1
    assert len({json.dumps(config["objective"]["model"]["image"]) for config in configs}) == 1

    (tmp_path / "digits-bag_of_words-0.0003-0.json").unlink()
    made = []
    train = benchmark.run
    monkeypatch.setattr(benchmark, "run", lambda config, cache: made.append(config.name) or train(config, cache))
    assert benchmark.main(arguments) == 0
    assert made == ["efficiency_digits_bag_of_words"]


def test_an_unknown_method_is_a_sentence(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--methods=captions"]) == 2
    assert "there are caption, bag_of_words" in capsys.readouterr().err
