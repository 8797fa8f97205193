"""The Slurm batch script, between an sbatch that is not there and programs that stand for srun and scontrol."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from launching import LAUNCH, NEXT_CODE, ROOT, lines, program, run, start


@pytest.fixture
def cluster(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """(the script where Slurm keeps it, the programs, the environment)."""
    spool, programs = tmp_path / "spool", tmp_path / "programs"
    spool.mkdir()
    script = shutil.copy(LAUNCH / "slurm.sbatch", spool / "slurm_script")
    program(programs, "srun", f'echo "$SRUN_CPUS_PER_TASK $*" >>"$RUNS"\n{NEXT_CODE}\nexit "$code"')
    program(programs, "scontrol", 'if [[ $1 == show ]]; then echo "JobState=$STATE"; else echo "$@" >>"$REQUEUED"; fi')
    program(programs, "scancel", 'echo "$@" >>"$CANCELLED"')
    env = {name: str(tmp_path / name.lower()) for name in ("CODES", "RUNS", "REQUEUED", "CANCELLED", "WORKDIR")}
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "12", "RESTART_SECONDS": "0"}
    return Path(script), programs, env


@pytest.mark.parametrize(
    ("codes", "state", "expected", "runs", "requeued"),
    [
        ("0", "RUNNING", 0, 1, []),
        ("75 0", "RUNNING", 75, 1, ["requeue 42"]),
        ("75 0", "COMPLETING", 75, 1, []),  # scancel, or a preempted job that Slurm requeues by itself
        ("1 0", "RUNNING", 0, 2, []),
        ("2 0", "RUNNING", 2, 1, []),
    ],
)
def test_exit_codes(cluster, codes: str, state: str, expected: int, runs: int, requeued: list[str], tmp_path: Path):
    script, programs, env = cluster
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    code, output = run("bash", script, "--workdir=/w", programs=programs, env=env | {"STATE": state})
    assert code == expected, output
    assert lines(tmp_path / "requeued") == requeued
    started = lines(tmp_path / "runs")
    assert len(started) == runs
    assert started[0].startswith("12 ") and started[0].endswith("python -m vlm_jax.main --workdir=/w")


def test_the_time_limit_stops_the_processes_and_not_srun(cluster, tmp_path: Path) -> None:
    script, programs, env = cluster
    # the processes end when Slurm passes the signal on to them; a SIGTERM to srun itself is the wrong way
    program(programs, "srun", "trap 'exit 9' TERM\necho ready\nuntil [[ -e $CANCELLED ]]; do sleep 0.05; done\nexit 75")
    process = start("bash", script, programs=programs, env=env | {"STATE": "RUNNING"})
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert lines(tmp_path / "cancelled") == ["--signal=TERM 42"]
    assert lines(tmp_path / "requeued") == ["requeue 42"]


def test_options() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives a process one GPU
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options and options["open-mode"] == "append"
