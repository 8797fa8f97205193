"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, pictures, predictions and `eval.json` in the workdir.

It writes what it is given. It computes no metric, decides no interval and prints nothing (`vlm_jax.console` does).
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vlm_jax.goodput import is_ledger_record

_PROTO: Any = event_pb2  # its classes are made when it is imported, so type checkers see none


class WorkdirError(ValueError):
    """A file of the workdir that can't be written, or isn't what was written: the sentence names it and the remedy."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a full disk or a missing permission raises into a `WorkdirError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{path} can't be written: {error.strerror or error}; make room on the disk, mend its permissions or give "
            "another --workdir. The same command goes on from the last checkpoint"
        ) from error


def mean(sum_count: tuple[SupportsFloat, SupportsFloat]) -> float:
    """The mean that a (sum, count) pair stands for; NaN when nothing was counted."""
    total, count = float(sum_count[0]), float(sum_count[1])
    return total / count if count else math.nan


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON so that a reader sees the old file or the new one, never a part of it.

    Raises:
        WorkdirError: it can't be written, as on a full disk.
    """
    _write_atomically(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        WorkdirError: it is no JSON object, or can't be read.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} can't be read ({error}); move it away, it is written anew") from error
    if not isinstance(content, dict):
        raise WorkdirError(f"{path} holds a {type(content).__name__} and no JSON object; move it away")
    return content


class MetricWriter:
    """Scalars, images and texts of one run, written by its primary process alone.

    `metrics.jsonl` holds one JSON object a line: `{"step": 120, "time": <Unix seconds>, "loss": 1.25, ...}`. Floats
    are written so that reading them gives the same bits back; NaN and infinities appear as `NaN` and `Infinity`, which
    Python's json reads. Every line reaches the operating system before `scalars` returns.

    What can't be written raises `WorkdirError` at once and in the caller's thread.

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
        self._board: EventsWriter | None = None
        if is_primary:
            with writing(self._path):
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
        with writing(self._path):
            self._file.write(json.dumps({"step": int(step), "time": now, **floats}) + "\n")
            self._file.flush()
        self._add_events([summary.scalar(name, value) for name, value in floats.items()], int(step), now)

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
        path = folder / f"{name.replace('/', '-')}-{step:08d}.png"
        with writing(path):
            folder.mkdir(exist_ok=True)
            Image.fromarray(image_HxWxC).save(path)
        self._add_events([summary.image(name, image_HxWxC, dataformats="HWC")], int(step), self._clock())

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text to TensorBoard and to `texts/<name>-<step>.md`, `/` in names as `-`."""
        if not self._is_primary:
            return
        path = self._workdir / "texts" / f"{name.replace('/', '-')}-{step:08d}.md"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text(markdown, encoding="utf-8")
        self._add_events([summary.text(name, markdown)], int(step), self._clock())

    def predictions(self, step: int, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes `predictions/<name>-<step>.jsonl`, `/` in names as `-`, an object a line.

        Of answers to questions also `<name>-<step>.json`, the list of ids and answers that VQAv2's server takes.
        """
        if not self._is_primary:
            return
        path = self._workdir / "predictions" / f"{name.replace('/', '-')}-{step:08d}.jsonl"
        _write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        wanted = ("question_id", "answer")
        if lines and all(key in line for line in lines for key in wanted):
            submission = [{key: line[key] for key in wanted} for line in lines]
            _write_atomically(path.with_suffix(".json"), json.dumps(submission, ensure_ascii=False).encode())

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """Forgets what a run wrote beyond `step`, the step it was restored at, so that no step is logged twice.

        Lines of `metrics.jsonl` with a greater step are removed (the file is replaced as a whole), those of the ledger
        of wall time excepted, and TensorBoard is told to hide its later events. Call it before the first `scalars`.

        Returns:
            All records that the file held, the removed ones among them; none but on the primary process.

        Raises:
            WorkdirError: a line that is no record of this writer; names file and line.
        """
        if not self._is_primary:
            return []
        self._file.close()
        lines = _read_lines(self._path)
        kept = [line for line, record in lines if record["step"] <= step or is_ledger_record(record)]
        _write_atomically(self._path, b"".join(kept))
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        self._purge_step = step + 1
        return [record for _, record in lines]

    def close(self) -> None:
        """Flushes and closes the files; the writer can't be used afterwards."""
        if not self._is_primary:
            return
        with writing(self._path):
            self._file.close()
        if self._board is not None:
            with writing(self._workdir / "tensorboard"):
                self._board.close()
            self._board = None

    def _add_events(self, summaries: list[Any], step: int, walltime: float) -> None:
        # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the next events wait for it for ever.
        with writing(self._workdir / "tensorboard"):
            board = self._tensorboard()
            for one in summaries:
                board.write_event(_PROTO.Event(wall_time=walltime, step=step, summary=one))
            board.flush()

    def _tensorboard(self) -> EventsWriter:
        # Opened at the first event and not before: `purge_step` stands at the start of a file, and a run that logs
        # nothing (evaluation alone) should leave no event file behind.
        if self._board is None:
            folder = self._workdir / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            self._board = EventsWriter(str(folder / "events"))
            if self._purge_step is not None:
                log = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
                self._board.write_event(_PROTO.Event(step=self._purge_step, session_log=log))
        return self._board


def _drop_torn_line(path: Path) -> None:
    """Cuts off a last line without its line feed: the process was killed while it wrote that line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        _write_atomically(path, whole)


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every line with its record."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError):
            raise WorkdirError(
                f"{path}, line {number} is no metrics record: {line[:80]!r}. Remove that line, or move the file away."
            ) from None
        found.append((line, record))
    return found


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                # Without it a crash of the machine can leave the new name on an empty file.
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
