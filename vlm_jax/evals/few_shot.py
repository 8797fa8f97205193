"""Few-shot classification of frozen features by ridge regression in closed form: cheap enough for every evaluation.

The protocol of big_vision's few-shot evaluator (Dosovitskiy et al. 2021, section 4.1 and appendix D.3.1): n images a
class, vectors standardised by them, targets -1 and 1, a least-squares fit whose L2 penalty is fixed beforehand, and the
class of the largest response. Not for more than some ten thousand training images.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.evals.base import Encoder, EvalError, EvalResult
from vlm_jax.evals.classification import label_ranks, single_label_metrics
from vlm_jax.evals.features import to_host
from vlm_jax.evals.frozen import FrozenConfig, Sources, Split, encode_split

# The protocol's constant feature. So large that the penalty hardly reaches the bias.
BIAS = 100.0
_TEST_AT_A_TIME = 4096


@dataclasses.dataclass(frozen=True)
class FewShotConfig(FrozenConfig):
    """Few-shot classification.

    Metrics, under `few_shot/<name>/`, for each number n of shots: `<n>shot_top1` and `<n>shot_mean_per_class`, means
    over the seeds, and `<n>shot_top1_std`, the standard deviation; with several penalties each has its own, as
    `<n>shot_l2_<penalty>_top1`. And `examples`, how many were classified.
    """

    # Training images of a class.
    shots: tuple[int, ...] = (1, 5, 10, 25)
    # L2 penalties. None of them is chosen by the test set: each is reported.
    l2: tuple[float, ...] = (1024.0,)
    # Each seed draws other training images; those of fewer shots are the first of those of more.
    seeds: int = 3

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            yield "shots", f"= {self.shots} must be one or more different positive numbers"
        if not self.l2 or min(self.l2) <= 0 or len(set(self.l2)) < len(self.l2):
            yield "l2", f"= {self.l2} must be one or more different positive numbers"
        if self.seeds < 1:
            yield "seeds", f"= {self.seeds} must be 1 or more"

    def build(self, encoder: Encoder, cache_dir: str) -> "FewShotEvaluator":
        """Opens both sources; raises `ConfigError` when one can't be opened or holds no records."""
        return FewShotEvaluator(self, encoder, self.open_sources(cache_dir))


class FewShotEvaluator:
    """Few-shot classification of one source by another."""

    def __init__(self, config: FewShotConfig, encoder: Encoder, sources: Sources):
        self._config, self._encoder, self._sources = config, encoder, sources

    def run(self, params: Any, step: int) -> EvalResult:
        """Classifies every usable record with every number of shots, penalty and seed.

        Raises:
            EvalError: a class with fewer training images than shots, no usable record, or labels out of range.
        """
        del step  # Draws no picture.
        config, split = self._config, encode_split(self._encoder, params, self._config, self._sources)
        by_seed = [self._by_class(split, seed) for seed in range(config.seeds)]
        metrics: dict[str, float] = {}
        for shots in config.shots:
            found = [self._classified(split, [own[:shots] for own in order]) for order in by_seed]
            for l2 in config.l2:
                prefix = f"{shots}shot_" if len(config.l2) == 1 else f"{shots}shot_l2_{l2:g}_"
                for key in ("top1", "mean_per_class"):
                    metrics[prefix + key] = float(np.mean([result[l2][key] for result in found]))
                metrics[prefix + "top1_std"] = float(np.std([result[l2]["top1"] for result in found]))
        metrics["examples"] = float(len(split.test.labels))
        return EvalResult({f"few_shot/{config.name}/{key}": value for key, value in metrics.items()})

    def _by_class(self, split: Split, seed: int) -> list[np.ndarray]:
        """Rows of each class in the order in which they become shots: a function of (seed, class)."""
        order = []
        for label in range(split.class_count):
            rows = np.flatnonzero(split.train.labels == label)
            if len(rows) < max(self._config.shots):
                name = self._sources.class_names[label] if self._sources.class_names else str(label)
                raise EvalError(
                    f"Few-shot evaluation {self._config.name!r} has {len(rows)} training images of class {name!r}, "
                    f"fewer than {max(self._config.shots)} shots; lower shots, or raise train_limit."
                )
            order.append(np.random.default_rng((seed, label)).permutation(rows))
        return order

    def _classified(self, split: Split, chosen: Sequence[np.ndarray]) -> dict[float, dict[str, float]]:
        """Metrics by penalty, of a classifier that is trained on the chosen rows."""
        rows = np.concatenate(chosen)
        ridge = solve_ridge(split.train.vectors[rows], split.train.labels[rows], split.class_count)
        return {
            l2: single_label_metrics(split.test.labels, self._ranks(ridge, l2, split), split.class_count)
            for l2 in self._config.l2
        }

    @staticmethod
    def _ranks(ridge: "Ridge", l2: float, split: Split) -> np.ndarray:
        weights_DxC, bias_C = ridge.weights(l2)
        ranks = []
        for start in range(0, len(split.test.labels), _TEST_AT_A_TIME):
            rows = slice(start, start + _TEST_AT_A_TIME)
            scores_BxC = split.test.vectors[rows] @ weights_DxC + bias_C
            ranks.append(to_host(label_ranks(scores_BxC.astype(np.float32), split.test.labels[rows])))
        return np.concatenate(ranks)


