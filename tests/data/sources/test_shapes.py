import collections
import dataclasses
import pickle
import re

import numpy as np
import pytest

from vlm_jax import schema
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.sources.shapes import COLORS, POSITIONS, SHAPES, SIZES
from vlm_jax.data.sources.shapes_chat import KINDS, NUMBERS, QUESTIONS
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


def test_noise_has_its_spread_and_is_a_record_s_own():
    """Around the same picture, the same each time, another in each record; conversations show it too."""
    plain, noisy = (ShapesConfig(count=20, image_size=64, cells=1, max_objects=1, noise=n).build("") for n in (0, 0.1))
    apart = [noisy[i]["image"].astype(float) - plain[i]["image"] for i in range(20)]
    object_pixels = [(plain[i]["image"] > 40) & (plain[i]["image"] < 215) for i in range(20)]  # far from both ends
    spread = np.concatenate([difference[inside] for difference, inside in zip(apart, object_pixels, strict=True)])
    assert spread.std() == pytest.approx(25.5, rel=0.05) and abs(spread.mean()) < 1
    np.testing.assert_array_equal(noisy[3]["image"], noisy[3]["image"])
    assert abs(np.corrcoef(apart[0].ravel(), apart[1].ravel())[0, 1]) < 0.05
    asked, clean = chats(noise=0.1), chats()
    assert asked[0]["turns"] == clean[0]["turns"]
    shown = next(i for i in range(20) if clean[i]["images"])
    assert (asked[shown]["images"][0].load() != clean[shown]["images"][0].load()).mean() > 0.5


@pytest.mark.parametrize("cells", [1, 9])
def test_variants_of_a_scene_differ_from_it_in_one_word(cells: int):
    """All in different ones, each drawn anew; families have nothing to do with each other."""
    config = ShapesConfig(count=70, cells=cells, max_objects=min(cells, 3), variants=14, image_size=32, seed=7)
    source = config.build("")
    for first in range(0, 70, 14):
        scene = {item["position"]: item for item in source[first]["scene"]}
        found = []
        for index in range(first + 1, first + 14):
            record = source[index]
            changed = {item["position"]: item for item in record["scene"]}
            words = [set(old.items()) - set(new.items()) for old, new in _matched(scene, changed)]
            assert sum(map(len, words)) == 1 and len(changed) == len(scene)
            assert list(changed) == sorted(changed, key=POSITIONS.index)  # captions keep the reading order
            found.append(source.texts(index)[0])
            assert (record["image"] != source[first]["image"]).mean() > 0.5  # another ground
        assert len({*found, source.texts(first)[0]}) == 14
    plain = dataclasses.replace(config, variants=1).build("")
    same = {i for i in range(70) if plain.texts(i) == source.texts(i)}
    assert same >= set(range(0, 70, 14)) and len(same) < 10


def _matched(scene: dict, changed: dict) -> list[tuple[dict, dict]]:
    """Objects at the same places; what moved stands against what came."""
    gone, came = scene.keys() - changed.keys(), changed.keys() - scene.keys()
    pairs = zip(sorted(gone), sorted(came), strict=True)
    return [(scene[place], changed[place]) for place in scene.keys() & changed.keys()] + [
        (scene[old], changed[new]) for old, new in pairs
    ]


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
        (ShapesConfig(noise=2.0), "noise"),
        (ShapesConfig(variants=0), "variants"),
        (ShapesConfig(variants=15), "variants"),
    ):
        with pytest.raises(ConfigError, match=f"source.{key} "):
            schema.validate(config, "config.data.source")


def chats(**options):
    return ShapesConfig(**{"conversations": KINDS, "count": 600, "image_size": 48, **options}).build("")


def test_conversations_are_a_pure_function_of_seed_split_and_index():
    source, longer = chats(max_rounds=3), chats(max_rounds=3, count=9000)
    copy = pickle.loads(pickle.dumps(source))
    test, other = chats(max_rounds=3, split="test"), chats(max_rounds=3, seed=1)
    for index in (599, 4, 31):
        record = source[index]
        for same in (longer[index], copy[index], source[index]):
            assert record["turns"] == same["turns"]
            for one, another in zip(record["images"], same["images"], strict=True):
                np.testing.assert_array_equal(one.load(), another.load())
    for elsewhere in (test, other):
        assert sum(source[i]["turns"] == elsewhere[i]["turns"] for i in range(200)) < 20
    assert {source[i]["kind"] for i in range(200)} == set(KINDS)
    assert not chats(max_objects=1).class_names


