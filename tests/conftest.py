"""Every test runs on 8 virtual CPU devices; JAX must hear of it before anything uses a device."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the time of the tests goes into compiling, and each of these makes it half. A version of jaxlib that doesn't
# know a flag aborts.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jaxlib").startswith("0.10."),
)
# Size of XLA's thread pools. A virtual device that waits in a collective holds a thread, and a program has several
# collectives at a time: with as many threads as cores, 8 devices on 2 cores wait for each other for ever.
os.environ.setdefault("NPROC", "64")

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Two programs with collectives in flight on more virtual devices than cores can wait for each other for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# A silent broadcast of [B] against [B, 1] is the classic wrong loss: it is an error in every test.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped() -> Iterator[None]:
    """Those of a file of tests, which no other needs: kept, they grow to 6 GiB a worker."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints 1 and 2, not to be changed."""
    from checkpoint_runs import two_steps_in  # its imports use JAX, which must be configured by then

    return two_steps_in(tmp_path_factory.mktemp("two_steps"))
