import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest
from conversations import (
    golden,
    grey,
    llava_tokenizer,
    nanovlm_config,
    nanovlm_items,
    nanovlm_tokenizer,
    record,
)
from PIL import Image

from vlm_jax import schema
from vlm_jax.data import pipeline
from vlm_jax.data.bad_records import BadRecordBudgetExceeded
from vlm_jax.data.chat_config import LLAVA_NEXT, LLAVA_STAGE_1, LLAVA_STAGE_2, NANOVLM, ChatConfig
from vlm_jax.data.chat_examples import ChatExamples, row_shapes
from vlm_jax.data.chat_rows import PackedRows
from vlm_jax.data.measure import measure
from vlm_jax.data.pipeline import DataConfig, TrainLoader, eval_batches
from vlm_jax.data.sources import BadRecord, LlavaJsonConfig, MixtureConfig, MixturePart, ShapesConfig
from vlm_jax.data.sources.shapes_chat import KINDS
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.data.tiles import NO_SLOT, SplitTiling, SquareTiling
from vlm_jax.schema import ConfigError

SHAPES = ShapesConfig(conversations=KINDS, max_rounds=3, count=400, image_size=32)
PACKED = ChatConfig(template="plain_eos", row_length=96, max_tiles=3, packing="tight", too_long="drop", window=64)
SMALL = dataclasses.replace(PACKED, template="vicuna_v1", system="Answer.", row_length=160)


class Records:
    """Conversations in memory."""

    class_names = ()

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def texts(self, index):
        return tuple(turn.text for turn in self.records[index]["turns"])


@pytest.fixture(scope="module")
def maker():
    source = SHAPES.build("")
    words = [text for index in range(100) for text in source.texts(index)]
    tokenizer = build_tokenizer(SentencePieceConfig(vocab_size=500, normalization="identity"), words)
    return ChatExamples(tokenizer, SMALL, tile_size=16, tokens_per_tile=4)


def with_config(maker, **changes):
    tokenizer = maker.writer.vocabulary.tokenizer
    return ChatExamples(tokenizer, dataclasses.replace(maker.config, **changes), 16, 4)


def mesh_of(count):
    automatic = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis_types=automatic, devices=jax.devices()[:count])


def test_rows_of_llava_are_its_collators():
    """Padded on the right to the longest, here to the length of a row: one token an image, as -200 is in LLaVA."""
    stored = golden("llava_collator")
    length = len(stored["input_ids"][0])
    config = dataclasses.replace(LLAVA_STAGE_2, row_length=length, group=0)
    maker = ChatExamples(llava_tokenizer(), config, 28, 1)
    cases = {case["name"]: case for case in golden("llava_preprocess") if case["version"] == "v1"}
    for number, name in enumerate(stored["names"]):
        case = cases[name if name in cases else f"{name}_img"]
        texts = [turn["value"] for turn in case["conversation"]]
        row = maker(record(*texts, images=1), None)
        ids = np.where(row["tile_slots"] == NO_SLOT, row["text"], -200)
        assert ids.tolist() == stored["input_ids"][number]
        assert np.where(row["supervised"], row["text"], -100).tolist() == stored["labels"][number]
        assert (row["segments"] > 0).tolist() == [i != stored["pad_id"] for i in stored["input_ids"][number]]


def test_rows_of_nanovlm_are_its_collators():
    """Padded on the left, and a conversation longer than the row is counted where nanoVLM drops it."""
    stored, records = golden("nanovlm_collator"), nanovlm_items()
    maker = ChatExamples(nanovlm_tokenizer(), nanovlm_config(row_length=stored["max_length"], max_tiles=60), 16, 4)
    for place, item in enumerate(stored["kept"]):
        row = maker(records[item], None)
        assert row["text"].tolist() == stored["input_ids"][place]
        labels = np.where(row["supervised"], row["text"], -100)
        assert [*labels[1:].tolist(), -100] == stored["labels"][place]
        assert (row["segments"] > 0).astype(int).tolist() == stored["attention_mask"][place]
    (dropped,) = set(stored["items"]) - set(stored["kept"])
    with pytest.raises(BadRecord, match=f"record {dropped} of mix.json can't be used: it has 327 tokens, and a row"):
        maker(records[dropped], None)


