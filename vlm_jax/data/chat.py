"""Conversations to tokens: ids, which of them are learned, and which image features some of them take.

The spans that are learned are built and not searched for: a conversation is written piece by piece, each piece is
tokenised by itself, and it is known of each whether the assistant says it. So no text of a message can hide an answer.
A conversation that can't be used raises `BadRecord`. How pixels become tiles is `tiles`' business.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from vlm_jax.data.chat_templates import ChatTemplate
from vlm_jax.data.images import decode
from vlm_jax.data.rounds import REMOVED, ImagePlaces, checked_rounds, placed
from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.chats import StoredImage, conversation_of
from vlm_jax.data.text import Tokenizer
from vlm_jax.data.tiles import NO_SLOT, TilePlan, Tiling
from vlm_jax.schema import ConfigError

CUT = "the end was cut off, the row was full"
NO_SYSTEM = "the system message was left out, the template has no place for one"
ImagePiece = int | tuple[np.ndarray, int]
"""The id of a marker token, or slots of features and the id that stands in their places."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A conversation in tokens.

    Attributes:
        ids: int32 [n]; the id of the image token where a token takes image features.
        supervised: bool [n], whether a token is learned: it is predicted from those before it.
        slots: int32 [n], `tile * tokens_per_tile + feature` counted from the document's first tile, or `NO_SLOT` for
            text, `NEWLINE` for the end of a row of features.
        images: those of the record that its tiles come from.
        tiles: the number of tiles of each image.
        notes: what was changed to make the record usable.
    """

    ids: np.ndarray
    supervised: np.ndarray
    slots: np.ndarray
    images: tuple[StoredImage, ...]
    tiles: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def tile_count(self) -> int:
        """Tiles of all images."""
        return sum(self.tiles)


def marked(spans: Sequence[tuple[str, bool]]) -> str:
    """Spans of a document as one text, what is learned in [[double brackets]]."""
    return " ".join(f"[[{text}]]" if learned else text for text, learned in spans)


class Vocabulary:
    """A tokenizer as conversations need it.

    Attributes:
        pad_id: what fills rows.
        space_is_implied: whether the encoder puts a space in front of each text itself, as SentencePiece does: a
            text that goes on after another one is then encoded without its first space.
    """

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.config.canonicalize:
            raise ConfigError("config.data.tokenizer.canonicalize drops the punctuation of conversations; set it false")
        self.tokenizer, self.pad_id = tokenizer, tokenizer.pad_id
        alone, after_space = self.encode("x"), self.encode("x x")
        self.space_is_implied = len(after_space) > len(alone) and after_space[-len(alone) :] == alone

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is among them."""
        return self.tokenizer.encoder.encode(text.lower() if self.tokenizer.config.lower else text)

    def special(self, token: str, what: str) -> int:
        """The id of a special token; raises `ConfigError` when there is none, `what` says who wants it."""
        if token == "{eos}" and self.tokenizer.eos_id >= 0:
            return self.tokenizer.eos_id
        found = self.tokenizer.encoder.special_id(token)
        if found < 0:
            raise ConfigError(
                f"{what} needs the token {token!r}, which the vocabulary of config.data.tokenizer lacks; take another "
                "tokenizer, or add the token to its special ones"
            )
        return found


