"""Checkpoints of a run: asynchronous saves, verified restores on any mesh, and parameters alone for evaluation.

    WORKDIR/checkpoints/STEP/state   the arrays
    WORKDIR/checkpoints/STEP/meta    config, tokenizer, preprocessing, data position, manifest (JSON)
    WORKDIR/damaged-checkpoints/     steps that failed verification, moved aside; nothing is ever deleted there

Nothing here knows what is trained. Loading parameters into another model is `vlm_jax.warm_start`.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from vlm_jax import orbax_noise
from vlm_jax.checkpoint_format import (
    CHECKPOINTS,
    CheckpointError,
    DamagedStepError,
    check_matches,
    find_step,
    manifest_of,
    read_arrays,
    read_meta,
    seal,
    stored_params,
    to_nested,
)
from vlm_jax.digest import flatten_paths

_log = logging.getLogger(__name__)
_SAVE_ERRORS = (OSError, ValueError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves and what it keeps."""

    every: int = 1000  # steps between saves
    keep: int = 3  # newest checkpoints that are kept
    keep_every: int = 0  # also keep every checkpoint whose step is a multiple of this; 0: none

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that would keep nothing."""
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                yield key, f"= {getattr(self, key)} must be at least 1"
        if self.keep_every < 0:
            yield "keep_every", f"= {self.keep_every} must be 0 (none) or a number of steps"


class Checkpointer:
    """The one writer and reader of a run's `checkpoints` directory.

    Every process of a run makes one and calls the same methods in the same order.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig) -> None:
        """Opens `directory` (WORKDIR/checkpoints), making it and clearing it of saves that were killed midway."""
        self.directory = epath.Path(directory).expanduser().resolve()
        self.config = config
        self._saving: int | None = None
        orbax_noise.silence()
        # No best_fn beside these: Orbax would then rank by metric and delete the newest step.
        policies: list[Any] = [checkpoint_managers.LatestN(config.keep)]
        if config.keep_every:
            policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))
        except OSError as error:
            raise CheckpointError(f"{self.directory} can't be used for checkpoints: {error}") from error

    def due(self, step: int) -> bool:
        """Whether the config wants a save after `step` steps."""
        return step > 0 and step % self.config.every == 0

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_position: int,
        config: Mapping[str, Any],
        tokenizer: Mapping[str, Any] | None,
        preprocess: Mapping[str, Any],
        extra_meta: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts writing a checkpoint and returns; the state's buffers may be donated or overwritten at once.

        Args:
            step: number of optimiser steps that the state has taken.
            state: tree of global arrays.
            data_position: global index of the next example of the run.
            config: the resolved config, plain data.
            tokenizer: what rebuilds the tokenizer, plain data, or None.
            preprocess: what rebuilds the evaluation preprocessing, plain data.
            extra_meta: further plain data.
            force: save off the schedule of `due`.

        Returns:
            Whether a save was started; False off schedule, or where `step` is saved already.

        Raises:
            CheckpointError: a step older than the newest checkpoint, or this or the previous
                save failed, as on a full disk; earlier checkpoints stay as they are.
        """
        if not (force or self.due(step)):
            return False
        self.wait()
        newest = self.latest_step()
        if newest == step:
            return False
        if newest is not None and newest > step:
            raise CheckpointError(
                f"step {step} is older than the newest checkpoint {self.directory / str(newest)}; "
                "restore that one, or save to another workdir"
            )
        flat = _arrays_by_path(state)
        meta = {
            **(extra_meta or {}),
            "step": step,
            "data_position": data_position,
            "config": config,
            "tokenizer": tokenizer,
            "preprocess": preprocess,
            "manifest": manifest_of(flat),
        }
        # Orbax refuses arrays of size 0; the manifest's shape is all there is to know of them.
        stored = to_nested({path: leaf for path, leaf in flat.items() if leaf.size})
        args = ocp.args.Composite(state=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(seal(meta)))
        self._saving = step
        try:
            return self._manager.save(step, args=args, force=True)
        except _SAVE_ERRORS as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns once the last save is on disk.

        Raises:
            CheckpointError: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except _SAVE_ERRORS as error:
            raise self._failed(error) from error
        self._saving = None

    def check_error(self) -> None:
        """Raises CheckpointError if a save in the background has failed already; doesn't wait."""
        try:
            self._manager.check_for_errors()
        except _SAVE_ERRORS as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits for the last save and releases threads; raises CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step saved, or being saved; None if there is none."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest good checkpoint onto any mesh, whatever mesh it was saved from.

        Every array is verified against its digest. A damaged step is logged and, once an older good one is found,
        moved to `damaged-checkpoints` beside this directory so that a later save of its step finds the place free.

        Args:
            abstract_state: tree of jax.ShapeDtypeStruct with shardings.

        Returns:
            (state, meta), or None if nothing was ever saved here.

        Raises:
            CheckpointError: the state saved is of another form (lists every array), or no step is undamaged; all
                stay in place then, so that a restarted job can't mistake the run for a new one.
        """
        self.wait()
        self._manager.reload()
        leaves, treedef = flatten_paths(abstract_state), jax.tree.structure(abstract_state)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            result, damage = self._attempt(step, leaves)
            if result is None:
                damaged[step] = damage
                _log.error("checkpoint of step %d is damaged: %s", step, damage)
                continue
            self._move_aside(damaged)
            flat, meta = result
            return jax.tree.unflatten(treedef, [flat[path] for path in leaves]), meta
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is usable; restore the directory from a copy, or move it away to "
                "start anew:\n  " + "\n  ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            )
        return None

    def _attempt(self, step: int, leaves: Mapping[str, Any]) -> tuple[Any, str]:
        """((arrays by path, meta), "") of a good step, or (None, what is damaged), the same on every process."""
        directory, result, damage = self.directory / str(step), None, ""
        try:
            meta = read_meta(directory)
            check_matches(directory, meta["manifest"], leaves)
            result = read_arrays(directory, meta["manifest"], leaves), meta
        except DamagedStepError as error:
            damage = str(error)
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.array([result is None])).any():
            return None, damage or f"{directory} can't be read by another process"
        return result, damage

    def _move_aside(self, damaged: Mapping[int, str]) -> None:
        if not damaged:
            return
        graveyard = self.directory.parent / "damaged-checkpoints"
        for step in damaged if jax.process_index() == 0 else ():
            graveyard.mkdir(parents=True, exist_ok=True)
            number = 0
            while (graveyard / f"{step}-{number}").exists():
                number += 1
            (self.directory / str(step)).rename(graveyard / f"{step}-{number}")
            _log.error("moved the damaged checkpoint of step %d to %s", step, graveyard / f"{step}-{number}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("vlm_jax: damaged checkpoints moved aside")
        self._manager.reload()

    def _failed(self, error: BaseException) -> CheckpointError:
        step, self._saving = self._saving, None
        # The manager has already counted the failed step in, and those out that it would have replaced.
        self._manager.reload()
        newest = self.latest_step()
        remains = f"the checkpoint of step {newest} is still good" if newest is not None else "there is no earlier one"
        reason = " ".join(str(error).split())[:500]
        return CheckpointError(
            f"saving the checkpoint of step {step} to {self.directory} failed; {remains}. Make room on the disk or "
            f"mend what is named here, then start again: {reason}"
        )


def _arrays_by_path(state: Any) -> dict[str, Any]:
    """Path -> array of a state; raises CheckpointError for leaves that are none."""
    flat = {p: np.asarray(x) if isinstance(x, np.generic) else x for p, x in flatten_paths(state).items()}
    scalars = [path for path, leaf in flat.items() if not isinstance(leaf, jax.Array | np.ndarray)]
    if scalars:
        raise CheckpointError(f"only arrays can be saved, not {', '.join(scalars)}; wrap them in an array")
    return flat


def read_params(
    path: epath.PathLike,
    *,
    prefer: Literal["ema", "params"] = "ema",
    shardings: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model's parameters without the rest of the training state.

    Args:
        path: a workdir, its `checkpoints` (the newest step is read), one step directory, or an imported checkpoint.
        prefer: `ema`: the averaged parameters if the run kept any, or its teacher; `params`: the raw ones.
        shardings: one sharding for all, or a nested dict of shardings as the parameters; None: one device.

    Returns:
        (nested dict of arrays, meta).

    Raises:
        CheckpointError: no checkpoint there, one without parameters, or a damaged one.
    """
    orbax_noise.silence()
    directory = find_step(path)
    try:
        meta = read_meta(directory)
        manifest = meta["manifest"]
        stored = stored_params(directory, meta, prefer)
        placements = _by_path(shardings, stored)
        entries = {name: manifest[path] for name, path in stored.items()}
        wanted = {
            stored[name]: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=placements[name])
            for name, entry in entries.items()
        }
        flat = read_arrays(directory, manifest, wanted)
    except DamagedStepError as error:
        raise DamagedStepError(f"{error}; give another step of {directory.parent}") from error
    return to_nested({name: flat[path] for name, path in stored.items()}), meta


