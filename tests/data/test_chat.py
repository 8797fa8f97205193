import json
import pickle

import numpy as np
import pytest
from conversations import (
    GOLDEN,
    golden,
    grey,
    llava_tokenizer,
    llava_writer,
    nanovlm_items,
    nanovlm_writer,
    record,
)

from vlm_jax.data.chat import CUT, NO_SYSTEM, ChatWriter
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.chat_templates import TEMPLATES
from vlm_jax.data.rounds import LEADING, REMOVED, TRAILING, ImagePlaces
from vlm_jax.data.sources.base import BadRecord
from vlm_jax.data.sources.chats import Turn, read_turns
from vlm_jax.data.text import HfTokenizerConfig, SentencePieceConfig, build_tokenizer
from vlm_jax.data.tiles import NO_SLOT, AnyresTiling, SplitTiling, SquareTiling
from vlm_jax.schema import ConfigError, _hints

PREPROCESSED = [case for case in golden("llava_preprocess") if case["legacy"]]
# What LLaVA loses of these without an error: all labels. Here they have some, or the record is refused by name.
LOST_BY_LLAVA = {"contains_ASSISTANT": "ok", "eos_inside": "cat"}


def llava_ids(document):
    return np.where(document.slots == NO_SLOT, document.ids, -200).tolist()


def labels(document):
    return np.where(document.supervised, document.ids, -100).tolist()


def case_record(case):
    turns = read_turns(case["conversation"], "mix.json", case["name"])
    return {"turns": turns, "images": (grey(),) * case["has_image"], "where": "mix.json", "key": case["name"]}


@pytest.mark.parametrize("case", PREPROCESSED, ids=lambda case: f"{case['version']}-{case['name']}")
def test_ids_and_labels_are_llavas(case):
    writer = llava_writer({"v1": "vicuna_v1", "plain": "plain"}[case["version"]])
    if case["name"] == "empty_answer":
        with pytest.raises(BadRecord, match=r"empty_answer of mix\.json can't be used: its answer in turn 2 is empty"):
            writer.document(case_record(case))
        return
    document = writer.document(case_record(case))
    if case["version"] == "v1" and case["name"] in LOST_BY_LLAVA:
        assert case["label_spans"] == []
        learned = document.ids[document.supervised].tolist()
        assert llava_tokenizer().encoder.decode(learned) == LOST_BY_LLAVA[case["name"]]
        assert learned[-1] == llava_tokenizer().eos_id
        return
    assert llava_ids(document) == case["input_ids"]
    assert labels(document) == case["labels"]


@pytest.mark.parametrize("case", golden("llava_tokenizer_image_token"), ids=lambda case: case["prompt"][:12])
def test_images_anywhere_in_a_text_are_llavas_tokens(case):
    """One user message and nothing around it: LLaVA's `tokenizer_image_token`."""
    bare = TEMPLATES["plain"].__class__(start="{bos}", user="{}", prompt="", answer="{}{eos}")
    writer = ChatWriter(llava_tokenizer(), bare, ImagePlaces("inline"), SquareTiling(), 28, 1)
    document = writer.prompt(record(case["prompt"], images=case["prompt"].count("<image>")))
    assert llava_ids(document) == case["ids"]


def test_ids_labels_and_tiles_are_nanovlms():
    writer, stored = nanovlm_writer(), golden("nanovlm_dataset_items")
    records, found = nanovlm_items(), 0
    for case in stored["outputs"]:
        if case["tokenizer"] == "with_global":
            document = writer.document(records[case["item"]])
            assert document.ids.tolist() == case["input_ids"]
            assert [*labels(document)[1:], -100] == case["labels"]  # nanoVLM shifts labels in its data
            assert list(document.tiles) == case["tiles_per_image"]
            found += 1
    assert found == len(stored["items"]) == 6


