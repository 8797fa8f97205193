"""The retrieval picture, looked at pixel by pixel."""

import numpy as np
import pytest

from vlm_jax.evals.pictures import Candidate, Query, retrieval_picture

RED, BLUE = (250, 10, 20), (10, 20, 250)
GREEN_FRAME = (0x1A, 0x7F, 0x37)


def plain(color, height, width):
    return np.full((height, width, 3), color, np.uint8)


def query(size, rank=1, caption="a red thing", count=5):
    own = Candidate(plain(RED, *size), 0.5, is_own=True)
    others = [Candidate(plain(BLUE, *size), 0.4, is_own=False) for _ in range(count)]
    if rank <= count:
        others[rank - 1] = own
    return Query(caption, tuple(others), own, rank)


def boxes(picture, color):
    """Bounding boxes (height, width) of the blobs of a colour, from left to right."""
    match = np.all(np.abs(picture.astype(int) - color) < 3, axis=-1)
    columns = np.flatnonzero(match.any(axis=0))
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 3) + 1)
    return [(match[:, group].any(axis=1).sum(), len(group)) for group in groups if len(group)]


@pytest.mark.parametrize("size", [(8, 8), (224, 224), (1000, 1000)])
def test_images_of_any_size_are_shown_at_one_size(size):
    picture = retrieval_picture([query(size, rank=2)], [], "title")
    red, blue = boxes(picture, RED), boxes(picture, BLUE)
    assert len(red) == 2, "once among the found, once as its own"
    assert len(blue) == 4
    for height, width in red + blue:
        assert height == pytest.approx(130, abs=15)
        assert width == pytest.approx(height, abs=6)


def test_the_shape_of_an_image_is_kept():
    ((height, width), *_) = boxes(retrieval_picture([query((50, 100))], [], "t"), BLUE)
    assert width == pytest.approx(2 * height, abs=6)


def test_small_images_keep_sharp_pixels():
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = (255, 0, 255)
    candidate = Candidate(board, 0.1, is_own=False)
    picture = retrieval_picture([Query("x", (candidate,), candidate, 9)], [], "t")
    magenta = np.all(picture == (255, 0, 255), axis=-1).sum()
    # Two boards of about 136 pixels' side, half of each magenta; smoothing would leave next to none of the pure colour.
    assert magenta == pytest.approx(136 * 136, rel=0.15)


def test_a_miss_is_framed_only_as_its_own_image():
    hit = retrieval_picture([query((8, 8), rank=1)], [], "t")
    miss = retrieval_picture([], [query((8, 8), rank=99)], "t")
    framed = [np.all(picture == GREEN_FRAME, axis=-1).sum() for picture in (hit, miss)]
    assert framed[0] == pytest.approx(2 * framed[1], rel=0.15)


def test_a_row_a_query_and_any_caption():
    one = retrieval_picture([query((8, 8))], [], "t")
    captions = ["costs $5 or $6", "x" * 500, "", "<|endoftext|> {} \\frac", "Größe 5 µm"]
    many = retrieval_picture([query((8, 8), caption=c) for c in captions], [query((8, 8), rank=7, count=2)], "t $1$")
    assert many.shape[0] > 4 * one.shape[0]
    assert many.shape[1] == one.shape[1]
    assert many.dtype == np.uint8
