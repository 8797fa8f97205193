"""Where the wall time of a run went, over all of its starts: a ledger whose parts sum to the time since the first.

It is kept in `metrics.jsonl` as records of their own (every key but `step` and `time` begins with `goodput/`), each
with the totals so far, so that the next start of the run goes on counting where a killed one stopped.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.console import format_duration

PREFIX = "goodput/"
# In the order in which they are shown. `lost`: steps that were done and thrown away, since the run went on from an
# older checkpoint. `down`: between the last sign of life of one start and the next start.
PARTS = ("step", "data", "compile", "init", "restore", "evaluation", "save", "lost", "down")
# What a process does by itself. The time of a step is the same on all: the chips wait for each other in it.
OWN_PARTS = ("data", "evaluation", "save")


def is_ledger_record(record: Mapping[str, Any]) -> bool:
    """Whether a record of `metrics.jsonl` is the ledger's and no step's or evaluation's."""
    return any(key.startswith(PREFIX) for key in record)


class Ledger:
    """Books every moment since `started` under one of `PARTS`.

    Args:
        started: Unix seconds at the start of the process.
        now: Unix seconds; a test passes its own.
    """

    def __init__(self, started: float, now: Callable[[], float] = time.time):
        self._now, self._started = now, started
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._part, self._mark = "init", started
        self._starts, self._lost_steps = 1, 0
        self._looked, self._seen = started, np.zeros(len(OWN_PARTS))

    def carry_over(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Adds what earlier starts booked, and what became of the work that they did beyond `step`.

        A killed process leaves the records that it wrote: its ledger up to the last save or evaluation, and after that
        the records of steps, up to the last moment at which it is known to have lived.

        Args:
            records: of `metrics.jsonl`, in the file's order, those beyond `step` included.
            step: at which this start goes on.
        """
        places = [index for index, record in enumerate(records) if is_ledger_record(record)]
        if not places:
            return
        last, rest = records[places[-1]], records[places[-1] :]
        kept: Mapping[str, Any] = next((records[i] for i in reversed(places) if records[i]["step"] <= step), {})
        for part in PARTS:
            self._seconds[part] += last.get(PREFIX + part, 0.0)
        for part in ("step", "data"):
            gone = max(last.get(PREFIX + part, 0.0) - kept.get(PREFIX + part, 0.0), 0.0)
            self._seconds[part] -= gone
            self._seconds["lost"] += gone
        reached, alive = max(record["step"] for record in rest), max(record.get("time", 0.0) for record in rest)
        self._seconds["lost" if reached > step else "step"] += alive - last["time"]
        self._seconds["down"] += max(self._started - alive, 0.0)
        self._lost_steps += int(last[PREFIX + "lost_steps"]) + max(reached - step, 0)
        self._starts += int(last[PREFIX + "starts"])

    def turn_to(self, part: str) -> None:
        """From now on time is `part`'s, outside of every `spend`."""
        self._book(self._part)
        self._part = part

    @contextlib.contextmanager
    def spend(self, part: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Books the time inside under `part`.

        Args:
            part: one of `PARTS`.
            unless: asked at the end; where true, the time is the surrounding part's after all (the chips were at work
                while the host waited for data, say).
        """
        outer = self._part
        self.turn_to(part)
        try:
            yield
        finally:
            self._book(outer if unless() else part)
            self._part = outer

    def record(self) -> dict[str, float]:
        """The totals so far, as a record of `metrics.jsonl`."""
        self._book(self._part)
        values = {PREFIX + part: seconds for part, seconds in self._seconds.items()}
        return values | {PREFIX + "lost_steps": float(self._lost_steps), PREFIX + "starts": float(self._starts)}

    def summary(self) -> dict[str, Any]:
        """`wall_seconds`, `goodput` (the share that useful steps took), `seconds` by part, `lost_steps`, `starts`."""
        self._book(self._part)
        wall = sum(self._seconds.values())
        return {
            "wall_seconds": wall,
            "goodput": self._seconds["step"] / wall if wall else 0.0,
            "seconds": dict(self._seconds),
            "lost_steps": self._lost_steps,
            "starts": self._starts,
        }

    def own_parts(self) -> tuple[np.ndarray, float]:
        """(seconds of each of `OWN_PARTS`, all seconds) since the last call."""
        self._book(self._part)
        seconds = np.asarray([self._seconds[part] for part in OWN_PARTS])
        since, self._seen = seconds - self._seen, seconds
        interval, self._looked = self._mark - self._looked, self._mark
        return since, interval

    def _book(self, part: str) -> None:
        now = self._now()
        # Wall clocks are set back at times.
        self._seconds[part] += max(now - self._mark, 0.0)
        self._mark = now


def slow_processes(seconds_PxC: np.ndarray, interval: float) -> list[str]:
    """A sentence for each process and part that took over twice the median of the other processes.

    Args:
        seconds_PxC: per process the seconds of each of `OWN_PARTS` in the interval.
        interval: its seconds; what takes less than a twentieth of it is not worth a word.
    """
    sentences = []
    for process, row in enumerate(seconds_PxC):
        others = np.median(np.delete(seconds_PxC, process, axis=0), axis=0)
        sentences += [
            f"process {process} is slow in {part}: {mine:.1f} s of the last {interval:.1f} s, the others {other:.1f} s"
            for part, mine, other in zip(OWN_PARTS, row, others, strict=True)
            if mine > 2 * other and mine > interval / 20
        ]
    return sentences


def render(summary: Mapping[str, Any]) -> str:
    """`goodput 92.1 % of 1:02:03 in 2 starts: step 92.1 %, compile 4.0 %, ...`; parts below 0.05 % are left out."""
    wall = summary["wall_seconds"]
    shares = {part: seconds / wall for part, seconds in summary["seconds"].items()} if wall else {}
    parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if share >= 5e-4)
    starts = f" in {summary['starts']} starts" if summary["starts"] > 1 else ""
    lost = f"; {summary['lost_steps']} steps were done twice" if summary["lost_steps"] else ""
    return f"goodput {summary['goodput']:.1%} of {format_duration(wall)}{starts}: {parts}{lost}"
