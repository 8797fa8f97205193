"""What a user can get wrong, by the command line and end to end: each thing is named in one sentence and loses nothing.

Files of their own are damaged here; the sources' and the checkpoints' own tests know each of them in detail.
"""

import contextlib
import io
import json
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import vlm_jax
from vlm_jax import metrics
from vlm_jax.checkpoint import Checkpointer
from vlm_jax.main import EXIT_CONFIG, main

CONFIG = """
import tiny
from vlm_jax.data.sources import TarConfig
from vlm_jax.evals.retrieval import RetrievalConfig


def get_config(name=""):
    evals = (RetrievalConfig("own", TarConfig(path="")),) if name == "retrieval" else ()
    return tiny.config(data__batch_size=8, train__steps=4, checkpoint__every=2, evals=evals)
"""


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 7, 12, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, ("PNG", "JPEG", "WEBP")[seed % 3])
    return file.getvalue()


def good(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of whole records, their captions in both forms."""
    members = []
    for i in range(start, start + count):
        captions = [f"picture {i}", f"number {i} again"]
        text = ("json", json.dumps({"caption": captions}).encode()) if i % 2 else ("txt", captions[0].encode())
        members += [(f"g{i:03d}.{('png', 'jpg', 'webp')[i % 3]}", picture(i)), (f"g{i:03d}.{text[0]}", text[1])]
    return members


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> "Command":
    (tmp_path / "tiny_config.py").write_text(CONFIG)
    return Command(tmp_path, capsys, caplog)


class Command:
    """The command line on a tiny model: a mistake must be a sentence on standard error, never a traceback."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
        self.folder, self.workdir, self.capsys, self.caplog = folder, folder / "run", capsys, caplog

    def __call__(self, *arguments: str, variant: str = "", **config: Any) -> tuple[int, str, str]:
        """(exit code, output, errors); `data__workers=2` stands for --config.data.workers=2."""
        overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in config.items()]
        reference = f"--config={self.folder / 'tiny_config.py'}{variant and ':' + variant}"
        code = main([reference, f"--workdir={self.workdir}", *overrides, *arguments])
        output, errors = self.capsys.readouterr()
        assert "Traceback" not in output + errors
        return code, output, errors

    def logged(self) -> list[str]:
        return [record.getMessage() for record in self.caplog.records if record.name.startswith("vlm_jax")]