def test_a_packed_row_of_nanovlm():
    stored, records = golden("nanovlm_packing")["pack"], nanovlm_items()
    length = len(stored["input_ids"])
    maker = ChatExamples(nanovlm_tokenizer(), nanovlm_config(row_length=length, max_tiles=68, padding="right"), 16, 4)
    members = [records[stored["items"][place]] for place in stored["order"]]
    row = maker.joined([maker.read(member) for member in members])
    assert row["text"].tolist() == stored["input_ids"]
    labels = np.where(row["supervised"], row["text"], -100)
    assert [*labels[1:].tolist(), -100] == stored["labels"]
    np.testing.assert_array_equal(row["segments"], stored["attention_mask"])
    assert int(row["tile_count"]) == sum(stored["tiles_per_image"])
    apart = ChatExamples(
        nanovlm_tokenizer(), nanovlm_config(row_length=length, max_tiles=68, isolation="document"), 16, 4
    ).joined([maker.read(member) for member in members])
    assert set(apart["segments"].tolist()) == {0, 1, 2, 3}
    assert (apart["positions"] == 0).sum() >= 3


def test_documents_of_a_packed_row_are_those_alone(maker):
    """Ids, supervision, slots, pixels and positions of each, whatever shares its row; nothing else is there."""
    source, rows = SHAPES.build(""), maker.rows(SHAPES.build(""), 5, 2, "")
    assert isinstance(rows, PackedRows)
    shapes = row_shapes(SMALL.row_length, SMALL.max_tiles, 16)
    several = 0
    for position in range(12):
        row, failures = rows(position)
        assert failures == []
        assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
            key: (shape, np.dtype(dtype)) for key, (shape, dtype) in shapes.items()
        }
        members = rows.packing[rows.order.index(position)]
        several += len(members) > 1
        tiles = used = 0
        for number, index in enumerate(members.tolist(), 1):
            own = row["segments"] == number
            document, pixels = maker.read(source[index])
            np.testing.assert_array_equal(row["text"][own], document.ids)
            np.testing.assert_array_equal(row["supervised"][own], document.supervised)
            np.testing.assert_array_equal(row["positions"][own], np.arange(len(document)))
            expected = np.where(document.slots >= 0, document.slots + 4 * tiles, document.slots)
            np.testing.assert_array_equal(row["tile_slots"][own], expected)
            np.testing.assert_array_equal(row["tiles"][tiles : tiles + len(pixels)], pixels)
            tiles, used = tiles + len(pixels), used + len(document)
        assert int(row["tile_count"]) == tiles and not row["tiles"][tiles:].any()
        slots = row["tile_slots"][row["tile_slots"] >= 0]
        np.testing.assert_array_equal(slots, np.arange(4 * tiles))  # the k-th image token takes the k-th feature
        assert (row["segments"] > 0).sum() == used and not row["supervised"][row["segments"] == 0].any()
    assert several > 6


