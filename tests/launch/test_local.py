"""launch/local.sh around a Python that only ends; `tests/test_several_processes.py` runs the real one."""

import signal
from pathlib import Path

import pytest
from launching import LAUNCH, lines, program, run, start


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A `python` that knows its index from --distributed=HOST:PORT,COUNT,INDEX and ends as $MAIN says."""
    body = 'if [[ $1 == -c ]]; then echo 1234; exit; fi\necho "$@" >>"$CALLS"\nindex=${*: -1}\nindex=${index##*,}'
    program(tmp_path / "programs", "python", f'{body}\neval "$MAIN"')
    return tmp_path / "programs"


@pytest.mark.parametrize(
    ("main", "expected"), [("exit 0", 0), ('exit "$((index == 2 ? 134 : 0))"', 134), ('exit "$((75 + index))"', 75)]
)
def test_the_first_code_that_is_not_0(programs: Path, tmp_path: Path, main: str, expected: int) -> None:
    env = {"CALLS": str(tmp_path / "calls"), "MAIN": main}
    code, output = run(LAUNCH / "local.sh", "3", "--config=c", programs=programs, env=env)
    assert code == expected, output
    asked = [f"-m vlm_jax.main --config=c --distributed=127.0.0.1:1234,3,{index}" for index in range(3)]
    assert sorted(lines(tmp_path / "calls")) == asked


def test_a_signal_reaches_all_and_no_code_is_lost_to_it(programs: Path, tmp_path: Path) -> None:
    main = "trap 'sleep 0.$index; exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    process = start(LAUNCH / "local.sh", "2", programs=programs, env={"CALLS": str(tmp_path / "calls"), "MAIN": main})
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_a_bad_count_is_the_usage(programs: Path) -> None:
    code, output = run(LAUNCH / "local.sh", "--config=c", programs=programs)
    assert code == 2 and "usage" in output
