"""Accuracy of a model's own classifier on a labelled source: how supervised training and fine-tuning are judged."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalConfig, EvalResult
from vlm_jax.evals.classification import check_labels, label_ranks, single_label_metrics
from vlm_jax.evals.features import gather
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class AccuracyConfig(EvalConfig):
    """Classification by the model's own head.

    Metrics, under `accuracy/<name>/`: `top1`, `top5` (where there are more than five classes), `mean_per_class` and
    `examples`.
    """

    def build(self, encoder: Encoder, cache_dir: str) -> "AccuracyEvaluator":
        """Opens the source.

        Raises:
            ConfigError: it can't be opened or names another number of classes, or the model has no classifier.
        """
        if not encoder.class_count:
            raise ConfigError(
                f"Evaluation {self.name!r} (accuracy) needs a model with a classifier of its own, and this one has "
                "none; use linear_probe, attentive_probe, knn or few_shot."
            )
        source = self.open_source(cache_dir)
        if len(source.class_names) != encoder.class_count:
            named = f"{len(source.class_names)} classes" if source.class_names else "no classes"
            raise ConfigError(
                f"Evaluation {self.name!r} (accuracy): its source names {named} and the model tells "
                f"{encoder.class_count} apart; give it the classes that the model was trained on."
            )
        return AccuracyEvaluator(self, encoder, source)


class AccuracyEvaluator:
    """Classification of every record of a source."""

    def __init__(self, config: AccuracyConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """Classifies every usable record; raises `EvalError` when there is none, or for labels out of range."""
        del step  # Draws no picture.
        encoder, name = self._encoder, self._config.name

        def ranked() -> Iterator[dict[str, jax.Array]]:
            # Of texts beside images the model's own rows are classified, else images.
            pairs = encoder.offers("pair_class_scores")
            for batch in encoder.loss_batches(self._source, 0) if pairs else encoder.labelled_batches(self._source):
                if pairs:
                    scores = encoder.pair_class_scores(params, batch)
                else:
                    scores = encoder.class_scores(params, batch["image"])
                yield {
                    "rank": label_ranks(scores, batch["label"]),
                    **{key: batch[key] for key in ("label", "index", "mask")},
                }

        rows = gather(
            ranked(),
            f"Evaluation {name!r} found no image with a label among {len(self._source)} records; the log above says "
            "why.",
        )
        check_labels(rows["label"], rows["index"], encoder.class_count, name)
        metrics = single_label_metrics(np.asarray(rows["label"]), rows["rank"], encoder.class_count)
        return EvalResult({f"accuracy/{name}/{key}": value for key, value in metrics.items()})
