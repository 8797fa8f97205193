import csv
import dataclasses
import json
import pickle

import pytest

from vlm_jax import schema
from vlm_jax.data.examples import draw_caption
from vlm_jax.data.sources import BadRecord, CsvConfig, JsonlConfig, TarConfig, source_for_path
from vlm_jax.schema import ConfigError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png", "c d.png"):
        (tmp_path / "pictures" / name).write_bytes(name.encode())
    return tmp_path


def jsonl(folder, *lines, ending="\n"):
    path = folder / "t.jsonl"
    path.write_bytes(ending.join(lines).encode("utf-8", "surrogateescape"))
    return str(path)


def row(image="pictures/a.png", caption="first"):
    return json.dumps({"image": image, "caption": caption, "id": 3}, ensure_ascii=False)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("tail", ["", "\n"])
def test_jsonl_rows(folder, ending, tail):
    lines = [row(), row("pictures/b.png", ["café", "two"]), row("pictures/c d.png", "line\u2028separator")]
    path = jsonl(folder, *lines, tail, ending=ending) if tail else jsonl(folder, *lines, ending=ending)
    source = source_for_path(path).build("")
    assert len(source) == 3
    assert source[0] == {"image": b"a.png", "texts": ("first",), "key": "number 1", "where": path}
    assert source[1]["texts"] == source.texts(1) == ("café", "two")
    assert source[2]["image"] == b"c d.png"
    assert source[2]["texts"] == ("line\u2028separator",)
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"image": ', "not JSON in UTF-8"),
        ('["a"]', "is a list, not a JSON object"),
        ('{"image": "pictures/a.png", "caption": "\udcff"}', "not JSON in UTF-8"),
        ('{"caption": "x"}', "names no image under 'image'"),
        (row("pictures/none.png"), "its image 'pictures/none.png' can't be read: No such file"),
        (row("pictures"), "Is a directory"),
    ],
)
def test_jsonl_unusable_lines_name_file_and_line(folder, line, why):
    path = jsonl(folder, row(), line, row())
    source = JsonlConfig(path=path).build("")
    with pytest.raises(BadRecord, match=why) as caught:
        source[1]
    assert (caught.value.where, caught.value.key) == (path, "number 2")
    assert source[2]["texts"] == ("first",)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"image": "pictures/a.png"}', "no 'caption' .the source's text_key.; it has: image"),
        (row(caption=""), "caption is empty"),
        (row(caption=[" ", ""]), "caption is empty"),
        ('{"image": "pictures/a.png", "caption": "x\\ud800"}', "not valid UTF-8"),
    ],
)
def test_jsonl_lines_without_a_caption_have_an_image_and_say_why(folder, line, why):
    path = jsonl(folder, row(), line)
    source = JsonlConfig(path=path).build("")
    assert (source[1]["image"], source[1]["texts"]) == (b"a.png", ())
    for read in (lambda: draw_caption(source[1], None), lambda: source.texts(1)):
        with pytest.raises(BadRecord, match=f"record number 2 of {path} can't be used: .*{why}"):
            read()


def test_missing_columns_list_those_found_and_the_nearest(folder):
    path = jsonl(folder, '{"file_name": "a.png", "captions": "x"}')
    with pytest.raises(ConfigError, match=r"no column 'image' .*image_key.*it has: file_name, captions"):
        JsonlConfig(path=path).build("")
    with pytest.raises(ConfigError, match=r"no column 'caption' .*text_key.*did you mean 'captions'\?"):
        JsonlConfig(path=path, image_key="file_name").build("")
    table = folder / "t.csv"
    table.write_text("filepath,title\na.png,x\n")
    with pytest.raises(ConfigError, match=r"no column 'path' .*it has: filepath, title; did you mean 'filepath'\?"):
        CsvConfig(path=str(table), image_key="path", text_key=("title",)).build("")


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_separator_is_found(folder, separator, mark):
    path = folder / ("t.tsv" if separator == "\t" else "t.csv")
    other = ";" if separator == "," else ","
    lines = [
        separator.join(("image", "id", "caption")),
        separator.join(("pictures/a.png", "1", f'"a {separator} quoted ""word"" and\na line{other}"')),
        separator.join(("pictures/c d.png", "2", "café")),
    ]
    path.write_text(mark + "\n".join(lines), encoding="utf-8")
    source = source_for_path(str(path)).build("")
    assert len(source) == 2
    assert source[0]["texts"] == (f'a {separator} quoted "word" and\na line{other}',)
    assert source[1] == {"image": b"c d.png", "texts": ("café",), "key": "number 2", "where": str(path)}
    assert pickle.loads(pickle.dumps(source)).texts(1) == ("café",)


