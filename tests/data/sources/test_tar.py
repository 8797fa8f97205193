import io
import json
import logging
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_jax import schema
from vlm_jax.data.examples import draw_caption
from vlm_jax.data.sources import BadRecord, TarConfig, shards, source_for_path
from vlm_jax.data.sources.paths import expand_braces, find_files
from vlm_jax.schema import ConfigError


def png(value=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def pairs(first, count):
    """Records `0007.png` + `0007.txt`, captioned by their number."""
    numbers = range(first, first + count)
    return [m for n in numbers for m in ((f"{n:04d}.png", png(n)), (f"{n:04d}.txt", f"number {n}".encode()))]


def usable(source):
    """(keys that can be read, messages of those that can't)."""
    keys, errors = [], []
    for index in range(len(source)):
        try:
            keys.append(source[index]["key"])
        except BadRecord as error:
            errors.append(str(error))
    return keys, errors


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{000..002}.tar", ["a000.tar", "a001.tar", "a002.tar"]),
        ("a{8..11}", ["a8", "a9", "a10", "a11"]),
        ("a{08..10}", ["a08", "a09", "a10"]),
        ("{x,y}-{1..2}", ["x-1", "x-2", "y-1", "y-2"]),
        ("{2..0}", ["2", "1", "0"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert expand_braces(pattern) == names


def test_paths_by_braces_glob_list_and_folder(tmp_path):
    names = [write_shard(tmp_path / f"s-{n:03d}.tar", pairs(3 * n, 3)) for n in range(4)]
    folder = str(tmp_path)
    assert find_files(f"{folder}/s-{{001..003}}.tar", "*.tar", "shards") == names[1:]
    assert find_files(f"{folder}/s-*.tar", "*.tar", "shards") == names
    assert find_files(folder, "*.tar", "shards") == names
    assert find_files(f"{names[2]}, {folder}/s-{{000,001}}.tar", "*.tar", "shards") == [names[2], names[0], names[1]]
    source = source_for_path(f"{folder}/s-{{000..003}}.tar").build("")
    assert usable(source) == ([f"{n:04d}" for n in range(12)], [])
    record = source[7]
    assert (record["image"], record["texts"], record["where"]) == (png(7), ("number 7",), names[2])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("{folder}/absent.tar", "absent.tar' is no file"),
        ("{folder}/s-{{000..009}}.tar", "s-001.tar' is no file"),
        ("{folder}/*.tarx", "pattern that no file matches"),
        ("{folder}/empty", "a folder without"),
    ],
)
def test_missing_paths_are_named(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "s-000.tar", pairs(0, 1))
    with pytest.raises(ConfigError, match=message):
        TarConfig(path=path.format(folder=tmp_path)).build("")


def test_kinds_of_members(tmp_path):
    members = [
        ("sub/a.b.txt", b"no image here"),
        ("sub/one.jpg", b"J"), ("sub/one.json", json.dumps({"caption": ["x", "", "y"], "w": 3}).encode()),
        ("sub/two.JPEG", b"K"), ("sub/two.cls", b"1\n"),
        ("other/two.webp", b"W"), ("other/two.txt", "\ufeffcafé \n".encode()), ("other/two.seg.png", b"S"),
        ("._junk", b"x"), ("__pycache__", b"y"),
    ]  # fmt: skip
    source = TarConfig(path=write_shard(tmp_path / "a.tar", members), class_names=("cat", "dog")).build("")
    assert source.class_names == ("cat", "dog")
    assert len(source) == 4
    with pytest.raises(BadRecord, match=r"sub/a of .*a\.tar can't be used: it has no image"):
        source[0]
    assert source[1] == {"image": b"J", "texts": ("x", "y"), "key": "sub/one", "where": str(tmp_path / "a.tar")}
    assert (source[2]["label"], source[2]["texts"]) == (1, ())
    assert (source[3]["image"], source[3]["texts"], source[3]["key"]) == (b"W", ("café",), "other/two")
    assert source.texts(3) == ("café",)
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (("k.cls", b"dog"), "not a number"),
        (("k.cls", b"7"), "2 class names"),
    ],
)
def test_unusable_records_name_shard_and_key(tmp_path, member, why):
    path = write_shard(tmp_path / "s.tar", [*pairs(0, 1), ("k.png", png()), member, *pairs(2, 1)])
    source = TarConfig(path=path, class_names=("a", "b")).build("")
    with pytest.raises(BadRecord, match=why) as caught:
        source[1]
    assert (caught.value.where, caught.value.key) == (path, "k")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert usable(source)[0] == ["0000", "0002"]


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (("k.txt", b"\xff\xfe\xfa"), "can't be read: 'utf-8' codec"),
        (("k.txt", b""), "its caption is empty"),
        (("k.txt", b" \n "), "its caption is empty"),
        (("k.json", b"{"), "can't be read"),
        (("k.json", b'{"text": "x", "id": 3}'), "no 'caption' .*it has: text, id"),
        (("k.json", b'{"caption": 3}'), "is a int, not a text"),
        (("k.json", b'{"caption": []}'), "its caption is empty"),
        (("k.xyz", b""), "it has no caption .txt or json."),
    ],
)
def test_records_without_a_caption_have_an_image_and_say_why(tmp_path, member, why):
    path = write_shard(tmp_path / "s.tar", [*pairs(0, 1), ("k.png", png()), member, *pairs(2, 1)])
    source = TarConfig(path=path).build("")
    assert (source[1]["image"], source[1]["texts"]) == (png(), ())
    assert usable(source) == (["0000", "k", "0002"], [])
    for read in (lambda: draw_caption(source[1], None), lambda: source.texts(1)):
        with pytest.raises(BadRecord, match=why) as caught:
            read()
        assert (caught.value.where, caught.value.key) == (path, "k")


