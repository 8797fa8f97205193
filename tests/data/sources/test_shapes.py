import pickle

import numpy as np
import pytest

from vlm_jax import schema
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.sources.shapes import COLORS, POSITIONS, SHAPES, SIZES
from vlm_jax.schema import ConfigError


def test_records_are_a_pure_function_of_seed_split_and_index():
    source = ShapesConfig(count=50).build("")
    copy = pickle.loads(pickle.dumps(source))
    longer = ShapesConfig(count=5000).build("")
    for index in (49, 3, 11):
        first = source[index]
        for other in (source, copy, longer):
            np.testing.assert_array_equal(first["image"], other[index]["image"])
            assert first["texts"] == other[index]["texts"] == source.texts(index)
    test = ShapesConfig(count=50, split="test").build("")
    other_seed = ShapesConfig(count=50, seed=1).build("")
    for elsewhere in (test, other_seed):
        assert sum(source.texts(i) == elsewhere.texts(i) for i in range(50)) < 5
    with pytest.raises(IndexError):
        source[50]


def test_captions_tell_the_scene():
    source = ShapesConfig(count=300, min_objects=1, max_objects=3, image_size=32).build("")
    counts = set()
    for index in range(300):
        scene, texts = source[index]["scene"], source.texts(index)
        counts.add(len(scene))
        assert len({item["position"] for item in scene}) == len(scene)
        for text in texts:
            assert text.count("a ") == len(scene) or text.count(" and ") == len(scene) - 1
            for item in scene:
                assert f"a {item['size']} {item['color']} {item['shape']} in the {item['position']}" in text
        assert len(texts) == (1 if len(scene) == 1 else 2)
    assert counts == {1, 2, 3}


def test_pictures_show_what_captions_say():
    """Each object's colour stands at its place, a large one covers more than a small one, empty cells are ground."""
    source = ShapesConfig(count=400, image_size=66, max_objects=2).build("")
    areas = {size: [] for size in SIZES}
    seen = set()
    for index in range(400):
        record = source[index]
        image, ground = record["image"].astype(int), record["image"][0, 0].astype(int)
        occupied = np.abs(image - ground).sum(-1) > 60
        cells = {item["position"]: item for item in record["scene"]}
        for number, position in enumerate(POSITIONS):
            row, column = divmod(number, 3)
            cell = np.s_[22 * row : 22 * row + 22, 22 * column : 22 * column + 22]
            if position not in cells:
                assert not occupied[cell].any()
                continue
            item = cells[position]
            areas[item["size"]].append(occupied[cell].sum())
            distance = np.abs(image[cell][10:12, 10:12].mean((0, 1)) - COLORS[item["color"]]).max()
            assert distance < 45
            seen.add((item["shape"], item["color"]))
    assert len(seen) == len(SHAPES) * len(COLORS)
    assert np.mean(areas["large"]) > 2.5 * np.mean(areas["small"])


def test_a_close_up_is_one_object_three_times_as_large():
    """About nine times the area (small ones are mostly edge), in the middle, and cut off nowhere."""
    areas = {}
    for cells in (9, 1):
        source = ShapesConfig(count=300, image_size=64, max_objects=1, cells=cells).build("")
        assert source.class_names[source[0]["label"]] == "{color} {shape}".format(**source[0]["scene"][0])
        for index in range(300):
            record = source[index]
            (item,), image = record["scene"], record["image"].astype(int)
            occupied = np.abs(image - image[0, 0]).sum(-1) > 60
            areas.setdefault((item["shape"], item["size"]), {}).setdefault(cells, []).append(occupied.sum())
            if cells == 1:
                assert item["position"] == "centre"
                assert np.abs(image[30:34, 30:34].mean((0, 1)) - COLORS[item["color"]]).max() < 45
                assert not np.concatenate([occupied[[0, -1]].ravel(), occupied[:, [0, -1]].ravel()]).any()
    assert len(areas) == len(SHAPES) * len(SIZES)
    for found in areas.values():
        assert np.mean(found[1]) == pytest.approx(9 * np.mean(found[9]), rel=0.3)


def test_shapes_differ_from_each_other():
    from PIL import Image, ImageDraw

    from vlm_jax.data.sources.shapes import _draw_object

    masks = {}
    for shape in SHAPES:
        image = Image.new("RGB", (64, 64))
        _draw_object(ImageDraw.Draw(image), shape, (32, 32), 24, (255, 255, 255))
        masks[shape] = np.asarray(image)[..., 0] > 0
    for a in SHAPES:
        for b in SHAPES:
            union, both = (masks[a] | masks[b]).sum(), (masks[a] & masks[b]).sum()
            assert a == b or both / union < 0.85


def test_impossible_scenes_are_refused():
    for config, key in (
        (ShapesConfig(count=0), "count"),
        (ShapesConfig(image_size=8), "image_size"),
        (ShapesConfig(min_objects=4), "min_objects"),
        (ShapesConfig(max_objects=10), "min_objects"),
    ):
        with pytest.raises(ConfigError, match=f"source.{key} "):
            schema.validate(config, "config.data.source")
