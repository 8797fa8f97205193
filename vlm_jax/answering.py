"""A checkpoint that answers conversations with images: rows as its evaluation makes them, and the text token by token.

For programs (a chat, a harness of benchmarks). The evaluation `vqa` asks on the mesh of a run; a terminal is `chat`'s.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax import schema
from vlm_jax.assemble import Restored, open_checkpoint
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.chat_examples import ChatExamples
from vlm_jax.data.chat_templates import TEMPLATES
from vlm_jax.data.examples import Example
from vlm_jax.data.images import decode
from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.chats import ImageArray, StoredImage, Turn
from vlm_jax.data.text import Tokenizer
from vlm_jax.data.text_rows import prompt_ids
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.objectives.base import ModelObjective
from vlm_jax.objectives.lm import LmConfig
from vlm_jax.objectives.vlm import VlmConfig

LIKELIEST = GenerationConfig()
_LENGTHS = 128  # rows come in multiples of so many tokens, so that questions of like lengths share a compiled program
_UNREADABLE = "\ufffd"  # what is decoded of the first bytes of a character


class AnswerError(ValueError):
    """What can't be asked or answered, and why: one sentence."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said, and the images that were shown.

    Attributes:
        turns: with the placeholder of the model where an image stands; see `Answerer.asked`.
        images: in the order of their placeholders.
    """

    turns: tuple[Turn, ...] = ()
    images: tuple[StoredImage, ...] = ()

    def answered(self, text: str) -> "Conversation":
        """With an answer to the last question."""
        return dataclasses.replace(self, turns=(*self.turns, Turn("assistant", text)))

    def record(self) -> Record:
        """As a source of conversations would give it."""
        return {"turns": self.turns, "images": self.images, "key": "conversation", "where": "answering"}


def read_image(path: str | os.PathLike[str]) -> ImageArray:
    """An image file; raises `AnswerError` when there is none or it can't be decoded."""
    try:
        with open(path, "rb") as file:
            return ImageArray(decode(file.read()))
    except OSError as error:
        raise AnswerError(f"the image {os.fspath(path)!r} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise AnswerError(f"{os.fspath(path)!r} is not an image that can be shown: {error}") from error


class Answerer:
    """The model of a checkpoint with its own tokenizer, template, tiles and preprocessing, on one device.

    A vision-language model answers conversations. A language model does, without images, where a template is known;
    without one it goes on with the text.

    Args:
        checkpoint: a workdir (its newest checkpoint), a step directory, or an imported checkpoint.
        template: of conversations, in the place of the checkpoint's own; needed for a language model that shall chat.
        overrides: dotted keys to change in the saved config.

    Attributes:
        config: that of the checkpoint.
        placeholder: what stands for an image in a message; empty where images have their place without.

    Raises:
        CheckpointError: there is no usable checkpoint.
        AnswerError: its model answers nothing.
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str], template: str = "", overrides: Mapping[str, Any] | None = None
    ):
        restored = _merged(open_checkpoint(checkpoint, None, overrides))
        objective, self.config = restored.objective, restored.config
        if type(objective).begin_writing is ModelObjective.begin_writing:
            kind = self.config.objective.kind()
            raise AnswerError(
                f"{checkpoint} holds a model of objective {kind!r}, which answers nothing; give a checkpoint of a "
                "vision-language model (vlm) or of a language model (lm)"
            )
        if restored.tokenizer is None:
            raise AnswerError(f"{checkpoint} holds no tokenizer; import it again with --tokenizer=FILE")
        self._rows = _rows_of(restored, restored.tokenizer, template)
        self._pad_id = restored.tokenizer.pad_id
        self.placeholder = self._rows.placeholder
        self._params = restored.params
        self._begin = jax.jit(objective.begin_writing, static_argnums=2)
        self._extend = jax.jit(objective.write_on, static_argnums=2, donate_argnums=1)

    def begun(self, system: str = "") -> Conversation:
        """An empty conversation; raises `AnswerError` for a system message that the template has no place for."""
        if system and not self._rows.reads_system:
            raise AnswerError("the template of this model has no place for a system message; leave it out")
        return Conversation((Turn("system", system),) if system else ())

    def asked(self, conversation: Conversation, text: str, images: Sequence[StoredImage] = ()) -> Conversation:
        """With a question and what it shows.

        Placeholders in the text say where the images stand; where there is none they stand before it, a line each.

        Raises:
            AnswerError: the text holds another number of placeholders than there are images, or the model was trained
                with one image a question and there are more.
        """
        if self._rows.one_image and len(images) > 1:
            raise AnswerError(
                f"the conversations of this model show one image a question, not {len(images)}; ask about each in a "
                "question of its own"
            )
        if self.placeholder:
            found = text.count(self.placeholder)
            if found and found != len(images):
                raise AnswerError(
                    f"the question holds {found} {self.placeholder} and comes with {len(images)} images; give as many "
                    f"images, or no {self.placeholder} for images before the text"
                )
            if not found:
                text = f"{self.placeholder}\n" * len(images) + text
        turns = (*conversation.turns, Turn("user", text))
        return Conversation(turns, (*conversation.images, *images))

    def row(self, conversation: Conversation) -> Example:
        """The row of a conversation that ends with a question, as the evaluation has it.

        Raises:
            AnswerError: it is longer than a row, has more images than one holds, or can't be written; says which.
        """
        try:
            return self._rows.prompt(conversation.record())
        except BadRecord as error:
            raise AnswerError(f"the conversation can't be answered: {error.why}") from error

    def answers(
        self, conversations: Sequence[Conversation], config: GenerationConfig = LIKELIEST, seed: int | None = None
    ) -> list[str]:
        """What the model says to each, side by side in one batch.

        Args:
            conversations: each ends with a question.
            config: how; end tokens and padding are the model's own, and there are no beams, whatever it says.
            seed: of sampling; None takes the likeliest tokens.
        """
        rows = _batch([self.row(conversation) for conversation in conversations])
        tokens = list(self._tokens(rows, config, seed))
        return [self._text(ids).strip() for ids in np.stack(tokens, axis=1).tolist()]

    def stream(
        self, conversation: Conversation, config: GenerationConfig = LIKELIEST, seed: int | None = None
    ) -> Iterator[str]:
        """The answer in pieces as they are written; joined they are that of `answers`.

        A piece ends with a whole character: of one that takes several tokens the first ones are held back, and so is
        white space, with which no answer ends.
        """
        ids: list[int] = []
        said = text = ""
        for token in self._tokens(_batch([self.row(conversation)]), config, seed):
            ids.append(int(token[0]))
            text = self._text(ids).strip()
            ready = text.rstrip(_UNREADABLE).rstrip()
            if ready.startswith(said) and ready != said:
                yield ready[len(said) :]
                said = ready
            if self._rows.complete(ids):
                break
        if text.startswith(said) and text != said:
            yield text[len(said) :]

    def _text(self, ids: list[int]) -> str:
        return self._rows.text(ids)

    def _tokens(self, rows: Example, config: GenerationConfig, seed: int | None) -> Iterator[np.ndarray]:
        """int32 [B] token after token, until all texts have ended."""
        config = dataclasses.replace(config, eos_ids=self._rows.end_ids, pad_id=self._pad_id, beams=1)
        keys = None if seed is None else jax.random.split(jax.random.key(seed), len(rows["text"]))
        writing = self._begin(self._params, rows, config)
        for _ in range(config.max_new_tokens):
            writing = self._extend(self._params, writing, config, keys)
            # A copy: the next step writes over what it is given.
            yield np.array(writing.token)
            if bool(writing.ended.all()):
                return


class _ChatRows:
    """Conversations in a template."""

    def __init__(self, maker: ChatExamples):
        self._maker, self._writer = maker, maker.writer
        self.placeholder = maker.config.images.in_messages
        self.one_image = maker.config.images.placement == "llava"
        self.reads_system = bool(maker.config.chat_template().system)
        self.end_ids = self._writer.end_ids

    def prompt(self, record: Record) -> Example:
        # An answer shows no images; a model may still write what stands for one.
        turns = tuple(
            turn._replace(text=turn.text.replace(self._maker.config.images.placeholder, ""))
            if turn.role == "assistant"
            else turn
            for turn in record["turns"]
        )
        return self._maker.prompt(record | {"turns": turns})

    def text(self, ids: list[int]) -> str:
        return self._writer.text(ids)

    def complete(self, ids: list[int]) -> bool:
        """Whether nothing that follows counts, though no end token was written."""
        return not self.end_ids and "\n" in self._writer.vocabulary.tokenizer.encoder.decode(ids)


class _TextRows:
    """All that was said as one text, which goes on."""

    placeholder, one_image, reads_system = "", False, False

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer, self._length = tokenizer, length
        self.end_ids = (tokenizer.eos_id,) * (tokenizer.eos_id >= 0)

    def prompt(self, record: Record) -> Example:
        ids = prompt_ids(self._tokenizer, " ".join(turn.text for turn in record["turns"]))
        why = ""
        if record["images"]:
            why = "it shows images, and this model reads text alone"
        elif not ids:
            why = "it holds no token, and this tokenizer has no start token to begin with"
        elif len(ids) > self._length:
            why = f"it has {len(ids)} tokens, and a row holds {self._length} (config.objective.length)"
        if why:
            raise BadRecord(record["where"], record["key"], why)
        fill = self._length - len(ids)
        text = np.asarray([self._tokenizer.pad_id] * fill + ids, np.int32)
        return {"text": text, "segments": (np.arange(self._length) >= fill).astype(np.int32)}

    def text(self, ids: list[int]) -> str:
        return self._tokenizer.encoder.decode([token for token in ids if token not in self.end_ids])

    def complete(self, ids: list[int]) -> bool:
        return False


def _merged(restored: Restored) -> Restored:
    """Small matrices are added to the large ones once, and not for each token."""
    method = restored.config.objective
    if not isinstance(method, VlmConfig) or method.model.lora is None:
        return restored
    model, params = method.model.merged(restored.params)
    method = dataclasses.replace(method, model=model)
    config = dataclasses.replace(restored.config, objective=method)
    objective = method.build(config.data.preprocess, config.compute_dtype())
    return dataclasses.replace(restored, config=config, objective=objective, params=params)


def _rows_of(restored: Restored, tokenizer: Tokenizer, template: str) -> _ChatRows | _TextRows:
    """How the model of a checkpoint reads what is said."""
    data, method = restored.config.data, restored.config.objective
    chat = data.chat
    if template:
        if template not in TEMPLATES:
            raise AnswerError(f"there is no template {template!r}, only {', '.join(TEMPLATES)}")
        chat = schema.override(chat or ChatConfig(), {"template": template})
    if isinstance(method, VlmConfig):
        if chat is None:
            raise AnswerError("the checkpoint says nothing of how conversations become rows; name a template")
        data = dataclasses.replace(data, augment=None, chat=chat)
        return _ChatRows(method.make_example(tokenizer, data))
    assert isinstance(method, LmConfig), "nothing else writes"
    if chat is None:
        return _TextRows(tokenizer, method.length)
    chat = dataclasses.replace(chat, row_length=method.length, max_tiles=0)
    return _ChatRows(ChatExamples(tokenizer, chat, tile_size=1, tokens_per_tile=1))


def _batch(rows: Sequence[Example]) -> Example:
    """Rows side by side, without the tokens and tiles that none of them uses but for a round number."""
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    used, length = int((stacked["segments"] > 0).sum(axis=1).max()), stacked["text"].shape[1]
    first = length - min(length, -(-used // _LENGTHS) * _LENGTHS)
    shorter = {name: x[:, first:] if x.shape[1:] == (length,) else x for name, x in stacked.items()}
    if "tiles" in shorter:
        tiles = int(shorter["tile_count"].max())
        shorter["tiles"] = shorter["tiles"][:, : 1 << (tiles - 1).bit_length() if tiles else 0]
    return shorter


__all__ = ["AnswerError", "Answerer", "Conversation", "read_image"]
