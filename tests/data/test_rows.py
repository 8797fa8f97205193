import pickle

import numpy as np
import pytest

from vlm_jax.data.bad_records import BadRecordAccount, BadRecordBudgetExceeded, Failure
from vlm_jax.data.examples import ClipExamples, LabelledImages, draw_caption
from vlm_jax.data.images import AugmentConfig, PreprocessConfig, preprocess
from vlm_jax.data.order import record_index, substitute
from vlm_jax.data.rows import EvalRows, Schedule, TrainRows, host_batches
from vlm_jax.data.sources import BadRecord, DigitsConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer


class Numbers:
    """Record i holds the number i; the bad ones can't be read."""

    class_names = ()

    def __init__(self, length, bad=()):
        self.length, self.bad = length, frozenset(bad)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord("numbers", str(index), "it is bad")
        return {"image": None, "texts": self.texts(index), "key": str(index), "where": "numbers"}

    def texts(self, index):
        return (str(index),)


def number_and_draw(record, rng):
    draw = -1.0 if rng is None else rng.random()
    return {"number": np.asarray(int(record["key"]), np.int32), "draw": np.asarray(draw, np.float32)}


def stream(make_row, schedule, batches):
    iterator = iter(host_batches(make_row, schedule, prefetch=2))
    found = [next(iterator) for _ in range(batches)]
    iterator.close()
    return found


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_positions_whatever_hosts_and_threads(hosts, threads):
    """Simulated hosts: each asks for its rows of a global batch of 12; together they are positions 5, 6, 7, ..."""
    source, batch, start = Numbers(1000), 12, 5
    rows = TrainRows(source, number_and_draw, seed=9)
    expected = [rows(start + p)[0] for p in range(4 * batch)]
    for host_rows in np.split(np.arange(batch), hosts):
        schedule = Schedule(start, batch, host_rows, threads, workers=0, batches=None)
        for number, (arrays, _) in enumerate(stream(rows, schedule, 4)):
            for place, row in enumerate(host_rows):
                for key, value in expected[number * batch + row].items():
                    assert arrays[key][place] == value
    assert [int(e["number"]) for e in expected] == [record_index(start + p, 1000, 9) for p in range(4 * batch)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("threads", [1, 4])
def test_schedule_gives_each_worker_whole_batches_in_turn(workers, threads):
    """Brute force of grain's contract: worker w takes elements w, w + W, ... and batches come back round-robin."""
    rows, batch = np.asarray([0, 1, 2, 6, 7, 8, 9]), 12
    schedule = Schedule(24, batch, rows, threads, workers, batches=None)
    count = max(1, workers)
    streams = [iter(range(w, 10**6, count)) for w in range(count)]
    for number in range(7):
        elements = [next(streams[number % count]) for _ in schedule.chunks]
        positions = [p for element in elements for p in schedule[element]]
        assert positions == [24 + number * batch + row for row in rows]


def test_an_unusable_record_is_replaced_by_its_fixed_substitute():
    bad = {3, 8, 21}
    rows = TrainRows(Numbers(30, bad), number_and_draw, seed=1)
    clean = TrainRows(Numbers(30), number_and_draw, seed=1)
    replaced = 0
    for position in range(120):
        example, failures = rows(position)
        index = record_index(position, 30, 1)
        assert [f.index for f in failures][:1] == ([index] if index in bad else [])
        if index not in bad:
            assert example["number"] == index
            continue
        replaced += 1
        attempt = 1
        while (stand_in := substitute(position, attempt, 30, 1)) in bad:
            attempt += 1
        assert example["number"] == stand_in
        assert example["draw"] == clean(position)[0]["draw"]  # the randomness is the position's
        assert str(failures[0]) == f"record {index} of numbers can't be used: it is bad"
    assert replaced == 12


def test_a_source_without_a_usable_record_ends_with_the_first_failures():
    for make in (lambda s: TrainRows(s, number_and_draw, 0)(0), lambda s: EvalRows(s, number_and_draw)):
        with pytest.raises(BadRecordBudgetExceeded, match=r"record \d of numbers can't be used: it is bad"):
            make(Numbers(3, range(3)))


def test_evaluation_rows_mark_padding_and_unusable_records():
    rows = EvalRows(Numbers(5, {0, 3}), number_and_draw)
    found = [rows(p) for p in range(8)]
    assert [bool(e["mask"]) for e, _ in found] == [False, True, True, False, True, False, False, False]
    assert [int(e["index"]) for e, _ in found] == list(range(8))
    assert [int(e["number"]) for e, _ in found] == [0, 1, 2, 0, 4, 0, 0, 0]
    assert [len(failures) for _, failures in found] == [1, 0, 0, 1, 0, 0, 0, 0]
    assert found[1][0]["draw"] == -1


@pytest.mark.parametrize(
    ("length", "budget", "allowed"),
    [(1000, 0.01, 10), (150, 0.01, 2), (10, 0.01, 1), (10, 0.0, 0), (10, 3, 3), (10, 1, 1)],
)
def test_budget_is_a_share_rounded_up_or_a_number(length, budget, allowed, caplog):
    account = BadRecordAccount(length, budget)
    failures = [Failure(i, "shard.tar", f"key{i}", "broken") for i in range(allowed + 1)]
    account.add(failures[:allowed] * 3)
    assert len(account) == allowed
    with pytest.raises(BadRecordBudgetExceeded) as caught:
        account.add(failures)
    message = str(caught.value)
    assert f"{allowed + 1} of {length} records can't be used, {allowed} are allowed" in message
    assert "record key0 of shard.tar can't be used: broken" in message
    assert len(caplog.records) == allowed + 1  # each record is logged once
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@pytest.fixture(scope="module")
def tokenizer():
    source = DigitsConfig().build("")
    return build_tokenizer(SentencePieceConfig(length=12, vocab_size=400), source.texts(0) + source.texts(1))


def test_clip_examples_draw_caption_and_crop(tokenizer):
    source = DigitsConfig().build("")
    make = ClipExamples(tokenizer, 12, PreprocessConfig(), AugmentConfig(scale=(0.4, 1.0)))
    captions = {tuple(tokenizer([text])[0]): text for text in source.texts(5)}
    seen, views = set(), set()
    for seed in range(60):
        example = make(source[5], np.random.default_rng(seed))
        again = make(source[5], np.random.default_rng(seed))
        assert all(np.array_equal(example[key], again[key]) for key in example)
        assert (example["image"].shape, example["image"].dtype) == ((12, 12, 3), np.uint8)
        assert (example["text"].shape, example["text"].dtype) == ((12,), np.int32)
        seen.add(captions[tuple(example["text"])])
        views.add(example["image"].tobytes())
    assert seen == set(source.texts(5))
    assert len(views) > 10


def test_captions_are_drawn_by_their_weights():
    record = {"texts": ("a", "b", "c"), "text_weights": (0.5, 0.2, 0.3), "key": "k", "where": "w"}
    drawn = "".join(draw_caption(record, np.random.default_rng(seed)) for seed in range(3000))
    for text, weight in zip("abc", record["text_weights"], strict=True):
        assert abs(drawn.count(text) / 3000 - weight) < 4 * (weight * (1 - weight) / 3000) ** 0.5
    assert draw_caption(record, None) == "a"
    even = "".join(draw_caption({**record, "text_weights": (1 / 3,) * 3}, np.random.default_rng(s)) for s in range(300))
    assert all(70 < even.count(text) < 130 for text in "abc")


def test_examples_of_evaluation_are_not_random(tokenizer):
    record = DigitsConfig().build("")[5]
    expected = preprocess(record["image"], PreprocessConfig(), 12)
    for augment in (AugmentConfig(), None):
        example = ClipExamples(tokenizer, 12, PreprocessConfig(), augment)(record, None)
        np.testing.assert_array_equal(example["image"], expected)
        np.testing.assert_array_equal(example["text"], tokenizer([record["texts"][0]])[0])
    without = ClipExamples(tokenizer, 12, PreprocessConfig(), None)(record, np.random.default_rng(0))
    np.testing.assert_array_equal(without["image"], expected)
    labelled = LabelledImages(12, PreprocessConfig())(record, None)
    assert labelled["label"] == record["label"]


def test_examples_name_the_record_that_fails(tokenizer):
    make = ClipExamples(tokenizer, 12, PreprocessConfig(), None)
    record = {"image": b"junk", "texts": ("x",), "key": "0007", "where": "shard-3.tar"}
    with pytest.raises(BadRecord, match=r"record 0007 of shard-3\.tar can't be used: the image can't be decoded"):
        make(record, np.random.default_rng(0))
    with pytest.raises(BadRecord, match="it has no caption"):
        make({**record, "texts": ()}, np.random.default_rng(0))
    with pytest.raises(BadRecord, match="it has no label"):
        LabelledImages(12, PreprocessConfig())(record, None)