def test_ids_are_nanovlms_without_a_tile_of_the_whole_image(tmp_path):
    """Its tokenizer without `<|global_image|>` numbers the tokens of tiles from one lower."""
    stored = json.loads((GOLDEN / "nanovlm_tokenizer.json").read_text())
    stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] != "<|global_image|>"]
    for token in stored["added_tokens"]:
        token["id"] -= token["id"] > 409
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    config = HfTokenizerConfig(path=str(tmp_path), bos=False, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer, places = build_tokenizer(config, None), nanovlm_writer().places
    tiling = SplitTiling(max_side=64, global_marker="")
    writer, records = ChatWriter(tokenizer, TEMPLATES["nanovlm"], places, tiling, 16, 4), nanovlm_items()
    cases = [case for case in golden("nanovlm_dataset_items")["outputs"] if case["tokenizer"] == "no_global"]
    assert len(cases) == 6
    for case in cases:
        document = writer.document(records[case["item"]])
        assert document.ids.tolist() == case["input_ids"]
        assert list(document.tiles) == case["tiles_per_image"]


def spelled(tokenizer, document):
    """The whole text of a document, special tokens included."""
    return tokenizer.encoder._reader.decode(document.ids.tolist(), skip_special_tokens=False)


SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("nanovlm", CHAT),
        ("chatml", CHAT),
        ("smollm2", f"<|im_start|>system\n{SMOL}<|im_end|>\n{CHAT}"),
        ("qwen", f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{CHAT}"),
    ],
)
def test_chatml_templates_spell_what_the_models_published(template, text):
    writer = nanovlm_writer(template)
    document = writer.document(record("Hi", "Yes."))
    tokenizer = writer.vocabulary.tokenizer
    assert spelled(tokenizer, document) == text
    learned = tokenizer.encoder._reader.decode(document.ids[document.supervised].tolist(), skip_special_tokens=False)
    assert learned == ("Yes.<|im_end|>\n" if template == "nanovlm" else "Yes.<|im_end|>")


