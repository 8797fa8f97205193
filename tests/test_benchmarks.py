"""The benchmarks run and report what they say; no figure is held to a limit here."""

import json
from pathlib import Path

import command
import pytest


def test_the_step_alone(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    output = command.benchmark(
        "step", "--config=configs/clip_digits.py", "--config.data.batch_size=8", "--peer=none", "--rounds=1",
        "--steps=1", f"--json={path}",
    )  # fmt: skip
    figures = json.loads(path.read_text())["vlm_jax"]
    assert figures["examples_per_second"] == pytest.approx(8 / figures["seconds_per_step"][0])
    assert "peak memory" in output


def test_the_input_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    output = command.benchmark("input", "--images=12", "--size=32", "--seconds=0.05", f"--json={path}")
    figures = json.loads(path.read_text())
    for kind in ("tar", "jsonl", "csv", "class_folders", "digits", "shapes"):
        assert figures[f"read {kind}"] > 0
    assert "one core" in output