def test_captions_of_several_json_keys_with_probabilities(tmp_path):
    values = {"short": "s", "long": ["l", "", "m"], "other": "o"}
    members = [("a.png", png()), ("a.json", json.dumps(values).encode())]
    members += [("b.png", png()), ("b.json", b'{"short": "t"}')]
    path = write_shard(tmp_path / "s.tar", members)
    source = TarConfig(path=path, json_text_key=("long", "short"), text_probabilities=(0.8, 0.2)).build("")
    assert source[0]["texts"] == source.texts(0) == ("l", "m", "s")
    assert source[0]["text_weights"] == (0.4, 0.4, 0.2)
    assert (source[1]["texts"], source[1]["text_weights"]) == (("t",), (1.0,))
    with pytest.raises(ConfigError, match=r"text_probabilities = .* must hold one number for each"):
        schema.validate(TarConfig(json_text_key=("a", "b"), text_probabilities=(1.0,)), "config.data.source")


def test_index_is_cached_and_follows_changes_of_the_shard(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pairs(0, 3))
    assert len(TarConfig(path=path).build("")) == 3
    assert (tmp_path / "s.tar.index.npz").is_file()
    scans, scan = [], shards.scan
    monkeypatch.setattr(shards, "scan", lambda name: scans.append(name) or scan(name))
    assert usable(TarConfig(path=path).build(""))[0] == ["0000", "0001", "0002"]
    assert not scans
    status = os.stat(path)
    write_shard(path, pairs(5, 3))  # the same size: only the time tells
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert usable(TarConfig(path=path).build(""))[0] == ["0005", "0006", "0007"]
    write_shard(path, pairs(0, 40))  # another size, the time restored
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(TarConfig(path=path).build("")) == 40
    assert len(scans) == 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not quite"])
def test_damaged_cache_is_made_anew(tmp_path, content):
    path = write_shard(tmp_path / "s.tar", pairs(0, 3))
    (tmp_path / "s.tar.index.npz").write_bytes(content)
    assert len(usable(TarConfig(path=path).build(""))[0]) == 3
    assert (tmp_path / "s.tar.index.npz").stat().st_size > 200
    assert not list(tmp_path.glob("*.tmp"))


def test_index_goes_to_the_cache_folder_where_the_shard_is_read_only(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "s.tar", pairs(0, 3))
    cache = tmp_path / "cache"
    real = shards.tempfile.NamedTemporaryFile

    def refuse(dir, **options):
        if os.path.samefile(dir, tmp_path):
            raise PermissionError("read-only")
        return real(dir=dir, **options)

    monkeypatch.setattr(shards.tempfile, "NamedTemporaryFile", refuse)
    assert len(TarConfig(path=shard).build(str(cache))) == 3
    assert len(list(cache.iterdir())) == 1
    assert not (tmp_path / "s.tar.index.npz").exists()
    monkeypatch.setattr(shards, "scan", lambda name: pytest.fail("the cache was not used"))
    assert len(TarConfig(path=shard).build(str(cache))) == 3