class Ridge(NamedTuple):
    """A ridge regression before its penalty is known: a penalty then costs one product of matrices.

    Attributes:
        mean: float64 [D], of the training vectors.
        std: float64 [D], likewise.
        left: float64 [D, R].
        eigenvalues: float64 [R], of the Gram matrix.
        right: float64 [R, C].
        target_sum: float64 [C], of the targets.
        examples: N.
    """

    mean: np.ndarray
    std: np.ndarray
    left: np.ndarray
    eigenvalues: np.ndarray
    right: np.ndarray
    target_sum: np.ndarray
    examples: int

    def weights(self, l2: float) -> tuple[np.ndarray, np.ndarray]:
        """float64 [D, C] and [C] for vectors as they are: response = vector @ weights + bias."""
        weights_DxC = (self.left / (self.eigenvalues + l2)) @ self.right / self.std[:, None]
        # Standardised vectors sum to zero, so the constant feature is orthogonal to them and solved alone.
        bias_C = BIAS**2 * self.target_sum / (BIAS**2 * self.examples + l2)
        return weights_DxC, bias_C - self.mean @ weights_DxC


def solve_ridge(vectors_NxD: np.ndarray, labels_N: np.ndarray, class_count: int) -> Ridge:
    """Everything of a ridge regression on one-hot targets in {-1, 1} that does not depend on the penalty.

    In float64 on the host: eigenvalues of a Gram matrix in float32 have no correct digit left where the penalty is
    small, and accelerators have neither float64 nor a fast solver for them.

    Args:
        vectors_NxD: [N, D].
        labels_N: int [N], in 0..C-1.
        class_count: C.
    """
    vectors = vectors_NxD.astype(np.float64)
    mean, std = vectors.mean(axis=0), vectors.std(axis=0) + 1e-5
    x_NxD = (vectors - mean) / std
    y_NxC = np.where(labels_N[:, None] == np.arange(class_count), 1.0, -1.0)
    # (x'x + l2)^-1 x'y = x'(xx' + l2)^-1 y: the smaller of the two Gram matrices is decomposed.
    if x_NxD.shape[0] >= x_NxD.shape[1]:
        eigenvalues, left = np.linalg.eigh(x_NxD.T @ x_NxD)
        right = left.T @ (x_NxD.T @ y_NxC)
    else:
        eigenvalues, basis = np.linalg.eigh(x_NxD @ x_NxD.T)
        left, right = x_NxD.T @ basis, basis.T @ y_NxC
    # Rounding can leave a zero slightly below zero, which a small penalty would not mend.
    return Ridge(mean, std, left, np.maximum(eigenvalues, 0.0), right, y_NxC.sum(axis=0), len(x_NxD))
