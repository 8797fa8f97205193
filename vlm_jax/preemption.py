"""Stopping on request: SIGTERM or SIGINT on any process makes all of them save the same step and leave."""

import signal
import threading
import types

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: saved and stopped before the last step; the same command goes on."""


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads between steps; later ones change nothing.

    With several processes the flag is agreed on through the coordination service, so that all stop after the same
    step. Use it as a context; the old handlers come back at its end.

    Args:
        process_ends: whether the process ends with the context. The handlers then stay: a signal that comes between
            the last save and the exit would otherwise turn "saved" into "killed".
    """

    def __init__(self, process_ends: bool = False) -> None:
        self._process_ends = process_ends
        self._requested = False
        self._old: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone; a run in another one can't catch them
        for number in (signal.SIGTERM, signal.SIGINT):
            # With several processes JAX's own notifier takes SIGTERM and tells the others; it must stay in place.
            if number == signal.SIGTERM and jax.process_count() > 1:
                continue
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if self._process_ends else handler)  # pyright: ignore

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if jax.process_count() > 1:
            # SIGINT reaches every process of a terminal's group; SIGTERM to oneself starts the agreed stop.
            signal.raise_signal(signal.SIGTERM)
        self._requested = True

    def now(self, step: int) -> bool:
        """Whether to stop before step `step`; every process gets the same answer. Call it once a step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._requested
