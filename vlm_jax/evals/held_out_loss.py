"""The loss that a method is trained on, on images that it was not trained on.

AIM's measure of scale (El-Nouby et al. 2024, figures 1 and 6). The published code validates with nothing hidden, where
its loss is 0 / 0; here what a method hides is drawn as in training, by a seed and the record's place.
"""

import dataclasses
from typing import Any

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalConfig, EvalError, EvalResult
from vlm_jax.evals.features import lookahead
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class HeldOutLossConfig(EvalConfig):
    """The method's own loss, with no drop path, dropout or augmentation.

    Metrics, under `held_out_loss/<name>/`: `loss`, the sum over the whole source divided by the count over the whole
    source, and `count`, how much was counted (images, or hidden patches, or tokens). A loss of several means (AIMv2's)
    takes each of them over the whole source, and `count` is that of the images.
    """

    # Of everything that is drawn: with the record's place it decides what is hidden of an image.
    seed: int = 0

    def build(self, encoder: Encoder, cache_dir: str) -> "HeldOutLossEvaluator":
        """Opens the source; raises `ConfigError` also for a method whose loss is not made of sums over rows."""
        if not encoder.offers("held_out_loss"):
            raise ConfigError(
                f"Evaluation {self.name!r} (held_out_loss): the loss of this method couples the rows of a batch or "
                "needs a teacher or a queue, so it has no value on a data set; take the evaluation out of config.evals."
            )
        return HeldOutLossEvaluator(self, encoder, self.open_source(cache_dir))


class HeldOutLossEvaluator:
    """The loss of every record of a source."""

    def __init__(self, config: HeldOutLossConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """Sums over the source; raises `EvalError` when nothing counts."""
        del step  # Draws no picture.
        config = self._config
        batches = lookahead(self._encoder.loss_batches(self._source, config.seed))
        total, count = self._encoder.held_out_loss(params, batches, config.seed)
        if not count:
            raise EvalError(
                f"Evaluation {config.name!r} found nothing to count among {len(self._source)} records; see the log "
                "above."
            )
        metrics = {"loss": total / count, "count": count}
        return EvalResult({f"held_out_loss/{config.name}/{key}": value for key, value in metrics.items()})


__all__ = ["HeldOutLossConfig", "HeldOutLossEvaluator"]
