"""Which accelerators this machine has, before JAX is imported. Joining processes to a job is `vlm_jax.distributed`."""

import glob
import importlib.util
import os

# How the chips appear on a TPU VM.
_TPU_DEVICE_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def has_tpu() -> bool:
    """Whether this host has TPU chips and the library to use them, and is not told to leave them alone."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return _chips() and _installed("libtpu") and (not platforms or "tpu" in platforms)


def pass_over_missing_tpu() -> None:
    """Keeps JAX from asking libtpu for chips on a machine that has none; call it before JAX is imported.

    libtpu is installed there to plan for TPUs (`vlm_jax.plan`). Asked for chips, it prints errors into every program.
    """
    if _installed("libtpu") and not _chips():
        gpu = any(_installed(f"jax_cuda{version}_plugin") for version in (12, 13))
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if gpu else "cpu")


def _chips() -> bool:
    return any(glob.glob(pattern) for pattern in _TPU_DEVICE_FILES)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
