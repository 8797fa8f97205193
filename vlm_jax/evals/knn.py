"""Weighted k-nearest-neighbour classification of frozen features: what they tell without any training.

The protocol of DINO (Caron et al. 2021, section 4.1, after Wu et al. 2018): cosine similarity, each of the k nearest
training images votes for its class with weight exp(similarity / T).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.evals.base import Encoder, EvalResult
from vlm_jax.evals.classification import label_ranks, single_label_metrics
from vlm_jax.evals.features import padded, padded_batches, to_host
from vlm_jax.evals.frozen import FrozenConfig, Sources, encode_split

# Training images that a batch of test images is compared with at a time: [batch_size, 8192] similarities, spread over
# the mesh.
TRAIN_AT_A_TIME = 8192


@dataclasses.dataclass(frozen=True)
class KnnConfig(FrozenConfig):
    """k-nearest-neighbour classification.

    Metrics, under `knn/<name>/`, for each k: `k<k>_top1`, `k<k>_top5` (where there are more than five classes) and
    `k<k>_mean_per_class`; and `examples`, how many were classified.
    """

    # Numbers of neighbours; 20 is usually the best (DINO).
    k: tuple[int, ...] = (20,)
    # T: a vote weighs exp(cosine / T).
    temperature: float = 0.07

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            yield "k", f"= {self.k} must be one or more different positive numbers"
        if self.temperature <= 0:
            yield "temperature", f"= {self.temperature} must be positive"

    def build(self, encoder: Encoder, cache_dir: str) -> "KnnEvaluator":
        """Opens both sources; raises `ConfigError` when one can't be opened or holds no records."""
        return KnnEvaluator(self, encoder, self.open_sources(cache_dir))


class KnnEvaluator:
    """k-nearest-neighbour classification of one source by another."""

    def __init__(self, config: KnnConfig, encoder: Encoder, sources: Sources):
        self._config, self._encoder, self._sources = config, encoder, sources

    def run(self, params: Any, step: int) -> EvalResult:
        """Classifies every usable record; raises `EvalError` when there is none, or for labels out of range."""
        del step  # Draws no picture.
        config, split = self._config, encode_split(self._encoder, params, self._config, self._sources)
        similarity_QxK, label_QxK = nearest(
            self._encoder, split.test.vectors, split.train.vectors, split.train.labels, max(config.k)
        )
        metrics: dict[str, float] = {}
        for k in config.k:
            ranks_Q = vote_ranks(
                similarity_QxK[:, :k], label_QxK[:, :k], split.test.labels, split.class_count, config.temperature
            )
            found = single_label_metrics(split.test.labels, ranks_Q, split.class_count)
            metrics["examples"] = found.pop("examples")
            metrics |= {f"k{k}_{key}": value for key, value in found.items()}
        return EvalResult({f"knn/{config.name}/{key}": value for key, value in metrics.items()})


def nearest(
    encoder: Encoder,
    queries_QxD: np.ndarray,
    train_NxD: np.ndarray,
    labels_N: np.ndarray,
    k: int,
    train_at_a_time: int = TRAIN_AT_A_TIME,
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and labels of the k nearest training vectors of each query, nearest first.

    Exact, whatever the chunks: of equal similarities the earlier training vector comes first.

    Args:
        encoder: spreads a batch of queries over its mesh.
        queries_QxD: float32 [Q, D].
        train_NxD: float32 [N, D]; a chunk at a time is whole on every device.
        labels_N: int32 >= 0 [N].
        k: neighbours; no more than there are training vectors are found.
        train_at_a_time: vectors of a chunk.

    Returns:
        float32 and int32 [Q, min(k, N)].
    """
    k, chunk = min(k, len(train_NxD)), min(train_at_a_time, len(train_NxD))
    batches = [encoder.shard(rows) for _, rows in padded_batches(_unit(queries_QxD), encoder.batch_size)]
    best: list[Any] = [
        (
            encoder.shard(np.full((encoder.batch_size, k), -np.inf, np.float32)),
            encoder.shard(np.full((encoder.batch_size, k), -1, np.int32)),
        )
        for _ in batches
    ]
    # Chunks outside, queries inside: each training vector then goes to the devices once.
    for start in range(0, len(train_NxD), chunk):
        rows = _unit(train_NxD[start : start + chunk])
        labels = padded(labels_N[start : start + chunk].astype(np.int32) + 1, chunk) - 1  # padding has label -1
        train, labels = encoder.replicate(padded(rows, chunk)), encoder.replicate(labels)
        best = [_merged(*found, queries, train, labels) for found, queries in zip(best, batches, strict=True)]
    similarity, label = (np.concatenate([to_host(found[i]) for found in best])[: len(queries_QxD)] for i in range(2))
    return similarity, label


@jax.jit
def _merged(
    best_BxK: jax.Array, label_BxK: jax.Array, queries_BxD: jax.Array, train_CxD: jax.Array, labels_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best K of those found before and those of a chunk."""
    # In float32 throughout: a TPU would multiply in bfloat16 and take other neighbours.
    found_BxC = jnp.matmul(queries_BxD, train_CxD.T, precision=jax.lax.Precision.HIGHEST)
    found_BxC = jnp.where(labels_C[None, :] < 0, -jnp.inf, found_BxC)
    candidates = jnp.concatenate([best_BxK, found_BxC], axis=1)
    similarity_BxK, position_BxK = jax.lax.top_k(candidates, best_BxK.shape[1])
    labels_BxC = jnp.broadcast_to(labels_C[None, :], found_BxC.shape)
    labels = jnp.concatenate([label_BxK, labels_BxC], axis=1)
    return similarity_BxK, jnp.take_along_axis(labels, position_BxK, axis=1)


def vote_ranks(
    similarity_QxK: np.ndarray, label_QxK: np.ndarray, labels_Q: np.ndarray, class_count: int, temperature: float
) -> np.ndarray:
    """Rank of each query's own class by its votes: int32 [Q], 0 = it wins.

    Equal votes are ordered by class index. A class without a vote has rank `class_count`: it was not found at all.
    """
    # Relative to the nearest: the same order, and a small temperature can't overflow. In float64 and as logarithms:
    # votes of far neighbours would be zeros in float32.
    weight_QxK = np.exp((similarity_QxK.astype(np.float64) - similarity_QxK[:, :1]) / temperature)
    ranks = []
    for start in range(0, len(labels_Q), 4096):
        rows = slice(start, start + 4096)
        votes_BxC = np.zeros((len(labels_Q[rows]), class_count))
        np.add.at(votes_BxC, (np.arange(len(votes_BxC))[:, None], label_QxK[rows]), weight_QxK[rows])
        found = np.take_along_axis(votes_BxC, labels_Q[rows, None], axis=1)[:, 0] > 0
        with np.errstate(divide="ignore"):
            scores_BxC = np.log(votes_BxC).astype(np.float32)
        ranks.append(np.where(found, to_host(label_ranks(scores_BxC, labels_Q[rows])), class_count))
    return np.concatenate(ranks)


def _unit(vectors_NxD: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors_NxD, axis=-1, keepdims=True)
    return (vectors_NxD / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
