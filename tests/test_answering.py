"""Checkpoints that answer: the streamed text against the evaluation's rows and `generate`, in a program and a terminal.

And what is refused.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax import chat, schema
from vlm_jax.answering import Answerer, AnswerError, Conversation, read_image
from vlm_jax.checkpoint import save_params
from vlm_jax.config import Config, to_json
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.sources.chats import ImageArray, Turn
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.mesh import unbox
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.models.language_model import LanguageModelConfig
from vlm_jax.models.lora import LoraConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.lm import LmConfig
from vlm_jax.objectives.vlm import VlmConfig

SCENES = ShapesConfig(count=60, image_size=16, conversations=("color", "compare", "text"))
TOKENIZER = build_tokenizer(
    SentencePieceConfig(vocab_size=400), [text for i in range(60) for text in SCENES.build("").texts(i)]
)
TOWER = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32, pool="none")
DECODER = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=400, init="smollm")
CHAT = ChatConfig(template="paligemma", tiling=SquareTiling(), row_length=200, max_tiles=3)
# With small matrices: what they learned must be in the answer.
METHOD = VlmConfig(
    model=VisionLanguageConfig(image=TOWER, decoder=DECODER, lora=LoraConfig(rank=2, alpha=4.0)),
    length=200,
    tiles=3,
    prefix=True,
)
LIKELIEST = GenerationConfig(max_new_tokens=6)


def save(folder: Path, method: Any, chat: ChatConfig | None) -> Any:
    """A checkpoint of random weights far from the start, where every text ends alike; returns (config, weights)."""
    settings: Any = {"objective": method, "data__chat": chat, "data__augment": None}
    config: Config = tiny.config(evals=(), **settings)
    objective = method.build(config.data.preprocess, np.float32)
    params = unbox(jax.jit(objective.init)(jax.random.key(0))[0])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 3 * np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32), params)
    view = schema.to_dict(config.data.preprocess)
    save_params(folder, params, config=to_json(config), tokenizer=TOKENIZER.state(), preprocess=view, extra={})
    return config, params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Any]:
    folder = tmp_path_factory.mktemp("vlm") / "checkpoint"
    return folder, *save(folder, METHOD, CHAT)


@pytest.fixture(scope="module")
def answerer(checkpoint: Any) -> Answerer:
    return Answerer(checkpoint[0])


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20 + seed, 31, 3)).astype(np.uint8)


def conversation(answerer: Answerer, images: int = 1, text: str = "What colour is the first?") -> Conversation:
    return answerer.asked(answerer.begun(), text, [ImageArray(pixels(i)) for i in range(images)])


def test_a_row_is_that_of_the_evaluation(checkpoint: Any, answerer: Answerer) -> None:
    """A question as it stands in the data, whole images before the text, and later turns with what was said."""
    _, config, _ = checkpoint
    maker = METHOD.make_example(TOKENIZER, config.data)
    images = tuple(ImageArray(pixels(i)) for i in range(2))
    turns = (
        Turn("user", "<image>\n<image>\nWhich is larger?"),
        Turn("assistant", "the first"),
        Turn("user", "And what colour is it?"),
    )
    expected = maker.prompt({"turns": turns, "images": images, "key": "a", "where": "b"})
    asked = answerer.asked(answerer.begun(), "Which is larger?", images).answered("the first<image>")
    row = answerer.row(answerer.asked(asked, "And what colour is it?"))
    assert row["tile_count"] == 2 and (row["tile_slots"] >= 0).sum() == 8
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)
    spelled = answerer.asked(answerer.begun(), "Is <image> larger than <image>?", images)
    assert spelled.turns[-1].text == "Is <image> larger than <image>?"


@pytest.mark.parametrize("images", [0, 1, 3])
def test_the_stream_is_the_evaluations_answer(checkpoint: Any, answerer: Answerer, images: int) -> None:
    """With the whole row and `generate` in one program, as `vqa` has it."""
    _, config, params = checkpoint
    objective = METHOD.build(config.data.preprocess, np.float32)
    asked = conversation(answerer, images)
    rows = {name: np.asarray(x)[None] for name, x in answerer.row(asked).items()}
    writer = METHOD.make_example(TOKENIZER, config.data).writer
    settings = GenerationConfig(LIKELIEST.max_new_tokens, writer.end_ids, TOKENIZER.pad_id)
    expected = jax.jit(objective.answer, static_argnums=2)(params, rows, settings).ids[0].tolist()
    pieces = list(answerer.stream(asked, LIKELIEST))
    assert len(pieces) > 1
    assert "".join(pieces) == writer.text(expected).strip() == answerer.answers([asked], LIKELIEST)[0]


def test_a_batch_answers_as_each_alone(answerer: Answerer) -> None:
    asked = [conversation(answerer, images, text) for images, text in ((0, "one"), (2, "What colour " * 5), (1, "so?"))]
    together = answerer.answers(asked, LIKELIEST)
    assert together == ["".join(answerer.stream(one, LIKELIEST)) for one in asked]
    assert len(set(together)) > 1


def test_samples_are_those_of_their_seed(answerer: Answerer) -> None:
    asked, config = conversation(answerer), GenerationConfig(max_new_tokens=6, temperature=3.0)
    said = [answerer.answers([asked], config, seed)[0] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert "".join(answerer.stream(asked, config, 1)) == said[0]


def test_pieces_end_with_whole_characters(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the vocabulary has no word for are bytes: none of them is shown before the last has come."""
    text = "red \U0001f642 ñandú, 日本  x"
    ids = TOKENIZER.encoder.encode(text)
    assert len(ids) > len(text)

    def tokens(*_: Any) -> Iterator[np.ndarray]:
        yield from (np.asarray([token]) for token in [*ids, TOKENIZER.eos_id])

    monkeypatch.setattr(answerer, "_tokens", tokens)
    pieces = list(answerer.stream(conversation(answerer, 0)))
    assert "".join(pieces) == TOKENIZER.encoder.decode(ids).strip()
    assert any("\U0001f642" in piece for piece in pieces) and "\ufffd" not in "".join(pieces)
    cut = ids[: ids.index(TOKENIZER.encoder.encode("\U0001f642")[-1])]
    monkeypatch.setattr(answerer, "_tokens", lambda *_: (np.asarray([token]) for token in cut))
    assert "".join(answerer.stream(conversation(answerer, 0))) == TOKENIZER.encoder.decode(cut).strip()


