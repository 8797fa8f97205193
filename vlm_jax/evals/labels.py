"""Rows with labels, of which a record may have several. `vlm_jax.data.examples` has the rows with exactly one."""

import numpy as np

from vlm_jax.data.examples import Example, Views
from vlm_jax.data.sources import BadRecord, Record
from vlm_jax.evals.base import EvalError


class MultiLabelImages:
    """`image` uint8 [size, size, 3] and `label` bool [C] of records whose `label` is an int or a tuple of ints.

    Args:
        views: makes the image.
        class_count: C.
    """

    def __init__(self, views: Views, class_count: int):
        self.views, self.class_count = views, class_count

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row.

        Raises:
            BadRecord: the record has no label; a record of none of the classes has the empty tuple.
            EvalError: a label that is not one of the classes.
        """
        label = record.get("label")
        if label is None:
            raise BadRecord(record["where"], record["key"], "it has no label")
        classes = np.asarray(label, np.int64).reshape(-1)
        wrong = (classes < 0) | (classes >= self.class_count)
        if wrong.any():
            raise EvalError(
                f"Record {record['key']} of {record['where']} has label {classes[wrong][0]}, but the "
                f"{self.class_count} class names stand for 0 to {self.class_count - 1}; correct class_names of that "
                "evaluation, or the record."
            )
        positive_C = np.zeros(self.class_count, bool)
        positive_C[classes] = True
        return {"image": self.views(record, rng), "label": positive_C}
