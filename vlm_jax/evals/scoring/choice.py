"""Multiple choice: which option an answer names. Strict, for a letter somewhere in a sentence is no answer.

A lenient reading (any A that stands alone) takes the article of "A dog." for option A and thereby gives a model that
never read the question a share of the points.
"""

import re
import string
from collections.abc import Sequence

import numpy as np

from vlm_jax.evals.scoring.base import Answered, Scores, mean_points

LETTERS = string.ascii_uppercase
_LETTER = re.compile(r"\(?([A-Z])(?:\)|\.|:)?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])\s+(\S.*)", re.DOTALL)


def plain(text: str) -> str:
    """An option's text as it is compared: lower case, one space between words, without a full stop behind it."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def chosen(text: str, options: Sequence[str]) -> int:
    """The option that an answer names, or -1.

    `B`, `B.`, `B:`, `B)` and `(B)` name the second, also with that option's text behind, and so does the text alone,
    where it is that of one option only. Anything else names none.

    Args:
        text: the answer.
        options: their texts; empty ones where only their number is known.
    """
    said, texts = text.strip(), [plain(option) for option in options]
    letter = _LETTER.fullmatch(said)
    if letter is not None and (said[0] == "(") <= (said[-1] == ")"):
        number = LETTERS.index(letter[1])
        return number if number < len(options) else -1
    both = _LETTER_AND_TEXT.fullmatch(said)
    if both is not None:
        number = LETTERS.index(both[1] or both[2])
        if number < len(options) and texts[number] == plain(both[3]):
            return number
    same = [number for number, option in enumerate(texts) if option and option == plain(said)]
    return same[0] if len(same) == 1 else -1


def right_option(row: Answered) -> int:
    """The number of the right option, whose letter is the known answer; raises `ValueError` when it is no letter."""
    letter = row.answers[0].strip()
    if len(letter) != 1 or letter not in LETTERS:
        raise ValueError(f"an answer is {letter!r}, not the letter of an option")
    return LETTERS.index(letter)


def score_choice(rows: Sequence[Answered]) -> Scores:
    """`accuracy`, that of each kind, `accuracy_mean`, the mean over kinds, and `unreadable`, the share of answers that
    name no option."""
    picked = [chosen(row.text, row.options) for row in rows]
    points = [float(pick == right_option(row)) for pick, row in zip(picked, rows, strict=True)]
    scores = mean_points("accuracy", rows, points)
    kinds = [value for name, value in scores.metrics.items() if "/" in name]
    scores.metrics["accuracy_mean"] = float(np.mean(kinds)) if kinds else scores.metrics["accuracy"]
    scores.metrics["unreadable"] = picked.count(-1) / len(picked)
    return scores


_SCIENCE_LETTER = re.compile(r"([A-E])\. ")
_SCIENCE_SENTENCE, _SCIENCE_PART = re.compile(r"The answer is ([A-E])\."), re.compile(r"The answer is ([A-E])")


def science_chosen(text: str, options: Sequence[str]) -> int:
    """The option that an answer names by LLaVA's reading, or -1: a letter from A to E alone, one followed by a point
    and a space at the very beginning, or one behind `The answer is `, that with a point behind it before others."""
    said = text.replace("\n", ". ")
    letter = said.strip()
    if len(letter) != 1 or letter not in LETTERS[:5]:
        match = _SCIENCE_LETTER.match(said) or _SCIENCE_SENTENCE.search(said) or _SCIENCE_PART.search(said)
        letter = match[1] if match else ""
    number = LETTERS.index(letter) if letter else -1
    return number if number < len(options) else -1


def score_scienceqa(rows: Sequence[Answered]) -> Scores:
    """`accuracy_image`, of the questions that come with an image (LLaVA's IMG), `accuracy` of all of them and of each
    kind, and `unreadable`, the share of answers that name no option."""
    picked = [science_chosen(row.text, row.options) for row in rows]
    points = [float(pick == right_option(row)) for pick, row in zip(picked, rows, strict=True)]
    scores = mean_points("accuracy", rows, points)
    seen = [point for point, row in zip(points, rows, strict=True) if row.images]
    image = {"accuracy_image": float(np.mean(seen))} if seen else {}
    return Scores({**image, **scores.metrics, "unreadable": picked.count(-1) / len(picked)}, scores.points)


__all__ = ["chosen", "right_option", "science_chosen", "score_choice", "score_scienceqa"]
