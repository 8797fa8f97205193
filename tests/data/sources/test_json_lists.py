"""Lists of captioned images in JSON files."""

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.sources import BadRecord, source_for_path
from vlm_jax.data.sources.json_lists import JsonListsConfig
from vlm_jax.data.sources.llava_json import LlavaJsonConfig
from vlm_jax.schema import ConfigError


@pytest.fixture
def folder(tmp_path):
    """Two lists as ALBEF's are: one caption an object, a list of them, an image twice, an image that is missing."""
    buffer = BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(buffer.getvalue())
    first = [{"image": "a.png", "caption": "one"}, {"image": "a.png", "caption": "two", "image_id": 7}]
    second = [
        {"image": "b.png", "caption": ["three", "four"]},
        {"image": "c.png", "caption": "five"},
        {"image": "b.png", "caption": " "},
    ]
    (tmp_path / "first.json").write_text(json.dumps(first))
    (tmp_path / "second.json").write_text(json.dumps(second))
    return tmp_path


def source(folder, **changes):
    path = f"{folder}/first.json,{folder}/second.json"
    return JsonListsConfig(**{"path": path, "image_root": f"{folder}/images", **changes}).build("")


def test_several_lists_are_one_source(folder):
    records = source(folder)
    assert len(records) == 5
    assert [records.texts(i) for i in range(4)] == [("one",), ("two",), ("three", "four"), ("five",)]
    first, second, third = (records[i] for i in range(3))
    assert (first["image_id"], second["image_id"], third["image_id"]) == ("a.png", "7", "b.png")
    assert (third["where"], third["key"]) == (f"{folder}/second.json", "number 1")
    assert first["image"][:4] == b"\x89PNG"


def test_what_can_not_be_used_names_its_file_and_number(folder):
    records = source(folder)
    with pytest.raises(BadRecord, match=r"number 2 of .*second.json .* 'c.png' can't be read"):
        records[3]
    assert records[4]["no_caption"] == "its caption is empty"
    with pytest.raises(ConfigError, match="has no key 'captoin'"):
        source(folder, text_key=("captoin",))
    (folder / "second.json").write_text('{"image": "a.png"}')
    with pytest.raises(ConfigError, match="must hold one list of objects"):
        source(folder)


def test_a_path_s_first_object_tells_captions_from_conversations(folder):
    assert isinstance(source_for_path(f"{folder}/first.json,{folder}/second.json"), JsonListsConfig)
    (folder / "chat.json").write_text('[{"id": "1", "conversations": [{"from": "human", "value": "a caption"}]}]')
    assert isinstance(source_for_path(f"{folder}/chat.json"), LlavaJsonConfig)
