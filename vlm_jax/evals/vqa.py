"""Questions about images: what the model writes is scored against the known answers, by a benchmark's own rule.

And what it makes of the same questions when it is shown nothing: a model that reads no images answers alike. What
answers are worth is `scoring`'s business.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.data.question_examples import known_answers as answers_of
from vlm_jax.data.sources import Record, Source
from vlm_jax.data.sources.chats import conversation_of
from vlm_jax.evals.base import Encoder, EvalConfig, EvalError, EvalResult
from vlm_jax.evals.features import gather, lookahead
from vlm_jax.evals.held_out import MARKS
from vlm_jax.evals.scoring import SCORERS, Answered, Score, Scores
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class VqaConfig(EvalConfig):
    """The last answer of every conversation of a source, written token by token, the likeliest each time.

    Metrics, under `vqa/<name>/`: those of `score`; `loss` in nats a learned token; `examples`. The first metric of a
    score is the one that its benchmark is known for; with `blank` also that one as `..._blank`, and `loss_blank`, of
    the same questions with images of the mean colour. Questions whose answers are kept secret give no metrics but
    `examples`, and `predictions` to submit.
    """

    # Tokens of an answer at most.
    max_new_tokens: int = 16
    # Whether the questions are also asked with blank images.
    blank: bool = True
    # How answers are scored: word for word, or by the rule of a benchmark.
    score: Score = "exact"
    # Whether prompts, answers and references go to WORKDIR/predictions/vqa-<name>-<step>.jsonl.
    predictions: bool = False

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


class _Said(NamedTuple):
    """Records that could be asked, and what was said to each."""

    records: list[Record]
    texts: list[str]


class VqaEvaluator:
    """The answers to the questions of a source."""

    def __init__(self, config: VqaConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """Writes an answer to every usable record.

        Raises:
            EvalError: no record is usable, or the score can't be taken of these records.
        """
        del step  # Draws no picture.
        name, found = f"vqa/{self._config.name}", {}
        predictions: list[dict[str, Any]] = []
        for suffix, blank in (("", False), ("_blank", True))[: 1 + self._config.blank]:
            said = self._said(params, blank)
            known = [place for place, record in enumerate(said.records) if answers_of(record)]
            scores = self._scores(said, known) if known else None
            metrics = {} if scores is None else scores.metrics
            found |= {f"{key}{suffix}": metrics[key] for key in list(metrics)[: 1 if blank else None]}
            if not blank:
                found["examples"] = float(len(said.texts))
                predictions = _lines(said, known, scores) if self._config.predictions else []
            if known and self._encoder.offers("held_out_loss"):
                total, count = self._encoder.held_out_loss(params, self._rows(blank), 0)
                found[f"loss{suffix}"] = total / max(count, 1.0)
        metrics = {f"{name}/{key}": value for key, value in found.items()}
        return EvalResult(metrics, predictions={name: predictions} if self._config.predictions else {})

    def _rows(self, blank: bool) -> Iterable[Mapping[str, jax.Array]]:
        batches = self._encoder.loss_batches(self._source, 0)
        return lookahead(self._encoder.blanked(batch) if blank else batch for batch in batches)

    def _said(self, params: Any, blank: bool) -> _Said:
        batches = self._encoder.prompt_batches(self._source)
        rows = gather(
            ({"said": self.say(params, batch, blank), **{key: batch[key] for key in MARKS}} for batch in batches),
            f"Evaluation {self._config.name!r} found no usable question among {len(self._source)} records; the log "
            "says why.",
        )
        return _Said([self._source[int(index)] for index in rows["index"]], self.texts(rows["said"]))

    def say(self, params: Any, batch: Mapping[str, jax.Array], blank: bool) -> jax.Array:
        """What is said to the rows of `prompt_batches`, int32 [B, ...]; here the ids of what is written."""
        return self._encoder.answer(params, batch, self._config.max_new_tokens, blank)

    def texts(self, said: np.ndarray) -> list[str]:
        """The texts of what `say` gives."""
        return self._encoder.written(said)

    def _scores(self, said: _Said, known: Sequence[int]) -> Scores:
        """Of the records with known answers."""
        rows = [answered(said.records[place], said.texts[place]) for place in known]
        try:
            return SCORERS[self._config.score](rows)
        except ValueError as error:
            raise EvalError(
                f"Evaluation {self._config.name!r}: score = {self._config.score!r} does not fit the answers of its "
                f"source ({error}); give the source of that benchmark, or another score."
            ) from error


def question_of(record: Record) -> str:
    """What is asked last."""
    turns = conversation_of(record, "")["turns"]
    return next((turn.text for turn in reversed(turns) if turn.role == "user"), "")


def answered(record: Record, text: str) -> Answered:
    """What a score reads of a record and the answer to it."""
    options, kind, group = record.get("options", ()), record.get("kind", ""), record.get("group", "")
    images = conversation_of(record, "")["images"]
    return Answered(text, answers_of(record), options, str(kind), group, len(images))


def _lines(said: _Said, known: Sequence[int], scores: Scores | None) -> list[dict[str, Any]]:
    """An object a question: `question_id`, `prompt`, `answer`, and where they are known `reference` and `score`."""
    worth = {} if scores is None else dict(zip(known, scores.points.tolist(), strict=True))
    lines = []
    for place, (record, text) in enumerate(zip(said.records, said.texts, strict=True)):
        line = {"question_id": record.get("question_id", record["key"]), "prompt": question_of(record), "answer": text}
        if place in worth:
            line |= {"reference": list(answers_of(record)), "score": worth[place]}
        lines.append(line)
    return lines


__all__ = ["VqaConfig", "VqaEvaluator", "answered", "answers_of", "question_of"]