def test_csv_unusable_rows(folder):
    path = folder / "t.csv"
    path.write_bytes(
        b"image,caption\npictures/a.png,ok\npictures/a.png,\n,x\npictures/a.png,\xff\xfe\npictures/a.png\n"
    )
    source = CsvConfig(path=str(path)).build("")
    assert len(source) == 5
    assert source[0]["texts"] == ("ok",)
    for index, why in (
        (1, "caption is empty"),
        (2, "'image' is empty"),
        (3, "not valid UTF-8"),
        (4, "caption is empty"),
    ):
        with pytest.raises(BadRecord, match=f"number {index + 1} of .*t.csv.*{why}"):
            draw_caption(source[index], None)
    assert [source[index]["image"] for index in (1, 3, 4)] == [b"a.png"] * 3


def test_image_root(folder):
    table = folder / "elsewhere.csv"
    table.write_text("image,caption\na.png,x\n")
    source = CsvConfig(path=str(table), image_root=str(folder / "pictures")).build("")
    assert source[0]["image"] == b"a.png"


@pytest.mark.parametrize("config", [JsonlConfig, CsvConfig])
def test_missing_and_empty_tables(folder, config):
    with pytest.raises(ConfigError, match="path is empty"):
        config().build("")
    with pytest.raises(ConfigError, match="is not a file"):
        config(path=str(folder / "none")).build("")
    empty = folder / "empty"
    empty.write_text("")
    with pytest.raises(ConfigError, match=r"no line|no column"):
        config(path=str(empty)).build("")
    empty.write_text("image,caption\n")
    with pytest.raises(ConfigError, match=r"no row|no JSON"):
        config(path=str(empty)).build("")


def test_kind_is_read_from_the_name(folder):
    assert isinstance(source_for_path("x/s-{000..010}.tar"), TarConfig)
    assert isinstance(source_for_path("a.TSV"), CsvConfig)
    assert isinstance(source_for_path("a.jsonl"), JsonlConfig)
    (folder / "x.tar").write_text("")
    assert isinstance(source_for_path(str(folder)), TarConfig)
    for path in ("photos.zip", str(folder / "pictures")):
        with pytest.raises(ConfigError, match=r"config\.data\.source\.path = .*give tar shards"):
            source_for_path(path)