BAD = {
    "cut": [("cut.jpg", picture(1)[:150]), ("cut.txt", b"a picture cut short")],
    "noimage": [("noimage.png", b"these are words"), ("noimage.txt", b"no picture")],
    "bytes": [("bytes.png", picture(0)), ("bytes.txt", b"caf\xe9 \xff")],
    "zero": [("zero.png", picture(0)), ("zero.txt", b"")],
    "blank": [("blank.png", picture(0)), ("blank.json", b'{"caption": ["", "  "]}')],
    "mute": [("mute.png", picture(0))],
    "torn": [("torn.png", picture(0)), ("torn.json", b'{"caption": "x')],
    "key": [("key.png", picture(0)), ("key.json", b'{"text": "another key"}')],
}


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_records_within_the_budget_are_named_counted_and_replaced(command: Command, workers: int) -> None:
    path = shard(command.folder / "s.tar", good(12) + [member for members in BAD.values() for member in members])
    code, output, _ = command(data__path=path, data__bad_record_budget=len(BAD), data__workers=workers, train__steps=6)
    assert code == 0
    named = {line.split()[1] for line in command.logged() if f"of {path} can't be used: " in line}
    assert named == set(BAD)  # 48 positions are more than two epochs of 20 records
    assert f"done: 6 steps; {len(BAD)} unusable records replaced" in output
    lines = [json.loads(line) for line in (command.workdir / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in reversed(lines) if "bad_records" in line)["bad_records"] == len(BAD)


def test_beyond_the_budget_the_run_stops_and_goes_on_with_a_larger_one(command: Command) -> None:
    path = shard(command.folder / "s.tar", good(30) + BAD["cut"] + BAD["zero"])
    code, _, errors = command(data__path=path, data__bad_record_budget=1, train__steps=8)
    assert code == 1
    assert errors.startswith("error: 2 of 32 records can't be used, 1 are allowed (config.data.bad_record_budget)")
    assert f"record cut of {path}" in errors
    assert f"record zero of {path}" in errors
    assert "raise the budget" in errors
    code, output, _ = command(data__path=path, data__bad_record_budget=2, train__steps=8)
    assert code == 0
    assert "done: 8 steps" in output


def test_shards_that_are_missing_empty_or_no_shards_are_named(command: Command) -> None:
    (command.folder / "zero.tar").write_bytes(b"")
    shard(command.folder / "none.tar", [])
    (command.folder / "words.tar").write_text("no archive\n" * 500)
    for name, words in {
        "absent.tar": "no file",
        "zero.tar": "the file has 0 bytes",
        "none.tar": "holds no record",
        "words.tar": "damaged",
    }.items():
        code, _, errors = command(data__path=command.folder / name)
        assert code == EXIT_CONFIG
        assert errors.startswith("error: ") and errors.count("\n") == 1
        assert f"{command.folder / name}" in errors and words in errors and "config.data.path" in errors


@pytest.mark.parametrize("damage", ["cut short", "is damaged at byte"])
def test_a_damaged_shard_costs_what_lies_behind_the_damage_and_says_so(command: Command, damage: str) -> None:
    path = shard(command.folder / "s.tar", good(20))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmember("g012.png").offset
    if damage == "cut short":
        data = data[: header + 600]
    else:
        data[header : header + 512] = b"\xaa" * 512
    path.write_bytes(data)
    for budget, expected in ((1, 0), (0, 1)):  # from the shard, then from its cached index
        command.workdir = command.folder / f"run-{budget}"
        command.caplog.clear()
        code, output, errors = command(data__path=path, data__bad_record_budget=budget)
        assert code == expected
        assert "13 records" in output
        assert (damage in errors) == bool(expected)
        warnings = command.logged()
        assert any(f"{path}: the shard" in line and damage in line and "12 records" in line for line in warnings)
        assert any(
            f"of {path} can't be used: the shard" in line and "fetch the shard again" in line for line in warnings
        )


def test_tables_name_the_row_the_file_and_the_column(command: Command) -> None:
    for i in range(12):
        (command.folder / f"{i}.png").write_bytes(picture(3 * i))
    rows = [f'{i}.png,"red, {i}"' for i in range(12)]
    table = command.folder / "t.csv"
    table.write_text("\n".join(["image,caption", *rows, "13.png,absent", "1.png,a dog, a cat"]) + "\n")
    code, _, _ = command(data__path=table, data__bad_record_budget=2)
    assert code == 0
    named = "\n".join(command.logged())
    assert f"record number 13 of {table} can't be used: its image '13.png' can't be read: No such file" in named
    assert f"record number 14 of {table} can't be used: it has 3 fields" in named
    command.workdir = command.folder / "other"
    for text, words in {
        "file,caption\n1.png,x\n": ["no column 'image'", "config.data.source.image_key", "it has: file, caption"],
        'image,caption\n1.png,"never closed\n2.png,x\n': ["a quote in line 2 is never closed"],
        "": ["no column 'image'"],
    }.items():
        table.write_text(text)
        code, _, errors = command(data__path=table)
        assert code == EXIT_CONFIG
        assert errors.count("\n") == 1 and all(word in errors for word in [str(table), *words]), errors
    table.write_text("image,caption\n1.png,x\n")
    code, _, errors = command(data__source="csv", data__source__path=table, data__source__image_root="/nowhere")
    assert code == EXIT_CONFIG
    assert "config.data.source.image_root = '/nowhere' is not a folder" in errors


def test_a_source_without_a_usable_record_does_not_blame_the_budget(command: Command) -> None:
    table = command.folder / "t.jsonl"
    table.write_text("".join(json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}) + "\n" for i in range(9)))
    code, _, errors = command(data__path=table, data__bad_record_budget=1000)
    assert code == 1
    assert errors.startswith("error: none of 64 records drawn one after the other, of 9 in all, can be used")
    assert f"of {table} can't be used: its image '" in errors
    assert "budget" not in errors
    first = [line for line in errors.splitlines() if line.startswith("  record")]
    assert len(first) == len(set(first))


