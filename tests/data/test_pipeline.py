import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from vlm_jax import schema
from vlm_jax.data.bad_records import BadRecordBudgetExceeded
from vlm_jax.data.captions import captions
from vlm_jax.data.examples import ClipExamples, LabelledImages
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig, TrainLoader, eval_batches
from vlm_jax.data.rows import TrainRows
from vlm_jax.data.sources import BadRecord, CsvConfig, DigitsConfig, ShapesConfig, TarConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.schema import ConfigError

SOURCE = DigitsConfig().build("")
BATCH = 32


def mesh_of(count, shape=None, names=("data",)):
    automatic = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(shape or (count,), names, axis_types=automatic, devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def make():
    tokenizer = build_tokenizer(SentencePieceConfig(length=12, vocab_size=400), SOURCE.texts(0) + SOURCE.texts(1))
    return ClipExamples(tokenizer, 8, PreprocessConfig(), AugmentConfig(scale=(0.5, 1.0)))


def take(make, count, start=0, mesh=None, batch=BATCH, source=SOURCE, **options):
    """The first batches of a loader as host arrays, and its count of bad records."""
    loader = TrainLoader(source, make, batch, 3, mesh or mesh_of(4), start, DataConfig(**options))
    try:
        found = [{key: np.asarray(value) for key, value in next(loader).items()} for _ in range(count)]
        assert loader.position == start + count * batch
        return found, loader.bad_records
    finally:
        loader.close()


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def test_batches_are_the_rows_of_their_positions_sharded_over_the_mesh(make):
    mesh = mesh_of(4, (2, 2), ("data", "fsdp"))
    loader = TrainLoader(SOURCE, make, BATCH, 3, mesh, 64, DataConfig())
    rows = TrainRows(SOURCE, make, 3)
    for number in range(3):
        batch = next(loader)
        assert set(batch) == {"image", "text"}
        assert batch["image"].sharding.spec == PartitionSpec(("data", "fsdp"))
        assert (batch["image"].shape, batch["image"].dtype) == ((BATCH, 8, 8, 3), np.uint8)
        assert (batch["text"].shape, batch["text"].dtype) == ((BATCH, 12), np.int32)
        assert {shard.data.shape[0] for shard in batch["image"].addressable_shards} == {BATCH // 4}
        for row in range(BATCH):
            expected = rows(64 + number * BATCH + row)[0]
            for key in batch:
                np.testing.assert_array_equal(np.asarray(batch[key][row]), expected[key])
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_stream_does_not_depend_on_mesh_batch_threads_or_where_it_is_cut(make):
    whole, _ = take(make, 6)
    flat = {key: np.concatenate([batch[key] for batch in whole]) for key in whole[0]}
    assert_same(take(make, 6, mesh=mesh_of(8))[0], whole)
    assert_same(take(make, 6, mesh=mesh_of(4, (2, 1, 2), ("data", "fsdp", "tensor")))[0], whole)
    assert_same(take(make, 6, threads=1, prefetch=1)[0], whole)
    for start in (BATCH, 5 * BATCH):
        assert_same(take(make, 6 - start // BATCH, start=start)[0], whole[start // BATCH :])
    other = take(make, 4, batch=48)[0]
    for key, value in flat.items():
        np.testing.assert_array_equal(np.concatenate([batch[key] for batch in other]), value)


def test_blocks_of_neighbours_come_in_one_batch():
    source = ShapesConfig(count=64, image_size=16).build("")
    blocks, _ = take(_index_of, 4, source=source, shuffle_block=8)
    first = [batch["index"].reshape(-1, 8)[:, 0] for batch in blocks]
    for batch, starts in zip(blocks, first, strict=True):
        np.testing.assert_array_equal(batch["index"].reshape(-1, 8), starts[:, None] + np.arange(8))
    for epoch in (np.concatenate(first[:2]), np.concatenate(first[2:])):
        assert sorted(epoch) == list(range(0, 64, 8)) != list(epoch)
    assert_same(take(_index_of, 1, 3 * BATCH, mesh_of(8), source=source, shuffle_block=8, threads=1)[0], blocks[3:])
    with pytest.raises(ConfigError, match="shuffle_block = 5 does not divide batch_size = 32"):
        schema.validate(DataConfig(batch_size=BATCH, shuffle_block=5), "config.data")
    packed = type("Packed", (), {"rows": take, "__call__": take})()
    with pytest.raises(ConfigError, match="shuffle_block = 8 is for rows of one record each"):
        take(packed, 1, source=source, shuffle_block=8)


def _index_of(record, rng):
    return {"index": np.int32(record["key"].split("-")[1])}


def test_worker_processes_give_the_same_stream_and_may_change_on_resume(make):
    whole, _ = take(make, 6)
    assert_same(take(make, 3, workers=1)[0], whole[:3])
    assert_same(take(make, 3, start=3 * BATCH, workers=2)[0], whole[3:])


def test_a_source_smaller_than_the_batch_repeats(make, tmp_path):
    source = write_pictures(tmp_path, 5)
    (batch,), _ = take(make, 1, source=source)
    pictures = [batch["image"][row].tobytes() for row in range(BATCH)]
    assert len(set(pictures)) >= 5


def write_pictures(folder, count, bad=()):
    """A tar source of grey pictures, some of which hold junk."""
    with tarfile.open(folder / "s.tar", "w") as archive:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
            image = b"junk" if number in bad else buffer.getvalue()
            for name, data in ((f"{number:03d}.png", image), (f"{number:03d}.txt", f"digit {number}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return TarConfig(path=str(folder / "s.tar")).build("")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_logged_once_and_counted(make, tmp_path, caplog, workers):
    source = write_pictures(tmp_path, 40, bad={4, 17})
    batches, bad = take(make, 4, source=source, workers=workers, bad_record_budget=2)
    assert bad == 2
    assert sorted(record.message.split()[1] for record in caplog.records) == ["004", "017"]
    assert all(str(tmp_path / "s.tar") in record.message for record in caplog.records)
    values = {int(v) for batch in batches for v in batch["image"].max((1, 2, 3))}
    assert values == set(range(40)) - {4, 17}
    again, _ = take(make, 4, source=source, bad_record_budget=0.5)
    assert_same(again, batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_budget_stops_the_run(make, tmp_path, workers):
    source = write_pictures(tmp_path, 40, bad={4, 17, 30})
    with pytest.raises(BadRecordBudgetExceeded, match=r"(?s)3 of 40 records .*, 2 are allowed.*of .*s\.tar"):
        take(make, 4, source=source, workers=workers, bad_record_budget=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_records_bad_is_a_named_error_not_a_hang(make, tmp_path, workers):
    source = write_pictures(tmp_path, 6, bad=range(6))
    with pytest.raises(BadRecordBudgetExceeded, match=r"record 00\d of .*s\.tar"):
        take(make, 1, source=source, workers=workers)


def test_evaluation_gives_every_record_once_in_order():
    test = DigitsConfig(split="test").build("")
    batches = eval_batches(test, LabelledImages(8, PreprocessConfig()), 64, mesh_of(4))
    assert len(batches) == -(-len(test) // 64)
    for _ in range(2):  # it can be iterated again
        found = [{key: np.asarray(value) for key, value in batch.items()} for batch in batches]
        joined = {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}
        assert joined["mask"].sum() == len(test)
        np.testing.assert_array_equal(joined["index"][joined["mask"]], np.arange(len(test)))
        for index in range(0, len(test), 50):
            np.testing.assert_array_equal(joined["image"][index], test[index]["image"])
            assert joined["label"][index] == test[index]["label"]
        assert not joined["image"][~joined["mask"]].any()
    assert batches.bad_records == 0


def test_evaluation_masks_and_counts_bad_records(make, tmp_path, caplog):
    source = write_pictures(tmp_path, 10, bad={0, 7})
    batches = eval_batches(source, make, 4, mesh_of(2))
    masks = np.concatenate([np.asarray(batch["mask"]) for batch in batches])
    assert np.flatnonzero(masks).tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert len(masks) == 12
    assert batches.bad_records == 2
    assert len(caplog.records) == 2


def test_an_error_of_a_source_reaches_the_caller(make):
    class Broken(type(SOURCE)):
        def __getitem__(self, index):
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        take(make, 1, source=Broken(DigitsConfig()))


def test_batch_must_divide_over_the_mesh(make):
    with pytest.raises(ConfigError, match=r"batch_size = 30 can't be split evenly over the mesh \(data=4\)"):
        take(make, 1, batch=30)


def test_captions_come_from_records_spread_over_the_source(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"x.png,{'' if n == 50 else f'number {n}'}\n" for n in range(101)))
    source = CsvConfig(path=str(table)).build("")
    assert list(captions(source, 3)) == ["number 0", "number 100"]  # 50 has none and is passed over
    assert len(list(captions(source))) == 100
    with pytest.raises(BadRecord):
        source.texts(50)


def test_data_config_picks_the_source(tmp_path):
    write_pictures(tmp_path, 3)
    config = schema.override(DataConfig(), {"path": str(tmp_path), "tokenizer": "sentencepiece", "augment": "None"})
    assert len(config.build_source("")) == 3
    assert config.augment is None
    assert schema.from_dict(DataConfig, schema.to_dict(config)) == config
    assert len(dataclasses.replace(config, path="").build_source("")) == 1442
    for key in ("batch_size", "shuffle_block", "threads", "prefetch", "workers", "bad_record_budget"):
        with pytest.raises(ConfigError, match=f"config.data.{key} = -1"):
            schema.validate(dataclasses.replace(config, **{key: -1}), "config.data")


PARENT = """
    import os, sys, time
    import jax
    from vlm_jax.data.examples import LabelledImages
    from vlm_jax.data.images import PreprocessConfig
    from vlm_jax.data.pipeline import DataConfig, TrainLoader
    from vlm_jax.data.sources import DigitsConfig

    if __name__ == "__main__":
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        make = LabelledImages(8, PreprocessConfig())
        loader = TrainLoader(DigitsConfig().build(""), make, 16, 0, mesh, 0, DataConfig(workers=2))
        for _ in range(2):  # the second batch is the second worker's: both have started then
            next(loader)
        print("ready", flush=True)
        if sys.argv[1] == "close":
            loader.close()
        elif sys.argv[1] == "sleep":
            time.sleep(60)
"""


def children(session):
    """Process ids of the living processes in a session."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(name))
    return found


@pytest.fixture
def parent(tmp_path):
    """Starts a process with a loader that has two workers, in a session of its own, and waits for its first batch."""
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with contextlib.ExitStack() as stack:

        def start(argument):
            errors = stack.enter_context(open(tmp_path / "errors", "wb"))
            process = subprocess.Popen(
                [sys.executable, str(script), argument],
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env=environment,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            return process

        yield start


def assert_all_end(session):
    deadline = time.monotonic() + 10
    while (left := children(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGABRT])
def test_workers_do_not_outlive_a_killed_parent(parent, end):
    process = parent("sleep")
    assert len(children(process.pid)) >= 3
    process.send_signal(end)
    process.wait(30)
    assert_all_end(process.pid)


@pytest.mark.parametrize("argument", ["close", "forget"])
def test_a_run_ends_cleanly_with_or_without_close(parent, tmp_path, argument):
    """No worker, no shared memory and no word about it is left."""
    process = parent(argument)
    assert process.wait(60) == 0
    assert_all_end(process.pid)
    assert b"leaked" not in (tmp_path / "errors").read_bytes()
    assert b"Traceback" not in (tmp_path / "errors").read_bytes()


def test_signals_to_the_group_leave_the_workers_to_the_parent(parent):
    """Ctrl-C and a scheduler's SIGTERM reach all processes; the parent must still be able to save and go on."""
    process = parent("sleep")
    workers = set(children(process.pid)) - {process.pid}
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
    time.sleep(1)
    assert set(children(process.pid)) == workers | {process.pid}
