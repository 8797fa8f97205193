"""Linear probe: logistic regression on frozen features, the measure of a representation in the CLIP paper.

Its protocol (Radford et al. 2021, section 3.2 and appendix A.3): L-BFGS of at most 1000 steps, vectors from before the
projection, and an L2 penalty that is chosen on a validation split, by a parametric binary search or a full sweep; then
a fit on training and validation images together. The solver is `logistic`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.evals.base import Encoder, EvalError, EvalResult
from vlm_jax.evals.benchmark_json import BenchmarkEntry, classification_names
from vlm_jax.evals.classification import label_ranks, multi_label_metrics, single_label_metrics
from vlm_jax.evals.features import Labelled, padded_batches, to_host
from vlm_jax.evals.frozen import FrozenConfig, Sources, encode_split
from vlm_jax.evals.logistic import Classifier, TrainingSet
from vlm_jax.schema import ConfigError

# lambda = 10 ** (place / 8): eight steps a decade from 1e-6 to 1e6, the resolution of the paper's search.
_STEPS_A_DECADE, _DECADES = 8, 6
_FIRST_INTERVAL = 2 * _STEPS_A_DECADE


@dataclasses.dataclass(frozen=True)
class LinearProbeConfig(FrozenConfig):
    """Logistic regression on frozen features.

    Metrics, under `linear_probe/<name>/`: `top1`, `top5` (where there are more than five classes), `mean_per_class`
    and `examples`, or with `labels="multi"` `mean_average_precision`, `voc07_map` and `examples`; `train_examples`;
    `lambda`, the penalty; `validation`, its `top1` or `mean_average_precision` on the validation split where it was
    chosen; `iterations` of the last fit, and `converged`, 0 when it was stopped by `max_iterations`.
    """

    # Labels of a record: exactly one, or any number of them (a sigmoid a class; the source must name its classes).
    labels: Literal["single", "multi"] = "single"
    # How the penalty is found: "binary", 1e-6, 1e-4, ..., 1e6 and then ever finer around the best of them, down to
    # eight steps a decade (15 fits); "full", 96 logarithmic steps from 1e-6 to 1e6.
    sweep: Literal["binary", "full"] = "binary"
    # Penalties of one's own in place of the sweep (lambda = 1 / C of scikit-learn); a single one is taken unseen.
    lambdas: tuple[float, ...] = ()
    # Share of the training images on which the penalty is chosen.
    validation_share: float = 0.1
    # Which images those are.
    seed: int = 0
    # A fit ends when no gradient is larger than this times the largest one at its start ...
    tolerance: float = 1e-5
    # ... or after this many steps.
    max_iterations: int = 1000

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if not all(value > 0 for value in self.lambdas):
            yield "lambdas", f"= {self.lambdas} must be positive numbers"
        if not 0 < self.validation_share < 1:
            yield "validation_share", f"= {self.validation_share} must lie between 0 and 1"
        if self.tolerance <= 0:
            yield "tolerance", f"= {self.tolerance} must be positive"
        if self.max_iterations < 1:
            yield "max_iterations", f"= {self.max_iterations} must be 1 or more"

    def build(self, encoder: Encoder, cache_dir: str) -> "LinearProbeEvaluator":
        """Opens both sources.

        Raises:
            ConfigError: one can't be opened or holds no records, or `labels="multi"` without class names.
        """
        sources = self.open_sources(cache_dir)
        if self.labels == "multi" and not sources.class_names:
            raise ConfigError(
                f"Evaluation {self.name!r}: labels = 'multi' needs a source that names its classes; its sources don't."
            )
        return LinearProbeEvaluator(self, encoder, sources)


class LinearProbeEvaluator:
    """Logistic regression, trained on one source and tested on another."""

    def __init__(self, config: LinearProbeConfig, encoder: Encoder, sources: Sources):
        self._config, self._encoder, self._sources = config, encoder, sources

    def run(self, params: Any, step: int) -> EvalResult:
        """Encodes both sources once, finds the penalty, fits and tests.

        Raises:
            EvalError: no usable record, too few to split, labels out of range, or vectors that are not finite.
        """
        del step  # Draws no picture.
        config = self._config
        split = encode_split(self._encoder, params, config, self._sources, multi=config.labels == "multi")
        train, test, class_count = split
        rows = TrainingSet(train.vectors, train.labels, class_count, self._encoder.shard, self._encoder.shards)
        fit = functools.partial(rows.fit, tolerance=config.tolerance, max_iterations=config.max_iterations)
        metrics: dict[str, float] = {}
        if len(config.lambdas) == 1:
            best = config.lambdas[0]
        else:
            held_out = self._held_out(train.index)
            validation = Labelled(*(array[held_out] for array in train))

            def score(l2: float) -> float:
                found = self._metrics(fit(l2, ~held_out).classifier, validation, class_count)
                return found["mean_average_precision" if config.labels == "multi" else "top1"]

            best, metrics["validation"] = self._search(score)
        final = fit(best, np.ones(len(train.index), bool))
        metrics = self._metrics(final.classifier, test, class_count) | metrics
        metrics |= {
            "train_examples": float(len(train.index)),
            "lambda": best,
            "iterations": float(final.iterations),
            "converged": float(final.converged),
        }
        return EvalResult(
            {f"linear_probe/{config.name}/{key}": value for key, value in metrics.items()},
            benchmark=BenchmarkEntry("linear_probe", config.name, classification_names(metrics, "lp_")),
        )

    def _search(self, score: Callable[[float], float]) -> tuple[float, float]:
        config = self._config
        if config.lambdas:
            return best_of(config.lambdas, score)
        if config.sweep == "full":
            return best_of(np.logspace(-_DECADES, _DECADES, 96).tolist(), score)
        return binary_search(score)

    def _held_out(self, index_N: np.ndarray) -> np.ndarray:
        """bool [N], the validation split: by place in the source, so that an unusable record moves no other one."""
        count = len(self._sources.train)
        order = np.random.default_rng(self._config.seed).permutation(count)
        chosen = np.zeros(count, bool)
        chosen[order[: round(self._config.validation_share * count)]] = True
        held_out = chosen[index_N]
        if held_out.all() or not held_out.any():
            raise EvalError(
                f"Linear probe {self._config.name!r} can't split its {len(index_N)} training images for the choice of "
                "the penalty; change validation_share, or give one value in lambdas."
            )
        return held_out

    def _metrics(self, classifier: Classifier, part: Labelled, class_count: int) -> dict[str, float]:
        batches = padded_batches(part.vectors, self._encoder.batch_size)
        logits = ((count, _logits(self._encoder.shard(rows), classifier)) for count, rows in batches)
        if part.labels.ndim == 2:
            scores_NxC = np.concatenate([to_host(batch)[:count] for count, batch in logits])
            return multi_label_metrics(scores_NxC, part.labels, self._config.name)
        labels = padded_batches(part.labels, self._encoder.batch_size)
        ranks = [
            to_host(label_ranks(batch, self._encoder.shard(own)))[:count]
            for (count, batch), (_, own) in zip(logits, labels, strict=True)
        ]
        return single_label_metrics(part.labels, np.concatenate(ranks), class_count)


def binary_search(score: Callable[[float], float]) -> tuple[float, float]:
    """The paper's search for a penalty: (lambda, its score).

    Seven values from 1e-6 to 1e6, then the neighbours of the best one at half the distance, and so on until the
    distance is an eighth of a decade. Of equal scores the stronger penalty wins.
    """
    last = _DECADES * _STEPS_A_DECADE
    scores: dict[int, float] = {}

    def best(places: Sequence[int]) -> int:
        for place in places:
            if place not in scores and -last <= place <= last:
                scores[place] = score(10.0 ** (place / _STEPS_A_DECADE))
        return max(scores, key=lambda place: (scores[place], place))

    peak, interval = best(range(-last, last + 1, _FIRST_INTERVAL)), _FIRST_INTERVAL
    while interval > 1:
        interval //= 2
        peak = best((peak - interval, peak + interval))
    return 10.0 ** (peak / _STEPS_A_DECADE), scores[peak]


def best_of(values: Sequence[float], score: Callable[[float], float]) -> tuple[float, float]:
    """(the value of the highest score, that score); of equal scores the stronger penalty wins."""
    found, best = max((score(value), value) for value in values)
    return best, found


@jax.jit
def _logits(vectors_BxD: jax.Array, classifier: Classifier) -> jax.Array:
    product = jnp.matmul(vectors_BxD, classifier.weights, precision=jax.lax.Precision.HIGHEST)
    return product + classifier.bias[None, :]
