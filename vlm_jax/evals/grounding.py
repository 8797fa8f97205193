"""Where in an image a model of pairs sees what a phrase names, though no box was ever shown to it in training.

Grad-CAM from the score of matching on the fusion encoder's look at the patches (Li et al. 2021, section 6.4), judged by
the pointing game (Zhang et al. 2016, section 4.2) and, where there are boxes of a detector, by RefCOCO+'s protocol.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vlm_jax.data.examples import decoded
from vlm_jax.data.sources import Record, Source
from vlm_jax.evals.base import Encoder, EvalConfig, EvalError, EvalResult
from vlm_jax.evals.features import gather, padded_batches, to_host
from vlm_jax.evals.pictures import Grounded, grounding_picture
from vlm_jax.models.position import resize_matrices
from vlm_jax.schema import ConfigError

OVERLAP = 0.5  # of a chosen box with the true one, to be right


@dataclasses.dataclass(frozen=True)
class GroundingConfig(EvalConfig):
    """Maps of the patches for all phrases of a source whose records have `phrases` and their `boxes`.

    Metrics, under `grounding/<name>/`: `pointing`, the share of phrases whose map is largest in a patch with its centre
    inside the box of what they name; `pointing_patch`, the same where the patch need only touch the box;
    `pointing_chance`, what a random pixel would get; `phrases`. Where records have `candidates`, boxes of a detector,
    `accuracy` is the share of phrases whose map chooses one that overlaps the true box by half or more;
    `accuracy/<split>` where they name splits. The picture is `grounding/<name>/maps`.
    """

    # Whose look at the image is asked: a layer of the fusion encoder, counted from 1 among those that look. Published
    # for six of them: the third, which the authors call layer 8 of BERT.
    layer: int = 3
    # Phrases that are drawn.
    pictured: int = 6

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if self.layer < 1:
            yield "layer", f"= {self.layer} must be at least 1, the first layer"
        if self.pictured < 0:
            yield "pictured", f"= {self.pictured} must not be negative; 0 draws nothing"

    def build(self, encoder: Encoder, cache_dir: str) -> "GroundingEvaluator":
        """Opens the source; raises `ConfigError` also for a model that can't be asked, or that sees parts of images."""
        if not encoder.offers("ground_pairs"):
            raise ConfigError(
                f"Evaluation {self.name!r} (grounding) is for models that see image and text together (ALBEF), and "
                "this one doesn't; take it out of config.evals."
            )
        if not encoder.sees_whole_images:
            raise ConfigError(
                f"Evaluation {self.name!r} (grounding) needs images squashed to the model's square, for boxes to stay "
                "where they are; set config.data.preprocess.resize = 'squash'"
            )
        return GroundingEvaluator(self, encoder, self.open_source(cache_dir))