def test_llama_2_writes_the_system_message_into_the_first_question():
    writer = llava_writer("llama_2")
    tokenizer = writer.vocabulary.tokenizer
    conversation = record("a", "b", "c", "d")
    conversation["turns"] = read_turns(
        [{"role": "system", "content": "s"}, *({"role": t.role, "content": t.text} for t in conversation["turns"])],
        "mix.json",
        "r1",
    )
    document = writer.document(conversation)
    starts = np.flatnonzero(document.ids == tokenizer.bos_id)
    ends = np.flatnonzero(document.ids == tokenizer.eos_id)
    assert (
        len(starts) == len(ends) == 2 and starts[0] == 0 and starts[1] == ends[0] + 1 and ends[1] == len(document) - 1
    )
    rounds = [tokenizer.encoder.decode(document.ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    assert rounds == ["[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b ", "[INST] c [/INST] d "]
    assert tokenizer.encoder.decode(document.ids[document.supervised].tolist()).split() == ["b", "d"]
    assert document.supervised[ends].all() and not document.supervised[starts].any()


@pytest.mark.parametrize("make", [llava_writer, nanovlm_writer])
def test_a_prompt_is_what_training_showed_before_the_answer(make):
    writer = make()
    placeholder = "<image>\n" if writer.places.placement == "llava" else ""
    conversation = record(f"{placeholder}What?", "A cat.", "Where?", "Here.", images=1)
    whole, prompt = writer.document(conversation), writer.prompt(conversation)
    np.testing.assert_array_equal(prompt.ids, whole.ids[: len(prompt)])
    np.testing.assert_array_equal(prompt.slots, whole.slots[: len(prompt)])
    assert whole.supervised[len(prompt) :].any() and not prompt.supervised.any()
    assert not whole.supervised[len(prompt) - 1] and whole.supervised[len(prompt)]
    asked = writer.prompt(record(f"{placeholder}What?", "A cat.", "Where?", images=1))
    np.testing.assert_array_equal(asked.ids, prompt.ids)


def test_several_images_stand_where_their_placeholders_stood():
    """The k-th placeholder takes the k-th image, in questions and in answers, each with as many tokens as it has."""
    writer = llava_writer(placement="inline", tiling=AnyresTiling())
    images = (grey(20, 40), grey(40, 20), grey(30, 30))
    document = writer.document(record("first <image> second <image>?", "like <image> this", images=images))
    assert document.tiles == (3, 3, 5)
    used = document.slots[document.slots >= 0]
    firsts = np.cumsum([0, *document.tiles])
    owners = np.searchsorted(firsts, used, side="right") - 1
    assert (np.diff(owners) >= 0).all() and set(owners.tolist()) == {0, 1, 2}
    for number in range(3):
        plan = writer.tiling.plan(*images[number].size(), 28, 1)
        alone = np.concatenate(plan.pieces)
        np.testing.assert_array_equal(used[owners == number], alone[alone >= 0] + firsts[number])
    assert not document.supervised[document.slots != NO_SLOT].any()
    learned = writer.vocabulary.tokenizer.encoder.decode(document.ids[document.supervised].tolist())
    assert learned.split() == ["like", "this"]


def test_text_alone_stands_beside_images():
    document = llava_writer().document(record("yes?", "no."))
    assert document.tile_count == 0 and (document.slots == NO_SLOT).all() and document.supervised.any()


BAD = {
    "two user turns": (("a", "b"), {"first": "user"}, "turn 2 comes from the user after one from the user"),
    "no answer": (("a",), {}, "it has no question with an answer"),
    "only the assistant": (("a",), {"first": "assistant"}, "it has no question with an answer"),
    "empty answer": (("a", "b", "c", " \n"), {}, "its answer in turn 4 is empty"),
    "fewer placeholders": (("a <image>", "b"), {"images": 2}, "hold 1 <image>, its images are 2"),
    "more placeholders": (("<image> a", "b", "<image> c", "d"), {"images": 1}, "hold 2 <image>, its images are 1:"),
    "placeholder without image": (("a <image>", "b"), {}, "hold 1 <image>, its images are 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations_are_named_with_the_reason(name):
    texts, options, why = BAD[name]
    conversation = record(*texts, **options, key="000017")
    if name == "two user turns":
        turn = conversation["turns"][0]
        conversation["turns"] = (turn, turn, conversation["turns"][1])
    for placement in ("inline", "llava"):
        with pytest.raises(BadRecord) as error:
            llava_writer(placement=placement).document(conversation)
        assert "record 000017 of mix.json can't be used" in str(error.value) and why in str(error.value)


def test_what_is_left_out_of_a_conversation_is_noted():
    leading = llava_writer().document(record("hello", "yes?", "no.", first="assistant"))
    assert leading.notes == (LEADING,)
    np.testing.assert_array_equal(leading.ids, llava_writer().document(record("yes?", "no.")).ids)
    trailing = llava_writer().document(record("yes?", "no.", "and?"))
    assert trailing.notes == (TRAILING,)
    np.testing.assert_array_equal(trailing.ids, leading.ids)
    told = record("<image>", "a cat", images=1)
    told["turns"] = (Turn("system", "be brief"), *told["turns"])
    plain = llava_writer("plain").document(told)
    assert plain.notes == (NO_SYSTEM,)
    np.testing.assert_array_equal(plain.ids, llava_writer("plain").document(record("<image>", "a cat", images=1)).ids)
    assert llava_writer().document(told).notes == ()
    removed = nanovlm_writer().document(record("a <|image|> b", "c", images=1))
    assert removed.notes == (REMOVED,)


@pytest.mark.parametrize("spelling", ["</s>", "<s>", "<unk>", "ASSISTANT:", " USER: x ASSISTANT: y</s>"])
def test_special_tokens_spelled_in_a_message_are_text(spelling):
    writer = llava_writer()
    tokenizer = writer.vocabulary.tokenizer
    document = writer.document(record(f"a {spelling} b", f"c {spelling} d"))
    assert (document.ids == tokenizer.eos_id).sum() == 1 and document.ids[-1] == tokenizer.eos_id
    assert (document.ids == tokenizer.bos_id).sum() == 1
    learned = document.ids[document.supervised].tolist()
    assert tokenizer.encoder.decode(learned) == f"c {spelling} d"
    chat = nanovlm_writer()
    document = chat.document(record("a <|im_end|>\n<|im_start|>assistant\nb <row_1_col_1>", "c <|im_end|> d"))
    assert [(document.ids == i).sum() for i in (1, 2, 410)] == [2, 2, 0]


def test_a_conversation_longer_than_a_row_is_cut_with_its_images():
    writer = llava_writer(placement="inline", tiling=AnyresTiling())
    conversation = record("one", "two", "<image> three", "four", "<image> five", "six", images=(grey(), grey()))
    whole = writer.document(conversation)
    first, second = (np.flatnonzero(whole.slots == start)[0] for start in (0, whole.tiles[0]))
    for length, images in ((first, 0), (first + 1, 1), (second, 1), (second + 1, 2)):
        cut = writer.cut(whole, int(length), conversation)
        assert len(cut) == length and len(cut.images) == len(cut.tiles) == images and cut.notes == (CUT,)
        np.testing.assert_array_equal(cut.ids, whole.ids[:length])
    assert writer.cut(whole, len(whole), conversation) is whole
    with pytest.raises(
        BadRecord, match=f"record r1 .* it has {len(whole)} tokens, and none of the first 20 is learned"
    ):
        writer.cut(whole, 20, conversation)


def test_vocabularies_that_lack_a_token_are_refused():
    with pytest.raises(ConfigError, match=r"conversation template needs the token '<\|im_start\|>'"):
        llava_writer("chatml")
    with pytest.raises(ConfigError, match=r"the tiling needs the token '<\|global_image\|>'"):
        ChatWriter(llava_tokenizer(), TEMPLATES["plain"], ImagePlaces(), SplitTiling(max_side=28), 28, 1)
    nine = nanovlm_writer(max_side=144)
    with pytest.raises(BadRecord, match="its image makes the tile <row_1_col_9>"):
        nine.document(record("a", "b", images=(grey(16, 144),)))
    canonical = build_tokenizer(
        SentencePieceConfig(path=str(GOLDEN / "llava_tokenizer.model"), canonicalize=True), None
    )
    with pytest.raises(ConfigError, match="canonicalize"):
        ChatWriter(canonical, TEMPLATES["plain"], ImagePlaces(), SquareTiling(), 28, 1)


def test_a_vocabulary_trained_here_writes_every_template():
    """Its symbols are special tokens; it has no start token, and chats begin without one."""
    symbols = ("<|im_start|>", "<|im_end|>")
    config = SentencePieceConfig(vocab_size=300, normalization="identity", user_symbols=symbols)
    tokenizer = build_tokenizer(config, ["yes no what where a cat"] * 3)
    for template in ("vicuna_v1", "plain", "plain_eos", "chatml", "llama_2"):
        writer = ChatWriter(tokenizer, TEMPLATES[template], ImagePlaces(), SquareTiling(), 28, 4)
        document = writer.document(record("<image> what?", "a cat", images=1))
        assert (document.ids >= 0).all() and (document.slots >= 0).sum() == 4
        assert "a cat" in tokenizer.encoder.decode(document.ids[document.supervised].tolist())


def test_every_template_can_be_chosen_by_name():
    assert set(_hints(ChatConfig)["template"].__args__) == set(TEMPLATES)


def test_writers_travel_to_workers():
    conversation = record("<image>\nWhat?", "A cat.", images=1)
    for writer in (llava_writer(), nanovlm_writer()):
        again = pickle.loads(pickle.dumps(writer))
        if writer.places.placement == "llava":
            np.testing.assert_array_equal(again.document(conversation).ids, writer.document(conversation).ids)


def test_every_character_is_encoded_once(monkeypatch):
    """The work grows with the length of a conversation, not with its square."""
    writer, encoded = llava_writer(), []
    encode = writer.vocabulary.encode
    monkeypatch.setattr(writer.vocabulary, "encode", lambda text: encoded.append(text) or encode(text))
    document = writer.document(record(*["<image> What is in this picture?", "Say it in full."] * 50, images=50))
    text = writer.template.default_system + " " + "USER: \nWhat is in this picture? ASSISTANT: Say it in full." * 50
    assert sum(map(len, encoded)) == len(text) - 50  # the space in front of each answer is implied
    assert len(document) > 50 * 15
