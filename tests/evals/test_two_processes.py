"""Every kind of evaluation in two real processes, whose devices hold half of every batch each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import two_process_worker


def test_two_processes_agree_with_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(Path(two_process_worker.__file__)), address]
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=environment) for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    expected = two_process_worker.evaluate(device_count=1)
    assert first["metrics"] == pytest.approx(expected["metrics"])
    assert second["metrics"] == first["metrics"]
    assert first["pictures"] == ["retrieval/toy/best_and_worst"]
    assert second["pictures"] == [], "pictures are drawn once, by the primary process"