class GroundingEvaluator:
    """The maps of all phrases of a source, and how good they are."""

    def __init__(self, config: GroundingConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """Asks for every phrase of every usable record; raises `EvalError` when there is none."""
        name = self._config.name
        rows = gather(
            self._dispatch(params),
            f"Evaluation {name!r} found no phrase with a box among {len(self._source)} records; see the log above.",
        )
        found: dict[str, list[float]] = {}
        drawn: list[Grounded] = []
        for place in sorted(range(len(rows["index"])), key=lambda row: (rows["index"][row], rows["phrase"][row])):
            record, number = self._source[int(rows["index"][place])], int(rows["phrase"][place])
            judged, grounded = judge(record, number, rows["maps"][place])
            for key, value in judged.items():
                found.setdefault(key, []).append(value)
            if len(drawn) < self._config.pictured:
                drawn.append(grounded())
        metrics = {key: float(np.mean(values)) for key, values in found.items()}
        metrics["phrases"] = float(len(rows["index"]))
        images = {}
        if drawn and jax.process_index() == 0:
            images[f"grounding/{name}/maps"] = grounding_picture(drawn, f"{name}, step {step:,}")
        return EvalResult({f"grounding/{name}/{key}": value for key, value in metrics.items()}, images=images)

    def _dispatch(self, params: Any) -> Iterator[dict[str, jax.Array]]:
        """Maps of a batch of phrases at a time, whose images are encoded once."""
        encoder, size = self._encoder, self._encoder.batch_size
        for batch in encoder.image_batches(self._source):
            index_B = to_host(batch["index"])
            asked = [
                (row, index_B[row], number, phrase)
                for row in np.flatnonzero(to_host(batch["mask"]))
                for number, phrase in enumerate(self._phrases(int(index_B[row])))
            ]
            if not asked:
                continue
            images = encoder.match_images(params, batch["image"])
            tokens = encoder.tokenize([phrase for *_, phrase in asked])
            named = np.asarray([place for *place, _ in asked], np.int32)
            chunks = zip(padded_batches(tokens, size), padded_batches(named, size), strict=True)
            for (count, tokens_PxL), (_, named_Px3) in chunks:
                texts = encoder.match_texts(params, encoder.shard(tokens_PxL))
                pairs_Px2 = np.stack([named_Px3[:, 0], np.arange(size, dtype=np.int32)], axis=1)
                maps = encoder.ground_pairs(params, images, texts, encoder.shard(pairs_Px2), self._config.layer)
                yield {
                    "maps": maps,
                    "index": encoder.shard(named_Px3[:, 1]),
                    "phrase": encoder.shard(named_Px3[:, 2]),
                    "mask": encoder.shard(np.arange(size) < count),
                }

    def _phrases(self, index: int) -> tuple[str, ...]:
        record = self._source[index]
        if "phrases" not in record or len(record["phrases"]) != len(record.get("boxes", ())):
            raise EvalError(
                f"Evaluation {self._config.name!r}: record {record['key']} of {record['where']} has no `phrases` with "
                "a box each; use a source of referring expressions, or shapes with named_objects = true."
            )
        return record["phrases"]


def judge(record: Record, number: int, map_RxC: np.ndarray) -> tuple[dict[str, float], Any]:
    """(what the map of a record's phrase gets in each measure, what makes it a `Grounded`)."""
    box = np.asarray(record["boxes"][number], np.float64)
    width, height = record["size"] if "size" in record else decoded(record).shape[1::-1]
    map_HxW = resized(map_RxC, height, width)
    left, top, *sides = _largest_patch(map_RxC, height, width)
    judged = {
        "pointing": float(_touches(box, (left + sides[0] / 2, top + sides[1] / 2, 0, 0))),
        "pointing_patch": float(_touches(box, (left, top, sides[0], sides[1]))),
        "pointing_chance": box[2] * box[3] / (width * height),
    }
    if "candidates" in record:
        chosen = best_box(map_HxW, record["candidates"])
        judged["accuracy"] = float(chosen is not None and overlap(box, chosen) >= OVERLAP)
        if record.get("split"):
            judged[f"accuracy/{record['split']}"] = judged["accuracy"]
    return judged, lambda: Grounded(record["phrases"][number], decoded(record), map_HxW, tuple(box))


def resized(map_RxC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The map of patches as one of pixels [height, width], bicubic as PyTorch's."""
    rows, columns = _matrices(map_RxC.shape, (height, width))
    return rows @ np.asarray(map_RxC, np.float64) @ columns.T


@functools.lru_cache(maxsize=64)
def _matrices(grid: tuple[int, int], pixels: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return resize_matrices(grid, pixels, "bicubic")


def _largest_patch(map_RxC: np.ndarray, height: int, width: int) -> tuple[float, float, float, float]:
    rows, columns = map_RxC.shape
    row, column = np.unravel_index(np.argmax(map_RxC), map_RxC.shape)
    return column * width / columns, row * height / rows, width / columns, height / rows


def _touches(box: np.ndarray, other: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, top, width, height) share a point."""
    across = box[0] <= other[0] + other[2] and other[0] <= box[0] + box[2]
    return bool(across and box[1] <= other[1] + other[3] and other[1] <= box[1] + box[3])


def best_box(map_HxW: np.ndarray, boxes_Nx4: np.ndarray) -> np.ndarray | None:
    """The box (left, top, width, height) that holds most of the map for the root of its area; None: none holds any.

    As in the published code, pixels count whose numbers lie between the box's edges cut to whole numbers.
    """
    best, chosen = 0.0, None
    for box in boxes_Nx4:
        left, top, width, height = (float(value) for value in box[:4])
        inside = map_HxW[int(top) : int(top + height), int(left) : int(left + width)]
        score = float(inside.sum()) / (width * height) ** 0.5
        if score > best:
            best, chosen = score, box[:4]
    return chosen


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes (left, top, width, height), in whole pixels as RefCOCO's tools count."""
    sides = []
    for axis in (0, 1):
        first = max(box[axis], other[axis])
        last = min(box[axis] + box[axis + 2] - 1, other[axis] + other[axis + 2] - 1)
        sides.append(last - first + 1 if first < last else 0.0)
    shared = sides[0] * sides[1]
    return float(shared / (box[2] * box[3] + other[2] * other[3] - shared))


__all__ = ["GroundingConfig", "GroundingEvaluator", "best_box", "judge", "overlap", "resized"]
