"""Memory that is freed stays with a process that computes on the CPU."""

import subprocess
import sys

import pytest

from vlm_jax import platforms

_ROUNDS = """
import resource
import numpy as np
from vlm_jax import platforms
if {kept}:
    platforms.keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(20_000_000, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it speaks to glibc")
def test_freed_memory_is_not_fetched_page_by_page_again() -> None:
    """80 MB, freed and taken again: 19,532 pages of 4 KiB, or a few."""

    def faults(kept: bool) -> int:
        done = subprocess.run([sys.executable, "-c", _ROUNDS.format(kept=kept)], check=True, capture_output=True)
        return int(done.stdout)

    assert faults(kept=True) < 100 < faults(kept=False)


@pytest.mark.parametrize(
    ("asked", "chips", "packages", "cpu"),
    [
        ("cpu", ["/dev/accel0"], {"libtpu"}, True),
        ("", ["/dev/accel0"], {"libtpu"}, False),
        ("", [], {"libtpu"}, True),
        ("", [], {"jax_cuda12_plugin"}, False),
        ("", [], set(), True),
    ],
)
def test_where_it_computes(
    monkeypatch: pytest.MonkeyPatch, asked: str, chips: list[str], packages: set[str], cpu: bool
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: chips)
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: object() if name in packages else None)
    assert platforms.computes_on_cpu() is cpu
