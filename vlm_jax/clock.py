"""Where the time of the loop goes: steps measured by waiting for their results, and what the steps waited for."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Clock:
    """Wall time since the last report, split into phases.

    A step's time is that between two moments at which results were waited for, less evaluation and saving. Where a
    result was there before the host came to look, its true moment is unknown and may be long past; the next interval
    then starts where the host began its next step. So an interval never misses work that a chip did in it, and no
    rate exceeds what the chip does.

    Args:
        now: seconds, rising; a test passes its own.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._phases: dict[str, float] = {}
        self._steps, self._flops = 0, 0.0
        self._seen_first = False
        self._mark = self._began = self._next_mark = now()

    def begin(self) -> None:
        """The host turns to its next step, before it has the data for it."""
        self._began = self._now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside under `name`: "data" is part of a step, anything else is not."""
        start = self._now()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + self._now() - start

    def first_step(self) -> bool:
        """Whether no step was counted yet; the first one holds the compilation and is left out of all rates."""
        return not self._seen_first

    def step_done(self, was_ready: bool, flops: float = 0.0) -> None:
        """The results of a step are read; `was_ready` if they were there before the host asked for them.

        `flops` are the model FLOPs of this step: those of the phase that it belongs to.
        """
        self._next_mark = self._began if was_ready else self._now()
        if not self._seen_first:
            self._seen_first = True
            self._restart()
            return
        self._steps += 1
        self._flops += flops

    def summary(self) -> dict[str, float]:
        """`seconds_per_step`, `data_wait` (share of that) and `flops_per_step` since the last summary.

        It starts a new interval.

        Empty when no step but the first one was done since: there is nothing to take a rate of.
        """
        if not self._steps:
            self._restart()
            return {}
        outside = sum(seconds for name, seconds in self._phases.items() if name != "data")
        busy = max(self._now() - self._mark - outside, 1e-9)
        result = {
            "seconds_per_step": busy / self._steps,
            "data_wait": min(self._phases.get("data", 0.0) / busy, 1.0),
            "flops_per_step": self._flops / self._steps,
        }
        self._restart()
        return result

    def _restart(self) -> None:
        self._mark, self._steps, self._flops, self._phases = self._next_mark, 0, 0.0, {}
