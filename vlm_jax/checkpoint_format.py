"""What a checkpoint's step directory holds, and how it is read back and verified.

`STEP/state` are the arrays, as a nested dict named by their paths; `STEP/meta` is one JSON with everything else and a
manifest of the arrays: digest, shape and dtype by path, the whole sealed by its own sha256. The storage layer restores
a flipped bit silently, so nothing read here is handed out before its digest agrees. Which steps are kept and which is
chosen is for `vlm_jax.checkpoint`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.digest import tree_digest

CHECKPOINTS = "checkpoints"

# What reading a damaged directory raises in Orbax, TensorStore and JSON. Running out of memory (RuntimeError on a
# device) is none of it: the step on disk is then as good as it was.
_READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError)


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, found or used: names the directory, the arrays and the remedy."""


class DamagedStepError(CheckpointError):
    """A step directory whose content isn't what was saved."""


class _Reading:
    """A context that turns what a damaged file raises into a DamagedStepError that names it."""

    def __init__(self, directory: epath.Path) -> None:
        self.directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        # Orbax wraps some errors in a bare Exception; what is wrong is then its cause.
        cause = error.__cause__ if kind is Exception and error is not None else error
        if isinstance(cause, _READ_ERRORS) and not isinstance(cause, PermissionError):
            reason = " ".join(str(cause).split())[:300] or "no details"
            raise DamagedStepError(f"{self.directory} can't be read: {type(cause).__name__}: {reason}") from error


def to_nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def manifest_of(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """path -> {"digest": 16 hexadecimal digits, "shape": [...], "dtype": name} of every array."""
    digests = tree_digest(dict(flat))
    return {
        path: {"digest": digests[path], "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in flat.items()
    }


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The meta as plain JSON data with its own sha256.

    Raises:
        CheckpointError: a value that JSON doesn't know.
    """
    try:
        plain = json.loads(json.dumps(dict(meta)))
    except TypeError as error:
        raise CheckpointError(f"what is saved beside the arrays must be plain JSON data: {error}") from error
    return {**plain, "sha256": _sha256(plain)}


def _sha256(meta: Mapping[str, Any]) -> str:
    canonical = json.dumps({key: value for key, value in meta.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_meta(step_directory: epath.Path) -> dict[str, Any]:
    """The verified meta of a step.

    Raises:
        DamagedStepError: it is missing, unreadable or altered.
    """
    with _Reading(step_directory / "meta"), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore(step_directory / "meta", args=ocp.args.JsonRestore())
    if not isinstance(meta, dict) or meta.get("sha256") != _sha256(meta):
        raise DamagedStepError(f"{step_directory / 'meta'} isn't what was saved: its sha256 differs")
    return meta


def check_matches(step_directory: epath.Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares saved arrays with wanted ones (path -> jax.ShapeDtypeStruct) by path, shape and dtype.

    Raises:
        CheckpointError: lists every missing, extra or differing array.
    """
    problems = [f"{path}: not in the checkpoint" for path in sorted(wanted.keys() - manifest.keys())]
    problems += [
        f"{path}: in the checkpoint, but not in this model" for path in sorted(manifest.keys() - wanted.keys())
    ]
    for path in sorted(wanted.keys() & manifest.keys()):
        saved = f"{manifest[path]['dtype']}{manifest[path]['shape']}"
        ours = f"{wanted[path].dtype}{list(wanted[path].shape)}"
        if saved != ours:
            problems.append(f"{path}: {saved} in the checkpoint, {ours} in this model")
    if problems:
        raise CheckpointError(
            f"{step_directory} holds another state than this config builds. Resume with the config it was saved with, "
            "or start in a new workdir and load its parameters through init_from:\n  " + "\n  ".join(problems)
        )


def read_arrays(
    step_directory: epath.Path, manifest: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads and verifies some of a step's arrays.

    Args:
        step_directory: the step.
        manifest: of its verified meta.
        wanted: path -> shape, dtype and sharding; a subset of the manifest. Without a sharding: the first local device.

    Returns:
        path -> array.

    Raises:
        DamagedStepError: a file is unreadable, or an array isn't what was saved; names every such array.
        ValueError: a sharding that doesn't divide its array.
    """
    wanted = {path: _placed(leaf) for path, leaf in wanted.items()}
    stored = {path: leaf for path, leaf in wanted.items() if leaf.size}
    nested = to_nested(stored)
    with _Reading(step_directory / "state"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restore_args = ocp.checkpoint_utils.construct_restore_args(nested)
        args = ocp.args.PyTreeRestore(item=nested, restore_args=restore_args, partial_restore=True)
        restored = reader.restore(step_directory / "state", args=args)
        flat = {path: _leaf(restored, path) for path in stored}
    for path in wanted.keys() - stored.keys():
        flat[path] = jax.device_put(jnp.zeros(wanted[path].shape, wanted[path].dtype), wanted[path].sharding)
    digests = tree_digest(flat)
    damaged = sorted(path for path in wanted if digests[path] != manifest[path]["digest"])
    if damaged:
        raise DamagedStepError(f"{step_directory / 'state'} isn't what was saved; damaged arrays: {', '.join(damaged)}")
    return flat


def _leaf(tree: Any, path: str) -> jax.Array:
    for name in path.split("/"):
        tree = tree[name]
    if not isinstance(tree, jax.Array):
        # Orbax hands back the request itself for an array that its damaged index doesn't list.
        raise LookupError(f"{path} is missing from the index")
    return tree


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Left to itself, Orbax would take the sharding from the file, whose devices may not exist here.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # A sharding that doesn't fit must fail here: later, it would pass for damage of the file.
    sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def committed_steps(directory: epath.Path) -> list[int]:
    """Steps in a checkpoint directory that were written to their end, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        int(child.name)
        for child in directory.iterdir()
        if child.name.isdecimal() and child.is_dir() and ocp.utils.is_checkpoint_finalized(child)
    )


def find_step(path: epath.PathLike) -> epath.Path:
    """The step directory that a user means: PATH itself, or the newest of a workdir or its `checkpoints`.

    Raises:
        CheckpointError: there is none.
    """
    path = epath.Path(path).expanduser().resolve()
    if path.name.isdecimal() and ((path / "meta").exists() or (path / "state").exists()):
        return path
    for directory in (path / CHECKPOINTS, path):
        if steps := committed_steps(directory):
            return directory / str(steps[-1])
    raise CheckpointError(
        f"{path} holds no checkpoint; give a workdir, its '{CHECKPOINTS}' directory, or one step in it"
        + ("" if path.exists() else " (the path doesn't exist)")
    )


def stored_params(
    step_directory: epath.Path, meta: Mapping[str, Any], prefer: Literal["ema", "params"]
) -> dict[str, str]:
    """Path of each parameter -> path of the array to read for it.

    Where averages are preferred those of the teacher that the meta names, or `ema/...`; `params/...` for what has none,
    as parameters that a run froze.

    Raises:
        CheckpointError: the checkpoint holds no parameters.
    """
    manifest = meta["manifest"]
    paths = {path.removeprefix("params/"): path for path in manifest if path.startswith("params/")}
    if not paths:
        raise CheckpointError(f"{step_directory} holds no parameters, only: {', '.join(sorted(manifest)) or 'nothing'}")
    if prefer == "params":
        return paths
    teacher = meta.get("teacher")
    average = "ema" if teacher is None else f"extra/{teacher}"
    return {name: f"{average}/{name}" if f"{average}/{name}" in manifest else path for name, path in paths.items()}
