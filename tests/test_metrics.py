"""The files of a run, read back by other means than the writer's."""

import json
import math
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from vlm_jax import metrics


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir):
    """All TensorBoard events, by the framing of TFRecord: length, its checksum, the bytes, their checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


@pytest.fixture
def writer(tmp_path):
    writer = metrics.MetricWriter(tmp_path / "run", is_primary=True, clock=lambda: 1700000000.25)
    yield writer
    writer.close()


def test_scalars_are_one_json_object_a_line_with_every_bit(tmp_path, writer):
    values = [0.1 + 0.2, 1e-300, math.pi, float(np.float32(1.1))]
    for step, value in enumerate(values):
        writer.scalars(step, {"loss": value, "lr": np.float32(0.5)})
    records = read_lines(tmp_path / "run")
    assert [record["loss"] for record in records] == values
    assert records[2] == {"step": 2, "time": 1700000000.25, "loss": math.pi, "lr": 0.5}


def test_non_finite_values_are_kept(tmp_path, writer):
    writer.scalars(1, {"loss": math.nan, "norm": math.inf})
    (record,) = read_lines(tmp_path / "run")
    assert math.isnan(record["loss"])
    assert record["norm"] == math.inf


def test_reserved_name_is_an_error(writer):
    with pytest.raises(ValueError, match="'time'"):
        writer.scalars(1, {"time": 1.0})


def test_tensorboard_holds_the_same_numbers_and_the_image(tmp_path, writer):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    writer.scalars(7, {"loss": 1.5, "zero_shot/digits/top1": 0.25})
    writer.image(7, "retrieval/shapes/best", image)
    writer.close()
    summaries = [(event.step, value) for event in read_events(tmp_path / "run") for value in event.summary.value]
    scalars = {value.tag: (step, value.simple_value) for step, value in summaries if not value.HasField("image")}
    assert scalars == {"loss": (7, 1.5), "zero_shot/digits/top1": (7, 0.25)}
    (drawn,) = [value for _, value in summaries if value.HasField("image")]
    assert (drawn.image.height, drawn.image.width) == (4, 5)
    saved = Image.open(tmp_path / "run" / "pictures" / "retrieval-shapes-best-00000007.png")
    np.testing.assert_array_equal(np.asarray(saved), image)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)])
def test_image_of_another_kind_is_an_error(writer, image):
    with pytest.raises(ValueError, match="give uint8"):
        writer.image(1, "x", image)


def deterministic(records):
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def run(workdir, start, stop):
    writer = metrics.MetricWriter(workdir, is_primary=True)
    if start:
        writer.truncate_after(start)
    for step in range(start + 1, stop + 1):
        writer.scalars(step, {"loss": 1 / step})
    writer.close()


def test_interrupted_and_resumed_file_equals_an_unbroken_one(tmp_path):
    run(tmp_path / "whole", 0, 20)
    # Restored at 10, although the first run had logged up to 13 and was killed within a line.
    run(tmp_path / "broken", 0, 13)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "time": 17')
    run(tmp_path / "broken", 10, 20)
    assert deterministic(read_lines(tmp_path / "broken")) == deterministic(read_lines(tmp_path / "whole"))


def test_a_torn_line_is_dropped_without_truncation_too(tmp_path):
    run(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}')  # It reads as JSON, yet its end may be missing.
    writer = metrics.MetricWriter(tmp_path, is_primary=True)
    writer.scalars(3, {"loss": 0.5})
    writer.close()
    assert [record["step"] for record in read_lines(tmp_path)] == [1, 2, 3]


def test_truncation_hides_later_tensorboard_events(tmp_path):
    run(tmp_path, 10, 11)
    marks = [event.step for event in read_events(tmp_path) if event.session_log.status == 1]
    assert marks == [11], "TensorBoard drops what was logged at this step and later before the mark"


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    writer = metrics.MetricWriter(tmp_path, is_primary=True)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 .*hello"):
        writer.truncate_after(1)


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
    script = (
        "import os, signal, sys; from vlm_jax.metrics import MetricWriter\n"
        "MetricWriter(sys.argv[1], is_primary=True).scalars(5, {'loss': 2.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert deterministic(read_lines(tmp_path)) == [{"step": 5, "loss": 2.0}]


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.MetricWriter(tmp_path / "run", is_primary=False)
    writer.truncate_after(3)
    writer.scalars(4, {"loss": 1.0})
    writer.image(4, "x", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert not (tmp_path / "run").exists()


def test_write_json_replaces_the_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    metrics.write_json(path, {"a": 1.0})
    metrics.write_json(path, {"a": 0.1 + 0.2})
    assert json.loads(path.read_text()) == {"a": 0.1 + 0.2}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(metrics.WorkdirError, match=r"eval\.json can't be written: No space"):
        metrics.write_json(path, {"a": 2.0})
    assert json.loads(path.read_text()) == {"a": 0.1 + 0.2}
    assert os.listdir(tmp_path) == ["eval.json"]


def test_mean_of_a_pair():
    assert metrics.mean((np.float32(3), np.float32(4))) == 0.75
    assert math.isnan(metrics.mean((0.0, 0)))


def test_texts_and_predictions_are_files_and_texts_are_in_tensorboard(tmp_path, writer):
    writer.text(7, "generate/x/answers", "answer: **rot** 日")
    writer.predictions(7, "vqa/x", [{"question_id": 1, "answer": "日"}, {"question_id": "b", "answer": "no"}])
    run = tmp_path / "run"
    assert (run / "texts" / "generate-x-answers-00000007.md").read_text(encoding="utf-8") == "answer: **rot** 日"
    lines = (run / "predictions" / "vqa-x-00000007.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question_id": 1, "answer": "日"},
        {"question_id": "b", "answer": "no"},
    ]
    (value,) = [value for event in read_events(run) for value in event.summary.value]
    assert value.tag.startswith("generate/x/answers")
    assert value.metadata.plugin_data.plugin_name == "text"
    assert value.tensor.string_val[0].decode() == "answer: **rot** 日"
