"""Runs `python -m vlm_jax.main` as a user does: a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Many short steps, so that a signal finds the run in their middle.
DIGITS = (
    "--config=configs/clip_digits.py:smoke",
    "--config.train.steps=60",
    "--config.train.log_every=1",
    "--config.checkpoint.every=10",
    "--config.evals=()",
)


def start(*arguments: str, devices: int = 1, optimize: bool = False) -> "subprocess.Popen[str]":
    """The process, with standard error in its output; optimised code costs time to compile."""
    return _start([sys.executable, "-m", "vlm_jax.main", *arguments], devices, optimize)


def launch_local(processes: int, *arguments: str, devices: int) -> tuple[int, str]:
    """(exit code, joint output) of `launch/local.sh`."""
    process = _start(["launch/local.sh", str(processes), *arguments], devices)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def _start(arguments: list[str], devices: int, optimize: bool = False) -> "subprocess.Popen[str]":
    level = "" if optimize else "--xla_backend_optimization_level=0"
    flags = f"--xla_force_host_platform_device_count={devices} {level}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", "PATH": path}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(*arguments: str, devices: int = 1, optimize: bool = False, timeout: float = 300) -> tuple[int, str]:
    """(exit code, output)."""
    process = start(*arguments, devices=devices, optimize=optimize)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def signal_at_step(process: "subprocess.Popen[str]", step: int, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal once the process reports `step`, and waits for its end; (exit code, output)."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        match = re.match(r"step (\d+)/", line)
        if match and int(match[1]) >= step:
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=120)
    return process.returncode, "".join(seen) + rest


def children(session: int) -> list[int]:
    """Processes that are alive in a session."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                alive.append(int(entry.name))
    return alive


def wait_for_no_children(session: int, seconds: float) -> list[int]:
    """What is still alive in a session after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (alive := children(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def benchmark(script: str, *arguments: str) -> str:
    """What a script of benchmarks/ prints."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
