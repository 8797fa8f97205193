"""The captions of a record: which stored values they are, whether they can be read, and those made from class names."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.data.sources.base import BadRecord


def captions_or_why(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` gives of a record; where it finds no caption that can be used, none, and `no_caption`, why."""
    try:
        return read()
    except BadRecord as error:
        return {"texts": (), "no_caption": error.why}


def checked_texts(texts: Iterable[Any], where: str, key: str) -> tuple[str, ...]:
    """The captions that hold something to read; raises `BadRecord` when there is none or one is not a text."""
    usable = _readable(texts, where, key)
    if not usable:
        raise BadRecord(where, key, "its caption is empty")
    return usable


def _readable(texts: Iterable[Any], where: str, key: str) -> tuple[str, ...]:
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str):
            raise BadRecord(where, key, f"its caption is a {type(text).__name__}, not a text: {text!r:.60}")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadRecord(where, key, f"its caption is not valid UTF-8 (character {error.start})") from None
    return tuple(text for text in texts if text.strip())


@dataclasses.dataclass(frozen=True)
class CaptionKeys:
    """Which values of a stored row are captions, and how often each is trained on.

    Attributes:
        keys: names of the values.
        probabilities: one for each key, in any unit; empty: every caption is as likely as every other.
        field: the source's own name for `keys`, for errors.
    """

    keys: tuple[str, ...]
    probabilities: tuple[float, ...]
    field: str

    def problems(self) -> Iterator[tuple[str, str]]:
        """Probabilities that don't belong to the keys."""
        if len(set(self.keys)) != len(self.keys) or "" in self.keys:
            yield self.field, f"= {self.keys} names a key twice, or names none"
        if self.probabilities and len(self.probabilities) != len(self.keys):
            yield "text_probabilities", f"= {self.probabilities} must hold one number for each of {self.keys}"
        if not all(0 < probability < float("inf") for probability in self.probabilities):
            yield "text_probabilities", f"= {self.probabilities} must be positive; leave a key out to never use it"

    def read(self, row: Mapping[str, Any], where: str, key: str) -> dict[str, Any]:
        """`texts` of a row, those of the first key first, and `text_weights` if the keys have probabilities.

        A key that the row lacks, or whose value holds nothing to read, leaves its share to the others; a list of
        captions divides its share evenly.

        Raises:
            BadRecord: no key gives a caption, or a value is not a text.
        """
        shares = self.probabilities or (1.0,) * len(self.keys)
        found = [
            (_readable(row[name] if isinstance(row[name], list) else [row[name]], where, key), share)
            for name, share in zip(self.keys, shares, strict=True)
            if row.get(name) is not None
        ]
        if not found:
            names = " or ".join(map(repr, self.keys)) or "caption"
            raise BadRecord(where, key, f"it has no {names} (the source's {self.field}); it has: {', '.join(row)}")
        texts = tuple(text for values, _ in found for text in values)
        if not texts:
            raise BadRecord(where, key, "its caption is empty")
        if not self.probabilities:
            return {"texts": texts}
        weights = [share / len(values) for values, share in found for _ in values]
        return {"texts": texts, "text_weights": tuple(weight / sum(weights) for weight in weights)}


def template_problems(templates: Sequence[str], stands_for: str) -> Iterator[tuple[str, str]]:
    """Templates that can't make a caption; `stands_for` is what replaces their {}."""
    if not templates:
        yield "templates", "is empty; give at least one, e.g. ('a photo of a {}.',)"
    for template in templates:
        if template.count("{}") != 1:
            yield "templates", f"holds {template!r}; each must hold {{}} once, where {stands_for} goes"


def fill_templates(templates: Sequence[str], name: str) -> tuple[str, ...]:
    """Every template with the name in it."""
    return tuple(template.replace("{}", name) for template in templates)
