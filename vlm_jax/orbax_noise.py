"""Quiets what Orbax prints beside the exceptions that it raises; whatever is lost here is also in an exception."""

import functools
import logging
import sys
import warnings
from typing import Any

_SOURCE = "/orbax/checkpoint/"
_MARKS = (_SOURCE, "orbax-checkpoint-tmp", "OCDBT database")  # the last two stand in what TensorStore raises


@functools.cache
def silence() -> None:
    """Installs the filters, once per process."""
    # Orbax logs each failure with pages of traceback, and harmless warnings at every restore.
    logging.getLogger("absl").addFilter(lambda record: _SOURCE not in record.pathname)
    # After one failed read or write it abandons the others, and each of those then complains by itself: one traceback
    # per array.
    logging.getLogger("asyncio").addFilter(lambda record: not any(part in record.getMessage() for part in _MARKS))
    warnings.filterwarnings("ignore", r"coroutine 'Store\..*' was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def without_abandoned(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        abandoned = code is not None and _SOURCE in code.co_filename
        if not abandoned and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = without_abandoned


__all__ = ["silence"]