def test_an_epoch_shows_every_conversation_once(maker):
    source = SHAPES.build("")
    rows = maker.rows(source, 5, 2, "")
    epochs = [[rows.order.index(e * len(rows.packing) + i) for i in range(len(rows.packing))] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    for order in epochs:
        seen = np.concatenate([rows.packing[row] for row in order])
        assert sorted(seen.tolist()) == list(range(len(source)))
    measured = measure(source, maker, 2)
    assert measured.tokens.sum() / (len(rows.packing) * SMALL.row_length) > 0.8


@pytest.mark.parametrize("config", [{}, {"packing": "none", "group": 8}, {"packing": "none"}])
def test_the_stream_is_the_same_for_any_mesh_and_start(maker, config):
    maker, source = with_config(maker, **config), SHAPES.build("")
    rows = maker.rows(source, 3, 1, "")
    streams = []
    for devices, start, count in ((1, 0, 3), (8, 0, 3), (4, 16, 1)):
        loader = TrainLoader(source, maker, 8, 3, mesh_of(devices), start, DataConfig(threads=2))
        streams.append([{key: np.asarray(value) for key, value in next(loader).items()} for _ in range(count)])
        loader.close()
    expected = [[rows(8 * batch + row)[0] for row in range(8)] for batch in range(3)]
    for stream, batches in zip(streams, (expected, expected, expected[2:]), strict=True):
        for batch, wanted in zip(stream, batches, strict=True):
            for key, value in batch.items():
                np.testing.assert_array_equal(value, np.stack([row[key] for row in wanted]))


def test_processes_that_find_other_lengths_stop_before_the_first_step(maker, monkeypatch):
    """Each looks at the data by itself; a file that one of them lacks would make its rows others."""
    source, other = SHAPES.build(""), dataclasses.replace(SHAPES, seed=1).build("")
    tables = {s: maker.rows(s, 3, 1, "").table for s in (source, other)}
    assert tables[source] != tables[other] and tables[source] == maker.rows(source, 9, 2, "").table
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for third, stops in ((other, True), (source, False)):
        found = np.stack([np.frombuffer(tables[s].encode(), np.uint8) for s in (source, source, third)])
        monkeypatch.setattr(pipeline.multihost_utils, "process_allgather", lambda mine, found=found: found)
        if stops:
            with pytest.raises(ConfigError, match="process 2 found other lengths"):
                pipeline._check_same_table(tables[source])
        else:
            pipeline._check_same_table(tables[source])


def test_rows_travel_to_workers(maker):
    rows = maker.rows(SHAPES.build(""), 3, 1, "")
    again = pickle.loads(pickle.dumps(rows))
    for key, value in rows(7)[0].items():
        np.testing.assert_array_equal(value, again(7)[0][key])


def files(tmp_path, count=40):
    """LLaVA's JSON with: a missing image, a damaged one, two questions in a row, an empty answer."""
    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    records = []
    for number in range(count):
        turns = [{"from": "human", "value": f"<image>\nq{number}"}, {"from": "gpt", "value": "yes " * (number % 5 + 1)}]
        records.append({"id": f"{number:03d}", "image": "a.png", "conversations": turns})
    records[3]["image"], records[4]["image"] = "missing.png", "damaged.png"
    records[5]["conversations"] = [records[5]["conversations"][0]] * 2
    records[6]["conversations"][1]["value"] = ""
    (tmp_path / "mix.json").write_text(json.dumps(records))
    return LlavaJsonConfig(path=str(tmp_path / "mix.json")).build("")


@pytest.mark.parametrize("config", [{}, {"packing": "none", "group": 8}, {"packing": "none"}])
def test_nothing_is_lost_without_being_counted(maker, tmp_path, config):
    """Every record is in a row or among the failures, each with its id and reason, whatever the walk."""
    source, maker = files(tmp_path), with_config(maker, **config)
    rows = maker.rows(source, 1, 1, "")
    epoch = len(rows.packing) if isinstance(rows, PackedRows) else len(source)
    failures = {failure.index: str(failure) for failure in rows.known_failures}
    assert set(failures) == (set() if config == {"packing": "none"} else {5, 6})
    for position in range(epoch):
        failures |= {failure.index: str(failure) for failure in rows(position)[1]}
    assert set(failures) == {3, 4, 5, 6}
    for index, why in {3: "'missing.png' can't be read", 4: "decoded", 5: "take turns", 6: "turn 2 is empty"}.items():
        assert f"record {index:03d}" in failures[index] and why in failures[index]
    with pytest.raises(BadRecordBudgetExceeded, match=r"record 00[3456]"):
        batches(source, maker, 10, bad_record_budget=1)
    assert batches(source, maker, 10, bad_record_budget=4) == 4


def batches(source, maker, count, **options):
    """Takes this many batches; the number of bad records."""
    loader = TrainLoader(source, maker, 8, 1, mesh_of(1), 0, DataConfig(**options))
    try:
        for _ in range(count):
            next(loader)
        return loader.bad_records
    finally:
        loader.close()


def test_a_conversation_that_fails_leaves_its_place_in_the_row_empty(maker, tmp_path):
    source = files(tmp_path)
    rows = maker.rows(source, 1, 1, "")
    row = next(r for r in range(len(rows.packing)) if 3 in rows.packing[r].tolist())
    position = next(p for p in range(len(rows.packing)) if rows.order.index(p) == row)
    example, failures = rows(position)
    left = [index for index in rows.packing[row].tolist() if index not in {f.index for f in failures}]
    assert failures and left and example["segments"].max() == int(example["tile_count"]) == len(left)


def test_a_source_without_one_usable_conversation_says_so(maker):
    source = Records([record("a", "", key=str(i)) for i in range(3)])
    with pytest.raises(BadRecordBudgetExceeded, match="none of the 3 conversations can be used"):
        maker.rows(source, 1, 1, "")


def test_lengths_are_measured_once_and_again_when_something_changed(maker, tmp_path):
    source, cache = files(tmp_path), str(tmp_path / "index")
    first = measure(source, maker, 2, cache)
    kept = list((tmp_path / "index").iterdir())
    assert len(kept) == 1

    class Unread:
        class_names = ()
        fingerprint = source.fingerprint
        __len__ = source.__len__

    again = measure(Unread(), maker, 2, cache)
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    measure(Unread(), with_config(maker, packing="balanced", padding="left"), 2, cache)  # changes no length
    measure(source, with_config(maker, row_length=100), 2, cache)
    (tmp_path / "mix.json").write_text((tmp_path / "mix.json").read_text() + " ")
    measure(source, maker, 2, cache)
    assert len(list((tmp_path / "index").iterdir())) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    measure(LlavaJsonConfig(path=str(tmp_path / "mix.json")).build(""), maker, 2, cache)


def test_measuring_decodes_no_pixels(maker):
    def never():
        raise AssertionError("decoded")

    image = dataclasses.replace(grey(), draw=never)
    source = Records([record("<image> a", "b", images=(image,), key=str(i)) for i in range(9)])
    measured = measure(source, maker, 2)
    assert (measured.tiles == 1).all() and (measured.image_tokens == 4).all() and (measured.learned > 0).all()


def test_parts_of_a_mixture_take_turns_in_rows(maker):
    """Two rows of the first part to one of the second, each part packed by itself."""
    source = MixtureConfig(
        sources=(
            MixturePart("a", dataclasses.replace(SHAPES, count=60), 2.0),
            MixturePart("b", dataclasses.replace(SHAPES, count=90, seed=1), 1.0),
        )
    ).build("")
    rows = maker.rows(source, 3, 1, "")
    parts = []
    for position in range(60):
        members = rows.packing[rows.order.index(position)]
        assert len(set((members >= 60).tolist())) == 1
        parts.append(bool(members[0] >= 60))
    assert 19 <= sum(parts) <= 21
    with pytest.raises(ConfigError, match="weights of a mixture"):
        with_config(maker, packing="none", group=8).rows(source, 3, 1, "")


def test_evaluation_takes_one_conversation_to_a_row(maker):
    source = dataclasses.replace(SHAPES, count=10, split="test").build("")
    batches = list(eval_batches(source, maker, 8, mesh_of(1)))
    assert [np.asarray(batch["mask"]).sum() for batch in batches] == [8, 2]
    assert set(np.asarray(batches[0]["segments"]).max(axis=1).tolist()) == {1}


def test_prompts_are_filled_up_on_the_left(maker):
    conversation = record("<image> what?", "a cat", images=1)
    row = maker.prompt(conversation)
    length = len(maker.writer.prompt(conversation))
    assert (row["segments"] > 0).tolist() == [False] * (SMALL.row_length - length) + [True] * length
    assert not row["supervised"].any() and row["positions"][-1] == length - 1
    with pytest.raises(BadRecord, match=r"record r1 .* its question has \d+ tokens, and a row holds \d+"):
        maker.prompt(record("word " * 400, "a"))


def test_published_recipes_and_refused_settings():
    for config in (LLAVA_STAGE_1, LLAVA_STAGE_2, LLAVA_NEXT, NANOVLM):
        schema.validate(config)
    # 63 tiles of 65 tokens are the most that a row of nanoVLM's 4096 can hold
    assert NANOVLM.max_tiles == NANOVLM.row_length // 65
    for changes, key in (
        ({"packing": "tight", "group": 8}, "group"),
        ({"row_length": 1}, "row_length"),
        ({"window": 0}, "window"),
    ):
        with pytest.raises(ConfigError, match=f"chat.{key} "):
            schema.validate(dataclasses.replace(ChatConfig(), **changes), "config.data.chat")
    with pytest.raises(ConfigError, match="max_side = 100 must be a multiple"):
        ChatExamples(nanovlm_tokenizer(), dataclasses.replace(NANOVLM, tiling=SplitTiling(max_side=100)), 16, 4)
    with pytest.raises(ConfigError, match="vicuna_v1"):
        schema.override(DataConfig(chat=ChatConfig()), {"chat.template": "vicuna"})
    switched = schema.override(DataConfig(chat=NANOVLM), {"chat.tiling": "square", "chat.tiling.fit": "crop"})
    assert switched.chat.tiling == SquareTiling(fit="crop")
    assert schema.from_dict(DataConfig, schema.to_dict(DataConfig(chat=NANOVLM))).chat == NANOVLM


def test_too_many_tiles_are_named(maker):
    with pytest.raises(BadRecord, match=r"record r1 .* its 4 images make 4 tiles, and a row holds 3"):
        maker(record("<image>" * 4, "a", images=4), None)


def test_an_image_too_narrow_is_named(maker):
    thin = grey(1, 10000)
    with pytest.raises(
        BadRecord, match=r"record r1 of mix\.json can't be used: the image of 10000x1 pixels is too narrow"
    ):
        maker(record("<image> a", "b", images=(thin,)), None)
    split = ChatExamples(nanovlm_tokenizer(), nanovlm_config(row_length=512, max_tiles=5), 16, 4)
    row = split(record("a", "b", images=(thin,)), None)
    assert int(row["tile_count"]) == 5  # the whole image, and four tiles side by side


def test_an_image_of_another_size_than_its_header_says_is_named():
    split = ChatExamples(nanovlm_tokenizer(), nanovlm_config(row_length=512, max_tiles=17), 16, 4)
    with pytest.raises(BadRecord, match=r"record r1 .* makes 17 tiles, and 5 by the size in the file's header"):
        split(record("a", "b", images=(dataclasses.replace(grey(16, 16), height=1, width=200),)), None)


def test_captions_are_conversations_of_one_round(maker):
    source = ShapesConfig(count=20, image_size=32).build("")
    row = with_config(maker, template="plain_eos")(source[3], None)
    learned = maker.writer.vocabulary.tokenizer.encoder.decode(row["text"][row["supervised"]].tolist())
    assert learned.strip() == source[3]["texts"][0] and int(row["tile_count"]) == 1
    with pytest.raises(BadRecord, match="it has no caption"):
        maker({**source[3], "texts": ()}, None)
    start = ChatExamples(nanovlm_tokenizer(), nanovlm_config(row_length=512, max_tiles=17), 16, 4)
    assert int(start(source[3], None)["tile_count"]) == 17
