"""Zero-shot classification: the names of the classes, put into prompts, are all that tells the classes apart.

The protocol of CLIP (arXiv:2103.00020, section 3.1): a class's feature is the mean of its prompts' L2-normalised
features, normalised again, and an image gets the class whose feature is nearest. Models without a joint space of
images and texts (captioners) score every prompt against every image; a class's score is the mean of its prompts'. Not
for classifiers with trained weights.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.sources import Source
from vlm_jax.evals import class_names, templates
from vlm_jax.evals.base import Encoder, EvalConfig, EvalResult
from vlm_jax.evals.benchmark_json import BenchmarkEntry, classification_names
from vlm_jax.evals.classification import (
    EmptyClasses,
    check_classes,
    check_labels,
    label_ranks,
    multi_label_metrics,
    single_label_metrics,
)
from vlm_jax.evals.features import encode_texts, gather
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class ZeroShotConfig(EvalConfig):
    """Zero-shot classification of a labelled source.

    Metrics, under `zero_shot/<name>/`: `top1`, `top5` (where there are more than five classes), `mean_per_class` (the
    mean over classes of each one's top-1) and `examples`, how many were classified. With `labels="multi"`:
    `mean_average_precision`, `voc07_map` and `examples`.
    """

    # Names of sets (imagenet80, imagenet7, photo, digits) and templates of one's own, with {} for the class name.
    templates: tuple[str, ...] = ("imagenet80",)
    # Class names by label, or the name of a list ("imagenet"); empty = those of the source.
    class_names: tuple[str, ...] = ()
    # Labels of a record: exactly one, or any number of them.
    labels: Literal["single", "multi"] = "single"
    # A class without an example has no accuracy: "error" stops, "skip" leaves it out of the means over classes.
    empty_classes: EmptyClasses = "error"
    # Prompts that a model without a joint space scores at a time, against a batch of images.
    prompts_at_a_time: int = 64

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if not self.templates:
            yield "templates", "is empty; give at least one set's name or one template with {}"
        try:
            templates.expand(self.templates)
        except ValueError as error:
            yield "templates", f"can't be used: {error}"
        if self.prompts_at_a_time < 1:
            yield "prompts_at_a_time", f"= {self.prompts_at_a_time} must be 1 or more"

    def build(self, encoder: Encoder, cache_dir: str) -> "ZeroShotEvaluator":
        """Opens the source.

        Raises:
            ConfigError: it holds no records, nothing names the classes, or the model reads no text.
        """
        self.check_reads_text(encoder)
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
        self._class_names = class_names.expand(config.class_names) or tuple(source.class_names)
        self._templates = templates.expand(config.templates)
        self._tokens: np.ndarray | None = None

    def run(self, params: Any, step: int) -> EvalResult:
        """Classifies every usable record.

        Raises:
            EvalError: a label that no class name stands for, a class without examples (see
                `ZeroShotConfig.empty_classes`), or no usable record at all.
        """
        del step  # Draws no picture.
        config = self._config
        rows = gather(
            self._dispatch(params),
            f"Zero-shot evaluation {config.name!r} found no image with a label among {len(self._source)} records; "
            "the log above says why.",
        )
        metrics = self._multi_label(rows) if config.labels == "multi" else self._single_label(rows)
        return EvalResult(
            {f"zero_shot/{config.name}/{key}": value for key, value in metrics.items()},
            benchmark=BenchmarkEntry("zeroshot_classification", config.name, classification_names(metrics)),
        )

    def _single_label(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        count = len(self._class_names)
        check_labels(rows["label"], rows["index"], count, self._config.name)
        self._check_classes(np.bincount(rows["label"], minlength=count))
        return single_label_metrics(rows["label"], rows["rank"], count)

    def _multi_label(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        self._check_classes(rows["label"].sum(axis=0))
        return multi_label_metrics(rows["scores"], rows["label"], self._config.name)

    def _check_classes(self, counts_C: np.ndarray) -> None:
        if self._config.empty_classes == "error":
            check_classes(counts_C, self._class_names, self._config.name)

    def _prompt_tokens(self) -> np.ndarray:
        # Kept from the first run on: tokenising 80 prompts for each of 1000 classes takes longer than encoding them.
        if self._tokens is None:
            prompts = [p for name in self._class_names for p in templates.prompts(self._templates, name)]
            self._tokens = self._encoder.tokenize(prompts)
        return self._tokens

    def _dispatch(self, params: Any) -> Iterator[dict[str, jax.Array]]:
        several = self._config.labels == "multi"
        batches = self._encoder.labelled_batches(self._source, len(self._class_names) if several else 0)
        for batch, scores_BxC in self._scored(params, batches):
            rows = {key: batch[key] for key in ("label", "index", "mask")}
            # Ranks are made on the mesh: a data set's scores on a thousand classes are not needed here.
            yield {**rows, **({"scores": scores_BxC} if several else {"rank": label_ranks(scores_BxC, batch["label"])})}

    def _scored(self, params: Any, batches: Any) -> Iterator[tuple[Any, jax.Array]]:
        """Each batch with its scores [B, C]."""
        encoder, tokens, class_count = self._encoder, self._prompt_tokens(), len(self._class_names)
        if encoder.joint_space:
            classifier_CxE = encoder.replicate(
                class_features(encoder, params, tokens, class_count, len(self._templates))
            )
            for batch in batches:
                yield batch, cosines(encoder.image_features(params, batch["image"]), classifier_CxE)
            return
        for batch in batches:
            yield (
                batch,
                class_scores(encoder, params, batch["image"], tokens, class_count, self._config.prompts_at_a_time),
            )


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
def cosines(features_BxE: jax.Array, classifier_CxE: jax.Array) -> jax.Array:
    """[B, C] in float32 throughout: a TPU would multiply in bfloat16 and make ties where there are none.

    The scale of 100 that CLIP puts on its logits changes no order and is left out.
    """
    return jnp.matmul(features_BxE, classifier_CxE.T, precision=jax.lax.Precision.HIGHEST)


def class_scores(
    encoder: Encoder, params: Any, images_BxHxWx3: jax.Array, tokens: np.ndarray, class_count: int, at_a_time: int
) -> jax.Array:
    """Mean score of each class's prompts against each image.

    Args:
        encoder: its `prompt_scores` is used, on chunks of one static size.
        params: of the model.
        images_BxHxWx3: a batch of images.
        tokens: int32 [C * K, L], the K prompts of class 0 first.
        class_count: C.
        at_a_time: prompts of a chunk.

    Returns:
        float32 [B, C].
    """
    size = min(at_a_time, len(tokens))
    # The last chunk starts earlier: a shorter one would compile anew, and prompts of zeros mean nothing.
    starts = [*range(0, len(tokens) - size, size), len(tokens) - size]
    chunks = [encoder.prompt_scores(params, images_BxHxWx3, tokens[start : start + size]) for start in starts]
    return _class_means(chunks, class_count, -len(tokens) % size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _class_means(chunks: list[jax.Array], class_count: int, repeated: int) -> jax.Array:
    """Means over the prompts of a class; the last chunk begins with `repeated` prompts of the one before it."""
    scores_BxCK = jnp.concatenate([*chunks[:-1], chunks[-1][:, repeated:]], axis=1)
    return scores_BxCK.reshape(scores_BxCK.shape[0], class_count, -1).mean(axis=-1)
