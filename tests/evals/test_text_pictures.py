"""Texts as pictures: where ink and ground are, and that nothing leaves the picture."""

import numpy as np
import pytest

from vlm_jax.evals.text_pictures import WIDTH, Sample, Span, paragraph, sample_rows, supervised_rows

GREEN = (0xC6, 0xEF, 0xCE)


def ground(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.asarray(colour, np.uint8)).all(axis=-1)


def test_what_is_learned_stands_on_green_and_nothing_else_does() -> None:
    pieces = [("USER: what is it? ASSISTANT:", False), ("a red cat", True), ("USER: thanks", False)]
    picture = supervised_rows([pieces], "title")
    assert picture.shape[1] == WIDTH
    green = ground(picture, GREEN)
    assert green.any()
    none = supervised_rows([[(text, False) for text, _ in pieces]], "title")
    assert not ground(none, GREEN).any()
    # The same words in the same places: the ground alone differs, but for ink on the edge of letters.
    assert (picture != none).any(axis=-1)[~ground(none, (255, 255, 255))].sum() < green.sum()
    columns = np.flatnonzero(green.any(axis=0))
    everything = np.flatnonzero((none != 255).any(axis=(0, 2)))
    assert everything[0] < columns[0] < columns[-1] < everything[-1]


def test_texts_are_broken_into_lines_that_fit() -> None:
    one = paragraph([Span("word")], 300)
    assert paragraph([Span("word " * 40)], 300).shape[0] > 3 * one.shape[0]
    assert paragraph([Span("a\nb")], 300).shape[0] == 2 * one.shape[0]
    assert paragraph([Span("w" * 300)], 300).shape[0] > 5 * one.shape[0]  # one word wider than the line
    assert paragraph([Span("x " * 100_000)], 300).shape[0] < 200 * one.shape[0]
    assert paragraph([Span("a\x00b\x1b \ud800 \u65e5")], 300).shape == one.shape  # whatever a model writes
    assert paragraph([Span("")], 300).shape == (one.shape[0], 300, 3)


@pytest.mark.parametrize("shapes", [(), ((5, 9),), ((300, 40), (8, 8)), ((20, 20),) * 7])
def test_samples_with_any_number_of_images(shapes: tuple[tuple[int, int], ...]) -> None:
    images = [np.full((*shape, 3), 77, np.uint8) for shape in shapes]
    right, wrong = (
        sample_rows([Sample(images, "What?", "a cat", ("a cat",), right)], "title") for right in (True, False)
    )
    assert right.shape[1] == WIDTH
    assert ground(right, (77, 77, 77)).any() == bool(shapes)
    assert ground(right, (0x1A, 0x7F, 0x37)).any()
    assert not ground(wrong, (0x1A, 0x7F, 0x37)).any()