def test_what_can_not_be_asked(answerer: Answerer, tmp_path: Path) -> None:
    with pytest.raises(AnswerError, match=r"its 4 images make 4 tiles, and a row holds 3 \(config.data.chat.max_tiles"):
        answerer.row(conversation(answerer, 4))
    with pytest.raises(AnswerError, match=r"its question has \d+ tokens, and a row holds 200 \(config.data.chat.row_l"):
        answerer.row(conversation(answerer, 0, "colour " * 300))
    with pytest.raises(AnswerError, match=r"holds 2 <image> and comes with 1 images; give as many images"):
        conversation(answerer, 1, "<image> or <image>?")
    with pytest.raises(AnswerError, match=r"has no place for a system message; leave it out"):
        answerer.begun("You are short.")
    with pytest.raises(AnswerError, match=r"the image '.*none.png' can't be read: No such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(AnswerError, match=r"text.png' is not an image that can be shown: the image can't be decoded"):
        read_image(tmp_path / "text.png")
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").load(), pixels(0))


def test_one_image_a_question_where_the_model_was_trained_so(checkpoint: Any) -> None:
    llava = Answerer(checkpoint[0], overrides={"data.chat.images.placement": "llava"})
    with pytest.raises(AnswerError, match=r"show one image a question, not 2; ask about each"):
        conversation(llava, 2)
    assert llava.row(conversation(llava, 1))["tile_count"] == 1


def test_a_model_that_answers_nothing(tmp_path: Path) -> None:
    config = tiny.config()
    params = unbox(jax.jit(config.objective.build(config.data.preprocess, np.float32).init)(jax.random.key(0))[0])
    view = schema.to_dict(config.data.preprocess)
    save_params(tmp_path / "clip", params, config=to_json(config), tokenizer=None, preprocess=view, extra={})
    with pytest.raises(AnswerError, match=r"holds a model of objective 'clip', which answers nothing; give"):
        Answerer(tmp_path / "clip")


def test_a_language_model_goes_on_or_chats(tmp_path: Path) -> None:
    """Without a template as `vlm_jax.load(...).write` does; with one in its form, up to its end token."""
    import vlm_jax

    save(tmp_path / "lm", LmConfig(model=LanguageModelConfig(DECODER), length=64), None)
    plain, chatting = Answerer(tmp_path / "lm"), Answerer(tmp_path / "lm", template="paligemma")
    asked = plain.asked(plain.begun(), "a small red")
    written = vlm_jax.load(tmp_path / "lm").write(["a small red"], LIKELIEST)[0].strip()
    assert "".join(plain.stream(asked, LIKELIEST)) == written
    with pytest.raises(AnswerError, match=r"it shows images, and this model reads text alone"):
        plain.row(plain.asked(asked, "what?", [ImageArray(pixels(0))]))
    with pytest.raises(AnswerError, match=r"it has \d+ tokens, and a row holds 64 \(config.objective.length\)"):
        plain.row(plain.asked(asked, "red " * 100))
    with pytest.raises(AnswerError, match=r"its 1 images make 1 tiles, and a row holds 0"):
        chatting.row(conversation(chatting))
    row = chatting.row(conversation(chatting, 0, "red?"))
    assert TOKENIZER.encoder.decode(row["text"][row["segments"] > 0].tolist()).strip() == "red?"
    assert chatting.answers([conversation(chatting, 0)], LIKELIEST)
    with pytest.raises(AnswerError, match=r"there is no template 'alpaca', only vicuna_v1, "):
        Answerer(tmp_path / "lm", template="alpaca")


def terminal(*arguments: str, lines: str = "") -> "subprocess.CompletedProcess[str]":
    """`python -m vlm_jax.chat` as a process of its own, with what is piped into it."""
    command = [sys.executable, "-m", "vlm_jax.chat", *arguments]
    settings: Any = {"env": os.environ, "capture_output": True, "text": True, "errors": "surrogateescape"}
    return subprocess.run(command, input=lines, timeout=300, **settings)


def test_a_session_in_a_terminal(checkpoint: Any, answerer: Answerer, tmp_path: Path) -> None:
    """Two questions about two images, a third after beginning anew, and mistakes that don't end it."""
    for seed in range(2):
        Image.fromarray(pixels(seed)).save(tmp_path / f"{seed}.png")
    lines = [
        "What colour is the first?",
        f"/image {tmp_path}/none.png",
        f"/image {tmp_path}/1.png",
        "And the second?",
        "",
        "/reset",
        "/what",
        "What is one plus one, caf\udce9?",  # a byte that is no character
        "/quit",
        "not asked",
    ]
    files = f"--image={tmp_path}/0.png", "--max_new_tokens=6"
    done = terminal(f"--checkpoint={checkpoint[0]}", *files, lines="\n".join(lines))
    assert done.returncode == 0, done.stderr
    shown = [ImageArray(pixels(seed)) for seed in range(2)]
    first = answerer.asked(answerer.begun(), lines[0], shown[:1])
    said = answerer.answers([first], LIKELIEST)
    second = answerer.asked(first.answered(said[0]), lines[3], shown[1:])
    third = answerer.asked(answerer.begun(), lines[7].replace("\udce9", "\ufffd"))
    said += answerer.answers([second], LIKELIEST) + answerer.answers([third], LIKELIEST)
    assert done.stdout == "".join(f"{text}\n" for text in said)
    problems = [line for line in done.stderr.splitlines() if "none.png" in line or "command" in line]
    assert problems[0].startswith("error: the image ") and "can't be read: No such file" in problems[0]
    assert problems[1].startswith("there is no command /what: /image PATH shows an image")


def test_one_question_and_its_json(
    checkpoint: Any, answerer: Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    flags = [f"--checkpoint={checkpoint[0]}", f"--image={tmp_path}/a.png", "--prompt=What?", "--max_new_tokens=6"]
    asked = answerer.asked(answerer.begun(), "What?", [ImageArray(pixels(0))])
    assert chat.main(flags) == 0
    assert capsys.readouterr().out == answerer.answers([asked], LIKELIEST)[0] + "\n"
    assert chat.main([*flags, "--json", "--temperature=3", "--top_k=50", "--seed=2"]) == 0
    sampled = GenerationConfig(6, temperature=3.0, top_k=50)
    expected = {"prompt": "What?", "images": [f"{tmp_path}/a.png"], "answer": answerer.answers([asked], sampled, 2)[0]}
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--image=none.png", "--prompt=a"], 2, "the image 'none.png' can't be read: No such file or directory"),
        (["--prompt=a", "--system=b"], 2, "the template of this model has no place for a system message; leave it out"),
        (["--json"], 2, "--json needs --prompt: it prints one answer; give a question"),
        (["--prompt=a", "--top_p=0.9"], 2, "--top_k and --top_p have no effect without sampling; give --temperature"),
        (["--prompt=a", "--max_new_tokens=0"], 2, "--max_new_tokens = 0 must be at least 1"),
        (["--prompt=a", "--checkpoint=none"], 1, "holds no checkpoint"),
    ],
)
def test_mistakes_are_one_sentence(
    checkpoint: Any, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    assert chat.main([f"--checkpoint={checkpoint[0]}", *flags]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
