"""What sources of conversations have in common: turns in one form, and images that are read when they are needed.

A record of a conversation holds `turns`, a tuple of `Turn`s, and `images`, a tuple of `StoredImage`s, beside `key` and
`where`. Whether turns follow each other as they should, and what becomes of them, is `chat`'s business.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import ExifTags, Image

from vlm_jax.data.sources.base import BadRecord, Record

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class Turn(NamedTuple):
    """A message and who says it."""

    role: Role
    text: str


class StoredImage(Protocol):
    """An image of a record, not read yet."""

    def load(self) -> bytes | np.ndarray:
        """The encoded file, or uint8 [H, W, 3]; raises `ValueError` with a sentence when it can't be read."""
        ...

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright, without decoding the pixels; raises `ValueError`."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageBytes:
    """An encoded image in memory."""

    data: bytes

    def load(self) -> bytes:
        """See `StoredImage`."""
        return self.data

    def size(self) -> tuple[int, int]:
        """See `StoredImage`."""
        return _header_size(io.BytesIO(self.data))


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own; `root` is the folder that the name starts from."""

    name: str
    root: str

    def load(self) -> bytes:
        """See `StoredImage`."""
        try:
            with open(os.path.join(self.root, self.name), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise self._missing(error) from error

    def size(self) -> tuple[int, int]:
        """See `StoredImage`; reads the file's header alone."""
        try:
            with open(os.path.join(self.root, self.name), "rb") as file:
                return _header_size(file)
        except OSError as error:
            raise self._missing(error) from error

    def _missing(self, error: Exception) -> ValueError:
        why = getattr(error, "strerror", None) or str(error)
        where = "" if os.path.isabs(self.name) else f" in {self.root}, the source's image_root"
        return ValueError(f"its image {self.name!r} can't be read: {why}{where}")


@dataclasses.dataclass(frozen=True)
class ImageArray:
    """Pixels in memory, uint8 [H, W, 3]."""

    pixels: np.ndarray

    def load(self) -> np.ndarray:
        """See `StoredImage`."""
        return self.pixels

    def size(self) -> tuple[int, int]:
        """See `StoredImage`."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclasses.dataclass(frozen=True)
class DrawnImage:
    """An image that is made when it is needed."""

    draw: Callable[[], np.ndarray]
    height: int
    width: int

    def load(self) -> np.ndarray:
        """See `StoredImage`."""
        return self.draw()

    def size(self) -> tuple[int, int]:
        """See `StoredImage`."""
        return self.height, self.width


def _header_size(file: Any) -> tuple[int, int]:
    try:
        with Image.open(file) as header:
            turned = header.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (header.width, header.height) if turned else (header.height, header.width)
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise ValueError(f"an image's size can't be read ({error or type(error).__name__})") from error


def read_turns(value: Any, where: str, key: str) -> tuple[Turn, ...]:
    """Turns of a list of `{"from": ..., "value": ...}` (LLaVA) or `{"role": ..., "content": ...}` (OpenAI, chatml).

    Raises:
        BadRecord: it is no such list, a role is unknown, or a message is no text.
    """
    if not isinstance(value, list) or not value:
        raise BadRecord(where, key, f"its conversation is {_brief(value)}, not a list of turns")
    return tuple(_turn(item, number, where, key) for number, item in enumerate(value, 1))


def _turn(item: Any, number: int, where: str, key: str) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRecord(where, key, f"its turn {number} is {_brief(item)}, not an object with a role and a text")
    role, text = item.get("from", item.get("role")), item.get("value", item.get("content"))
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRecord(
            where, key, f"its turn {number} comes from {_brief(role)}, which is none of {', '.join(_ROLES)}"
        )
    return Turn(known, checked_text(text, f"turn {number}", where, key))


def checked_text(text: Any, what: str, where: str, key: str) -> str:
    """The text of a message; raises `BadRecord` when it is none or can't be written in UTF-8."""
    if not isinstance(text, str):
        raise BadRecord(where, key, f"its {what} is {_brief(text)}, not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(where, key, f"its {what} is not valid UTF-8 (character {error.start})") from None
    return text


def _brief(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}: {value!r:.60}"


def images_of(value: Any, root: str, where: str, key: str) -> tuple[StoredImage, ...]:
    """The images of a value: a file name, or a list of names; None and an empty list are none.

    Raises:
        BadRecord: it is something else.
    """
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise BadRecord(where, key, f"its image is {_brief(name)}, not the name of a file")
    return tuple(ImageFile(name, root) for name in names)


def message_texts(turns: Sequence[Turn]) -> tuple[str, ...]:
    """The messages that hold something to read, for what needs texts alone (training a tokenizer)."""
    return tuple(turn.text for turn in turns if turn.text.strip())


def question_turns(question: str, answer: str, images: int, placeholder: str) -> tuple[Turn, ...]:
    """A question behind the placeholders of its images, each on a line of its own, and the answer if there is one."""
    front = f"{placeholder}\n" * images if placeholder else ""
    asked = Turn("user", front + question)
    return (asked, Turn("assistant", answer)) if answer else (asked,)


def conversation_of(record: Record, placeholder: str) -> Record:
    """The record itself if it is a conversation; else a question or a caption as one.

    Of a record with a caption the user shows the image alone.

    Raises:
        BadRecord: it has neither turns nor a caption.
    """
    if "turns" in record:
        return record
    if "question" in record:
        count = len(record["images"])
        return {**record, "turns": question_turns(record["question"], record["reference"], count, placeholder)}
    if not record["texts"]:
        raise BadRecord(record["where"], record["key"], record.get("no_caption", "it has no caption"))
    image = record["image"]
    stored = ImageArray(image) if isinstance(image, np.ndarray) else ImageBytes(image)
    turns = (Turn("user", placeholder), Turn("assistant", record["texts"][0]))
    return {"turns": turns, "images": (stored,), "key": record["key"], "where": record["where"]}
