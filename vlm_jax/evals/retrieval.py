"""Image-text retrieval both ways, with any number of captions an image.

For models that embed images and texts into one space; what is nearest there may be put in order anew by a model of
pairs (`rerank`). The picture of best and worst cases is drawn by `pictures`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.images import decode
from vlm_jax.data.sources import BadRecord, Record, Source
from vlm_jax.evals import pictures
from vlm_jax.evals.base import Encoder, EvalConfig, EvalError, EvalResult
from vlm_jax.evals.benchmark_json import BenchmarkEntry
from vlm_jax.evals.features import encode_images, encode_texts, padded_batches, to_host
from vlm_jax.evals.rerank import Embedded, Matcher, rerank
from vlm_jax.schema import ConfigError

RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(EvalConfig):
    """Retrieval within a captioned source.

    Metrics, under `retrieval/<name>/`, for `image_to_text` and `text_to_image`: `..._r1`, `_r5`, `_r10` (share of
    queries with a right answer among the first k), `_median_rank` and `_mean_rank` (1 = first); and `images`, `texts`,
    how many there were. Under the same prefix the picture `best_and_worst`.

    With `rerank` also `..._r1_reranked` and so on, beside those of the first stage; `matching_accuracy`, the mean of
    `matching_accuracy_own` (captions with their images) and `matching_accuracy_hard` (every caption with the nearest
    image that isn't its own, and every image with the nearest wrong caption).
    """

    # Only the first this many captions of an image (5 is usual for COCO and Flickr30k); 0 = all.
    captions_per_image: int = 5
    # Images with the same captions answer each other's queries: for data in which a caption names a class (digits).
    # The published protocols of COCO and Flickr30k don't.
    shared_captions: bool = False
    # Of the nearest ones of a query, how many are put in order anew by the model that looks at image and text together
    # (ALBEF, appendix: 128 of Flickr30k, 256 of COCO); 0 = none.
    rerank: int = 0
    # Queries in the picture's best half, and as many in its worst half; 0 = no picture.
    pictured: int = 4

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        for key, value in (("captions_per_image", self.captions_per_image), ("pictured", self.pictured)):
            if value < 0:
                yield key, f"= {value} can't be negative"
        if self.rerank and self.rerank <= max(RECALL_AT):
            yield "rerank", f"= {self.rerank} must exceed {max(RECALL_AT)}, of which recall is measured; 0 is none"

    def build(self, encoder: Encoder, cache_dir: str) -> "RetrievalEvaluator":
        """Opens the source.

        Raises:
            ConfigError: it can't be opened, holds no records, or the model has no joint space of images and texts.
        """
        self.check_reads_text(encoder)
        if not encoder.joint_space:
            raise ConfigError(
                f"Evaluation {self.name!r} (retrieval) ranks by the cosine of features, and this model has no joint "
                "space of images and texts; use zero_shot."
            )
        if self.rerank and not encoder.offers("match_pairs"):
            raise ConfigError(
                f"Evaluation {self.name!r} (retrieval): rerank = {self.rerank} needs a model that tells whether an "
                "image and a text belong together (albef), and this one doesn't; set rerank = 0."
            )
        return RetrievalEvaluator(self, encoder, self.open_source(cache_dir))


class RetrievalEvaluator:
    """Retrieval within one source."""

    def __init__(self, config: RetrievalConfig, encoder: Encoder, source: Source):
        self._config = config
        self._encoder = encoder
        self._source = source

    def run(self, params: Any, step: int) -> EvalResult:
        """Ranks every caption for every usable image and the other way round.

        Raises:
            EvalError: no usable record, or an image without a caption.
        """
        images_NxE, index_N = encode_images(self._encoder, params, _Readable(self._source), self._config.name)
        captions, owner_M = self._captions(index_N)
        group_N = _caption_groups(captions, owner_M) if self._config.shared_captions else np.arange(len(index_N))
        tokens_MxL = self._encoder.tokenize(captions)
        texts_MxE = np.concatenate(list(encode_texts(self._encoder, params, tokens_MxL)))
        embedded = Embedded(images_NxE, index_N, texts_MxE, captions, owner_M, group_N)
        image_ranks_N = positive_ranks(self._encoder, images_NxE, group_N, texts_MxE, embedded.owner_ids_M)
        text_ranks_M = positive_ranks(self._encoder, texts_MxE, embedded.owner_ids_M, images_NxE, group_N)
        prefix = f"retrieval/{self._config.name}/"
        stages, matching = {"": (image_ranks_N, text_ranks_M)}, {}
        if self._config.rerank:
            matcher = Matcher(self._encoder, params, _Readable(self._source), tokens_MxL, self._config.name)
            stages["_reranked"], matching = rerank(matcher, embedded, stages[""], self._config.rerank)
        found = {stage: [recall(ranks) for ranks in ways] for stage, ways in stages.items()}
        metrics = {
            f"{prefix}{way}_{key}{stage}": found[stage][place][key]
            for place, way in enumerate(("image_to_text", "text_to_image"))
            for key in found[""][place]
            for stage in stages
        }
        metrics |= {f"{prefix}{key}": value for key, value in matching.items()}
        metrics |= {f"{prefix}images": float(len(images_NxE)), f"{prefix}texts": float(len(texts_MxE))}
        named = dict(zip(("text_retrieval", "image_retrieval"), list(stages.values())[-1], strict=True))
        recalls = {f"{way}_recall@{k}": float(np.mean(r < k)) for way, r in named.items() for k in RECALL_AT}
        drawn = {}
        if self._config.pictured and jax.process_index() == 0:
            drawn[f"{prefix}best_and_worst"] = self._picture(embedded, text_ranks_M, step)
        return EvalResult(metrics, drawn, BenchmarkEntry("zeroshot_retrieval", self._config.name, recalls))

    def _captions(self, index_N: np.ndarray) -> tuple[list[str], np.ndarray]:
        """All captions, and for each the row of its image."""
        captions: list[str] = []
        owner: list[int] = []
        for row, index in enumerate(index_N):
            try:
                texts = self._source.texts(int(index))[: self._config.captions_per_image or None]
            except BadRecord as error:  # an image with a label in place of a caption
                raise EvalError(f"Retrieval evaluation {self._config.name!r} needs captions, but {error}.") from error
            if not texts:
                raise EvalError(
                    f"Record {index} of retrieval evaluation {self._config.name!r} has no caption; "
                    "retrieval needs a source with captions."
                )
            captions.extend(texts)
            owner.extend([row] * len(texts))
        return captions, np.asarray(owner, np.int32)

    def _picture(self, embedded: Embedded, text_ranks_M: np.ndarray, step: int) -> np.ndarray:
        own_scores_M = np.sum(embedded.images_NxE[embedded.owner_M] * embedded.texts_MxE, axis=-1)
        best, worst = best_and_worst(text_ranks_M, own_scores_M, embedded.owner_M, self._config.pictured)
        title = f"{self._config.name}: text to image at step {step:,}, {len(embedded.index_N):,} images"
        best_rows, worst_rows = (
            [self._query(embedded, text, int(text_ranks_M[text])) for text in texts] for texts in (best, worst)
        )
        return pictures.retrieval_picture(best_rows, worst_rows, title)

    def _query(self, embedded: Embedded, text: int, rank: int) -> pictures.Query:
        """One row of the picture: the images nearest to a caption, and its own image."""
        scores_N = embedded.images_NxE @ embedded.texts_MxE[text]
        own = int(embedded.owner_M[text])

        def candidate(row: int) -> pictures.Candidate:
            image = decode(self._source[int(embedded.index_N[row])]["image"])
            is_own = bool(embedded.group_N[row] == embedded.group_N[own])
            return pictures.Candidate(image, float(scores_N[row]), is_own=is_own)

        nearest = np.argsort(-scores_N, kind="stable")[: pictures.CANDIDATES]
        found = tuple(candidate(int(row)) for row in nearest)
        return pictures.Query(embedded.captions[text], found, candidate(own), own_rank=rank + 1)


class _Readable:
    """A source in which a caption that can't be read makes the record unusable."""

    def __init__(self, source: Source):
        self._source, self.class_names, self.texts = source, source.class_names, source.texts

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        if "no_caption" in record:
            raise BadRecord(record["where"], record["key"], record["no_caption"])
        return record


def _caption_groups(captions: list[str], owner_M: np.ndarray) -> np.ndarray:
    """int32 [N], equal for images whose lists of captions are equal."""
    texts: list[list[str]] = [[] for _ in range(int(owner_M.max()) + 1)]
    for caption, row in zip(captions, owner_M, strict=True):
        texts[row].append(caption)
    groups: dict[tuple[str, ...], int] = {}
    return np.asarray([groups.setdefault(tuple(own), len(groups)) for own in texts], np.int32)


def positive_ranks(
    encoder: Encoder,
    queries_QxE: np.ndarray,
    query_ids_Q: np.ndarray,
    gallery_GxE: np.ndarray,
    gallery_ids_G: np.ndarray,
) -> np.ndarray:
    """Rank of each query's best own gallery item: int32 [Q], 0 = first.

    An item is a query's own when their ids are equal; with several own items the best one counts, and the others do
    not stand before it. Items of equal score stand before the own one, and so does every item whose score is NaN: a
    collapsed or broken model then ranks last, not first. At most `encoder.batch_size` x G scores exist at a time,
    spread over the mesh.

    Args:
        encoder: spreads a batch of queries over its mesh.
        queries_QxE: float32, L2-normalised.
        query_ids_Q: int32 >= 0, the image that a query belongs to.
        gallery_GxE: float32, L2-normalised; whole on every device.
        gallery_ids_G: int32 >= 0.
    """
    ranks = []
    gallery, gallery_ids = encoder.replicate(gallery_GxE), encoder.replicate(gallery_ids_G.astype(np.int32))
    query_batches = padded_batches(queries_QxE, encoder.batch_size)
    id_batches = padded_batches(query_ids_Q.astype(np.int32), encoder.batch_size)
    for (count, queries_BxE), (_, ids_B) in zip(query_batches, id_batches, strict=True):
        ranks_B = _batch_ranks(encoder.shard(queries_BxE), encoder.shard(ids_B), gallery, gallery_ids)
        ranks.append(to_host(ranks_B)[:count])
    return np.concatenate(ranks)


@jax.jit
def _batch_ranks(
    queries_BxE: jax.Array, query_ids_B: jax.Array, gallery_GxE: jax.Array, gallery_ids_G: jax.Array
) -> jax.Array:
    # In float32 throughout: a TPU would multiply in bfloat16 and make ties where there are none.
    scores_BxG = jnp.matmul(queries_BxE, gallery_GxE.T, precision=jax.lax.Precision.HIGHEST)
    own_BxG = query_ids_B[:, None] == gallery_ids_G[None, :]
    best_Bx1 = jnp.max(scores_BxG, axis=-1, where=own_BxG, initial=-jnp.inf, keepdims=True)
    # "Not behind" instead of "before": comparisons with NaN are false, and must put the item before the own one.
    not_behind_BxG = ~own_BxG & ~(scores_BxG < best_Bx1)
    return jnp.sum(not_behind_BxG, axis=-1, dtype=jnp.int32)


def recall(ranks: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 (0..1), median and mean rank (1 = first) of ranks that count from 0."""
    return {
        **{f"r{k}": float(np.mean(ranks < k)) for k in RECALL_AT},
        "median_rank": float(np.median(ranks + 1)),
        "mean_rank": float(np.mean(ranks + 1)),
    }


def best_and_worst(
    text_ranks_M: np.ndarray, own_scores_M: np.ndarray, image_of_text_M: np.ndarray, count: int
) -> tuple[list[int], list[int]]:
    """Up to `count` texts of lowest and of highest rank, each of another image.

    Of texts with equal ranks those come first that are nearest to their own image (best) or farthest from it (worst).
    """

    def first_of_each_image(order: np.ndarray, left_out: set[int]) -> list[int]:
        _, first = np.unique(image_of_text_M[order], return_index=True)
        kept = [int(text) for text in order[np.sort(first)] if int(image_of_text_M[text]) not in left_out]
        return kept[:count]

    best = first_of_each_image(np.lexsort((-own_scores_M, text_ranks_M)), set())
    shown = {int(image) for image in image_of_text_M[best]}
    return best, first_of_each_image(np.lexsort((own_scores_M, -text_ranks_M)), shown)
