"""The second stage of retrieval: the nearest ones of a query in an order by a model that sees image and text together.

Li et al. (2021, section 3.4 and appendix): the k candidates with the highest cosine are ranked by the score of matching
(ITM). Also how often such a model is right of pairs that are hard to tell. The first stage is `retrieval`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalError
from vlm_jax.evals.features import gather, lookahead, padded_batches, to_host
from vlm_jax.models.albef import MATCHED


@dataclasses.dataclass(frozen=True)
class Embedded:
    """N images and M captions of a source; `index_N` are the images' records, `owner_M` the captions' image rows.

    Images of one `group_N` are right answers to each other's captions; without shared captions each is its own group.
    """

    images_NxE: np.ndarray  # noqa: N815
    index_N: np.ndarray  # noqa: N815
    texts_MxE: np.ndarray  # noqa: N815
    captions: list[str]
    owner_M: np.ndarray  # noqa: N815
    group_N: np.ndarray  # noqa: N815

    @property
    def owner_ids_M(self) -> np.ndarray:  # noqa: N802
        """int [M], the group of each caption's image."""
        return self.group_N[self.owner_M]


@dataclasses.dataclass(frozen=True)
class Matcher:
    """A model of pairs, and the images and captions of a source that are its pairs.

    Attributes:
        encoder: its `match_*` are used.
        params: of the model.
        source: the images.
        tokens_MxL: the captions.
        name: of the evaluation, for messages.
    """

    encoder: Encoder
    params: Any
    source: Source
    tokens_MxL: np.ndarray  # noqa: N815
    name: str

    def scores(self, index_N: np.ndarray, image_R: np.ndarray, text_R: np.ndarray) -> np.ndarray:
        """float32 [R, 2], scores of "no" and "yes" of pairs; `image_R` ascends, and counts in the records `index_N`.

        Each image is encoded once, and stays on the devices with all captions while its pairs are scored; a batch of
        pairs at a time, spread over the mesh.
        """
        return gather(self._dispatch(index_N, image_R, text_R), "there are pairs")["scores"]

    def _dispatch(self, index_N: np.ndarray, image_R: np.ndarray, text_R: np.ndarray) -> Iterator[dict[str, jax.Array]]:
        encoder, texts, first = self.encoder, self._texts(), 0
        for batch in encoder.image_batches(self.source):
            place_U = np.flatnonzero(to_host(batch["mask"]))
            last = first + len(place_U)
            if not np.array_equal(to_host(batch["index"])[place_U], index_N[first:last]):
                raise EvalError(f"Retrieval evaluation {self.name!r}: other images can be read than a moment ago.")
            begin, end = np.searchsorted(image_R, (first, last))
            pairs_Px2 = np.stack([place_U[image_R[begin:end] - first], text_R[begin:end]], axis=1).astype(np.int32)
            images = encoder.match_images(self.params, batch["image"])
            for count, pairs_Bx2 in padded_batches(pairs_Px2, encoder.batch_size):
                scores_Bx2 = encoder.match_pairs(self.params, images, texts, encoder.shard(pairs_Bx2))
                yield {"scores": scores_Bx2, "mask": encoder.shard(np.arange(len(pairs_Bx2)) < count)}
            first = last

    def _texts(self) -> dict[str, jax.Array]:
        """What the model takes of all captions, whole on every device."""
        encoder = self.encoder
        dispatched = (
            (count, encoder.match_texts(self.params, encoder.shard(tokens_BxL)))
            for count, tokens_BxL in padded_batches(self.tokens_MxL, encoder.batch_size)
        )
        parts = [{key: x[:count] for key, x in to_host(texts).items()} for count, texts in lookahead(dispatched)]
        return {key: encoder.replicate(np.concatenate([part[key] for part in parts])) for key in parts[0]}


