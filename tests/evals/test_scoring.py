"""What answers are worth, by the benchmarks' own rules: worked examples, and the definitions written out."""

import functools
import itertools

import numpy as np
import pytest

from vlm_jax.evals.scoring import SCORERS, Answered, Score
from vlm_jax.evals.scoring.choice import chosen, science_chosen
from vlm_jax.evals.scoring.short_answers import anls, canonical_answer, edit_distance
from vlm_jax.evals.scoring.vqa_accuracy import m4c_normalised, normalised, textvqa_accuracy, vqa_accuracy
from vlm_jax.evals.scoring.yes_no import says_no, yes_or_no


def people(*groups: tuple[str, int]) -> list[str]:
    return [answer for answer, count in groups for _ in range(count)]


@pytest.mark.parametrize("said", range(11))
def test_an_answer_is_as_right_as_nine_of_ten_people_say_on_average(said: int) -> None:
    """All ten choices of nine people, enumerated; the numbers that papers give for 0, 1, 2, 3 and 4 of ten."""
    answers = people(("red", said), ("blue", 10 - said))
    nines = [min(sum(answers[i] == "red" for i in nine) / 3, 1) for nine in itertools.combinations(range(10), 9)]
    assert vqa_accuracy("red", answers) == pytest.approx(np.mean(nines))
    assert vqa_accuracy("red", answers) == pytest.approx({0: 0, 1: 0.3, 2: 0.6, 3: 0.9}.get(said, 1.0))
    assert textvqa_accuracy("red", answers) == vqa_accuracy("red", answers)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("a an the", ""),
        ("dont", "don't"),
        ("couldntve done", "couldntve done"),  # two apostrophes are missing: not in the published table
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("ice-cream", "ice cream"),  # no space beside it: it becomes one
        ("yes, it is", "yes it is"),  # a space behind it: it goes
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # with a comma between digits every mark goes
        ("a/b", "b"),  # the slash becomes a space, and "a" is an article
        ("3.5", "3.5"),
        ("at 5. street", "at 5 street"),
        ("what\tis\nit?", "what is it"),
        ("(left)", "left"),
    ],
)
def test_answers_are_normalised_as_the_evaluation_of_vqa_does(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_of_what_people_said_only_punctuation_is_treated_where_they_disagree() -> None:
    assert vqa_accuracy("two", ["two"] * 10) == 0.0  # "2" is compared with "two"
    assert vqa_accuracy("two", ["2"] * 10) == 1.0
    assert vqa_accuracy("ice-cream", ["ice-cream"] * 10) == 0.0
    assert vqa_accuracy("ice-cream", people(("ice-cream", 9), ("cake", 1))) == 1.0


def test_textvqa_treats_both_sides_alike() -> None:
    assert m4c_normalised("Joe's, 1,000?") == "joe 's 1000"
    assert m4c_normalised("What's up?") == "what 's up"
    assert textvqa_accuracy("The ice-cream", ["ice-cream"] * 10) == 1.0
    assert textvqa_accuracy("two", ["two"] * 10) == 1.0
    assert textvqa_accuracy("joe's", people(("Joe's", 2), ("joes", 8))) == pytest.approx(0.6)


def test_kinds_of_vqa_have_their_own_accuracy() -> None:
    rows = [
        Answered("yes", ("yes",) * 10, kind="yes/no"),
        Answered("2", tuple(people(("2", 2), ("3", 8))), kind="number"),
        Answered("cat", ("dog",) * 10, kind="other"),
        Answered("dog", ("dog",) * 10, kind="other"),
    ]
    found = SCORERS["vqa"](rows)
    assert found.metrics == pytest.approx(
        {"accuracy": 2.6 / 4, "accuracy/yes_no": 1.0, "accuracy/number": 0.6, "accuracy/other": 0.5}
    )
    assert next(iter(found.metrics)) == "accuracy"
    assert found.points == pytest.approx([1, 0.6, 0, 1])


def test_pope_by_its_table_of_hits() -> None:
    """Li et al. 2023, 5.1: precision, recall and F1 of yes."""
    assert [says_no(text) for text in ("No", "no, there is not.", "There is not one", "Yes. No.", "nope", "yes")] == [
        *(True, True, True, False, False, False)
    ]
    answers = ("yes", "yes", "yes", "no", "no", "no", "no", "yes")
    texts = ("Yes", "Yes, it is", "No.", "No", "Yes", "There is no dog", "no", "not really")
    kinds = ["random"] * 5 + ["popular"] * 3
    rows = [Answered(text, (answer,), kind=kind) for text, answer, kind in zip(texts, answers, kinds, strict=True)]
    found = SCORERS["pope"](rows).metrics
    # of all: 2 hits, 1 false alarm, 3 right noes, 2 misses
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 4)
    assert found["f1_all"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found["yes_ratio"] == pytest.approx(3 / 8)
    assert found["f1/random"] == pytest.approx(2 / 3)
    assert found["f1/popular"] == 0.0
    assert found["f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_mme_sums_points_of_questions_and_of_images() -> None:
    assert [yes_or_no(text) for text in (" Yes, it", "No.", "It is yes", "Not", "maybe", "n")] == [
        *("yes", "no", "other", "no", "other", "other")
    ]

    def image(name: str, kind: str, first: str, second: str) -> list[Answered]:
        return [Answered(first, ("Yes",), kind=kind, group=name), Answered(second, ("No",), kind=kind, group=name)]

    rows = [
        *image("a", "existence", "Yes", "No"),
        *image("b", "existence", "Yes", "Yes"),
        *image("c", "OCR", "yes.", "no."),
        *image("d", "code_reasoning", "perhaps", "no"),
    ]
    found = SCORERS["mme"](rows).metrics
    assert found["accuracy/existence"] == 0.75
    assert found["accuracy_plus/existence"] == 0.5
    assert found["score/existence"] == 125
    assert found["score/OCR"] == 200
    assert (found["perception"], found["cognition"], found["total"]) == (325, 50, 375)
    assert found["other"] == 1 / 8
    assert next(iter(found)) == "perception"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        *[(text, 1) for text in ("B", "B.", " B\n", "(B)", "B)", "B:", "B. a cat", "(B) A cat.", "B: a cat", "A cat")],
        *[(text, -1) for text in ("b", "The answer is B", "A cat sits", "A. a cat", "B or C", "(B", "AB", "", "a")],
        ("E", -1),
        ("D", 3),
        ("same", -1),  # the text of two options
    ],
)
def test_only_an_option_and_nothing_else_is_a_choice(text: str, option: int) -> None:
    assert chosen(text, ("a dog", "a cat", "same", "Same.")) == option


