"""Runs the launchers beside programs that stand in for what they call. It knows no launcher."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"


def program(folder: Path, name: str, body: str) -> Path:
    """An executable bash script `name` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def start(
    *command: str | Path, programs: Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> "subprocess.Popen[str]":
    """A command that finds `programs` before all others; standard error in its output."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(
    *command: str | Path, programs: Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> tuple[int, str]:
    """(exit code, output)."""
    process = start(*command, programs=programs, env=env, cwd=cwd)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


# Ends with the next code of the file $CODES, one a line; `1:20` also saves a checkpoint of step 20 in $WORKDIR.
NEXT_CODE = """
mapfile -t codes <"$CODES"
printf '%s\\n' "${codes[@]:1}" >"$CODES"
IFS=: read -r code step <<<"${codes[0]}"
if [[ -n $step ]]; then mkdir -p "$WORKDIR/checkpoints/$step"; fi
"""


def lines(path: Path) -> list[str]:
    """The lines of a file; none if there is no such file."""
    return path.read_text().splitlines() if path.exists() else []
