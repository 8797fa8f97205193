"""The benchmarks run and report what they say; no figure is held to a limit here."""

import json
import time
from pathlib import Path

import command
import pytest
import step

from vlm_jax.schema import ConfigError


def test_the_step_alone(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    output = command.benchmark(
        "step", "--config=configs/clip_digits.py", "--config.data.batch_size=8", "--peer=none", "--rounds=1",
        "--steps=1", f"--json={path}",
    )  # fmt: skip
    figures = json.loads(path.read_text())["vlm_jax"]
    assert figures["examples_per_second"] == pytest.approx(8 / figures["seconds_per_step"][0])
    assert figures["cpu_seconds_per_step"][0] > 0
    assert "peak memory" in output


def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="--device=gpu, but JAX runs on cpu; install the cuda12 extra"):
        step.check_device("gpu")


def test_sleep_is_wall_time_and_work_is_cpu_time() -> None:
    """The fastest of several turns: other programs may take the processor in any one of them."""

    def work(count: int) -> None:
        end = time.process_time() + 0.02 * count
        while time.process_time() < end:
            pass

    turns = step.measure({"sleep": lambda count: time.sleep(0.02 * count), "work": work}, rounds=3, steps=2)
    assert all(len(own) == 3 and turn.wall >= 0.019 for own in turns.values() for turn in own)
    assert min(turn.cpu for turn in turns["sleep"]) < 0.01
    assert min(turn.cpu for turn in turns["work"]) == pytest.approx(0.02, rel=0.2)


def test_a_ratio_is_the_median_over_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.compare("us / them", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == 1.0
    assert capsys.readouterr().out == "  us / them: 1.000 (rounds 0.500 to 2.000)\n"


def test_the_input_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    output = command.benchmark("input", "--images=12", "--size=32", "--seconds=0.05", f"--json={path}")
    figures = json.loads(path.read_text())
    for kind in ("tar", "jsonl", "csv", "class_folders", "digits", "shapes"):
        assert figures[f"read {kind}"] > 0
    assert "one core" in output


def test_the_profile_knows_the_parts_of_the_step(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    output = command.benchmark(
        "step_profile", "--config=configs/clip_digits.py", "--config.data.batch_size=8", "--steps=1", "--top=3",
        f"--json={path}",
    )  # fmt: skip
    found = json.loads(path.read_text())
    assert sum(found["parts"].values()) == pytest.approx(found["total"])
    assert {"MLP, maps", "attention, projections", "norms", "loss, clipping, optimiser"} <= set(found["parts"])
    assert max(found["parts"].values()) < 0.8 * found["total"]  # else the names were not understood
    assert "MLP, maps" in output
