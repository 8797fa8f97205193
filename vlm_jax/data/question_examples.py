"""Questions with the answers of several people to rows of a batch: for models that read a question and write an answer.

Not for conversations in one row with their images, which `chat_examples` makes.
"""

import re
from collections.abc import Sequence

import numpy as np

from vlm_jax.data.examples import Example, Views
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.chats import conversation_of
from vlm_jax.data.text import Tokenizer

_PLACEHOLDER = re.compile(r"<image>\n?")


class QuestionExamples:
    """`image` uint8 [size, size, 3], `text` int32 [length], and the different answers with their weights.

    `answers` int32 [most, answer_length] are [CLS] answer [SEP], cut before their end; places without an answer hold a
    start token. `weights` float32 [most] are the shares of those who gave an answer, 0 in places without one. Of more
    different answers than `most` those that most people gave are kept.

    Args:
        tokenizer: of questions, by its conventions, and of answers as they are.
        size: side of the model's images in pixels.
        preprocess: the evaluation view.
        augment: the random view of training; None trains on the evaluation view.
        most: different answers of a question.
        answer_length: tokens of an answer, start and end token included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        size: int,
        preprocess: PreprocessConfig,
        augment: AugmentConfig | None,
        most: int,
        answer_length: int,
    ):
        self.tokenizer, self.views = tokenizer, Views(size, preprocess, augment)
        self.most, self.answer_length = most, answer_length

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row; raises `BadRecord`, also for a question whose answers are kept secret."""
        row, given = self._row(record, rng), known_answers(record)
        if not given:
            raise BadRecord(record["where"], record["key"], "its answer is not known")
        counts = {answer: given.count(answer) for answer in given}
        kept = sorted(counts, key=lambda answer: -counts[answer])[: self.most]  # of equal counts the first given
        answers, weights = self.answer_rows([""] * self.most), np.zeros(self.most, np.float32)
        answers[:, 1:] = self.tokenizer.pad_id
        answers[: len(kept)] = self.answer_rows(kept)
        share = record.get("answer_weight", 1.0) / len(given)
        weights[: len(kept)] = [share * counts[answer] for answer in kept]
        return {**row, "answers": answers, "weights": weights}

    def prompt(self, record: Record) -> Example:
        """The row without answers, on the evaluation view; raises `BadRecord`."""
        return self._row(record, None)

    def answer_rows(self, texts: Sequence[str]) -> np.ndarray:
        """Answers as the decoder writes them, int32 [n, answer_length]."""
        tokenizer, rows = self.tokenizer, np.full((len(texts), self.answer_length), self.tokenizer.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = tokenizer.encoder.encode(tokenizer.encoder.clean(text))[: self.answer_length - 2]
            row[: len(ids) + 2] = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        return rows

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer."""
        return (self.tokenizer.eos_id,)

    @property
    def pad_id(self) -> int:
        """What follows the end."""
        return self.tokenizer.pad_id

    def written(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its end."""
        return self.tokenizer.decode([*ids, self.tokenizer.eos_id])

    def spans(self, record: Record) -> list[tuple[str, bool]]:
        """A record as a row of training: texts, and whether they are learned, in turn; raises `BadRecord`."""
        answers = known_answers(record)
        if not answers:
            raise BadRecord(record["where"], record["key"], "its answer is not known")
        return [(f"{self.tokenizer.clean(asked(record))} ", False), (" | ".join(dict.fromkeys(answers)), True)]

    def _row(self, record: Record, rng: np.random.Generator | None) -> Example:
        question, images = asked(record), record["images"]
        if len(images) != 1:
            raise BadRecord(record["where"], record["key"], f"it has {len(images)} images, and a question is about one")
        try:
            image = images[0].load()
        except ValueError as error:
            raise BadRecord(record["where"], record["key"], str(error)) from error
        return {"image": self.views({**record, "image": image}, rng), "text": self.tokenizer([question])[0]}


def asked(record: Record) -> str:
    """What is asked last in a conversation, without the places of its images."""
    turns = conversation_of(record, "")["turns"]
    question = next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
    return _PLACEHOLDER.sub("", question).strip()


def known_answers(record: Record) -> tuple[str, ...]:
    """What people said, one answer each; of a conversation the last answer; none where they are kept secret."""
    if "answers" in record:
        return tuple(record["answers"])
    last = conversation_of(record, "")["turns"][-1]
    return (last.text,) if last.role == "assistant" and last.text else ()


__all__ = ["QuestionExamples", "asked", "known_answers"]