def rerank(
    matcher: Matcher, embedded: Embedded, ranks: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, float]]:
    """The ranks after the second stage.

    Args:
        matcher: the model of pairs.
        embedded: the features of the first stage.
        ranks: of the best own item of each image and each caption in the first stage, int32 [N] and [M], 0 = first.
        k: candidates of a query. Behind them the order of the first stage stays.

    Returns:
        (ranks as given, the metrics `matching_accuracy...`).

    Raises:
        EvalError: all images share their captions, so nothing is wrong.
    """
    encoder, texts, groups = matcher.encoder, len(embedded.texts_MxE), embedded.group_N
    if len(np.unique(groups)) < 2:
        raise EvalError(f"Retrieval evaluation {matcher.name!r} has one image alone; matching needs a wrong one.")
    image = (embedded.images_NxE, groups)
    text = (embedded.texts_MxE, embedded.owner_ids_M)
    texts_NxK, wrong_text_N = nearest(encoder, image, text, k)
    images_MxK, wrong_image_M = nearest(encoder, text, image, k)
    row_N, row_M = np.arange(len(groups), dtype=np.int64), np.arange(texts, dtype=np.int64)
    # A pair as one number: sorted by image, and each once whoever asks for it.
    asked = {
        "texts": row_N[:, None] * texts + texts_NxK,
        "images": images_MxK * texts + row_M[:, None],
        "own": embedded.owner_M * texts + row_M,
        "hard": np.concatenate([row_N * texts + wrong_text_N, wrong_image_M * texts + row_M]),
    }
    pair_R = np.unique(np.concatenate([pairs.ravel() for pairs in asked.values()]))
    scores_Rx2 = matcher.scores(embedded.index_N, pair_R // texts, pair_R % texts)
    found = {name: scores_Rx2[np.searchsorted(pair_R, pairs)] for name, pairs in asked.items()}
    new_ranks = (
        _second_ranks(found["texts"], text[1][texts_NxK] == groups[:, None], ranks[0]),
        _second_ranks(found["images"], groups[images_MxK] == text[1][:, None], ranks[1]),
    )
    other = 1 - MATCHED
    own = float(np.mean(found["own"][:, MATCHED] > found["own"][:, other]))
    hard = float(np.mean(found["hard"][:, other] > found["hard"][:, MATCHED]))
    return new_ranks, {
        "matching_accuracy": (own + hard) / 2,
        "matching_accuracy_own": own,
        "matching_accuracy_hard": hard,
    }


def nearest(
    encoder: Encoder, queries: tuple[np.ndarray, np.ndarray], gallery: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest items of each query, spread over the mesh as ranks are.

    Args:
        encoder: spreads a batch of queries over its mesh.
        queries: float32 [Q, E], and whose they are, int [Q].
        gallery: float32 [G, E] and int [G].
        k: how many; of a smaller gallery all.

    Returns:
        (int64 [Q, K], the nearest first; int64 [Q], the nearest of another's).
    """
    features, ids = encoder.replicate(gallery[0]), encoder.replicate(gallery[1].astype(np.int32))
    query_batches = padded_batches(queries[0], encoder.batch_size)
    id_batches = padded_batches(queries[1].astype(np.int32), encoder.batch_size)
    parts = []
    for (count, queries_BxE), (_, ids_B) in zip(query_batches, id_batches, strict=True):
        found = _batch_nearest(encoder.shard(queries_BxE), encoder.shard(ids_B), features, ids, min(k, len(gallery[0])))
        parts.append([part[:count].astype(np.int64) for part in to_host(found)])
    near_QxK, wrong_Q = (np.concatenate(part) for part in zip(*parts, strict=True))
    return near_QxK, wrong_Q


@functools.partial(jax.jit, static_argnums=4)
def _batch_nearest(
    queries_BxE: jax.Array, query_ids_B: jax.Array, gallery_GxE: jax.Array, gallery_ids_G: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    # In float32 throughout, as ranks are.
    scores_BxG = jnp.matmul(queries_BxE, gallery_GxE.T, precision=jax.lax.Precision.HIGHEST)
    own_BxG = query_ids_B[:, None] == gallery_ids_G[None, :]
    wrong_BxG = jnp.where(own_BxG | jnp.isnan(scores_BxG), -jnp.inf, scores_BxG)
    # Of a broken model that gives nothing but NaN the first other one.
    wrong_B = jnp.where(jnp.isneginf(wrong_BxG.max(axis=1)), jnp.argmin(own_BxG, axis=1), jnp.argmax(wrong_BxG, axis=1))
    return jax.lax.top_k(scores_BxG, k)[1], wrong_B


def _second_ranks(scores_QxKx2: np.ndarray, own_QxK: np.ndarray, ranks_Q: np.ndarray) -> np.ndarray:
    """Ranks among the candidates, by "yes"; of queries without an own one among them that of the first stage.

    As there, equal scores and NaN stand before the own one.
    """
    scores_QxK = scores_QxKx2[..., MATCHED]
    best_Qx1 = np.max(np.where(own_QxK, scores_QxK, -np.inf), axis=1, keepdims=True)
    not_behind_QxK = ~own_QxK & ~(scores_QxK < best_Qx1)
    return np.where(own_QxK.any(axis=1), not_behind_QxK.sum(axis=1), ranks_Q).astype(np.int32)


__all__ = ["Embedded", "Matcher", "nearest", "rerank"]
