"""Pictures of what a method makes of the pixels that it hides: image, what is left of it, and the prediction."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalConfig, EvalResult
from vlm_jax.evals.features import first_rows
from vlm_jax.evals.pictures import image_rows
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class ReconstructionsConfig(EvalConfig):
    """A row for each of the first images of the source.

    It gives no metrics; the picture is `reconstructions/<name>/rows`.
    """

    # Images that are drawn.
    pictured: int = 8
    # Of what is hidden: with the record's place it decides the mask.
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if self.pictured < 1:
            yield "pictured", f"= {self.pictured} must be at least 1"

    def build(self, encoder: Encoder, cache_dir: str) -> "ReconstructionsEvaluator":
        """Opens the source; raises `ConfigError` also for a method that predicts no pixels."""
        if not encoder.offers("reconstruct"):
            raise ConfigError(
                f"Evaluation {self.name!r} (reconstructions) is for methods that predict pixels, and this one doesn't; "
                "take it out of config.evals."
            )
        return ReconstructionsEvaluator(self, encoder, self.open_source(cache_dir))


class ReconstructionsEvaluator:
    """Draws what a method reconstructs."""

    def __init__(self, config: ReconstructionsConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """One picture, on the primary process; raises `EvalError` when there is no usable image."""
        config, encoder = self._config, self._encoder

        def drawn(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                "image": batch["image"],
                **encoder.reconstruct(params, batch["image"], batch["index"], config.seed),
            }

        nothing = f"Evaluation {config.name!r} found no usable image among {len(self._source)} records."
        columns = first_rows(encoder.image_batches(self._source), drawn, config.pictured, nothing)
        if jax.process_index():
            return EvalResult({})
        picture = image_rows(columns, f"{config.name}, step {step:,}")
        return EvalResult({}, images={f"reconstructions/{config.name}/rows": picture})