def what_is_there(image):
    """Position -> (colour, area) of the objects of a picture, found in its pixels."""
    image = image.astype(int)
    cell, ground, found = len(image) // 3, image[0, 0], {}
    for number, position in enumerate(POSITIONS):
        row, column = divmod(number, 3)
        part = image[cell * row : cell * row + cell, cell * column : cell * column + cell]
        occupied = (np.abs(part - ground).sum(-1) > 60).sum()
        if occupied:
            centre = part[cell // 2 - 1 : cell // 2 + 1, cell // 2 - 1 : cell // 2 + 1].mean((0, 1))
            found[position] = min(COLORS, key=lambda name: np.abs(centre - COLORS[name]).sum())
    return found


def test_answers_are_what_the_pictures_show():
    """Every question is answered from the pixels alone, but for shapes, whose answers are the scene's."""
    source, asked = chats(max_rounds=1, count=400), dict.fromkeys(KINDS, 0)
    for index in range(400):
        record = source[index]
        kind, question, answer = record["kind"], record["turns"][0].text, record["answer"]
        asked[kind] += 1
        pictures = [what_is_there(image.load()) for image in record["images"]]
        images = {"text": 0, "described": 0, "more": 2, "compare": 2}.get(kind, 1)
        assert question.count("<image>") == len(pictures) == images
        place = question.rpartition(" in the ")[2].rstrip("?")
        if kind == "described":
            described, question = question.split("\n")
            things = re.findall(r"(\w+) (\w+) in the (centre|\w+ \w+)", described)
            assert described.startswith("There is a ") and len(things) in (1, 2, 3)
            by_question = {
                "How many objects are there?": NUMBERS[len(things)],
                **{f"What colour is the object in the {at}?": color for color, _, at in things},
                **{f"What shape is the object in the {at}?": shape for _, shape, at in things},
                **{f"Where is the {color} {shape}?": at for color, shape, at in things},
            }
            assert by_question[question] == answer
        elif kind == "color":
            assert pictures[0][place] == answer
        elif kind == "compare":
            assert pictures["In the second picture" in question][place] == answer
            assert place in pictures[0] and place in pictures[1]
        elif question.endswith("How many objects are there?"):
            assert NUMBERS[len(pictures[0])] == answer
        elif kind == "position":
            assert pictures[0][answer] in question
        elif kind == "more":
            first, second = map(len, pictures)
            assert answer == ("same" if first == second else "first" if first > second else "second")
        elif kind == "text":
            a, b = (NUMBERS.index(word.rstrip("?")) for word in question.split() if word.rstrip("?") in NUMBERS)
            assert NUMBERS[a + b] == answer
        elif kind == "shape":
            scene = ShapesConfig(count=400, image_size=48).build("")[index]["scene"]
            assert answer == next(item["shape"] for item in scene if item["position"] == place)
        else:
            assert answer == ShapesConfig(count=400).build("").texts(index)[0]
    assert min(asked.values()) > 20


def test_a_conversation_asks_nothing_twice_and_many_things():
    source, lengths = chats(max_rounds=8, conversations=("color", "shape", "position", "count")), set()
    for index in range(300):
        record = source[index]
        asked = [turn.text.replace("<image>", "").strip() for turn in record["turns"] if turn.role == "user"]
        assert len(set(asked)) == len(asked) <= min(8, 3 * 3 + 1)
        lengths.add(len(asked))
    assert lengths == set(range(1, 9))


def test_answers_cannot_be_guessed_from_the_questions():
    """The best answer to each first question, known from 20,000 others, is right as often as chance allows."""
    train, test = (chats(count=20000, split=split, max_rounds=1) for split in ("train", "test"))
    answers = {}
    for index in range(20000):
        record = train[index]
        if record["kind"] in QUESTIONS:
            answers.setdefault(record["turns"][0].text, collections.Counter())[record["answer"]] += 1
    right = collections.defaultdict(list)
    for index in range(6000):
        record = test[index]
        if record["kind"] in QUESTIONS:
            known = answers.get(record["turns"][0].text)
            guess = known.most_common(1)[0][0] if known else ""
            right[record["kind"]].append(guess == record["answer"])
    chance = {"color": 1 / 8, "shape": 1 / 6, "count": 1 / 3, "position": 1 / 9, "more": 1 / 3, "compare": 1 / 8}
    for kind, hits in right.items():
        assert np.mean(hits) < chance[kind] + 4 * np.sqrt(chance[kind] / len(hits)), kind
    assert np.mean([hit for hits in right.values() for hit in hits]) < 0.23


def test_conversations_that_cannot_be_made_are_refused():
    for changes, key in (
        ({"conversations": ("more",), "max_objects": 1}, "conversations"),
        ({"max_rounds": 0}, "max_rounds"),
    ):
        with pytest.raises(ConfigError, match=f"source.{key} "):
            schema.validate(ShapesConfig(**changes), "config.data.source")
