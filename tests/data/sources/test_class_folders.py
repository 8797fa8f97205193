import io
import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from vlm_jax import schema
from vlm_jax.data.sources import BadRecord, ClassFoldersConfig, TarConfig, source_for_path
from vlm_jax.schema import ConfigError


@pytest.fixture
def folder(tmp_path):
    """Three classes, one empty; nested, hidden, linked and foreign files."""
    root = tmp_path / "photos"
    for name in (
        "n02_dog/b.JPG", "n02_dog/a.png", "n02_dog/deep/er/c.jpeg", "n02_dog/notes.txt", "n02_dog/.hidden.png",
        "n02_dog/.cache/d.png", "n01_big_cat/x.webp", ".git/y.png", "z.png",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "n03_empty").mkdir()
    (root / "n01_big_cat" / "around").symlink_to(root / "n01_big_cat")
    (root / "n01_big_cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.gif").write_bytes(b"e")
    (root / "n01_big_cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    return root


def keys(source):
    return [source.paths[i] for i in range(len(source))]


def test_classes_are_the_sorted_folders(folder, caplog):
    with caplog.at_level(logging.WARNING):
        source = source_for_path(str(folder)).build("")
    assert "the class n03_empty has no image" in caplog.text
    assert source.class_names == ("n01 big cat", "n02 dog", "n03 empty")
    assert keys(source) == [
        "n01_big_cat/gone.png", "n01_big_cat/linked/e.gif", "n01_big_cat/x.webp",
        "n02_dog/a.png", "n02_dog/b.JPG", "n02_dog/deep/er/c.jpeg",
    ]  # fmt: skip
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    record = pickle.loads(pickle.dumps(source))[4]
    assert record == {
        "image": b"n02_dog/b.JPG",
        "texts": ("a photo of a n02 dog.",),
        "label": 1,
        "key": "n02_dog/b.JPG",
        "where": str(folder),
    }
    with pytest.raises(BadRecord, match=r"record n01_big_cat/gone\.png of .*photos can't be used: .*No such file"):
        source[0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("names.txt", "tench, Tinca\nthe dog\nnothing\n", ("tench, Tinca", "the dog", "nothing")),
        ("names.tsv", "n02_dog\tdog\nn01_big_cat\tcat\nn03_empty\tno one\n", ("dog", "cat", "no one")),
        (
            "synsets.txt",
            "n01_big_cat tench, Tinca\nn02_dog dog\nn03_empty e\nn04 f\n",
            ("tench, Tinca", "dog", "e", "f"),
        ),
        ("names.json", json.dumps(["cat", "dog", "none"]), ("cat", "dog", "none")),
        ("map.json", json.dumps({"n03_empty": "e", "n02_dog": "d", "n01_big_cat": "c"}), ("e", "d", "c")),
        (
            "keras.json",
            json.dumps({"0": ["n01_big_cat", "c"], "1": ["n02_dog", "d"], "2": ["n03_empty", "e"]}),
            ("c", "d", "e"),
        ),
    ],
)
def test_names_from_a_file(folder, tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    config = ClassFoldersConfig(path=str(folder), class_names_file=str(tmp_path / name), templates=("{}", "the {}"))
    source = config.build("")
    assert source.class_names == expected
    dog = keys(source).index("n02_dog/a.png")
    assert source.texts(dog) == (expected[source.labels[dog]], f"the {expected[source.labels[dog]]}")
    assert "d" in source.texts(dog)[0]
    ordered = [path.split("/")[0] for path in keys(source)]
    assert ordered == sorted(ordered, key=lambda folder: source.labels[ordered.index(folder)])


def test_what_is_wrong_is_named(folder, tmp_path):
    def build(**options):
        return ClassFoldersConfig(**{"path": str(folder), **options}).build("")

    names = tmp_path / "names.txt"
    for content, message in (
        ("cat\ndog\n", "2 names for 3 folders"),
        ("n01_big_cat\tcat\nn02_dog\tdog\n", r"no name for the folder 'n03_empty' \(1 in all"),
    ):
        names.write_text(content)
        with pytest.raises(ConfigError, match=message):
            build(class_names_file=str(names))
    (tmp_path / "names.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"names\.json' can't be read"):
        build(class_names_file=str(tmp_path / "names.json"))
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        build(class_names_file=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="is not a folder"):
        build(path=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="has no folder in it"):
        build(path=str(folder / "n03_empty"))
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"hold no image \(\.jpg"):
        build(path=str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match=r"class folders with images"):
        source_for_path(str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="templates holds 'x'"):
        schema.validate(ClassFoldersConfig(templates=("x",)))
    (folder / "s.tar").write_bytes(b"")
    assert isinstance(source_for_path(str(folder)), TarConfig)


def test_images_decode(tmp_path):
    from vlm_jax.data.examples import LabelledImages
    from vlm_jax.data.images import PreprocessConfig

    (tmp_path / "red").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "PNG")
    (tmp_path / "red" / "1.png").write_bytes(buffer.getvalue())
    row = LabelledImages(4, PreprocessConfig())(ClassFoldersConfig(path=str(tmp_path)).build("")[0], None)
    np.testing.assert_array_equal(row["image"][0, 0], [255, 0, 0])
    assert row["label"] == 0
