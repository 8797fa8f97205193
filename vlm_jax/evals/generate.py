"""Samples of what a model answers, for people: images, question, answer and reference, and what is learned of a row."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vlm_jax.data.chat import marked
from vlm_jax.data.images import decode
from vlm_jax.data.sources import BadRecord, Record, Source
from vlm_jax.data.sources.chats import conversation_of
from vlm_jax.evals.base import Encoder, EvalConfig, EvalResult
from vlm_jax.evals.features import first_rows
from vlm_jax.evals.scoring.short_answers import canonical_answer
from vlm_jax.evals.text_pictures import Sample, sample_rows, supervised_rows
from vlm_jax.evals.vqa import answers_of, question_of
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class GenerateConfig(EvalConfig):
    """Answers to the first prompts of a source, written token by token, the likeliest each time.

    It gives no metrics. The picture and the text `generate/<name>/answers` show images, question, answer and reference;
    `generate/<name>/supervised` shows the same records as rows of training, marked what of them is learned.
    """

    # Prompts that are answered.
    count: int = 8
    # Tokens of an answer at most.
    max_new_tokens: int = 64

    def problems(self) -> Iterator[tuple[str, str]]:
        """Nothing to write."""
        yield from super().problems()
        for key, value in (("count", self.count), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                yield key, f"= {value} must be at least 1"

    def build(self, encoder: Encoder, cache_dir: str) -> "GenerateEvaluator":
        """Opens the source; raises `ConfigError` also for a model that answers nothing."""
        if not encoder.offers("answer"):
            raise ConfigError(
                f"Evaluation {self.name!r} (generate) is for models that answer, and this one doesn't; take it out of "
                "config.evals."
            )
        return GenerateEvaluator(self, encoder, self.open_source(cache_dir))


class GenerateEvaluator:
    """Shows what a model answers."""

    def __init__(self, config: GenerateConfig, encoder: Encoder, source: Source):
        self._config, self._encoder, self._source = config, encoder, source

    def run(self, params: Any, step: int) -> EvalResult:
        """Pictures and texts, on the primary process; raises `EvalError` when there is no usable prompt."""
        config, encoder = self._config, self._encoder

        def answers(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return {"ids": encoder.answer(params, batch, config.max_new_tokens), "index": batch["index"]}

        nothing = f"Evaluation {config.name!r} found no usable prompt among {len(self._source)} records."
        rows = first_rows(encoder.prompt_batches(self._source), answers, config.count, nothing)
        if jax.process_index():
            return EvalResult({})
        texts = encoder.written(rows["ids"])
        records = [self._source[int(index)] for index in rows["index"]]
        samples = [_sample(record, text) for record, text in zip(records, texts, strict=True)]
        name, title = f"generate/{config.name}", f"{config.name}, step {step:,}"
        learned = list(self._learned(records))
        images = {f"{name}/answers": sample_rows(samples, title)}
        notes = {f"{name}/answers": "\n".join(map(_block, samples))}
        if learned:
            images[f"{name}/supervised"] = supervised_rows(learned, f"{title}: what is learned is green")
            notes[f"{name}/supervised"] = "\n".join(_fenced(marked(row)) for row in learned)
        return EvalResult({}, images=images, texts=notes)

    def _learned(self, records: list[Record]) -> Iterator[list[tuple[str, bool]]]:
        """The records as rows of training; those without a known answer are none."""
        for record in records:
            try:
                yield self._encoder.spans(record)
            except BadRecord:
                continue


def _sample(record: Record, text: str) -> Sample:
    references = answers_of(record)
    right = canonical_answer(text) in map(canonical_answer, references)
    images = [decode(image.load()) for image in conversation_of(record, "")["images"]]
    return Sample(images, question_of(record), text, references, right)


def _block(sample: Sample) -> str:
    references = " | ".join(dict.fromkeys(sample.references))
    return _fenced(f"question:  {sample.question}\nanswer:    {sample.answer}\nreference: {references}")


def _fenced(text: str) -> str:
    # Four marks, for what a model writes may hold three.
    return f"````\n{text}\n````\n"


__all__ = ["GenerateConfig", "GenerateEvaluator"]
