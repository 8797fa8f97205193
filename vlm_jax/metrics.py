"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, pictures and `eval.json` in the workdir.

It writes what it is given. It computes no metric, decides no interval and prints nothing (`vlm_jax.console` does).
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter


def mean(sum_count: tuple[SupportsFloat, SupportsFloat]) -> float:
    """The mean that a (sum, count) pair stands for; NaN when nothing was counted."""
    total, count = float(sum_count[0]), float(sum_count[1])
    return total / count if count else math.nan


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON so that a reader sees the old file or the new one, never a part of it."""
    _write_atomically(Path(path), (json.dumps(content, indent=2) + "\n").encode())


class MetricWriter:
    """Scalars and images of one run, written by its primary process alone.

    `metrics.jsonl` holds one JSON object a line: `{"step": 120, "time": <Unix seconds>, "loss": 1.25, ...}`. Floats
    are written so that reading them gives the same bits back; NaN and infinities appear as `NaN` and `Infinity`, which
    Python's json reads. Every line reaches the operating system before `scalars` returns.

    Args:
        workdir: the run's directory; created when absent.
        is_primary: False on every process but one, where all methods then do nothing.
        clock: Unix time in seconds; a test passes its own.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, is_primary: bool, clock: Callable[[], float] = time.time):
        self._workdir = Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._is_primary = is_primary
        self._clock = clock
        self._purge_step: int | None = None
        self._board: SummaryWriter | None = None
        if is_primary:
            self._workdir.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Writes the values of one step, in float64.

        Raises:
            ValueError: a metric is called `step` or `time`, which are the record's own keys.
        """
        if not self._is_primary:
            return
        for reserved in ("step", "time"):
            if reserved in values:
                raise ValueError(
                    f"A metric can't be called {reserved!r}: metrics.jsonl has that key already; rename it."
                )
        floats = {name: float(value) for name, value in values.items()}
        now = self._clock()
        self._file.write(json.dumps({"step": int(step), "time": now, **floats}) + "\n")
        self._file.flush()
        board = self._tensorboard()
        for name, value in floats.items():
            board.add_scalar(name, value, int(step), walltime=now)

    def image(self, step: int, name: str, image_HxWxC: np.ndarray) -> None:
        """Writes a uint8 [H, W, 3] image to TensorBoard and to `pictures/<name>-<step>.png`, `/` in names as `-`.

        Raises:
            ValueError: another dtype or shape.
        """
        if image_HxWxC.dtype != np.uint8 or image_HxWxC.ndim != 3 or image_HxWxC.shape[-1] != 3:
            raise ValueError(
                f"Image {name!r} is {image_HxWxC.dtype} {image_HxWxC.shape}; give uint8 of shape [height, width, 3]."
            )
        if not self._is_primary:
            return
        folder = self._workdir / "pictures"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image_HxWxC).save(folder / f"{name.replace('/', '-')}-{step:08d}.png")
        self._tensorboard().add_image(name, image_HxWxC, int(step), dataformats="HWC")

    def truncate_after(self, step: int) -> None:
        """Forgets what a run wrote beyond `step`, the step it was restored at, so that no step is logged twice.

        Lines of `metrics.jsonl` with a greater step are removed (the file is replaced as a whole), and TensorBoard is
        told to hide its later events. Call it before the first `scalars`.

        Raises:
            ValueError: a line that is no record of this writer; names file and line.
        """
        if not self._is_primary:
            return
        self._file.close()
        _write_atomically(self._path, b"".join(_lines_up_to(self._path, step)))
        self._file = self._path.open("a", encoding="utf-8")
        self._purge_step = step + 1

    def close(self) -> None:
        """Flushes and closes the files; the writer can't be used afterwards."""
        if not self._is_primary:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _tensorboard(self) -> SummaryWriter:
        # Opened at the first event and not before: `purge_step` can only be given at opening, and a run that logs
        # nothing (evaluation alone) should leave no event file behind.
        if self._board is None:
            self._board = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=self._purge_step)
        return self._board


def _drop_torn_line(path: Path) -> None:
    """Cuts off a last line without its line feed: the process was killed while it wrote that line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        _write_atomically(path, whole)


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number} is no metrics record: {line[:80]!r}. Remove that line, or move the file away."
            ) from None
        if line_step <= step:
            kept.append(line)
    return kept


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            # Without it a crash of the machine can leave the new name on an empty file.
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
