"""Questions about images, answered by the likeliest of a list of answers (ALBEF, Li et al. 2021, section 4).

For models with a decoder of answers; freely written answers are `vqa`'s, which also scores these.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax.data.question_examples import known_answers
from vlm_jax.data.sources import BadRecord, Source
from vlm_jax.evals.base import Encoder
from vlm_jax.evals.vqa import VqaConfig, VqaEvaluator
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class AnswerRankingConfig(VqaConfig):
    """As `vqa`, with the same metrics, except that an answer is one of a list and not written freely.

    Of the answers those `k` whose first token is the likeliest are read to their end, and the likeliest is given.
    """

    # file with the JSON list of all answers (ALBEF: answer_list.json); empty: the known answers of the source
    answers: str = ""
    # answers that are read to their end
    k: int = 128
    # whether the likelihood of an answer's first token counts twice, as in the published code
    first_twice: bool = True

    def problems(self) -> Iterator[tuple[str, str]]:
        """No answer at all."""
        yield from super().problems()
        if self.k < 1:
            yield "k", f"= {self.k} must be at least 1"

    def build(self, encoder: Encoder, cache_dir: str) -> "AnswerRankingEvaluator":
        """Opens the source and the list; raises `ConfigError` also for a model that ranks nothing."""
        if not encoder.offers("rank_answers"):
            raise ConfigError(
                f"Evaluation {self.name!r} (answer_ranking) is for models with a decoder of answers, and this one has "
                "none; use vqa, or take it out of config.evals."
            )
        source = self.open_source(cache_dir)
        answers = read_answers(self.answers, self.name) if self.answers else answers_in(source)
        if not answers:
            raise ConfigError(
                f"config.evals.{self.name}.answers is empty and the source knows no answer; give a list of answers"
            )
        return AnswerRankingEvaluator(self, encoder, source, answers)


class AnswerRankingEvaluator(VqaEvaluator):
    """The best of some answers to each question of a source."""

    def __init__(self, config: AnswerRankingConfig, encoder: Encoder, source: Source, answers: list[str]):
        super().__init__(config, encoder, source)
        self.answers, self._ranking = answers, config

    def say(self, params: Any, batch: Mapping[str, jax.Array], blank: bool) -> jax.Array:
        """See the base: the place of the best answer, int32 [B]."""
        config, answers_NxL = self._ranking, self._answer_rows
        return self._encoder.rank_answers(params, batch, answers_NxL, config.k, config.first_twice, blank)[0][:, 0]

    def texts(self, said: np.ndarray) -> list[str]:
        """See the base."""
        return [self.answers[int(place)] for place in said]

    @functools.cached_property
    def _answer_rows(self) -> np.ndarray:
        return self._encoder.answer_rows(self.answers)


def read_answers(path: str, name: str) -> list[str]:
    """The list of a file; raises `ConfigError` when it holds something else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            answers = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"config.evals.{name}.answers = {path!r} can't be read as JSON ({error})") from None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ConfigError(f"config.evals.{name}.answers = {path!r} must hold a list of texts, all possible answers")
    return answers


def answers_in(source: Source) -> list[str]:
    """All different answers that a source knows, in their order; records that can't be read are passed over."""
    found: set[str] = set()
    for index in range(len(source)):
        try:
            found.update(known_answers(source[index]))
        except BadRecord:
            continue
    return sorted(found)


__all__ = ["AnswerRankingConfig", "AnswerRankingEvaluator", "answers_in", "read_answers"]
