"""VQA accuracy: an answer is as right as many of ten people gave it (Antol et al. 2015, section 4; Goyal et al. 2017).

Answers are compared as the evaluation code of VQAv2 does (`vqa`), or as that of M4C does, by which TextVQA is scored
(`textvqa`). The two differ: the first treats what the model says, and of what people said only the punctuation, and
that only where they disagree; the second treats both alike.
"""

import re
from collections.abc import Sequence

from vlm_jax.evals.scoring.base import Answered, Scores, mean_points

ENOUGH = 3  # people who must have said it for the answer to be right

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
# The published pattern means to look behind the point as well, and doesn't.
_POINT = re.compile(r"\.(?!\d)")
_SHORT_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _misspelt(form: str) -> list[str]:
    """The form without one of its apostrophes, for each of them."""
    return [form[:place] + form[place + 1 :] for place, mark in enumerate(form) if mark == "'"]


# "somebody'd" goes the other way in the published table.
_APOSTROPHES = {wrong: form for form in _SHORT_FORMS.split() for wrong in _misspelt(form)} | {"somebody'd": "somebodyd"}


def without_punctuation(text: str) -> str:
    """Each mark goes where a space is beside one like it, or where the text has a comma between digits; elsewhere it
    becomes a space. Points stay before digits alone."""
    out = text
    grouped = _GROUPED_DIGITS.search(text) is not None
    for mark in _MARKS:
        goes = grouped or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    return _POINT.sub("", out)


def plain_words(text: str) -> str:
    """Lower case, digits for number words up to ten, no articles, and apostrophes where they belong."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def normalised(text: str) -> str:
    """An answer as the evaluation of VQAv2 compares it."""
    return plain_words(without_punctuation(" ".join(re.split(r"[\n\t]", text)).strip()))


def m4c_normalised(text: str) -> str:
    """An answer as the evaluation of M4C compares it: commas and question marks go first, and `'s` is a word."""
    lower = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalised(lower)


def agreement(answer: str, people: Sequence[str]) -> float:
    """The mean, over all choices of all people but one, of min(how many of those said it / 3, 1).

    Raises:
        ValueError: there are no two people.
    """
    if len(people) < 2:
        raise ValueError("a question was answered by one, and agreement takes several people")
    said = sum(person == answer for person in people)
    # Who is left out said it, or didn't.
    with_it, without_it = min(max(said - 1, 0) / ENOUGH, 1.0), min(said / ENOUGH, 1.0)
    return (said * with_it + (len(people) - said) * without_it) / len(people)


def vqa_accuracy(text: str, people: Sequence[str]) -> float:
    """What an answer to a question of VQAv2 is worth, in 0..1."""
    if len(set(people)) > 1:
        people = [without_punctuation(person) for person in people]
    return agreement(normalised(text), people)


def textvqa_accuracy(text: str, people: Sequence[str]) -> float:
    """What an answer to a question of TextVQA is worth, in 0..1."""
    return agreement(m4c_normalised(text), [m4c_normalised(person) for person in people])


def score_vqa(rows: Sequence[Answered]) -> Scores:
    """`accuracy`, and that of each kind; VQAv2's are `yes_no`, `number` and `other`."""
    return mean_points("accuracy", rows, [vqa_accuracy(row.text, row.answers) for row in rows])


def score_textvqa(rows: Sequence[Answered]) -> Scores:
    """`accuracy`."""
    return mean_points("accuracy", rows, [textvqa_accuracy(row.text, row.answers) for row in rows])


__all__ = [
    "agreement",
    "m4c_normalised",
    "normalised",
    "score_textvqa",
    "score_vqa",
    "textvqa_accuracy",
    "vqa_accuracy",
]
