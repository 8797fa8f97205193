"""A checkpoint that is asked lists of questions, as harnesses of benchmarks do; it knows none of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.assemble import build_encoder, open_checkpoint
from vlm_jax.checkpoint import read_checkpoint_meta
from vlm_jax.config import from_json
from vlm_jax.data.sources import Record
from vlm_jax.data.sources.chats import ImageArray, Turn
from vlm_jax.evals.features import gather
from vlm_jax.mesh import make_mesh
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.schema import ConfigError, override


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question with its images, uint8 [H, W, 3] of any sizes, and an answer to it where one is judged."""

    question: str
    images: tuple[np.ndarray, ...] = ()
    answer: str = ""


class Asker:
    """The model of a checkpoint on a mesh over all devices of this process.

    Args:
        checkpoint: a workdir, one of its step directories, or an imported checkpoint.
        batch_size: questions at a time, rounded up to what the devices share evenly.
        overrides: dotted keys to change in the saved config: `mesh.fsdp`, `objective.length`, ...

    Raises:
        ConfigError: the model answers no questions.
        CheckpointError: there is no usable checkpoint.
    """

    def __init__(self, checkpoint: str, batch_size: int, overrides: Mapping[str, Any]):
        saved = from_json(read_checkpoint_meta(checkpoint)["config"])
        changes: dict[str, Any] = {"data.batch_size": batch_size, "evals": ()}
        chat = saved.data.chat
        if chat is None:
            raise ConfigError(f"{checkpoint} holds a model without conversations; give one that answers questions")
        if chat.images.placement == "llava":
            # In training it makes one of several images of a message; LLaVA's evaluations leave them where they are.
            changes["data.chat.images.placement"] = "inline"
        changes |= overrides
        self._mesh = make_mesh(override(saved, changes).mesh)
        with jax.set_mesh(self._mesh):
            restored = open_checkpoint(checkpoint, self._mesh, changes)
            config = restored.config
            self._encoder = build_encoder(config, restored.objective, restored.tokenizer, self._mesh, "")
        if not self._encoder.offers("answer"):
            raise ConfigError(f"{checkpoint} holds a model that answers no questions; give a vision-language model")
        self._params = restored.params
        assert config.data.chat is not None, "overrides change its keys, and don't take it away"
        self._placeholder = config.data.chat.images.in_messages

    def answers(self, asked: Sequence[Asked], config: GenerationConfig, seed: int | None = None) -> list[str]:
        """The answer to each question; "" to one that doesn't fit a row, which the log names.

        Args:
            asked: the questions.
            config: how answers are written; their end tokens are the model's own.
            seed: of sampling; None takes the likeliest tokens.
        """
        source = _Records([self._record(number, one) for number, one in enumerate(asked)])
        rows = gather(
            (
                {"ids": self._encoder.write(self._params, batch, config, seed)}
                | {name: batch[name] for name in ("index", "mask")}
                for batch in self._encoder.prompt_batches(source)
            ),
            f"none of {len(asked)} questions can be asked; the log says why.",
        )
        answers = [""] * len(asked)
        for index, text in zip(rows["index"].tolist(), self._encoder.written(rows["ids"]), strict=True):
            answers[index] = text
        return answers

    def likelihoods(self, asked: Sequence[Asked]) -> list[tuple[float, bool]]:
        """Of each answer, its end token included: (log-probability, whether each token is the likeliest).

        An answer that doesn't fit a row has (-inf, False).
        """
        source = _Records([self._record(number, one) for number, one in enumerate(asked)])

        def judged(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            sums, likeliest = self._encoder.likelihood(self._params, batch)
            return {"sum": sums, "likeliest": likeliest, "index": batch["index"], "mask": batch["mask"]}

        batches = (judged(batch) for batch in self._encoder.loss_batches(source, 0))
        rows = gather(batches, f"none of {len(asked)} answers can be judged; the log says why.")
        found = [(-np.inf, False)] * len(asked)
        for index, total, likeliest in zip(rows["index"].tolist(), rows["sum"], rows["likeliest"], strict=True):
            found[index] = float(total), bool(likeliest)
        return found

    def _record(self, number: int, one: Asked) -> Record:
        """Images stand where the question has as many placeholders, else before it."""
        common = {"images": tuple(map(ImageArray, one.images)), "texts": (), "key": str(number), "where": "lmms-eval"}
        mark = self._placeholder
        if mark and one.images and one.question.count(mark) == len(one.images):
            turns = (Turn("user", one.question), *[Turn("assistant", one.answer)] * bool(one.answer))
            return {**common, "turns": turns}
        question = one.question.replace(mark, "") if mark else one.question
        return {**common, "question": question, "reference": one.answer}


class _Records:
    """Records in memory, as a source."""

    class_names: tuple[str, ...] = ()

    def __init__(self, records: list[Record]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def texts(self, index: int) -> tuple[str, ...]:
        """See `Source`."""
        return self._records[index]["texts"]


__all__ = ["Asked", "Asker"]
