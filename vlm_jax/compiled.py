"""The step compiled before it runs, by the loop itself or ahead of time into a file, and what tells two programs apart.

A file of compiled steps is loaded only for the very program, devices and JAX that it was made for.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils, serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from vlm_jax.assemble import Program
from vlm_jax.metrics import writing
from vlm_jax.platforms import libtpu_version
from vlm_jax.schema import ConfigError, differences

_FACTS = "facts.json"


def program_hash(lowered: Any) -> str:
    """SHA-256 of a lowered step (`jax.stages.Lowered`) as StableHLO, without source locations."""
    return hashlib.sha256(lowered.as_text(debug_info=False).encode()).hexdigest()


def _facts(lowered: Any, program: Program) -> dict[str, Any]:
    """What must agree between the making and the use of a compiled step."""
    devices = list(program.mesh.devices.flat)
    return {
        "program": program_hash(lowered),
        "jax": jax.__version__,
        "platform": _compiler(devices[0]),
        "devices": f"{len(devices)} x {devices[0].device_kind}, {[device.id for device in devices]}",
        # of the devices and not of this job: one process compiles for a slice of many hosts
        "processes": len({device.process_index for device in devices}),
    }


def _compiler(device: Any) -> str:
    """Platform and compiler of a device, which for a TPU need not be there."""
    if device.platform == "tpu":
        return f"tpu libtpu {libtpu_version()}"
    return f"{device.client.platform} {device.client.platform_version}"


def lower(program: Program, phase: int) -> Any:
    """A phase's step, lowered from shapes alone."""
    with jax.set_mesh(program.mesh):
        return program.trace(phase).lower()


def save(path: str, program: Program) -> None:
    """Compiles the step of every phase for the program's devices and writes all of them to one file.

    Raises:
        WorkdirError: the file can't be written.
    """
    with writing(path), zipfile.ZipFile(path, "w") as file:
        for phase in range(len(program.steps)):
            lowered = lower(program, phase)
            with _without_cache():
                payload, _, _ = serialize_executable.serialize(lowered.compile())
            file.writestr(f"{phase}/{_FACTS}", json.dumps(_facts(lowered, program), indent=1))
            file.writestr(f"{phase}/step", payload)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew: an executable that came out of the compilation cache loses functions when it is written again."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it remembers whether it is in use
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def load(path: str, program: Program, phase: int, lowered: Any) -> tuple[Any, str]:
    """A phase's compiled step from a file of `save`.

    The file holds machine code: run only what you made.

    Returns:
        (the step, "") or (None, why the file is of no use here).
    """
    try:
        with zipfile.ZipFile(path) as file:
            saved, payload = json.loads(file.read(f"{phase}/{_FACTS}")), file.read(f"{phase}/step")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        return None, f"it can't be read ({error})"
    other = [line.removeprefix("file.") for line in differences(saved, _facts(lowered, program), "file")]
    if other:
        return None, "it is another program's (in the file -> here): " + "; ".join(other)
    try:
        trees = jax.tree.structure(lowered.args_info), lowered.out_tree
        return serialize_executable.deserialize_and_load(
            payload, *trees, execution_devices=list(program.mesh.devices.flat)
        ), ""
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        return None, f"the runtime refuses it ({' '.join(str(error).split())[:200]})"


def compile_step(program: Program, phase: int, path: str, say: Callable[[str], None]) -> Any:
    """A phase's step, from a file made ahead of time where that fits on every process, else compiled here.

    Args:
        program: what runs.
        phase: of its method.
        path: of the file; "" compiles.
        say: told in a sentence why a file is not used.

    Raises:
        ConfigError: the processes have lowered different programs.
    """
    lowered = lower(program, phase)
    check_same_everywhere({"program": program_hash(lowered), "jax": jax.__version__}, "step")
    if path:
        step, reason = load(path, program, phase, lowered)
        if _everywhere(step is not None):
            return step
        say(f"--compiled={path} is not used, the step is compiled here: {reason or 'another process can not use it'}")
    with jax.set_mesh(program.mesh):
        return lowered.compile()


def check_same_everywhere(facts: Mapping[str, Any], name: str) -> None:
    """Compares plain data between all processes; they must call it together. `name` begins the names of what differs.

    Raises:
        ConfigError: a process differs from process 0; names it and every difference.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True)
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    if (digests == digests[:1]).all():
        return
    everyone = [json.loads(other) for other in _gather_text(text)]
    lines = [
        f"process {index}: {line}"
        for index, other in enumerate(everyone)
        for line in differences(everyone[0], other, name)
    ]
    raise ConfigError(
        "the processes of this job don't run the same program; start all of them with the same command, code and "
        "libraries (process 0 -> other):\n  " + "\n  ".join(lines)
    )


def _gather_text(text: str) -> list[str]:
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(content), np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _everywhere(mine: bool) -> bool:
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(mine)).all())