def test_choice_counts_kinds_and_what_is_unreadable() -> None:
    options = ("", "", "", "")
    rows = [
        Answered("A", ("A",), options, "math"),
        Answered("The answer is A", ("A",), options, "math"),
        Answered("B.", ("C",), options, "logical reasoning"),
        Answered("(C)", ("C",), options, "math"),
    ]
    found = SCORERS["choice"](rows).metrics
    assert found["accuracy"] == 0.5
    assert found["accuracy/math"] == pytest.approx(2 / 3)
    assert found["accuracy/logical_reasoning"] == 0
    assert found["accuracy_mean"] == pytest.approx(1 / 3)
    assert found["unreadable"] == 0.25


@pytest.mark.parametrize(
    ("text", "option"),
    [
        *[(text, 1) for text in ("B", " B ", "B. a cat", "B\nbecause", "So. The answer is B.", "The answer is B")],
        ("The answer is A or The answer is B.", 1),
        *[(text, -1) for text in ("E", "b", "It is B", "B.", "(B)")],
    ],
)
def test_scienceqa_is_read_as_llava_reads_it(text: str, option: int) -> None:
    assert science_chosen(text, ("x", "y", "z")) == option


def test_scienceqa_has_an_accuracy_of_questions_with_an_image() -> None:
    options = ("x", "y")
    rows = [Answered("A", ("A",), options, images=1), Answered("B", ("A",), options, images=1)]
    rows += [Answered("A", ("A",), options, images=0), Answered("?", ("A",), options, images=0)]
    found = SCORERS["scienceqa"](rows).metrics
    assert list(found.items())[:2] == [("accuracy_image", 0.5), ("accuracy", 0.5)]
    assert found["unreadable"] == 0.25
    assert SCORERS["scienceqa"](rows[2:3]).metrics["accuracy"] == 1.0


def test_gqa_compares_texts_and_tells_open_questions_from_binary_ones() -> None:
    rows = [
        Answered("Yes.", ("yes",), kind="verify"),
        Answered("left", ("right",), kind="choose"),
        Answered("the dog", ("dog",), kind="query"),  # no article is taken off
        Answered("Dog", ("dog",), kind="query"),
        Answered("cat", ("cat",), kind="query"),
    ]
    found = SCORERS["gqa"](rows).metrics
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert (found["binary"], found["open"]) == pytest.approx((1 / 2, 2 / 3))
    assert found["accuracy/verify"] == 1.0


@functools.cache
def recursive_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        recursive_distance(a[1:], b) + 1,
        recursive_distance(a, b[1:]) + 1,
        recursive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distances_are_those_of_the_recursion() -> None:
    assert edit_distance("kitten", "sitting") == 3
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert edit_distance(a, b) == recursive_distance(a, b)


def test_anls_takes_the_nearest_answer_and_nothing_below_one_half() -> None:
    assert anls("The  Gazette ", ("the gazette",)) == 1.0
    assert anls("kitten", ("nothing", "sitting")) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ("abxy",)) == 0.5  # exactly one half counts
    assert anls("abcd", ("axyz",)) == 0.0
    assert anls("", ("",)) == 1.0
    assert SCORERS["anls"]([Answered("abcd", ("abcx",)), Answered("?", ("abcx",))]).metrics == {"anls": 0.375}


@pytest.mark.parametrize(
    ("score", "answers", "why"),
    [
        ("pope", ("red",), "an answer is 'red', neither yes nor no"),
        ("mme", ("red",), "an answer is 'red', neither yes nor no"),
        ("choice", ("AB",), "an answer is 'AB', not the letter of an option"),
        ("scienceqa", ("",), "an answer is '', not the letter of an option"),
        ("vqa", ("red",), "a question was answered by one"),
        ("textvqa", ("red",), "a question was answered by one"),
    ],
)
def test_answers_of_another_benchmark_are_refused(score: Score, answers: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        SCORERS[score]([Answered("red", answers, ("x", "y"))])


def test_word_for_word_is_but_for_case_and_a_full_stop() -> None:
    assert canonical_answer(" Top Left. ") == "top left"
    rows = [Answered("Red.", ("blue", "red"), kind="color"), Answered("red one", ("red",), kind="color")]
    assert SCORERS["exact"](rows).metrics == {"exact_match": 0.5, "exact_match/color": 0.5}