def labelled(kind, folder, labels, captions=True, **options):
    """A table with one row per label."""
    rows = [{"image": "pictures/a.png", "caption": f"number {n}", "class": label} for n, label in enumerate(labels)]
    if kind == "jsonl":
        path = jsonl(folder, *(json.dumps({key: value for key, value in r.items() if value is not None}) for r in rows))
        config = JsonlConfig(path=path, label_key="class", **options)
    else:
        path = str(folder / "t.csv")
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
        config = CsvConfig(path=path, label_key="class", **options)
    return dataclasses.replace(config, **{} if captions else {"text_key": ()}).build("")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_labels_by_number_and_by_name(folder, kind):
    source = labelled(kind, folder, [7, 0, None, 3])
    assert source.class_names == ()
    assert [source[i].get("label") for i in range(4)] == [7, 0, None, 3]
    assert source[1]["texts"] == ("number 1",)
    named = labelled(kind, folder, ["dog", "cat; big", None, "dog", "ant"])
    assert named.class_names == ("ant", "cat; big", "dog")
    assert [named[i].get("label") for i in range(5)] == [2, 1, None, 2, 0]
    assert pickle.loads(pickle.dumps(named))[4]["label"] == 0
    given = labelled(kind, folder, ["dog", "cat", 1, "bird", 2, -1], class_names=("dog", "cat"), captions=False)
    assert [given[i]["label"] for i in range(3)] == [0, 1, 1]
    assert given[0]["texts"] == ()
    for index in (3, 4, 5):
        with pytest.raises(BadRecord, match=rf"number {index + 1} of .*its label is .*not one of the 2 class names"):
            given[index]
    with pytest.raises(ConfigError, match=r"no column 'kind' .*label_key\); it has: image, caption, class"):
        type(source.config)(path=source.config.path, label_key="kind").build("")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_several_captions_with_probabilities(folder, kind):
    rows = [
        {"image": "pictures/a.png", "long": "a long one", "short": "one"},
        {"image": "pictures/a.png", "long": "", "short": "two"},
    ]
    if kind == "jsonl":
        rows[0]["short"] = ["one", "1"]
        config = JsonlConfig(path=jsonl(folder, *map(json.dumps, [*rows, {"image": "pictures/a.png", "long": None}])))
    else:
        (folder / "t.csv").write_text("image,long,short\n" + "\n".join(",".join(row.values()) for row in rows))
        config = CsvConfig(path=str(folder / "t.csv"))
    config = dataclasses.replace(config, text_key=("short", "long"))
    assert config.build("")[0]["texts"] == (("one", "1") if kind == "jsonl" else ("one",)) + ("a long one",)
    assert "text_weights" not in config.build("")[0]
    source = dataclasses.replace(config, text_probabilities=(1, 3)).build("")
    assert source[0]["text_weights"] == ((0.125, 0.125, 0.75) if kind == "jsonl" else (0.25, 0.75))
    assert (source[1]["texts"], source[1]["text_weights"]) == (("two",), (1.0,))
    if kind == "jsonl":
        with pytest.raises(BadRecord, match=r"no 'short' or 'long' \(the source's text_key\); it has: image, long"):
            draw_caption(source[2], None)
    for options, message in (
        ({"text_probabilities": (1.0,)}, "one number for each of"),
        ({"text_probabilities": (1.0, 0.0)}, "must be positive"),
        ({"text_key": ("a", "a")}, "names a key twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            schema.validate(dataclasses.replace(config, **options), "config.data.source")
    assert schema.override(config, {"text_key": "caption"}).text_key == ("caption",)
    assert schema.override(config, {"text_key": "a,b"}).text_key == ("a", "b")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_a_table_of_images_alone(folder, name):
    (folder / name).write_text('{"image": "pictures/a.png"}\n' if name == "t.jsonl" else "image\npictures/a.png\n")
    config = source_for_path(str(folder / name))
    with pytest.raises(ConfigError, match=r"no column 'caption' .*images without captions set .*text_key=\(\)"):
        config.build("")
    config = schema.override(config, {"text_key": "()"})
    schema.validate(config, "config.data.source")
    record = config.build("")[0]
    assert (record["image"], record["texts"]) == (b"a.png", ())
    with pytest.raises(BadRecord, match="it has no caption"):
        draw_caption(record, None)


def test_a_list_of_labels_is_several_classes(tmp_path):
    """Numbered over all lists and single values alike; an empty list is none of the classes."""
    rows = [["cat", "dog"], "dog", [], ["bird"]]
    lines = [json.dumps({"image": "x.png", "caption": "c", "what": value}) for value in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "x.png").write_bytes(b"")
    source = JsonlConfig(path=str(tmp_path / "t.jsonl"), label_key="what").build("")
    assert source.class_names == ("bird", "cat", "dog")
    assert [source[i]["label"] for i in range(4)] == [(1, 2), 2, (), (0,)]
