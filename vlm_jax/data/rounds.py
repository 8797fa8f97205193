"""What a conversation says: its questions and answers in turn, and where in them its images stand.

Everything that makes a conversation unusable before there are tokens is found here. Tokens are `chat`'s business.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.chats import Turn

Placement = Literal["inline", "llava", "start"]
LEADING, TRAILING = "a leading turn of the assistant was left out", "a last question without an answer was left out"
REMOVED = "a placeholder spelled in a message was taken out"
Message = list[str | int]
"""Texts, and numbers of the images between them."""


@dataclasses.dataclass(frozen=True)
class ImagePlaces:
    """Where in a conversation the tokens of its images stand.

    Attributes:
        placement: "inline" puts the k-th image where the k-th placeholder stands, anywhere. "llava" moves the
            placeholder of a message to its front, followed by a line feed, and makes one of several (LLaVA-1.5).
            "start" puts all images at the front of the first user message (nanoVLM); messages hold no placeholders.
        placeholder: what stands for an image in a message; with "start" it is taken out where a message spells it.
        label: text in front of an image where there are several, {} is its number from 0; empty: none.
        image_token: the token whose id fills the places of image features; empty: the padding.
    """

    placement: Placement = "inline"
    placeholder: str = "<image>"
    label: str = ""
    image_token: str = ""

    @property
    def in_messages(self) -> str:
        """What stands for an image in a message; empty where nothing does."""
        return "" if self.placement == "start" else self.placeholder


def checked_rounds(record: Record, answered: bool = True) -> tuple[str, list[tuple[str, str]], tuple[str, ...]]:
    """(system message or "", rounds of question and answer, notes) of a record's turns.

    A leading turn of the assistant is left out, as LLaVA does, and a last question without an answer: there is nothing
    to learn from either. With `answered` False that question is kept, and the last answer may be empty.

    Raises:
        BadRecord: two turns in a row come from the same side, an answer is empty, or there is no round at all.
    """
    turns: list[Turn] = list(record["turns"])
    where, key, notes = record["where"], record["key"], list(record.get("notes", ()))
    system, offset = "", 1
    if turns and turns[0].role == "system":
        system, offset = turns.pop(0).text, 2
    if turns and turns[0].role == "assistant":
        turns.pop(0)
        notes.append(LEADING)
        offset += 1
    for number, turn in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if turn.role != wanted:
            before = turns[number - 1].role if number else "nobody"
            why = f"its turn {number + offset} comes from the {turn.role} after one from the {before}"
            raise BadRecord(where, key, f"{why}; the user and the assistant must take turns")
    if len(turns) % 2:
        if answered:
            turns.pop()
            notes.append(TRAILING)
        else:
            turns.append(Turn("assistant", ""))
    if not turns:
        raise BadRecord(where, key, "it has no question with an answer")
    for number in range(1, len(turns), 2):
        if not turns[number].text.strip() and (answered or number < len(turns) - 1):
            raise BadRecord(where, key, f"its answer in turn {number + offset} is empty")
    return system, [(turns[i].text, turns[i + 1].text) for i in range(0, len(turns), 2)], tuple(notes)


def placed(
    rounds: Sequence[tuple[str, str]], images: int, places: ImagePlaces, record: Record
) -> list[tuple[Message, Message]]:
    """The rounds with the numbers of the images where they stand, each number once and in order.

    Raises:
        BadRecord: there are more or fewer placeholders than images.
    """
    placeholder = places.placeholder
    if places.placement == "start":
        messages: list[tuple[Message, Message]] = [
            ([question.replace(placeholder, "")], [answer.replace(placeholder, "")]) for question, answer in rounds
        ]
        messages[0][0][:0] = range(images)
        return messages
    found = 0

    def split(text: str) -> Message:
        nonlocal found
        if placeholder not in text:
            return [text]
        if places.placement == "llava":
            text = f"{placeholder}\n{text.replace(placeholder, '').strip()}".strip()
        message: Message = []
        for number, part in enumerate(text.split(placeholder)):
            if number:
                message.append(found)
                found += 1
            message += [part] if part else []
        return message

    messages = [(split(question), split(answer)) for question, answer in rounds]
    if found != images:
        why = f"its messages hold {found} {placeholder}, its images are {images}"
        raise BadRecord(record["where"], record["key"], f"{why}: the k-th placeholder takes the k-th image")
    return messages