def read_checkpoint_meta(path: epath.PathLike) -> dict[str, Any]:
    """The meta of the step that `read_params` would read, without its arrays.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    orbax_noise.silence()
    return read_meta(find_step(path))


def _by_path(shardings: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(shardings, Mapping):
        return dict.fromkeys(saved, shardings)
    flat = flatten_paths(shardings)
    if missing := sorted(saved.keys() - flat.keys()):
        raise CheckpointError(f"no sharding is given for these parameters of the checkpoint: {', '.join(missing)}")
    return flat


def read_extra(path: epath.PathLike) -> dict[str, Any]:
    """What a method keeps beside its parameters in a checkpoint, as a nested dict; {} if nothing is there.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    orbax_noise.silence()
    directory = find_step(path)
    manifest = read_meta(directory)["manifest"]
    entries = {name: entry for name, entry in manifest.items() if name.startswith("extra/")}
    if not entries:
        return {}
    wanted = {name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"]) for name, entry in entries.items()}
    return to_nested(read_arrays(directory, manifest, wanted)).get("extra", {})


def save_params(
    directory: epath.PathLike,
    params: Any,
    *,
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
    preprocess: Mapping[str, Any],
    extra: Any = None,
) -> None:
    """Writes parameters alone as step 0 of a new directory, which then loads like a run's workdir.

    `extra` is what their method keeps beside them (an averaged model, queues), for `init_from.extra`.

    Raises:
        CheckpointError: the directory holds checkpoints already, or can't be written.
    """
    checkpointer = Checkpointer(epath.Path(directory).expanduser().resolve() / CHECKPOINTS, CheckpointConfig(keep=1))
    try:
        if (newest := checkpointer.latest_step()) is not None:
            raise CheckpointError(f"{checkpointer.directory} holds step {newest} already; give a new directory")
        meta = {"config": config, "tokenizer": tokenizer, "preprocess": preprocess}
        state = {"params": params} | ({"extra": extra} if extra else {})
        checkpointer.save(0, state, data_position=0, force=True, **meta)
    finally:
        checkpointer.close()


__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "DamagedStepError",
    "read_checkpoint_meta",
    "read_extra",
    "read_params",
    "save_params",
]
