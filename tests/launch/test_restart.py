"""The restart loop, around programs that end as they are told to."""

import signal
import time
from pathlib import Path

import pytest
from launching import LAUNCH, NEXT_CODE, lines, program, run, start

RESTART = LAUNCH / "restart.sh"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """`train`, which ends with the next code, and a `sleep` that only notes how long it should have been."""
    folder = tmp_path / "programs"
    program(folder, "train", f'echo "$@" >>"$RUNS"\n{NEXT_CODE}\nexit "$code"')
    program(folder, "sleep", 'echo "$1" >>"$SLEPT"')
    return folder


def environment(tmp_path: Path, codes: str = "", **more: str) -> dict[str, str]:
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    names = {"CODES": "codes", "RUNS": "runs", "SLEPT": "slept", "WORKDIR": "workdir"}
    return {name: str(tmp_path / file) for name, file in names.items()} | more


@pytest.mark.parametrize(
    ("codes", "limit", "expected", "runs"),
    [
        ("0", "5", 0, 1),
        ("2 0", "5", 2, 1),
        ("75 75 75 0", "0", 0, 4),  # preemptions are no failures
        ("134 1 0", "2", 0, 3),
        ("1 1 137 0", "2", 137, 3),
        ("1 75 1 0", "1", 1, 3),  # a preemption is no progress either
        ("1:10 1:20 1:30 1:40 0", "1", 0, 5),  # each failure after a newer checkpoint
        ("1:10 1:20 1 1 0", "1", 1, 3),
        ("1:100 1:20 0", "1", 1, 2),  # an older one that is still there is no progress
        ("1:7.orbax-checkpoint-tmp 1 0", "1", 1, 2),  # a save that was killed midway is none
        ("134 2", "5", 2, 2),
    ],
)
def test_exit_codes(codes: str, limit: str, expected: int, runs: int, programs: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, codes, RESTART_LIMIT=limit)
    flags = ("--config=c.py", f"--workdir={tmp_path}/workdir", "--config.data.path=a b/{0..9}.tar")
    code, output = run(RESTART, "train", *flags, programs=programs, env=env)
    assert code == expected, output
    assert lines(tmp_path / "runs") == [" ".join(flags)] * runs


def test_pauses_double_and_begin_anew_with_progress(programs: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, "1 1 1 75 1 1:5 1 0", RESTART_MAX_SECONDS="35")
    code, output = run(RESTART, "train", "--workdir", str(tmp_path / "workdir"), programs=programs, env=env)
    assert code == 0, output
    assert lines(tmp_path / "slept") == ["10", "20", "35", "35", "10", "20"]


def test_preempted_elsewhere_leaves_the_restart_to_the_scheduler(programs: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, "1 75 0", RESTART_PREEMPTED="elsewhere")
    assert run(RESTART, "train", programs=programs, env=env)[0] == 75
    assert len(lines(tmp_path / "runs")) == 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("trap 'exit 75' TERM", 75),
        ("trap 'exit 0' TERM", 0),  # the last step was done
        ("trap 'exit 1' TERM", 1),  # the save failed
        ("", 75),  # killed before it listened: nothing is lost
    ],
)
def test_a_signal_reaches_the_command_and_ends_the_loop(answer: str, expected: int, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    program(folder, "train", f"{answer}\necho ready\nwhile true; do sleep 0.05; done")
    process = start(RESTART, "train", programs=folder)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert process.returncode == expected


def test_a_signal_during_a_pause_ends_the_loop(programs: Path, tmp_path: Path) -> None:
    program(programs, "sleep", 'touch "$SLEPT"; exec "$(type -ap sleep | tail -n 1)" "$@"')
    process = start(RESTART, "train", programs=programs, env=environment(tmp_path, "1 0"))
    while not (tmp_path / "slept").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert len(lines(tmp_path / "runs")) == 1


def test_bad_settings_are_a_sentence(programs: Path, tmp_path: Path) -> None:
    code, output = run(RESTART, "train", programs=programs, env=environment(tmp_path, "0", RESTART_LIMIT="many"))
    assert code == 2 and "must be whole numbers, not many" in output
    assert run(RESTART, programs=programs)[0] == 2
