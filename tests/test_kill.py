"""Real signals to a real process: what is saved, which code it exits with, and that the restart loses nothing."""

import json
import random
import signal
import time
from pathlib import Path

import command
import pytest
import tiny

import vlm_jax
from vlm_jax.preemption import EXIT_PREEMPTED


def losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    code, output = command.run(*command.DIGITS, f"--workdir={workdir}")
    assert code == 0, output
    assert "first step after" in output
    return workdir


def assert_same_end(workdir: Path, unbroken: Path) -> None:
    assert losses(workdir) == losses(unbroken)
    tiny.assert_trees_equal(vlm_jax.load(workdir).params, vlm_jax.load(unbroken).params)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(number: signal.Signals, unbroken: Path, tmp_path: Path) -> None:
    arguments = (*command.DIGITS, f"--workdir={tmp_path}", "--config.data.workers=1")
    process = command.start(*arguments)
    code, output = command.signal_at_step(process, 25, number)
    assert code == EXIT_PREEMPTED, output
    assert command.wait_for_no_children(process.pid, 10) == []
    stopped = max(int(step.name) for step in (tmp_path / "checkpoints").iterdir() if step.name.isdecimal())
    assert 25 <= stopped < 60
    assert max(losses(tmp_path)) == stopped
    code, output = command.run(*arguments)
    assert code == 0, output
    assert f"continued at step {stopped}" in output
    assert_same_end(tmp_path, unbroken)


def test_sigkill_loses_only_the_steps_since_the_last_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    arguments = (*command.DIGITS, f"--workdir={tmp_path}", "--config.data.workers=1")
    started = time.time()
    process = command.start(*arguments)
    code, _ = command.signal_at_step(process, 27, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert command.wait_for_no_children(process.pid, 10) == [], "data workers outlive their trainer"
    code, output = command.run(*arguments)
    assert code == 0, output
    wall = time.time() - started
    assert "continued at step" in output
    assert_same_end(tmp_path, unbroken)
    ledger = json.loads((tmp_path / "goodput.json").read_text())
    assert ledger["starts"] == 2 and ledger["lost_steps"] >= 7
    assert ledger["seconds"]["lost"] > 0 < ledger["seconds"]["down"]
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_seconds"])
    # less what no process can measure of itself: the start of Python and what comes after the last line
    assert 0.8 * wall < ledger["wall_seconds"] <= wall


def test_a_second_signal_does_no_harm(tmp_path: Path) -> None:
    process = command.start(*command.DIGITS, f"--workdir={tmp_path}")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 12/"):
            break
    for _ in range(20):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, output
    assert vlm_jax.load(tmp_path).step >= 12


def test_a_signal_before_the_first_step(tmp_path: Path) -> None:
    process = command.start(*command.DIGITS, f"--workdir={tmp_path}")
    assert process.stdout is not None
    for line in process.stdout:
        if "records, batch" in line:
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_sigkill_at_any_moment(seed: int, unbroken: Path, tmp_path: Path) -> None:
    generator, arguments = (
        random.Random(seed),
        (*command.DIGITS, f"--workdir={tmp_path}", "--config.checkpoint.every=2"),
    )
    for _ in range(3):
        process = command.start(*arguments)
        time.sleep(generator.uniform(4, 16))
        process.kill()
        process.communicate()
    code, output = command.run(*arguments)
    assert code == 0, output
    assert_same_end(tmp_path, unbroken)
