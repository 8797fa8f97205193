"""Questions about images: what the model writes is compared with the known answer, word for word.

And what it makes of the same questions when it is shown nothing: a model that reads no images answers alike.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalConfig, EvalResult
from vlm_jax.evals.features import gather, lookahead
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class VqaConfig(EvalConfig):
    """The last answer of every conversation of a source, written token by token, the likeliest each time.

    Metrics, under `vqa/<name>/`: `exact_match`, the share of answers that are the known one but for case, spaces around
    them and a full stop; `exact_match/<kind>` where records name kinds; `loss` in nats a learned token; `examples`.
    With `blank` also `exact_match_blank` and `loss_blank`, of the same questions with images of the mean colour.
    """

    # Tokens of an answer at most.
    max_new_tokens: int = 16
    # Whether the questions are also asked with blank images.
    blank: bool = True

    def problems(self) -> Iterator[tuple[str, str]]:
        """Answers without a token."""
        yield from super().problems()
        if self.max_new_tokens < 1:
            yield "max_new_tokens", f"= {self.max_new_tokens} must be at least 1"

    def build(self, encoder: Encoder, cache_dir: str) -> "VqaEvaluator":
        """Opens the source; raises `ConfigError` also for a model that answers nothing."""
        if not encoder.offers("answer"):
            raise ConfigError(
                f"Evaluation {self.name!r} (vqa) asks questions about images, and this model answers none; take it out "
                "of config.evals."
            )
        return VqaEvaluator(self, encoder, self.open_source(cache_dir))


class VqaEvaluator:
    """The answers to the questions of a source."""

    def __init__(self, config: VqaConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """Writes an answer to every usable record; raises `EvalError` when there is none."""
        del step  # Draws no picture.
        found: dict[str, float] = {}
        for suffix, blank in (("", False), ("_blank", True))[: 1 + self._config.blank]:
            right, kinds = self._right(params, blank)
            found[f"exact_match{suffix}"] = float(right.mean())
            if not blank:
                found["examples"] = float(len(right))
                for kind in sorted(set(kinds) - {""}):
                    found[f"exact_match/{kind}"] = float(right[kinds == kind].mean())
            if self._encoder.offers("held_out_loss"):
                total, count = self._encoder.held_out_loss(params, self._rows(blank), 0)
                found[f"loss{suffix}"] = total / max(count, 1.0)
        return EvalResult({f"vqa/{self._config.name}/{key}": value for key, value in found.items()})

    def _rows(self, blank: bool) -> Iterable[Mapping[str, jax.Array]]:
        batches = self._encoder.loss_batches(self._source, 0)
        return lookahead(self._encoder.blanked(batch) if blank else batch for batch in batches)

    def _right(self, params: Any, blank: bool) -> tuple[np.ndarray, np.ndarray]:
        """(whether each usable record is answered rightly, its kind or "")."""
        encoder, config = self._encoder, self._config
        rows = gather(
            (
                {"ids": encoder.answer(params, batch, config.max_new_tokens, blank), "index": batch["index"]}
                | {"mask": batch["mask"]}
                for batch in encoder.prompt_batches(self._source)
            ),
            f"Evaluation {config.name!r} found no usable question among {len(self._source)} records; the log says why.",
        )
        written = encoder.written(rows["ids"])
        records = [self._source[int(index)] for index in rows["index"]]
        right = [
            canonical_answer(text) == canonical_answer(record["turns"][-1].text)
            for text, record in zip(written, records, strict=True)
        ]
        return np.asarray(right), np.asarray([str(record.get("kind", "")) for record in records])


def canonical_answer(text: str) -> str:
    """An answer as it is compared: lower case, without spaces around it and a full stop behind it."""
    return text.strip().lower().removesuffix(".").strip()


__all__ = ["VqaConfig", "VqaEvaluator", "canonical_answer"]