def test_shard_cut_anywhere_keeps_the_records_before(tmp_path, caplog):
    """Cut at every 100 bytes: whole records stay readable, at most one is unusable, and the shard is named."""
    whole = write_shard(tmp_path / "whole.tar", pairs(0, 4))
    data = Path(whole).read_bytes()
    size = data.rstrip(b"\0")
    ends = [4 * 512 * (n + 1) for n in range(4)]  # two headers and two blocks a record
    for cut in range(100, len(size) + 100, 100):
        path = tmp_path / f"cut-{cut}.tar"
        path.write_bytes(data[:cut])
        complete = sum(cut >= end - 500 for end in ends)  # the last block is padding but for some bytes
        if not complete:
            continue
        keys, errors = usable(TarConfig(path=str(path)).build(""))
        assert keys == [f"{n:04d}" for n in range(len(keys))]
        assert sum(end <= cut for end in ends) <= len(keys) <= complete
        assert len(errors) == 1
        assert f"cut-{cut}.tar" in errors[0]
        assert "cut short" in errors[0]
        assert f"cut-{cut}.tar" in caplog.text


def test_shards_without_a_record(tmp_path, caplog):
    empty, zeros = tmp_path / "e.tar", tmp_path / "z.tar"
    empty.write_bytes(b"")
    zeros.write_bytes(bytes(10240))
    for path, why in ((empty, "0 bytes"), (zeros, "holds no record")):
        with pytest.raises(ConfigError, match=f"{path.name}: the shard is empty.*{why}"):
            TarConfig(path=str(path)).build("")
    good = write_shard(tmp_path / "g.tar", pairs(0, 2))
    with caplog.at_level(logging.WARNING):
        keys, errors = usable(TarConfig(path=f"{empty},{good},{zeros}").build(""))
    assert keys == ["0000", "0001"]
    assert len(errors) == 2  # among good shards, an empty one counts as one unusable record
    assert "e.tar" in errors[0]
    assert "z.tar" in errors[1]


def test_compressed_shards_are_refused_with_the_remedy(tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(__file__, "a.txt")
    with pytest.raises(ConfigError, match="gunzip"):
        source_for_path(str(tmp_path / "s.tar.gz")).build("")


def test_shard_that_shrinks_in_use(tmp_path):
    path = write_shard(tmp_path / "s.tar", pairs(0, 5))
    source = TarConfig(path=path).build("")
    with open(path, "r+b") as file:
        file.truncate(3 * 512)
    assert usable(source)[0] == ["0000"] or not usable(source)[0]
    shutil.move(path, tmp_path / "elsewhere.tar")
    with pytest.raises(BadRecord, match="can't be read: No such file"):
        source[0]


def test_source_is_picklable_and_long_names_work(tmp_path):
    name = "deep/" * 30 + "x" * 150
    members = [(f"{name}.png", png(3)), (f"{name}.txt", b"long")]
    source = TarConfig(path=write_shard(tmp_path / "s.tar", members)).build("")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[0] == source[0]
    assert copy[0]["key"] == name


def test_conversations_with_no_image_one_and_several(tmp_path):
    def turns(text):
        return json.dumps({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]}).encode()

    members = [
        *(("0000.json", turns("no image")), ("0001.png", png(1)), ("0001.json", turns("<image> one"))),
        *((f"0002.{n}.png", png(20 + n)) for n in (10, 2, 1)),
        ("0002.json", turns("<image><image><image>")),
        ("0003.png", png(3)),
        ("0004.json", b"[1]"),
    ]
    path, cache = write_shard(tmp_path / "a.tar", members), str(tmp_path / "cache")
    for _ in range(2):  # the second time from the index that was kept
        source = pickle.loads(pickle.dumps(TarConfig(path=path, json_chat_key="conversations").build(cache)))
        assert [source[i]["turns"][0].text for i in range(3)] == ["no image", "<image> one", "<image><image><image>"]
        assert [[image.load() for image in source[i]["images"]] for i in range(3)] == [
            [], [png(1)], [png(21), png(22), png(30)],
        ]  # fmt: skip
        assert source.texts(1) == ("<image> one\na",)
        for index, why in ((3, "it has no json with a conversation"), (4, "its json is a list")):
            with pytest.raises(BadRecord, match=why):
                source[index]
