import json
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.data.packing import lay_out, pack, pack_windows, pieces

GOLDEN = Path(__file__).parents[1] / "golden" / "nanovlm_packing.json"


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"])
def test_balanced_packing_is_nanovlms(case):
    groups = pack(
        case["lengths"],
        case["seq_length"],
        tiles=case["image_counts"],
        max_tiles=case["max_images_per_knapsack"],
        fit="balanced",
        spare_rows=case["delta"],
    )
    assert groups == case["groups"]


def best_fit_decreasing(lengths, tiles, row_length, max_tiles):
    """Brute force: looks at every row for every document."""
    rows = []
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [
            (-sum(lengths[i] for i in row), number)
            for number, row in enumerate(rows)
            if sum(lengths[i] for i in row) + lengths[document] <= row_length
            and sum(tiles[i] for i in row) + tiles[document] <= max_tiles
        ]
        if fits:
            rows[min(fits)[1]].append(document)
        else:
            rows.append([document])
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_tight_packing_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    lengths, tiles = rng.integers(1, 60, 150).tolist(), rng.integers(0, 4, 150).tolist()
    groups = pack(lengths, 64, tiles=tiles, max_tiles=5)
    assert sorted(map(sorted, groups)) == sorted(map(sorted, best_fit_decreasing(lengths, tiles, 64, 5)))


def test_windows_hold_every_usable_document_once_within_the_limits():
    rng = np.random.default_rng(0)
    lengths, tiles = rng.integers(1, 100, 3000), rng.integers(0, 3, 3000)
    lengths[[5, 700]] = -1
    packing = pack_windows(lengths, 128, seed=3, tiles=tiles, max_tiles=6, window=256)
    rows = [packing[row] for row in range(len(packing))]
    assert sorted(np.concatenate(rows).tolist()) == [i for i in range(3000) if i not in (5, 700)]
    assert all(lengths[row].sum() <= 128 and tiles[row].sum() <= 6 for row in rows)
    assert lengths[lengths > 0].sum() / (128 * len(packing)) > 0.95
    again, other = (pack_windows(lengths, 128, seed=s, tiles=tiles, max_tiles=6, window=256) for s in (3, 4))
    np.testing.assert_array_equal(packing.documents, again.documents)
    assert not np.array_equal(packing.documents, other.documents)
    with pytest.raises(IndexError):
        packing[len(packing)]
    assert len(pack_windows([-1, -1], 128, seed=0)) == 0


def test_a_document_that_fits_no_row_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens and 0 tiles"):
        pack([3, 9], 8)
    with pytest.raises(ValueError, match="document 0 has 3 tokens and 2 tiles"):
        pack([3, 8], 8, tiles=[2, 0], max_tiles=1)


def test_long_texts_are_cut_where_a_row_is_full():
    lengths = [5, 0, 12, 3]
    document, first, stop = pieces(lengths, 5)
    joined = [[] for _ in lengths]
    for d, a, b in zip(document, first, stop, strict=True):
        assert 0 < b - a <= 5
        joined[d] += range(a, b)
    assert joined == [list(range(n)) for n in lengths]
    assert len(document) == 1 + 0 + 3 + 1


@pytest.mark.parametrize("padding", ["right", "left"])
def test_documents_are_isolated_by_segment_and_position(padding):
    layout = lay_out([3, 2], 8, padding=padding)
    pad = [0, 0, 0]
    right = padding == "right"
    assert layout.segments.tolist() == ([1, 1, 1, 2, 2, *pad] if right else [*pad, 1, 1, 1, 2, 2])
    assert layout.positions.tolist() == ([0, 1, 2, 0, 1, *pad] if right else [*pad, 0, 1, 2, 0, 1])
    assert layout.starts == ([0, 3] if right else [3, 6])
    with pytest.raises(ValueError, match="don't fit"):
        lay_out([5, 4], 8)


def test_without_isolation_a_row_is_nanovlms():
    """One separator after each document, that nothing sees; positions run through."""
    pack_case = json.loads(GOLDEN.read_text())["pack"]
    mask = np.asarray(pack_case["attention_mask"])
    separators = np.flatnonzero(mask == 0)
    lengths = np.diff(separators, prepend=-1) - 1
    layout = lay_out(lengths.tolist(), len(mask), isolation="none")
    np.testing.assert_array_equal(layout.segments, mask)
    np.testing.assert_array_equal(layout.positions, np.arange(len(mask)))
    assert layout.starts == [0, *(separators[:-1] + 1).tolist()]
