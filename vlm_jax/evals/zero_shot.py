"""Zero-shot classification: class names become text features, an image gets the class whose feature is nearest.

The protocol of CLIP (arXiv:2103.00020, section 3.1): a class's feature is the mean of its prompts' L2-normalised
features, normalised again. Not for classifiers with trained weights.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.sources import Source
from vlm_jax.evals import templates
from vlm_jax.evals.base import Encoder, EvalConfig, EvalError, EvalResult
from vlm_jax.evals.features import encode_texts, lookahead, to_host
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class ZeroShotConfig(EvalConfig):
    """Zero-shot classification of a labelled source.

    Metrics, under `zero_shot/<name>/`: `top1`, `top5` (where there are more than five classes), `mean_per_class` (the
    mean over classes of each one's top-1) and `examples`, how many were classified.
    """

    # Names of sets (imagenet80, imagenet7, photo, digits) and templates of one's own, with {} for the class name.
    templates: tuple[str, ...] = ("imagenet80",)
    # Class names by label; empty = those of the source.
    class_names: tuple[str, ...] = ()
    # A class without an example has no accuracy: "error" stops, "skip" leaves it out of `mean_per_class`.
    empty_classes: Literal["error", "skip"] = "error"

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if not self.templates:
            yield "templates", "is empty; give at least one set's name or one template with {}"
        try:
            templates.expand(self.templates)
        except ValueError as error:
            yield "templates", f"can't be used: {error}"

    def build(self, encoder: Encoder, cache_dir: str) -> "ZeroShotEvaluator":
        """Opens the source.

        Raises:
            ConfigError: it holds no records, or nothing names the classes.
        """
        source = self.open_source(cache_dir)
        if not (self.class_names or source.class_names):
            raise ConfigError(
                f"The source of zero-shot evaluation {self.name!r} names no classes; "
                "set class_names of that evaluation, in the order of the labels."
            )
        return ZeroShotEvaluator(self, encoder, source)


class ZeroShotEvaluator:
    """Zero-shot classification of one source."""

    def __init__(self, config: ZeroShotConfig, encoder: Encoder, source: Source):
        self._config = config
        self._encoder = encoder
        self._source = source
        self._class_names = config.class_names or tuple(source.class_names)
        self._templates = templates.expand(config.templates)
        self._tokens: np.ndarray | None = None

    def run(self, params: Any, step: int) -> EvalResult:
        """Classifies every usable record.

        Raises:
            EvalError: a label that no class name stands for, a class without examples (see
                `ZeroShotConfig.empty_classes`), or no usable record at all.
        """
        del step  # Draws no picture.
        classifier_CxE = class_features(
            self._encoder, params, self._prompt_tokens(), len(self._class_names), len(self._templates)
        )
        labels, ranks = self._labels_and_ranks(params, classifier_CxE)
        counts = np.bincount(labels, minlength=len(self._class_names))
        metrics = {"top1": float(np.mean(ranks < 1))}
        if len(self._class_names) > 5:
            metrics["top5"] = float(np.mean(ranks < 5))
        metrics["mean_per_class"] = self._mean_per_class(labels, ranks, counts)
        metrics["examples"] = float(len(labels))
        return EvalResult({f"zero_shot/{self._config.name}/{key}": value for key, value in metrics.items()})

    def _prompt_tokens(self) -> np.ndarray:
        # Kept from the first run on: tokenising 80 prompts for each of 1000 classes takes longer than encoding them.
        if self._tokens is None:
            prompts = [p for name in self._class_names for p in templates.prompts(self._templates, name)]
            self._tokens = self._encoder.tokenize(prompts)
        return self._tokens

    def _labels_and_ranks(self, params: Any, classifier_CxE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, ranks = [], []
        for batch in map(to_host, lookahead(self._dispatch(params, classifier_CxE))):
            mask = batch.pop("mask")
            index, label, rank = (batch[key][mask] for key in ("index", "label", "rank"))
            wrong = (label < 0) | (label >= len(self._class_names))
            if wrong.any():
                raise EvalError(
                    f"Record {index[wrong][0]} of zero-shot evaluation {self._config.name!r} has label "
                    f"{label[wrong][0]}, but the {len(self._class_names)} class names stand for 0 to "
                    f"{len(self._class_names) - 1}; correct class_names of that evaluation, or the record."
                )
            labels.append(label)
            ranks.append(rank)
        if not sum(map(len, labels)):
            raise EvalError(
                f"Zero-shot evaluation {self._config.name!r} found no image with a label among "
                f"{len(self._source)} records; the log above says why."
            )
        return np.concatenate(labels), np.concatenate(ranks)

    def _dispatch(self, params: Any, classifier_CxE: np.ndarray) -> Iterator[dict[str, jax.Array]]:
        for batch in self._encoder.labelled_batches(self._source):
            features_BxE = self._encoder.image_features(params, batch["image"])
            rank = label_ranks(features_BxE, classifier_CxE, batch["label"])
            yield {"rank": rank, **{key: batch[key] for key in ("label", "index", "mask")}}

    def _mean_per_class(self, labels: np.ndarray, ranks: np.ndarray, counts: np.ndarray) -> float:
        empty = [name for name, count in zip(self._class_names, counts, strict=True) if not count]
        if empty and self._config.empty_classes == "error":
            raise EvalError(
                f"Zero-shot evaluation {self._config.name!r} has no example of {len(empty)} of its "
                f"{len(self._class_names)} classes ({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}); "
                "correct class_names or limit, or set empty_classes to 'skip'."
            )
        hits = np.bincount(labels, weights=ranks < 1, minlength=len(counts))
        return float(np.mean(hits[counts > 0] / counts[counts > 0]))


def class_features(
    encoder: Encoder, params: Any, tokens: np.ndarray, class_count: int, template_count: int
) -> np.ndarray:
    """Features of classes, from their prompts.

    Args:
        encoder: its text tower is used, a batch at a time.
        params: of the model.
        tokens: int32 [C * K, L], the K prompts of class 0 first.
        class_count: C.
        template_count: K.

    Returns:
        float32 [C, E], rows of length 1: the normalised mean of the prompts' normalised features.
    """
    sums_CxE: np.ndarray | None = None
    done = 0
    for features_nxE in encode_texts(encoder, params, tokens):
        if sums_CxE is None:
            sums_CxE = np.zeros((class_count, features_nxE.shape[-1]), np.float32)
        # Summed as they come: all prompts of ImageNet at once would be 80 times the classifier.
        np.add.at(sums_CxE, np.arange(done, done + len(features_nxE)) // template_count, features_nxE)
        done += len(features_nxE)
    assert sums_CxE is not None, "a classifier has at least one class and one template"
    return sums_CxE / np.maximum(np.linalg.norm(sums_CxE, axis=-1, keepdims=True), math.ulp(1.0))


@jax.jit
def label_ranks(features_BxE: jax.Array, classifier_CxE: jax.Array, labels_B: jax.Array) -> jax.Array:
    """How many classes come before the right one: int32 [B], 0 = the right class wins.

    Equal scores are ordered by class index, as `top_k` does; a NaN score puts the right class last, so that a broken
    model can't look good. The scale of 100 that CLIP puts on its logits changes no order and is left out. Labels out
    of range give a rank without meaning.
    """
    # In float32 throughout: a TPU would multiply in bfloat16 and make ties where there are none.
    logits_BxC = jnp.matmul(features_BxE, classifier_CxE.T, precision=jax.lax.Precision.HIGHEST)
    own_Bx1 = jnp.take_along_axis(logits_BxC, labels_B[:, None], axis=-1, mode="clip")
    later_BxC = jnp.arange(logits_BxC.shape[-1])[None, :] > labels_B[:, None]
    behind_BxC = (logits_BxC < own_Bx1) | ((logits_BxC == own_Bx1) & later_BxC)
    return logits_BxC.shape[-1] - 1 - jnp.sum(behind_BxC, axis=-1, dtype=jnp.int32)
