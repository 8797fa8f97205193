"""When a process joins a job. What JAX does then is replaced: there is no cluster here."""

from typing import Any

import jax
import pytest

from vlm_jax import distributed, platforms
from vlm_jax.schema import ConfigError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: made.append(args))
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.mark.parametrize(
    ("name", "value", "joins"),
    [
        ("TPU_WORKER_HOSTNAMES", "a,b", True),
        ("TPU_WORKER_HOSTNAMES", "localhost", False),
        ("SLURM_NTASKS", "8", True),
        ("SLURM_NTASKS", "1", False),
        ("MEGASCALE_COORDINATOR_ADDRESS", "a:80", True),
    ],
)
def test_auto_follows_the_environment(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str, joins: bool
) -> None:
    monkeypatch.setenv(name, value)
    distributed.start("auto")
    assert bool(calls) == joins
    distributed.start("off")
    assert len(calls) == joins


@pytest.mark.parametrize("library", [True, False])
def test_auto_joins_on_a_tpu_vm_whose_environment_says_nothing(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, library: bool
) -> None:
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: object() if library else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    distributed.start("auto")
    assert bool(calls) == library
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    distributed.start("auto")
    assert bool(calls) == library  # told to leave the chips alone


def test_a_tpu_host_without_a_job_is_one_process_and_an_explicit_wish_is_an_error(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    def none_found(**options: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", none_found)
    monkeypatch.setattr(platforms, "has_tpu", lambda: True)
    distributed.start("auto")
    with pytest.raises(ValueError, match="coordinator_address"):
        distributed.start("on")


def test_coordinator_count_and_index(calls: list[Any]) -> None:
    distributed.start("10.0.0.1:8476,4,3")
    assert calls == [("10.0.0.1:8476", 4, 3)]
    for flag in ("10.0.0.1,4,3", "10.0.0.1:8476,4", "10.0.0.1:8476,4,4", "maybe"):
        with pytest.raises(ConfigError, match="--distributed="):
            distributed.start(flag)


@pytest.mark.parametrize(
    ("packages", "chips", "expected"),
    [
        ({"libtpu"}, [], "cpu"),
        ({"libtpu", "jax_cuda12_plugin"}, [], "cuda,cpu"),
        ({"libtpu"}, ["/dev/accel0"], None),
        (set(), [], None),
    ],
)
def test_libtpu_without_chips_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, packages: set[str], chips: list[str], expected: str | None
) -> None:
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: chips)
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setenv("JAX_PLATFORMS", "")  # restored afterwards
    monkeypatch.delenv("JAX_PLATFORMS")
    platforms.pass_over_missing_tpu()
    assert platforms.os.environ.get("JAX_PLATFORMS") == expected
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    platforms.pass_over_missing_tpu()
    assert platforms.os.environ["JAX_PLATFORMS"] == "tpu"
