"""Grounding against loops over phrases and boxes, and RefCOCO+'s ranking of boxes against torch and numbers by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoder import FakeEncoder, ListSource, make_params

from vlm_jax.data.sources import DigitsConfig, ShapesConfig
from vlm_jax.evals.base import EvalError
from vlm_jax.evals.grounding import GroundingConfig, GroundingEvaluator, best_box, overlap, resized
from vlm_jax.schema import ConfigError

CONFIG = GroundingConfig("toy", DigitsConfig(), layer=1, pictured=2)


class Pointer(FakeEncoder):
    """A model that can be asked: its map of 2 x 2 patches is largest at patch ord(the phrase's letter) % 4."""

    sees_whole_images = True

    def offers(self, function: str) -> bool:
        return function == "ground_pairs"

    def ground_pairs(self, params: Any, images: Any, texts: Any, pairs: Any, layer: int) -> jax.Array:
        place = texts["letters"][pairs[:, 1]] % 4
        brightness = images[pairs[:, 0], 0]  # of the pair's own image
        return jax.nn.one_hot(place, 4).reshape(-1, 2, 2) * layer * jnp.where(brightness > 0, 1.0, -1.0)[:, None, None]

    def match_images(self, params: Any, images: Any) -> jax.Array:
        return jnp.asarray(images)[:, 0, 0, :1].astype(jnp.float32) - 100

    def match_texts(self, params: Any, tokens: Any) -> dict[str, jax.Array]:
        return {"letters": jnp.asarray(tokens)[:, -1]}


def records(count: int = 23) -> list[dict[str, Any]]:
    """Images of 2 x 2 pixels, bright or dark; zero to three phrases of one letter each, with boxes of a pixel."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        phrases = tuple(str(letter) for letter in rng.choice(list("ABCD"), size=int(rng.integers(0, 4))))
        boxes = np.concatenate([rng.integers(0, 2, (len(phrases), 2)), np.ones((len(phrases), 2))], axis=1)
        image = np.full((2, 2, 3), 200 if index % 3 else 20, np.uint8)
        record = {
            "image": image,
            "texts": ("x",),
            "phrases": phrases,
            "boxes": boxes,
            "key": f"{index}",
            "where": "toy",
        }
        record["label"] = 0
        found.append(record | ({"bad": True} if index % 7 == 3 else {}))
    return found


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 16), (4, 8)])
def test_every_phrase_of_every_usable_record_points_into_its_own_image(devices: int, batch_size: int) -> None:
    source = records()
    hits = []
    for record in source:
        for phrase, box in zip(record["phrases"], record["boxes"], strict=True):
            if "bad" not in record:
                bright, place = record["image"][0, 0, 0] > 100, ord(phrase) % 4
                # In a dark image all patches but one are equal, and the first of those is the largest.
                place = place if bright else int(place == 0)
                hits.append(divmod(place, 2) == (int(box[1]), int(box[0])))
    evaluator = GroundingEvaluator(CONFIG, Pointer(devices, batch_size), ListSource(source))
    result = evaluator.run(make_params(), step=1)
    assert 0 < np.mean(hits) < 1
    assert result.metrics["grounding/toy/pointing"] == pytest.approx(np.mean(hits))
    assert result.metrics["grounding/toy/phrases"] == len(hits)
    assert result.metrics["grounding/toy/pointing_chance"] == 0.25
    assert result.metrics["grounding/toy/pointing_patch"] >= result.metrics["grounding/toy/pointing"]
    (picture,) = result.images.values()
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    # the map is laid over the image: another one gives another picture
    other = GroundingEvaluator(dataclasses.replace(CONFIG, layer=-1), Pointer(), ListSource(source))
    assert not np.array_equal(other.run(make_params(), step=1).images["grounding/toy/maps"], picture)


def test_boxes_are_ranked_as_published() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    map_RxC = rng.random((3, 4)).astype(np.float32)
    pixels = resized(map_RxC, 29, 41)
    expected = torch.nn.functional.interpolate(torch.tensor(map_RxC)[None, None], size=(29, 41), mode="bicubic")
    np.testing.assert_allclose(pixels, expected[0, 0], atol=1e-6)
    boxes = np.column_stack([rng.uniform(0, 30, 9), rng.uniform(0, 20, 9), rng.uniform(1, 15, (9, 2)), rng.random(9)])
    scores = [pixels[int(y) : int(y + h), int(x) : int(x + w)].sum() / np.sqrt(w * h) for x, y, w, h, _ in boxes]
    np.testing.assert_array_equal(best_box(pixels, boxes), boxes[int(np.argmax(scores)), :4])
    assert best_box(-pixels, boxes) is None
    assert overlap(np.asarray([0, 0, 10, 10]), np.asarray([5, 0, 10, 10])) == pytest.approx(50 / 150)
    assert overlap(np.asarray([0, 0, 4, 4]), np.asarray([4, 0, 4, 4])) == 0.0


def test_detected_boxes_are_judged_by_split() -> None:
    """A map in the upper right quarter chooses the candidate there, whatever the size of the image."""
    candidates = np.asarray([[0, 0, 50, 30], [50, 0, 50, 30], [0, 30, 50, 30]])
    image = np.full((60, 100, 3), 200, np.uint8)
    more = {"image": image, "phrases": ("A",), "candidates": candidates, "key": "0", "where": "toy", "label": 0}
    source = [
        {
            "image": image,
            "phrases": ("A",),
            "boxes": np.asarray([box]),
            "candidates": candidates,
            "split": split,
            **more,
        }
        for box, split in (([52, 1, 46, 27], "val"), ([0, 0, 50, 30], "val"), ([50, 2, 50, 30], "testA"))
    ]
    metrics = GroundingEvaluator(CONFIG, Pointer(), ListSource(source)).run(make_params(), step=1).metrics
    accuracy = {key.removeprefix("grounding/toy/"): x for key, x in metrics.items() if "accuracy" in key}
    assert accuracy == {"accuracy": pytest.approx(2 / 3), "accuracy/val": 0.5, "accuracy/testA": 1.0}


def test_boxes_of_drawn_objects_are_where_their_colour_is() -> None:
    """Where the pixels differ from the ground, to a pixel; and of two objects alike none is named."""
    one = ShapesConfig(image_size=64, count=48, max_objects=1, named_objects=True)
    for record in map(one.build("").__getitem__, range(48)):
        image = record["image"].astype(int)
        drawn = np.abs(image - image[0, 0]).max(axis=-1) > 8  # no object reaches the corner
        (left, top, width, height), (item,) = record["boxes"][0], record["scene"]
        assert record["phrases"] == (f"a {item['size']} {item['color']} {item['shape']}",)
        for first, size, axis in ((left, width, 0), (top, height, 1)):
            pixels = np.flatnonzero(drawn.any(axis=axis))
            np.testing.assert_allclose((pixels[0], pixels[-1] + 1), (first, first + size), atol=1.5)
    several = dataclasses.replace(one, min_objects=9, max_objects=9, count=24)
    plain = dataclasses.replace(several, named_objects=False).build("")
    naming, left_out = dataclasses.replace(several, captions="object").build(""), 0
    for index, record in enumerate(map(several.build("").__getitem__, range(24))):
        np.testing.assert_array_equal(record["image"], plain[index]["image"])
        phrases = [f"a {item['size']} {item['color']} {item['shape']}" for item in record["scene"]]
        assert list(record["phrases"]) == [phrase for phrase in phrases if phrases.count(phrase) == 1]
        assert len(record["boxes"]) == len(record["phrases"])
        assert naming.texts(index) == naming[index]["texts"] == record["phrases"]
        left_out += len(phrases) - len(record["phrases"])
    assert left_out


def test_mistakes_are_sentences() -> None:
    class Blind(FakeEncoder):
        sees_whole_images = True

        def offers(self, function: str) -> bool:
            return False

    with pytest.raises(ConfigError, match="is for models that see image and text together"):
        CONFIG.build(Blind(), "")

    class Cropped(Pointer):
        sees_whole_images = False

    with pytest.raises(ConfigError, match="needs images squashed"):
        CONFIG.build(Cropped(), "")
    plain = ListSource([{"image": np.zeros((2, 2, 3), np.uint8), "label": 0, "key": "0", "where": "toy"}])
    with pytest.raises(EvalError, match="has no `phrases` with a box each"):
        GroundingEvaluator(CONFIG, Pointer(), plain).run(make_params(), step=1)
