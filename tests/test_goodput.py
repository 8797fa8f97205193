"""The ledger of wall time with a time of its own: parts that sum to it, over starts, kills and steps done twice."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.goodput import OWN_PARTS, PARTS, Ledger, is_ledger_record, render, slow_processes
from vlm_jax.metrics import MetricWriter


class Time:
    """Seconds that a test moves on."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Run:
    """Starts of a run as the loop makes them: a step takes 2 s and its data 1 s, a save 4 s, all else as told."""

    def __init__(self, workdir: Path):
        self.workdir, self.time = workdir, Time()

    def start(self, step: int, until: int, save_at: int = 0) -> Iterator[Ledger]:
        """From `step` on; stops before the end of every step so that the test may kill it there."""
        ledger = Ledger(self.time.now, self.time)
        self.time.now += 5  # init
        with ledger.spend("restore"):
            self.time.now += 3
        writer = MetricWriter(self.workdir, is_primary=True, clock=self.time)
        ledger.carry_over(writer.truncate_after(step), step)
        with ledger.spend("compile"):
            self.time.now += 20
        writer.scalars(step, ledger.record())
        ledger.turn_to("step")
        for index in range(step + 1, until + 1):
            with ledger.spend("data"):
                self.time.now += 1
            self.time.now += 2
            writer.scalars(index, {"loss": 1.0})
            if index == save_at:
                with ledger.spend("save"):
                    self.time.now += 4
                    writer.scalars(index, ledger.record())
            yield ledger
        writer.scalars(until, ledger.record())
        writer.close()
        yield ledger


def finish(starts: Iterator[Ledger]) -> Ledger:
    *_, ledger = starts
    return ledger


def run_until(starts: Iterator[Ledger], steps: int) -> None:
    for _ in range(steps):
        next(starts)


def test_parts_of_one_start_sum_to_its_wall_time(tmp_path: Path) -> None:
    run = Run(tmp_path)
    summary = finish(run.start(0, 10, save_at=5)).summary()
    assert summary["wall_seconds"] == pytest.approx(run.time.now - 1000)
    assert summary["seconds"] == pytest.approx(
        dict.fromkeys(PARTS, 0.0) | {"init": 5, "restore": 3, "compile": 20, "data": 10, "step": 20, "save": 4}
    )
    assert summary["goodput"] == pytest.approx(20 / 62)


@pytest.mark.parametrize("killed_at", [6, 7, 9])
def test_what_a_kill_threw_away_is_lost_and_the_time_until_the_next_start_is_down(
    killed_at: int, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run_until(run.start(0, 10, save_at=5), killed_at)
    run.time.now += 100
    ledger = finish(run.start(5, 10))
    summary = ledger.summary()
    assert summary["wall_seconds"] == pytest.approx(run.time.now - 1000)
    assert summary["seconds"] == pytest.approx(
        dict.fromkeys(PARTS, 0.0)
        | {"init": 10, "restore": 6, "compile": 40, "data": 10, "step": 20, "save": 4}
        | {"lost": 3 * (killed_at - 5), "down": 100}
    )
    assert (summary["lost_steps"], summary["starts"]) == (killed_at - 5, 2)
    assert f"in 2 starts: step {summary['goodput']:.1%}" in render(summary)


def test_a_checkpoint_that_was_recorded_but_is_no_longer_good_costs_the_steps_before_it_too(tmp_path: Path) -> None:
    """Killed twice: at 7 after the save of 5, which proved good; at 8, and then 5 was damaged."""
    run = Run(tmp_path)
    run_until(run.start(0, 10, save_at=5), 7)
    run_until(run.start(5, 10), 3)
    summary = finish(run.start(0, 10)).summary()
    assert summary["wall_seconds"] == pytest.approx(run.time.now - 1000)
    assert summary["seconds"]["lost"] == pytest.approx(3 * (2 + 8))
    assert summary["seconds"]["step"] == pytest.approx(20)
    assert summary["lost_steps"] == 2 + 8


def test_its_records_survive_truncation_and_are_told_apart(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run_until(run.start(0, 10, save_at=5), 7)
    finish(run.start(2, 3))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if is_ledger_record(record)] == [0, 5, 2, 3]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]


def test_a_wait_that_the_chips_did_not_notice_is_the_steps(tmp_path: Path) -> None:
    time = Time()
    ledger = Ledger(time.now, time)
    ledger.turn_to("step")
    for busy in (True, False):
        with ledger.spend("data", unless=lambda busy=busy: busy):
            time.now += 3
    time.now += 1
    assert ledger.summary()["seconds"] == pytest.approx(dict.fromkeys(PARTS, 0.0) | {"step": 4, "data": 3})


def test_metrics_of_a_run_without_a_ledger_start_one(tmp_path: Path) -> None:
    time = Time()
    ledger = Ledger(time.now, time)
    ledger.carry_over([{"step": 3, "time": 5.0, "loss": 1.0}], 3)
    time.now += 2
    assert ledger.summary()["wall_seconds"] == pytest.approx(2)


def test_a_slow_process_is_named_with_what_it_is_slow_in() -> None:
    time = Time()
    ledgers = [Ledger(time.now, time) for _ in range(4)]
    rows = []
    for ledger, data in zip(ledgers, (0.1, 0.1, 5.0, 0.12), strict=True):
        start = time.now
        ledger.own_parts()
        with ledger.spend("data"):
            time.now += data
        time.now = start + 10
        seconds, interval = ledger.own_parts()
        rows.append(seconds)
        assert interval == pytest.approx(10)
    (sentence,) = slow_processes(np.stack(rows), 10.0)
    assert sentence == "process 2 is slow in data: 5.0 s of the last 10.0 s, the others 0.1 s"
    assert slow_processes(np.stack(rows[:2] + rows[3:]), 10.0) == []
    (two,) = slow_processes(np.asarray([[0.1, 0, 0], [0.9, 0, 0]]), 10.0)
    assert OWN_PARTS[0] in two and "process 1" in two
