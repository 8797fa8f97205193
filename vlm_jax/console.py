"""What a person sees of a running job: a live progress line on a terminal, plain lines in a log file.

It shows numbers that the training loop measured; it measures nothing and writes no file (`vlm_jax.metrics` does).
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

# Metric -> how it reads. Order is that of the line; a metric that the loop doesn't know (MFU on a CPU) is left out.
_FIELDS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "examples_per_second": lambda value: f"examples/s {value:.0f}" if value >= 10 else f"examples/s {value:.2f}",
    "seconds_per_step": lambda value: f"step {value * 1e3:.0f} ms" if value < 10 else f"step {value:.1f} s",
    "data_wait": lambda value: f"data {value:.0%}",
    "mfu": lambda value: f"mfu {value:.1%}",
}


class Console:
    """Live progress of a run.

    Args:
        total_steps: the step at which the run ends.
        stream: where to write, standard output by default. A terminal gets one line that is redrawn; anything else
            gets a plain line an update.
        is_primary: False on every process but one, which then stays silent.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None, *, is_primary: bool = True):
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._is_primary = is_primary
        self._progress: Progress | None = None
        self._task = TaskID(0)
        # Rich's own test is not used: in some CI systems it takes a log file for a terminal.
        if is_primary and self._stream.isatty():
            console = rich.console.Console(file=self._stream)
            if not console.is_dumb_terminal:
                self._progress, self._task = _start_progress(console, total_steps)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the state after `step`.

        Args:
            step: number of steps done.
            metrics: any of `loss`, `examples_per_second`, `seconds_per_step`, `data_wait` (share of the time in which
                the step waited for data, 0..1) and `mfu` (0..1); other names are not shown. The time that is left is
                computed from `seconds_per_step`.
        """
        if not self._is_primary:
            return
        fields = [show(metrics[name]) for name, show in _FIELDS.items() if name in metrics]
        if "seconds_per_step" in metrics:
            fields.append(f"eta {format_duration(metrics['seconds_per_step'] * (self._total_steps - step))}")
        if self._progress is not None:
            self._progress.update(self._task, completed=step, details="  ".join(fields))
        else:
            self._line("  ".join([f"step {step}/{self._total_steps}", *fields]))

    def message(self, text: str) -> None:
        """Shows a sentence on a line of its own, above the live line where there is one."""
        if not self._is_primary:
            return
        if self._progress is not None:
            # As `Text`: square brackets in a path or an error must not be read as rich's markup.
            self._progress.console.print(Text(text), soft_wrap=True)
        else:
            self._line(text)

    def close(self) -> None:
        """Leaves the last state of the live line on the screen and gives the cursor back; harmless when repeated."""
        if self._progress is not None:
            self._progress.stop()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        # A pipe is block-buffered: without it the log of a killed run ends minutes before the run did.
        self._stream.flush()


def format_duration(seconds: float) -> str:
    """Seconds as `0:32`, `12:05`, `3:07:09` or `2d 04:30:00`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _start_progress(console: rich.console.Console, total_steps: int) -> tuple[Progress, TaskID]:
    columns = (
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[details]}", markup=False),
    )
    # Twice a second is enough for the eye and costs the host next to nothing.
    progress = Progress(*columns, console=console, refresh_per_second=2)
    task = progress.add_task("", total=total_steps, details="")
    progress.start()
    return progress, task
