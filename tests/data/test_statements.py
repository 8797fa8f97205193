"""Statements about scenes against the scenes; lists of labelled statements and of references as they are published."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from vlm_jax.data.examples import LabelledPairs
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.sources import BadRecord, JsonListsConfig, ReferringConfig, ShapesStatementsConfig
from vlm_jax.data.sources.shapes_statements import ENTAILMENT, TRUTH
from vlm_jax.schema import ConfigError


@pytest.mark.parametrize("images", [1, 2])
def test_statements_are_what_their_classes_say(images: int) -> None:
    config = ShapesStatementsConfig(count=150, image_size=24, images=images)  # pyright: ignore[reportArgumentType]
    source, scenes = config.build(""), config.scenes.build("")
    assert source.class_names == (ENTAILMENT if images == 1 else TRUTH)
    labels = []
    for index in range(len(source)):
        record, (text,) = source[index], source.texts(index)
        shown = [scenes[images * index + place] for place in range(images)]
        for image, scene in zip(record.get("images", (record["image"],)), shown, strict=True):
            np.testing.assert_array_equal(image, scene["image"])
        side = int(text.startswith("the right image"))
        names = [f"{item['color']} {item['shape']}" for item in shown[side]["scene"]]
        has, seen = (
            any(text.endswith(f" {name}") for name in names),
            text.startswith(("there is", "the left", "the right")),
        )
        kind = source.class_names[record["label"]]
        assert (kind, has) in ({("entailment", True), ("contradiction", False), ("True", True), ("False", False)}) or (
            kind == "neutral" and not seen and any(name in text for name in names)
        )
        labels.append(record["label"])
    assert min(np.bincount(labels, minlength=len(source.class_names))) > 150 / len(source.class_names) / 2
    assert dataclasses.replace(config, split="test").build("").texts(0) != source.texts(0)


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.jpg"), np.full((6, 8, 3), 60 * number, np.uint8))
    (folder / "list.json").write_text(json.dumps(rows))
    return str(folder / "list.json")


class Letters:
    """A tokenizer of one id."""

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.asarray([[ord(text[0])] for text in texts], np.int32)


def test_lists_of_entailment_are_read(tmp_path: Path) -> None:
    rows = [
        {"image": str(n), "sentence": "a", "label": label}
        for n, label in enumerate(["entailment", "contradiction", "-"])
    ]
    keys: Any = {"text_key": ("sentence",), "label_key": "label", "class_names": ENTAILMENT, "image_suffix": ".jpg"}
    source = JsonListsConfig(path=write(tmp_path, rows), **keys).build("")
    assert source.class_names == ENTAILMENT
    assert [source[n]["label"] for n in range(2)] == [2, 0]
    with pytest.raises(BadRecord, match="its label is '-', not one of the 3 class names"):
        source[2]
    row = LabelledPairs(Letters(), 4, 1, PreprocessConfig(resize="squash"), None)(source[1], None)  # pyright: ignore
    assert (row["image"].shape, row["text"].tolist(), int(row["label"])) == ((4, 4, 3), [97], 0)


def test_lists_of_pairs_of_images_are_read(tmp_path: Path) -> None:
    rows = [
        {"images": ["2.jpg", "1.jpg"], "sentence": "b", "label": "True"},
        {"images": ["0.jpg"], "sentence": "c", "label": "False"},
    ]
    keys: Any = {"image_key": "images", "text_key": ("sentence",), "label_key": "label", "class_names": TRUTH}
    source = JsonListsConfig(path=write(tmp_path, rows), **keys).build("")
    maker = LabelledPairs(Letters(), 4, 2, PreprocessConfig(resize="squash"), None)  # pyright: ignore
    row = maker(source[0], None)
    assert row["image"].shape == (2, 4, 4, 3) and int(row["label"]) == 1
    np.testing.assert_allclose(row["image"].mean(axis=(1, 2, 3)), [120, 60], atol=2)
    with pytest.raises(BadRecord, match="it shows 1 images, and 2 are wanted"):
        maker(source[1], None)


def test_references_have_boxes_candidates_and_splits(tmp_path: Path) -> None:
    rows = [{"image": "1.jpg", "text": "left one", "ref_id": ref} for ref in (5, 6, 7)]
    refs = [{"ref_id": 5, "ann_id": 50, "image_id": 1, "split": "testA"}, {"ref_id": 6, "ann_id": 60, "image_id": 1}]
    instances = {
        "annotations": [{"id": 50, "bbox": [1.5, 2, 3, 4], "image_id": 1}],
        "images": [{"id": 1, "width": 8, "height": 6}],
    }
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "dets.json").write_text(json.dumps({"1": [[0, 0, 4, 4, 0.9], [4, 0, 4, 4, 0.8]]}))
    keys = {"refs": "refs(unc).p", "instances": "instances.json", "detections": "dets.json"}
    config = ReferringConfig(path=write(tmp_path, rows), **{k: str(tmp_path / name) for k, name in keys.items()})
    source = config.build("")
    record = source[0]
    assert (record["phrases"], record["split"], record["size"]) == (("left one",), "testA", (8, 6))
    np.testing.assert_array_equal(record["boxes"], [[1.5, 2, 3, 4]])
    np.testing.assert_array_equal(record["candidates"], [[0, 0, 4, 4], [4, 0, 4, 4]])
    with pytest.raises(BadRecord, match="the annotations lack number 60"):
        source[1]
    with pytest.raises(BadRecord, match=r"ref_id 7 is not among the references"):
        source[2]
    (tmp_path / "evil.p").write_bytes(pickle.dumps([print]))
    with pytest.raises(ConfigError, match=r"it holds a builtins\.print, which is not read"):
        dataclasses.replace(config, refs=str(tmp_path / "evil.p")).build("")
    with pytest.raises(ConfigError, match=r"source\.instances is empty"):
        dataclasses.replace(config, instances="").build("")
