"""What the README says of the digits recipes, at their full length: minutes each on a CPU."""

from pathlib import Path

import command
import pytest

from vlm_jax.metrics import read_json


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_digits", "siglip_digits"])
def test_zero_shot_accuracy_on_held_out_scans(name: str, tmp_path: Path) -> None:
    # Its own optimisation level: the tests' saves compile time, which is little here.
    code, output = command.run(f"--config=configs/{name}.py", f"--workdir={tmp_path}", optimize=True, timeout=1800)
    assert code == 0, output
    assert read_json(tmp_path / "eval.json")["zero_shot/digits/top1"] >= 0.96
