"""Metrics of classification, with one label an image or several. No features and no classifier are here."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.evals.base import EvalError

EmptyClasses = Literal["error", "skip"]


@jax.jit
def label_ranks(scores_BxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """How many classes come before the right one: int32 [B], 0 = the right class wins.

    Equal scores are ordered by class index, as `top_k` does; a NaN score puts the right class last, so that a broken
    model can't look good. Labels out of range give a rank without meaning.
    """
    own_Bx1 = jnp.take_along_axis(scores_BxC, labels_B[:, None], axis=-1, mode="clip")
    later_BxC = jnp.arange(scores_BxC.shape[-1])[None, :] > labels_B[:, None]
    behind_BxC = (scores_BxC < own_Bx1) | ((scores_BxC == own_Bx1) & later_BxC)
    return scores_BxC.shape[-1] - 1 - jnp.sum(behind_BxC, axis=-1, dtype=jnp.int32)


def check_labels(labels_N: np.ndarray, index_N: np.ndarray, class_count: int, name: str) -> None:
    """Raises `EvalError` when a label stands for none of the `class_count` classes of the evaluation `name`."""
    wrong = (labels_N < 0) | (labels_N >= class_count)
    if wrong.any():
        raise EvalError(
            f"Record {index_N[wrong][0]} of evaluation {name!r} has label {labels_N[wrong][0]}, but the {class_count} "
            f"class names stand for 0 to {class_count - 1}; correct class_names of that evaluation, or the record."
        )


def check_classes(counts_C: np.ndarray, class_names: Sequence[str], name: str) -> None:
    """Raises `EvalError` when the evaluation `name` has no example of a class, which then has no accuracy."""
    empty = [class_name for class_name, count in zip(class_names, counts_C, strict=True) if not count]
    if empty:
        raise EvalError(
            f"Evaluation {name!r} has no example of {len(empty)} of its {len(class_names)} classes "
            f"({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}); correct class_names or limit, or set "
            "empty_classes to 'skip'."
        )


def single_label_metrics(labels_N: np.ndarray, ranks_N: np.ndarray, class_count: int) -> dict[str, float]:
    """Metrics of images with one label each.

    Args:
        labels_N: int [N], in 0..C-1.
        ranks_N: int [N], of the right class; 0 = it wins.
        class_count: C.

    Returns:
        `top1`; `top5` where there are more than five classes; `mean_per_class`, the mean over the classes that occur
        of each one's top-1; `examples`, N.
    """
    metrics = {"top1": float(np.mean(ranks_N < 1))}
    if class_count > 5:
        metrics["top5"] = float(np.mean(ranks_N < 5))
    counts_C = np.bincount(labels_N, minlength=class_count)
    hits_C = np.bincount(labels_N, weights=ranks_N < 1, minlength=class_count)
    metrics["mean_per_class"] = float(np.mean(hits_C[counts_C > 0] / counts_C[counts_C > 0]))
    metrics["examples"] = float(len(labels_N))
    return metrics


def multi_label_metrics(scores_NxC: np.ndarray, positive_NxC: np.ndarray, name: str) -> dict[str, float]:
    """Metrics of images with any number of labels each.

    Args:
        scores_NxC: float [N, C].
        positive_NxC: bool [N, C].
        name: of the evaluation, for messages.

    Returns:
        `mean_average_precision` (`average_precision`) and `voc07_map` (`voc07_average_precision`), each the mean over
        the classes that occur; `examples`, N.

    Raises:
        EvalError: no class occurs.
    """
    occurring = np.flatnonzero(positive_NxC.any(axis=0))
    if not len(occurring):
        raise EvalError(
            f"Evaluation {name!r} found no record with a label among {len(positive_NxC)}, so there is no average "
            "precision; check the labels of its source."
        )
    metrics = {}
    for key, score in (("mean_average_precision", average_precision), ("voc07_map", voc07_average_precision)):
        metrics[key] = float(np.mean([score(scores_NxC[:, c], positive_NxC[:, c]) for c in occurring]))
    return {**metrics, "examples": float(len(scores_NxC))}


def average_precision(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Area under the steps of the precision-recall curve: sum over thresholds of (gain in recall) * precision.

    Images of equal score enter together; NaN scores last. Needs a positive.
    """
    hits_T, found_T = _retrieved(scores_N, positive_N)
    return float(np.sum(np.diff(hits_T, prepend=0) / hits_T[-1] * (hits_T / found_T)))


def voc07_average_precision(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """The interpolated measure of PASCAL VOC 2007 (Everingham et al. 2010, section 4.2).

    Mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or a higher one. Images of equal score
    enter together; NaN scores last. Needs a positive.
    """
    hits_T, found_T = _retrieved(scores_N, positive_N)
    best_from_T = np.maximum.accumulate((hits_T / found_T)[::-1])[::-1]
    # In whole numbers: 3 of 10 positives are a recall of 0.3, which in floats is below 3 * 0.1.
    first = [int(np.argmax(10 * hits_T >= tenths * hits_T[-1])) for tenths in range(11)]
    return float(np.mean(best_from_T[first]))


def _retrieved(scores_N: np.ndarray, positive_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positives, images) at or above each distinct score, from the highest one down: int [T] each."""
    scores_N = np.where(np.isnan(scores_N), -np.inf, scores_N)
    order = np.argsort(-scores_N, kind="stable")
    falling = scores_N[order]
    last_T = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(order) - 1)
    return np.cumsum(positive_N[order])[last_T], last_T + 1
