import json
import pickle

import pytest

from vlm_jax.data.sources import BadRecord, LlavaJsonConfig, source_for_path
from vlm_jax.data.sources.chats import Turn
from vlm_jax.schema import ConfigError

RECORDS = [
    {"id": "000", "image": "coco/a.jpg", "conversations": [{"from": "human", "value": "<image>\nWas ist das?"},
                                                           {"from": "gpt", "value": "Ein Käfer, 日本 \\ [\"x\"]"}]},
    {"id": "text", "conversations": [{"from": "human", "value": "yes?"}, {"from": "gpt", "value": "no\u2028."}]},
    {"id": 7, "image": ["a.jpg", "b.jpg"], "conversations": [{"role": "user", "content": "<image><image>"},
                                                             {"role": "assistant", "content": "two"}]},
]  # fmt: skip


def write(path, records=RECORDS, **options):
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"ensure_ascii": False, "indent": 2}])
def test_a_list_is_read_record_by_record(tmp_path, options):
    path = write(tmp_path / "mix.json", **options)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.jpg").write_bytes(b"bytes")
    source = pickle.loads(pickle.dumps(source_for_path(path).build("")))
    assert len(source) == 3
    first, second, third = (source[i] for i in range(3))
    assert first["turns"] == (Turn("user", "<image>\nWas ist das?"), Turn("assistant", 'Ein Käfer, 日本 \\ ["x"]'))
    assert first["key"] == "000 (number 1)" and first["where"] == path
    assert [image.load() for image in first["images"]] == [b"bytes"]
    assert second["images"] == () and second["turns"][1].text == "no\u2028."
    assert [image.name for image in third["images"]] == ["a.jpg", "b.jpg"]
    assert source.texts(2) == ("<image><image>\ntwo",)
    with pytest.raises(IndexError):
        source[3]


def test_an_object_a_line_several_files_and_a_byte_order_mark(tmp_path):
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    write(tmp_path / "a.json")
    source = LlavaJsonConfig(path=str(tmp_path)).build("")
    assert [source[i]["turns"] for i in range(6)] == [source[i % 3]["turns"] for i in range(6)]
    assert source[4]["where"].endswith("b.json") and source[4]["key"] == "text (number 2)"
    named = LlavaJsonConfig(path=f"{tmp_path}/b.json,{tmp_path}/a.json", image_root=str(tmp_path)).build("")
    assert named[0]["where"].endswith("b.json") and named[0]["images"][0].root == str(tmp_path)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"id": "x"}, "its conversation is missing, not a list of turns"),
        ({"id": "x", "conversations": []}, "not a list of turns"),
        ({"id": "x", "conversations": ["hi"]}, "its turn 1 is a str: 'hi', not an object"),
        ({"id": "x", "conversations": [{"from": "dog", "value": "a"}]}, "its turn 1 comes from a str: 'dog'"),
        ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, "its turn 1 is a int: 3, not a text"),
        ({"id": "x", "image": 5, "conversations": [{"from": "human", "value": "a"}]}, "its image is a int: 5"),
        ({"id": "x", "conversations": [{"from": "human", "value": "\ud800"}]}, "its turn 1 is not valid UTF-8"),
        (["x"], "it is a list, not a JSON object"),
    ],
)
def test_records_that_are_no_conversations_are_named(tmp_path, record, why):
    source = LlavaJsonConfig(path=write(tmp_path / "mix.json", [*RECORDS, record])).build("")
    with pytest.raises(BadRecord) as error:
        source[3]
    key = "x (number 4)" if isinstance(record, dict) else "number 4"
    assert f"record {key} of {tmp_path}/mix.json" in str(error.value) and why in str(error.value)


def test_images_that_cannot_be_read_are_named(tmp_path):
    source = LlavaJsonConfig(path=write(tmp_path / "mix.json")).build("")
    for method in ("load", "size"):
        with pytest.raises(ValueError, match=r"its image 'coco/a\.jpg' can't be read: No such file or directory in"):
            getattr(source[0]["images"][0], method)()


def test_files_that_cannot_be_used_are_refused(tmp_path):
    whole = json.dumps(RECORDS)
    for text, why in (
        (whole[:-1], "is cut short: its list has no end"),
        (whole[:200], "is damaged at byte"),
        ("[]", "holds no record"),
        ('{"a": 1}', "has no 'conversations' in its first records"),
    ):
        (tmp_path / "mix.json").write_text(text)
        with pytest.raises(ConfigError, match=why):
            LlavaJsonConfig(path=str(tmp_path / "mix.json")).build("")
    with pytest.raises(ConfigError, match="image_root = '/nowhere' is not a folder"):
        LlavaJsonConfig(path=write(tmp_path / "mix.json"), image_root="/nowhere").build("")
    with pytest.raises(ConfigError, match="is no file"):
        LlavaJsonConfig(path=str(tmp_path / "mox.json")).build("")


def test_the_fingerprint_follows_the_file_and_the_keys(tmp_path):
    path = write(tmp_path / "mix.json")
    first = LlavaJsonConfig(path=path).build("").fingerprint()
    assert LlavaJsonConfig(path=path).build("").fingerprint() == first
    assert LlavaJsonConfig(path=path, image_root=str(tmp_path)).build("").fingerprint() != first
    write(tmp_path / "mix.json", RECORDS[:2])
    assert LlavaJsonConfig(path=path).build("").fingerprint() != first
