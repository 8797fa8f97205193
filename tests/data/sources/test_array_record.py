import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from vlm_jax import schema
from vlm_jax.data.examples import draw_caption
from vlm_jax.data.sources import ArrayRecordConfig, BadRecord, source_for_path
from vlm_jax.data.sources.array_record import parse_example
from vlm_jax.schema import ConfigError


def varint(number):
    """Base 128, lowest group first (the encoding rules of protocol buffers)."""
    groups = []
    while True:
        number, low = number >> 7, number & 127
        groups.append(low | (128 if number else 0))
        if not number:
            return bytes(groups)


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(**features):
    """A tf.train.Example by hand: map entries of name and a list of bytes (1), floats (2) or integers (3)."""
    entries = b""
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], int):
            feature = field(3, field(1, b"".join(map(varint, values))))
        else:
            texts = [item.encode() if isinstance(item, str) else item for item in values]
            feature = field(1, b"".join(field(1, text) for text in texts))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def write(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def numbered(number):
    return example(image=b"picture %d" % number, caption=[f"number {number}", f"no {number}"], label=number % 3)


@pytest.fixture
def path(tmp_path):
    """Three files of 4, 0 and 5 records."""
    for file, numbers in enumerate((range(4), range(0), range(4, 9))):
        write(tmp_path / f"set.array_record-{file:05d}-of-00003", map(numbered, numbers))
    return str(tmp_path / "set.array_record")


def test_examples_are_parsed_by_the_wire_format():
    assert parse_example(example(a=[1, 300, 1 << 40], b="é", c=[b"\xff", b""])) == {
        "a": [1, 300, 1 << 40],
        "b": ["é".encode()],
        "c": [b"\xff", b""],
    }
    floats = field(1, field(1, field(1, b"f") + field(2, field(2, field(1, bytes.fromhex("0000c03f000000c0"))))))
    assert parse_example(floats) == {"f": [1.5, -2.0]}
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        parse_example(b"junk")


def test_records_of_all_files_in_order(path, tmp_path):
    config = ArrayRecordConfig(path=f"{path}@3", label_key="label", class_names=("a", "b", "c"))
    source = config.build("")
    assert len(source) == 9
    assert source.class_names == ("a", "b", "c")
    assert source[6] == {
        "image": b"picture 6",
        "texts": ("number 6", "no 6"),
        "label": 0,
        "key": "number 3",
        "where": f"{path}-00002-of-00003",
    }
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.texts, range(9))) == [(f"number {n}", f"no {n}") for n in range(9)]
    with pytest.raises(IndexError):
        source[9]
    for other in (f"{path}*", str(tmp_path), f"{path}-0000{{0,1,2}}-of-00003"):
        assert [record["key"] for record in source_for_path(other).build("")] == [r["key"] for r in source]


def test_unusable_records_name_file_and_number(tmp_path):
    records = [
        numbered(0),
        b"junk",
        example(caption="no image"),
        example(image=3, caption="a number"),
        example(image=b"x", label=0),
        example(image=b"x", caption=b"\xff"),
        example(image=b"x", caption=""),
        example(image=b"x", caption="y", label=7),
        example(image=b"x", caption="y", label="two"),
    ]
    name = write(tmp_path / "a.array_record", records)
    source = ArrayRecordConfig(path=name, label_key="label", class_names=("a", "b")).build("")
    image, text = "no encoded image", "no 'caption'.*it has: "
    for index, why in enumerate(("not a tf", image, image, text, "not UTF-8", "is empty", "label is 7")):
        with pytest.raises(BadRecord, match=f"record number {index + 2} of .*a.array_record can't be used: .*{why}"):
            draw_caption(source[index + 1], None)
    assert [(source[index]["image"], source[index]["texts"]) for index in (4, 5, 6)] == [(b"x", ())] * 3
    with pytest.raises(BadRecord, match="label is b'two', not the number of one of the 2 class names"):
        source[8]
    data = bytearray((tmp_path / "a.array_record").read_bytes())
    data[data.index(b"picture 0")] ^= 4
    (tmp_path / "b.array_record").write_bytes(data)
    with pytest.raises(BadRecord, match=r"number 1 of .*b\.array_record can't be used: it can't be read"):
        ArrayRecordConfig(path=str(tmp_path / "b.array_record"), label_key="label").build("")[0]


def test_wrong_files_and_features_are_named(tmp_path, path):
    with pytest.raises(ConfigError, match=r"array_record-00000-of-00004' is no file"):
        ArrayRecordConfig(path=f"{path}@4").build("")
    with pytest.raises(ConfigError, match=r"no feature 'text' .*it has: caption, image, label"):
        ArrayRecordConfig(path=f"{path}@3", text_key=("text",)).build("")
    with pytest.raises(ConfigError, match="path is empty; give ArrayRecord files"):
        ArrayRecordConfig().build("")
    cut = tmp_path / "cut.array_record"
    cut.write_bytes(b"too short")
    with pytest.raises(ConfigError, match=r"cut\.array_record is not a readable ArrayRecord file"):
        ArrayRecordConfig(path=str(cut)).build("")
    with pytest.raises(ConfigError, match="holds a record"):
        ArrayRecordConfig(path=write(cut, [])).build("")
    with pytest.raises(ConfigError, match=r"are no tf\.train\.Example"):
        ArrayRecordConfig(path=write(cut, [b"junk"])).build("")
    alone = ArrayRecordConfig(path=f"{path}@3", text_key=())
    schema.validate(alone, "config.data.source")
    assert alone.build("")[1] | {"where": ""} == {"image": b"picture 1", "texts": (), "key": "number 2", "where": ""}
