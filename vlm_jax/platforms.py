"""Which accelerators this machine has, before JAX is imported. Joining processes to a job is `vlm_jax.distributed`."""

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# How the chips appear on a TPU VM.
_TPU_DEVICE_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def has_tpu() -> bool:
    """Whether this host has TPU chips and the library to use them, and is not told to leave them alone."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return _chips() and _installed("libtpu") and (not platforms or "tpu" in platforms)


def computes_on_cpu() -> bool:
    """Whether JAX will find no accelerator here, or is told to leave it alone."""
    return os.environ.get("JAX_PLATFORMS", "") == "cpu" or not (has_tpu() or _has_gpu_plugin())


def pass_over_missing_tpu() -> None:
    """Keeps JAX from asking libtpu for chips on a machine that has none; call it before JAX is imported.

    libtpu is installed there to plan for TPUs (`vlm_jax.plan`). Asked for chips, it prints errors into every program.
    """
    if _installed("libtpu") and not _chips():
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if _has_gpu_plugin() else "cpu")


def keep_freed_memory() -> None:
    """Lets the allocator keep what a program frees; for a process that computes on the CPU, before it starts threads.

    XLA frees all temporaries of a step at its end. glibc maps blocks of that size and gives them back to the system,
    which hands them out again page by page, zeroed: a third of the time of small steps (docs/performance.md). The price
    is that a process stays as large as it once was. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _chips() -> bool:
    return any(glob.glob(pattern) for pattern in _TPU_DEVICE_FILES)


def _has_gpu_plugin() -> bool:
    return any(_installed(f"jax_cuda{version}_plugin") for version in (12, 13))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def libtpu_version() -> str:
    """The version of the compiler, or "none"."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "none"
