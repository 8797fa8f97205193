"""The account of records that could not be used: each one logged once, counted, and held against a budget."""

import logging
import math
from collections.abc import Iterable
from typing import NamedTuple

from vlm_jax.data.sources.base import BadRecord

_SHOWN = 5
_log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A `BadRecord` and its index, in a form that travels between processes beside a batch."""

    index: int
    where: str
    key: str
    why: str

    @classmethod
    def of(cls, index: int, error: BadRecord) -> "Failure":
        """The error that record `index` raised."""
        return cls(index, error.where, error.key, error.why)

    def __str__(self) -> str:
        return str(BadRecord(self.where, self.key, self.why))


class BadRecordBudgetExceeded(RuntimeError):  # noqa: N818 - a limit that was reached
    """More records can't be used than the config allows, or none can; the message lists the first of them."""

    def __init__(self, message: str):
        super().__init__(message)


def none_usable(failures: Iterable[Failure], what: str) -> BadRecordBudgetExceeded:
    """The error where no budget helps; `what` says which records were tried."""
    distinct = {failure.index: failure for failure in failures}
    return BadRecordBudgetExceeded(f"{what} can be used. The first:{_listed(distinct.values())}\nRepair the data.")


def _listed(failures: Iterable[Failure]) -> str:
    return "".join(f"\n  {failure}" for failure in list(failures)[:_SHOWN])


def exceeded(failures: Iterable[Failure], found: int, allowed: int, length: int) -> BadRecordBudgetExceeded:
    """The error that ends a run, with the first few records in it."""
    return BadRecordBudgetExceeded(
        f"{found} of {length} records can't be used, {allowed} are allowed "
        f"(config.data.bad_record_budget). The first:{_listed(failures)}\nRepair the data, or raise the budget."
    )


class BadRecordAccount:
    """Distinct bad records that this process has met.

    Args:
        length: records of the source.
        budget: below 1 a share of `length`, rounded up; from 1 on a number of records; None counts without limit.
    """

    def __init__(self, length: int, budget: float | None):
        self.length = length
        share = budget is not None and budget < 1
        self.allowed = None if budget is None else math.ceil(budget * length) if share else int(budget)
        self.failures: dict[int, Failure] = {}

    def __len__(self) -> int:
        return len(self.failures)

    def add(self, failures: Iterable[Failure]) -> None:
        """Takes what came with a batch; raises `BadRecordBudgetExceeded` once there are more than allowed."""
        for failure in failures:
            if failure.index not in self.failures:
                self.failures[failure.index] = failure
                _log.warning("%s", failure)
        if self.allowed is not None and len(self) > self.allowed:
            raise exceeded(self.failures.values(), len(self), self.allowed, self.length)
