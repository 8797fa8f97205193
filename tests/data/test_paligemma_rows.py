"""PaliGemma's rows: images, start token, prompt, line feed, and an answer that ends; and rows shown to people."""

import numpy as np
import pytest
from conversations import llava_tokenizer, record

from vlm_jax.data.budget import main
from vlm_jax.data.chat import ChatWriter
from vlm_jax.data.chat_config import PALIGEMMA
from vlm_jax.data.tiles import NO_SLOT


@pytest.fixture(scope="module")
def writer() -> ChatWriter:
    template, places = PALIGEMMA.chat_template(), PALIGEMMA.images
    return ChatWriter(llava_tokenizer(), template, places, PALIGEMMA.tiling, 28, 4)


def test_images_stand_before_the_start_token(writer: ChatWriter) -> None:
    """As the published processor writes it: image tokens, <bos>, prompt and line feed; then the suffix and <eos>."""
    conversation = record("<image>\nWhere is the cat?", "sofa", images=1)
    document, tokenizer = writer.document(conversation), llava_tokenizer()
    encode = tokenizer.encoder.encode
    prefix, suffix = [tokenizer.bos_id, *encode("Where is the cat?\n")], [*encode("sofa"), tokenizer.eos_id]
    assert document.slots.tolist() == [0, 1, 2, 3] + [NO_SLOT] * (len(prefix) + len(suffix))
    assert document.ids[4:].tolist() == prefix + suffix
    assert document.supervised.tolist() == [False] * (4 + len(prefix)) + [True] * len(suffix)
    assert writer.end_ids == (tokenizer.eos_id,)
    assert writer.text([*encode("sofa"), tokenizer.eos_id, 5, 5]) == "sofa"
    prompt = writer.prompt(conversation)
    assert prompt.ids.tolist() == document.ids[: len(prompt)].tolist()
    assert len(prompt) == 4 + len(prefix)


def test_what_is_learned_stands_in_brackets(writer: ChatWriter) -> None:
    conversation = record("<image>\nWhere is the cat?", "sofa", images=1)
    shown = writer.shown(writer.document(conversation))
    assert shown.startswith("<4 tokens of images> <1> Where is the cat?")
    assert shown.endswith("[[sofa <2>]]")
    assert np.count_nonzero([c == "[" for c in shown]) == 2


def test_the_budget_shows_rows(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config=configs/vlm_shapes_stage2.py:smoke", "--config.data.source.count=60", "--show=2"]
    assert main(flags) == 0
    assert capsys.readouterr().out.count("[[") >= 2
