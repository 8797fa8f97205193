"""Two real processes of four devices on loopback: one run, stopped and resumed together, equal to one process's."""

import json
import signal
import socket
from pathlib import Path

import command
import pytest
import tiny

import vlm_jax
from vlm_jax.main import EXIT_CONFIG
from vlm_jax.preemption import EXIT_PREEMPTED

RUN = (
    "--config=configs/clip_digits.py:smoke",
    "--config.train.steps=16",
    "--config.train.log_every=1",
    "--config.checkpoint.every=8",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=4",
)


def pair(workdir: Path, *second: str) -> list:
    """Two processes; the second one is given further flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        command.start(*RUN, f"--workdir={workdir}", f"--distributed=127.0.0.1:{port},2,{index}", *flags, devices=4)
        for index, flags in enumerate(((), second))
    ]


def losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def finish(processes: list) -> tuple[tuple[int, ...], list[str]]:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return tuple(process.returncode for process in processes), outputs


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("two")
    code, output = command.launch_local(2, *RUN, f"--workdir={workdir}", devices=4)
    assert code == 0, output
    assert output.count("step 16/16") == 1  # only the first process reports
    return workdir


def test_two_processes_are_one_run(unbroken: Path, tmp_path: Path) -> None:
    """The same examples in the same rows; collectives between processes add in another order, hence the rounding."""
    code, output = command.run(*RUN, f"--workdir={tmp_path}", devices=8)
    assert code == 0, output
    one, two = losses(tmp_path), losses(unbroken)
    assert two == pytest.approx(one, rel=1e-5)
    assert two[1] == one[1]
    evaluated, trained = (json.loads((w / "eval.json").read_text()) for w in (unbroken, tmp_path))
    assert evaluated.keys() == trained.keys()


def test_sigterm_to_one_stops_both_at_one_step_and_both_go_on_bit_for_bit(unbroken: Path, tmp_path: Path) -> None:
    processes = pair(tmp_path)
    for line in processes[0].stdout:
        if line.startswith("step 5/"):
            processes[1].send_signal(signal.SIGTERM)  # the one that writes nothing
            break
    codes, outputs = finish(processes)
    assert codes == (EXIT_PREEMPTED, EXIT_PREEMPTED), outputs
    stopped = vlm_jax.load(tmp_path).step
    assert 5 <= stopped < 16
    codes, outputs = finish(pair(tmp_path))
    assert codes == (0, 0), outputs
    assert f"continued at step {stopped}" in outputs[0]
    assert losses(tmp_path) == losses(unbroken)
    tiny.assert_trees_equal(vlm_jax.load(tmp_path).params, vlm_jax.load(unbroken).params)


def test_processes_of_different_commands_are_told_apart_before_the_first_step(tmp_path: Path) -> None:
    codes, outputs = finish(pair(tmp_path, "--config.optimizer.learning_rate=0.5"))
    assert codes == (EXIT_CONFIG, EXIT_CONFIG), outputs
    for output in outputs:
        assert "the processes of this job don't run the same program" in output
        assert "process 1: config.optimizer.learning_rate: " in output and "-> 0.5" in output
    assert not (tmp_path / "metrics.jsonl").exists()