def test_images_alone_train_a_method_that_reads_no_text_and_no_other(command: Command) -> None:
    members = [(f"i{i:03d}.png", picture(3 * i)) for i in range(12)]
    path = shard(command.folder / "s.tar", members + BAD["torn"] + BAD["bytes"] + BAD["cut"])
    recipe = Path(__file__).parents[1] / "configs/mae_b16.py"
    code, output, _ = command(f"--config={recipe}:smoke", data__path=path, evals="()", data__bad_record_budget=1)
    assert code == 0
    assert "done: 6 steps; 1 unusable records replaced" in output
    assert {line.split()[1] for line in command.logged() if f"of {path} can't be used" in line} == {"cut"}
    command.workdir = command.folder / "pairs"
    command.caplog.clear()
    paths = f"{path},{shard(command.folder / 'captioned.tar', good(12))}"
    code, output, _ = command(data__path=paths, data__bad_record_budget=15, train__steps=8)  # CLIP: two epochs and more
    assert code == 0
    assert "done: 8 steps; 15 unusable records replaced" in output
    mute = [line for line in command.logged() if f"of {path} can't be used: it has no caption (txt or json)" in line]
    assert {line.split()[1] for line in mute} == {f"i{i:03d}" for i in range(12)}


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Every write beyond `size` bytes of a file fails as on a full disk, whatever library and thread makes it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_same_command_goes_on(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(command.folder / "s.tar", good(12))
    assert command(data__path=path, train__steps=6)[0] == 0
    unbroken = tiny.host(vlm_jax.load(command.workdir).params)
    command.workdir = command.folder / "full"
    save, full = Checkpointer.save, contextlib.ExitStack()

    def fills_up(self: Checkpointer, step: int, *arguments: Any, **named: Any) -> bool:
        self.wait()
        if step == 4:
            full.enter_context(no_file_beyond(6000))
        return save(self, step, *arguments, **named)

    with monkeypatch.context() as patch, full:
        patch.setattr(Checkpointer, "save", fills_up)
        # few lines of metrics, which would meet the full disk first
        code, _, errors = command(data__path=path, train__steps=6, train__log_every=6)
    assert code == 1
    assert errors.count("\n") == 1, errors
    assert f"saving the checkpoint of step 4 to {command.workdir / 'checkpoints'} failed" in errors
    assert "the checkpoint of step 2 is still good" in errors
    assert "Make room" in errors and "File too large" in errors
    code, output, errors = command(data__path=path, train__steps=6)
    assert code == 0, errors
    assert "continued at step 2" in output
    tiny.assert_trees_equal(vlm_jax.load(command.workdir).params, unbroken)


@pytest.mark.parametrize(("room", "name"), [(300, "metrics.jsonl"), (5000, "tensorboard")])
def test_a_full_disk_stops_the_metrics_at_once(tmp_path: Path, room: int, name: str) -> None:
    """In the caller's thread: a writer with one of its own would let the run wait for room for ever."""
    writer = metrics.MetricWriter(tmp_path, is_primary=True)
    writer.scalars(0, {"loss": 1.0})
    values = {f"m{i}": 1.0 for i in range(200)}
    with no_file_beyond(room), pytest.raises(metrics.WorkdirError, match=f"{name} can't be written: File too large"):
        writer.scalars(1, values)
    with contextlib.suppress(metrics.WorkdirError):
        writer.close()


def test_a_run_on_a_full_disk_ends_with_one_sentence(command: Command) -> None:
    path = shard(command.folder / "s.tar", good(12))
    with no_file_beyond(20):
        code, _, errors = command(data__path=path)
    assert code == 1
    assert errors.count("\n") == 1, errors
    assert str(command.workdir) in errors and "can't be written: File too large; make room" in errors


def test_a_workdir_that_is_no_folder_or_holds_garbage_is_named(command: Command) -> None:
    path = shard(command.folder / "s.tar", good(12))
    (command.folder / "file").write_text("")
    command.workdir = command.folder / "file" / "run"
    code, _, errors = command(data__path=path)
    assert code == 1
    assert errors.count("\n") == 1 and str(command.workdir) in errors and "Not a directory" in errors
    command.workdir = command.folder / "run"
    assert command(data__path=path)[0] == 0
    for name in ("metrics.jsonl", "config.json"):
        content = (command.workdir / name).read_text()
        (command.workdir / name).write_text("garbage\n")
        code, _, errors = command(data__path=path)
        assert code == 1
        assert errors.count("\n") == 1 and str(command.workdir / name) in errors and "move" in errors
        (command.workdir / name).write_text(content)


def test_a_workdir_of_another_config_shows_the_difference(command: Command) -> None:
    path = shard(command.folder / "s.tar", good(12))
    assert command(data__path=path)[0] == 0
    code, _, errors = command(data__path=path, optimizer__learning_rate=0.5, data__batch_size=16, data__threads=2)
    assert code == EXIT_CONFIG
    assert f"workdir {command.workdir} belongs to a run of another config" in errors
    assert [line.strip() for line in errors.splitlines()[1:]] == [
        "config.data.batch_size: 8 -> 16",
        "config.optimizer.learning_rate: 0.001 -> 0.5",
    ]


def test_evaluation_alone_names_its_own_keys_and_counts_what_it_leaves_out(command: Command) -> None:
    train, test = shard(command.folder / "s.tar", good(12)), command.folder / "test.tar"
    shard(test, good(9, start=50) + BAD["cut"] + BAD["zero"] + [("l.png", picture(3)), ("l.cls", b"1")])
    assert command(data__path=train)[0] == 0
    where = ("--mode=eval", f"--checkpoint={command.workdir}")
    code, _, errors = command(*where, variant="retrieval", evals__own__source__path=command.folder / "absent.tar")
    assert code == EXIT_CONFIG
    assert "config.evals.own.source.path" in errors and "absent.tar" in errors
    code, _, errors = command(*where, variant="retrieval", evals__own__source__path=test)
    assert code == 1
    assert "'own' needs captions, but record l of" in errors and errors.count("\n") == 1
    test.unlink()
    shard(test, good(9, start=50) + BAD["cut"] + BAD["zero"])
    command.caplog.clear()
    assert command(*where, variant="retrieval", evals__own__source__path=test)[0] == 0
    numbers = json.loads((command.workdir / "eval.json").read_text())
    assert (numbers["retrieval/own/images"], numbers["retrieval/own/texts"]) == (9, 13)  # odd numbers have two captions
    assert {line.split()[1] for line in command.logged() if f"of {test} can't be used" in line} == {"cut", "zero"}
