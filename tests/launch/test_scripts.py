"""Every script of launch/: shellcheck finds nothing, and it can be started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, ROOT

SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 8
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside_python)
    assert shellcheck, "shellcheck is missing; pip install -e '.[test]' brings it"
    done = subprocess.run(
        [shellcheck, "--external-sources", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_bash(script: Path) -> None:
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")  # sbatch reads its script; nobody starts it