class _Pieces:
    """Tokens in the making. Texts that follow each other and are learned alike are encoded as one."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.ids: list[int] = []
        self.learned: list[tuple[int, int]] = []
        self.features: list[tuple[int, np.ndarray]] = []
        self._texts: list[str] = []
        self._text_learned, self._after_text = False, False

    def text(self, text: str, learned: bool) -> None:
        if self._texts and learned != self._text_learned:
            self._flush()
            self._after_text = True
        self._text_learned = learned
        self._texts += [text] if text else []

    def special(self, token_id: int, learned: bool) -> None:
        self._flush()
        self._add([token_id], learned)

    def image(self, pieces: Sequence[ImagePiece]) -> None:
        for piece in pieces:
            if isinstance(piece, int):
                self.special(piece, False)
            else:
                self._flush()
                self.features.append((len(self.ids), piece[0]))
                self._add([piece[1]] * len(piece[0]), False)

    def _flush(self) -> None:
        text = "".join(self._texts)
        if text:
            goes_on = self._after_text and self.vocabulary.space_is_implied and text[0] == " "
            self._add(self.vocabulary.encode(text[1:] if goes_on else text), self._text_learned)
        self._texts, self._after_text = [], False

    def _add(self, ids: list[int], learned: bool) -> None:
        if learned:
            self.learned.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._flush()
        ids = np.asarray(self.ids, np.int32)
        supervised, slots = np.zeros(len(ids), bool), np.full(len(ids), NO_SLOT, np.int32)
        for start, stop in self.learned:
            supervised[start:stop] = True
        for start, features in self.features:
            slots[start : start + len(features)] = features
        return ids, supervised, slots


class ChatWriter:
    """Writes records of conversations as documents. Picklable and safe in threads.

    Args:
        tokenizer: its encoder and special tokens; its length and padding play no part.
        template: what stands around messages.
        places: where images stand.
        tiling: how an image becomes tiles.
        tile_size: side of a tile in pixels.
        tokens_per_tile: tokens that the model makes of a tile.

    Raises:
        ConfigError: the vocabulary lacks a special token that the template or the images need.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        places: ImagePlaces,
        tiling: Tiling,
        tile_size: int,
        tokens_per_tile: int,
    ):
        self.vocabulary, self.template, self.places = Vocabulary(tokenizer), template, places
        self.tiling, self.tile_size, self.tokens_per_tile = tiling, tile_size, tokens_per_tile
        self.bos_id = tokenizer.bos_id
        self.image_id = self.vocabulary.pad_id
        if places.image_token:
            self.image_id = self.vocabulary.special(places.image_token, "places.image_token")
        names = ("start", "system", "user", "prompt", "answer", "after")
        self._parts = {name: self._parsed(getattr(template, name)) for name in names}
        self._markers = {
            name: self.vocabulary.special(name, "the tiling") for name in tiling.markers(_GRID_SIDES) if name
        }

    def _parsed(self, text: str) -> list[str | int | None]:
        """A template string as texts, ids of special tokens, and None for the message."""
        parts: list[str | int | None] = []
        specials = ("{}", "{bos}", "{eos}", *self.template.specials)
        for part in re.split(f"({'|'.join(map(re.escape, specials))})", text):
            if part == "{bos}":
                parts += [self.bos_id] * (self.bos_id >= 0)  # vocabularies trained here have none
            elif part in specials:
                parts.append(None if part == "{}" else self.vocabulary.special(part, "the conversation template"))
            elif part:
                parts.append(part)
        return parts

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that end an answer; a template may have none."""
        parts = self._parts["answer"]
        return tuple(part for part in parts[parts.index(None) :] if isinstance(part, int))

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer: up to its end token, or to a line feed in a template without one."""
        ends = [place for place, token in enumerate(ids) if token in self.end_ids]
        text = self.vocabulary.tokenizer.encoder.decode(ids[: ends[0]] if ends else ids)
        return text if self.end_ids else text.partition("\n")[0]

    def spans(self, document: Document) -> list[tuple[str, bool]]:
        """The document for people: texts, and whether they are learned, in turn; tokens without a text as <id>."""
        decode = self.vocabulary.tokenizer.encoder.decode
        alone = [not decode([int(token)]).strip("\ufffd") for token in document.ids]
        kinds = zip(document.supervised.tolist(), (document.slots != NO_SLOT).tolist(), alone, strict=True)
        spans: list[tuple[str, bool]] = []
        place = 0
        for (learned, image, single), group in itertools.groupby(kinds):
            ids = document.ids[place : place + len(list(group))].tolist()
            place += len(ids)
            text = "".join(f"<{token}>" for token in ids) if single else decode(ids)
            text = f"<{len(ids)} tokens of images>" if image else text
            if spans and spans[-1][1] == learned:
                text = f"{spans.pop()[0]} {text}"
            spans.append((text, learned))
        return spans

    def shown(self, document: Document) -> str:
        """The document as one text, what is learned in [[double brackets]]."""
        return marked(self.spans(document))

    def document(self, record: Record) -> Document:
        """The whole conversation; of a record with a caption, its first one as the answer to the image.

        Raises:
            BadRecord: it can't be used; says why.
        """
        record = conversation_of(record, self.places.in_messages)
        return self._written(record, *checked_rounds(record))

    def prompt(self, record: Record) -> Document:
        """The conversation up to where the assistant shall answer its last question; nothing of it is learned.

        Raises:
            BadRecord: it can't be used; says why.
        """
        record = conversation_of(record, self.places.in_messages)
        system, rounds, notes = checked_rounds(record, answered=False)
        document = self._written(record, system, [*rounds[:-1], (rounds[-1][0], None)], notes)
        return dataclasses.replace(document, supervised=np.zeros_like(document.supervised))

    def _written(
        self, record: Record, system: str, rounds: Sequence[tuple[str, str | None]], notes: tuple[str, ...]
    ) -> Document:
        """The rounds as a document; one whose answer is None ends where the answer would begin."""
        images: tuple[StoredImage, ...] = record["images"]
        texts = [(question, answer or "") for question, answer in rounds]
        messages = placed(texts, len(images), self.places, record)
        if self.places.placement == "start" and any(self.places.placeholder in text for both in texts for text in both):
            notes = (*notes, REMOVED)
        plans = [self.tiling.plan(*self._size(image, record), self.tile_size, self.tokens_per_tile) for image in images]
        pieces = _Pieces(self.vocabulary)
        firsts = itertools.accumulate((plan.tiles for plan in plans), initial=0)
        written = [self._image_pieces(plan, first, record) for plan, first in zip(plans, firsts, strict=False)]
        labelled = bool(self.places.label) and len(images) > 1

        def write(name: str, message: Sequence[str | int], learned: bool) -> None:
            for part in self._parts[name]:
                if isinstance(part, int):
                    pieces.special(part, learned)
                elif part is not None:
                    pieces.text(part, learned)
                for item in message if part is None else ():
                    if isinstance(item, str):
                        pieces.text(item, learned)
                        continue
                    if labelled:
                        pieces.text(self.places.label.format(item), False)
                    pieces.image(written[item])

        write("start", [], False)
        if system and not self.template.system:
            notes = (*notes, NO_SYSTEM)
        system = (system or self.template.default_system) if self.template.system else ""
        if system and not self.template.system_in_user:
            write("system", [system], False)
        for number, (question, answer) in enumerate(messages):
            if not self.template.reads_user_text:
                question = [item for item in question if not isinstance(item, str)]
            if system and self.template.system_in_user and number == 0:
                question = [self.template.system.replace("{}", system), *question]
            if self.template.images_first:
                for image in (item for item in question if isinstance(item, int)):
                    pieces.image(written[image])
                question = ["".join(item for item in question if isinstance(item, str)).strip()]
            write("user", question, False)
            write("prompt", [], False)
            if rounds[number][1] is not None:
                write("answer", answer, True)
                write("after", [], False)
        return Document(*pieces.arrays(), images, tuple(plan.tiles for plan in plans), notes)

    def _image_pieces(self, plan: TilePlan, first_tile: int, record: Record) -> list[ImagePiece]:
        """What stands for an image: ids of marker tokens, and slots of the document."""
        shift = first_tile * self.tokens_per_tile
        return [
            self._marker(piece, record)
            if isinstance(piece, str)
            else (np.where(piece >= 0, piece + shift, piece), self.image_id)
            for piece in plan.pieces
        ]

    def cut(self, document: Document, length: int, record: Record) -> Document:
        """The document without what lies beyond `length` tokens, nor the images of which nothing is left.

        Raises:
            BadRecord: nothing that is learned is left.
        """
        if len(document) <= length:
            return document
        if not document.supervised[:length].any():
            why = f"it has {len(document)} tokens, and none of the first {length} is learned; make the rows longer"
            raise BadRecord(record["where"], record["key"], why)
        slots = document.slots[:length]
        tiles_left = int(slots.max(initial=NO_SLOT)) // self.tokens_per_tile + 1
        images = int(np.searchsorted(np.cumsum(document.tiles), tiles_left)) + 1 if tiles_left else 0
        return Document(
            document.ids[:length],
            document.supervised[:length],
            slots,
            document.images[:images],
            document.tiles[:images],
            (*document.notes, CUT),
        )

    def tiles(self, document: Document, record: Record) -> np.ndarray:
        """The pixels of a document's images, uint8 [tiles, tile_size, tile_size, 3]; raises `BadRecord`."""
        side = self.tile_size
        parts = [np.zeros((0, side, side, 3), np.uint8)]
        for image, tiles in zip(document.images, document.tiles, strict=True):
            try:
                parts.append(self.tiling.tiles(decode(image.load()), side))
            except ValueError as error:
                raise BadRecord(record["where"], record["key"], str(error)) from error
            if len(parts[-1]) != tiles:
                why = f"its image makes {len(parts[-1])} tiles, and {tiles} by the size in the file's header"
                raise BadRecord(record["where"], record["key"], f"{why}; write the file again")
        return np.concatenate(parts)

    def _size(self, image: StoredImage, record: Record) -> tuple[int, int]:
        if not self.tiling.needs_size:
            return 0, 0
        try:
            return image.size()
        except ValueError as error:
            raise BadRecord(record["where"], record["key"], str(error)) from error

    def _marker(self, name: str, record: Record) -> int:
        if name not in self._markers:
            why = f"its image makes the tile {name}, and there are tokens for {_GRID_SIDES} rows and columns"
            raise BadRecord(record["where"], record["key"], why)
        return self._markers[name]


_GRID_SIDES = 8
