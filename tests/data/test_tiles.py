import numpy as np
import pytest
from conversations import GOLDEN, golden
from safetensors.numpy import load_file

from vlm_jax.data.images import PreprocessConfig, normalise
from vlm_jax.data.tiles import (
    CLIP_GREY,
    NEWLINE,
    AnyresTiling,
    SplitTiling,
    SquareTiling,
    best_grid,
    pad_to_square,
    split_size,
    unpadded,
)

LLAVA, TABLES = load_file(GOLDEN / "llava_images.safetensors"), golden("llava_images")
TILES = load_file(GOLDEN / "nanovlm_tiles.safetensors")


@pytest.mark.parametrize("name", ["wide", "tall", "square", "odd"])
def test_llavas_images_pixel_for_pixel(name):
    image = LLAVA[f"image.{name}"]
    assert list(CLIP_GREY) == TABLES["bg"]
    np.testing.assert_array_equal(pad_to_square(image, CLIP_GREY), LLAVA[f"square.{name}"])
    for kind, tiling in (
        ("pad", SquareTiling(fit="pad")),
        ("crop", SquareTiling(fit="crop")),
        ("anyres", AnyresTiling()),
    ):
        tiles = tiling.tiles(image, 28)
        expected = LLAVA[f"{kind}_pixel_values.{name}"].reshape(-1, 3, 28, 28)
        np.testing.assert_array_equal(normalise(tiles, PreprocessConfig()).transpose(0, 3, 1, 2), expected)
        assert tiling.plan(*image.shape[:2], 28, 4).tiles == len(expected)


def test_llavas_tables_of_grids_and_borders():
    assert len(TABLES["anyres_table"]["rows"]) == 60
    for row in TABLES["anyres_table"]["rows"]:
        width, height = row["wh"]
        assert list(best_grid(height, width, AnyresTiling().grids, 336)) == row["grid_wh"]
    assert len(TABLES["unpad_table"]) == 40
    for row in TABLES["unpad_table"]:
        width, height = row["original_wh"]
        top, stop, left, right = unpadded(height, width, *row["current_hw"])
        assert [stop - top, right - left] == row["out_hw"]


@pytest.mark.parametrize(("height", "width"), [(50, 30), (20, 45), (33, 28), (16, 90)])
def test_slots_of_a_grid_are_its_features_merged_cropped_and_ended_by_newlines(height, width):
    """LLaVA-NeXT's tensors: tiles to one map of features, its borders cut off, a newline behind each row."""
    side, tiling = 3, AnyresTiling()
    per_tile = side * side
    plan = tiling.plan(height, width, 28, per_tile)
    columns, rows = best_grid(height, width, tiling.grids, 28)
    features = np.random.default_rng(0).normal(size=(plan.tiles, per_tile, 2))
    newline = np.full(2, 9.0)
    grid = features[1:].reshape(rows, columns, side, side, 2).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * side, columns * side, 2)
    top, stop, left, right = unpadded(height, width, rows * side, columns * side)
    grid = grid[top:stop, left:right]
    ended = np.concatenate([grid, np.broadcast_to(newline, (len(grid), 1, 2))], axis=1).reshape(-1, 2)
    slots = np.concatenate(plan.pieces)
    gathered = np.where((slots == NEWLINE)[:, None], newline, features.reshape(-1, 2)[slots])
    np.testing.assert_array_equal(gathered, np.concatenate([features[0], ended]))


def test_nanovlms_table_of_sizes():
    table = golden("nanovlm_resize_table")
    assert len(table) == 190
    for row in table:
        size = split_size(row["h"], row["w"], row["patch_size"], row["max_side_len"], row["resize_to_max_side_len"])
        assert list(size) == row["out_hw"]


@pytest.mark.parametrize("case", golden("nanovlm_tiles"), ids=lambda case: f"{case['processor']}-{case['image']}")
def test_nanovlms_tiles(case):
    tiling = SplitTiling(max_side=64, enlarge=case["processor"] == "max64_fill")
    image = TILES[f"image.{case['image']}"]
    expected = TILES[f"tiles.{case['processor']}.{case['image']}"].transpose(0, 2, 3, 1)
    tiles = tiling.tiles(image, 16)
    plan = tiling.plan(*case["in_hw"], 16, 4)
    assert plan.tiles == len(tiles) == case["n_tiles"]
    has_global = int(case["has_global_first"])
    # the cells are bytes in both; nanoVLM resizes the whole image in floats, here it is rounded to bytes
    np.testing.assert_allclose(tiles[has_global:] / 255, expected[has_global:], atol=1e-6, rtol=0)
    np.testing.assert_allclose(tiles[:has_global] / 255, expected[:has_global], atol=1 / 255, rtol=0)
    alone = SplitTiling(max_side=64, enlarge=tiling.enlarge, global_marker="").tiles(image, 16)
    np.testing.assert_array_equal(alone, tiles[has_global:])


def test_image_strings_are_nanovlms():
    for case in golden("nanovlm_image_strings"):
        marker = "<|global_image|>" if case["tokenizer"] == "with_global" else ""
        tiling, text = SplitTiling(max_side=64, enlarge=False, global_marker=marker), ""
        for number, (rows, columns) in enumerate(case["grids"]):
            text += f"<image: {number}>" if len(case["grids"]) > 1 else ""
            for piece in tiling.plan(rows * 16, columns * 16, 16, case["mp_image_token_length"]).pieces:
                text += piece if isinstance(piece, str) else "<|image|>" * len(piece)
        assert text == case["string"]


def test_an_image_of_1_by_10000_pixels_has_a_defined_result():
    """A square of it would need 300 MB, and a crop of it 3 GB: refused. Where sides are bounded it is an image."""
    line = np.zeros((1, 10000, 3), np.uint8)
    for fit in ("pad", "crop"):
        with pytest.raises(ValueError, match="of 10000x1 pixels is too narrow: it would be resized to"):
            SquareTiling(fit=fit).tiles(line, 336)
    assert SquareTiling(fit="squash").tiles(line, 336).shape == (1, 336, 336, 3)
    assert AnyresTiling().tiles(line, 336).shape == (3, 336, 336, 3)
    assert SplitTiling().tiles(line, 512).shape == (5, 512, 512, 3)
    thin = AnyresTiling().plan(1, 10000, 336, 576)
    assert thin.tiles == 3
    assert sum(map(len, thin.pieces)) == 576  # not a whole row of features of the grid shows it: the whole image does
    assert SplitTiling().plan(1, 10000, 512, 64).tiles == 5
