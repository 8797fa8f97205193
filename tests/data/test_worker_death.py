"""A data worker that the system kills ends the run with a sentence, not with a hang or a stop without reason."""

import itertools
import os
import signal
from pathlib import Path

import pytest
import tiny

from vlm_jax.data.captions import captions
from vlm_jax.data.pipeline import DataWorkerError, TrainLoader
from vlm_jax.data.text import build_tokenizer


def worker_processes() -> list[int]:
    """Children of this process that grain spawned."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and "spawn_main" in command:
            found.append(int(entry.name))
    return found


def test_a_killed_worker_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    config = tiny.config(data__workers=2)
    source = config.data.build_source(str(tmp_path))
    tokenizer = build_tokenizer(config.data.tokenizer, captions(source))
    make_example = config.objective.make_example(tokenizer, config.data)
    loader = TrainLoader(source, make_example, 16, config.seed, tiny.mesh(), 0, config.data)
    next(loader)
    os.kill(worker_processes()[-1], signal.SIGKILL)
    with pytest.raises(DataWorkerError, match=r"exit code -9.*config\.data\.workers"):
        list(itertools.islice(loader, 500))
    loader.close()
