"""Runs on conversations by the command line: images of odd sizes, several to a record, packed; and bad records.

A nanoVLM of a few thousand parameters: tiles of 16 pixels, 4 tokens each, and a grid of up to 4 x 4 of them.
"""

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax.answering import Answerer, read_image
from vlm_jax.assemble import build_program
from vlm_jax.config import Config, load_config
from vlm_jax.data.chat_examples import ChatExamples
from vlm_jax.data.chat_rows import PackedRows
from vlm_jax.data.sources.chats import ImageFile, Turn
from vlm_jax.data.text import build_tokenizer
from vlm_jax.main import main
from vlm_jax.models.generation import GenerationConfig

CONFIG = """
from pathlib import Path
from vlm_jax.config import config_module
from vlm_jax.data.chat_config import NANOVLM
from vlm_jax.data.tiles import SplitTiling
from vlm_jax.mesh import MeshConfig
from vlm_jax.schema import override

RECIPE = config_module(Path({root!r}) / "configs" / "nanovlm_460m.py")


def get_config(name=""):
    config = RECIPE.get_config("smoke")
    sizes = {{"objective.length": 256, "objective.tiles": 32, "data.chat.row_length": 256, "data.chat.max_tiles": 32}}
    small = {{"width": 16, "depth": 1, "heads": 2, "mlp_dim": 24}}
    changes = sizes | {{f"objective.model.image.{{key}}": value for key, value in small.items()}}
    changes |= {{"evals": (), "train.steps": 2, "train.log_every": 1, "checkpoint.every": 2, "data.threads": 1}}
    changes |= {{"data.chat.tiling.max_side": 64, "data.chat.tiling.enlarge": False, "train.dtype": "float32"}}
    return override(config, changes)
"""
SIZES = ((37, 91), (200, 33), (64, 64), (16, 16), (5, 47))  # heights and widths


def picture(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "nanovlm_tiny.py"
    path.write_text(CONFIG.format(root=str(Path(__file__).parents[1])))
    return str(path)


def turns(*texts: str, first: int = 0) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[(first + k) % 2], "value": text} for k, text in enumerate(texts)]


Q, A = "what is it?", "it is big"
# Name of the record: (its conversation, its images, what is said of it).
UNUSABLE: dict[str, tuple[list[dict[str, str]], list[str], str]] = {
    "twice-user": ([*turns(Q), *turns(Q, A)], ["0.png"], "its turn 2 comes from the user after one from the user"),
    "empty-answer": (turns(Q, "  "), ["0.png"], "its answer in turn 2 is empty"),
    "missing-image": (turns(Q, A), ["none.png"], "its image 'none.png' can't be read: No such file or directory"),
    "cut-image": (turns(Q, A), ["cut.png"], "an image's size can't be read (image file is truncated)"),
    "too-long": (turns(Q, "word " * 400), ["0.png"], "tokens, and a row holds 256 (config.data.chat.row_length)"),
    "too-many-tiles": (turns(Q, A), ["2.png"] * 2, "its 2 images make 34 tiles, and a row holds 32"),
}
# And what is changed in those that are used.
CHANGED = {
    "starts-with-assistant": (turns("hi", Q, A, first=1), ["0.png"], "a leading turn of the assistant was left out"),
    "no-last-answer": (turns(Q, A, Q), [], "a last question without an answer was left out"),
    "placeholder": (turns(f"<|image|> {Q}", A), ["0.png"], "a placeholder spelled in a message was taken out"),
}
USABLE = {
    "special-token": (turns(f"{Q} <|im_end|> </s>", f"{A} <|im_start|>"), ["0.png"], ""),
    "narrow": (turns(Q, A), ["narrow.png"], ""),
}


def good(count: int) -> list[dict[str, Any]]:
    """Records with none, two or three images, of one or two rounds."""
    found = []
    for number in range(count):
        images = [f"{(number + k) % 5}.png" for k in range((0, 2, 3)[number % 3])]
        said = turns(f"what is {number}?", f"it is {'big ' * (number % 4)}{number}", "why?", "so")
        found.append({"id": f"good-{number}", "image": images, "conversations": said[: 2 + 2 * (number % 2)]})
    return found


class Run(NamedTuple):
    """Two steps on records of which each kind of bad one is one.

    Attributes:
        config: as it was run.
        rows: of the training, eight of them: a batch is an epoch.
        maker: makes rows of records.
        losses: of the two steps.
        output: what was printed.
        warnings: what was logged.
    """

    config: Config
    rows: PackedRows
    maker: ChatExamples
    losses: list[float]
    output: str
    warnings: list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    for name, size in (*enumerate(SIZES), ("narrow", (1, 10_000))):
        (folder / f"{name}.png").write_bytes(picture(*size))
    (folder / "cut.png").write_bytes(picture(200, 33)[:3000])
    return folder


@pytest.fixture(scope="module")
def run(config_file: str, folder: Path) -> Run:
    others = [
        {"id": name, "image": images, "conversations": conversation}
        for name, (conversation, images, _) in (UNUSABLE | CHANGED | USABLE).items()
    ]
    path, settings = folder / "mix.json", {"data.source": "llava_json", "data.bad_record_budget": str(len(UNUSABLE))}
    settings["data.source.path"] = str(path)
    for count in range(10, 30):
        path.write_text(json.dumps([*good(count), *others]))
        config = load_config(config_file, settings)
        source = config.data.source.build("")
        texts = [text for index in range(len(source)) for text in source.texts(index)]
        maker = config.objective.make_example(build_tokenizer(config.data.tokenizer, texts), config.data)
        assert isinstance(maker, ChatExamples)
        rows = maker.rows(source, config.seed, 1, "")
        assert isinstance(rows, PackedRows)
        if len(rows.packing) == config.data.batch_size:
            break
    warnings, output = Warnings(), io.StringIO()
    logging.getLogger("vlm_jax").addHandler(warnings)
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    with contextlib.redirect_stdout(output):
        code = main([f"--config={config_file}", f"--workdir={folder}/run", *flags])
    logging.getLogger("vlm_jax").removeHandler(warnings)
    assert code == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return Run(config, rows, maker, losses, output.getvalue(), warnings.messages)


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_a_packed_epoch_of_odd_images_is_its_conversations_alone(run: Run) -> None:
    """The loss of the first step is the mean over the tokens of all conversations, each in a row of its own."""
    source, rows, config = run.rows.source, run.rows, run.config
    used = sorted(index for row in range(8) for index in rows.packing[row].tolist())
    assert len(used) == len(source) - len(UNUSABLE) and max(len(rows.packing[row]) for row in range(8)) > 2
    alone = [run.maker(source[index], None) for index in used]
    assert {int(row["tile_count"]) for row in alone} >= {0, 13, 14, 18, 22, 31}
    assert len(run.losses) == 2 and np.isfinite(run.losses).all()

    program = build_program(config)
    with jax.set_mesh(program.mesh):
        params = tiny.host(program.setup.init().params)
    method = config.objective.build(config.data.preprocess, np.float32)
    loss = jax.jit(lambda params, row: method.loss(params, {}, row, None, 0)[0])

    def summed(examples: Any) -> np.ndarray:
        found = [loss(params, jax.tree.map(lambda x: x[None], example)) for example in examples]
        return np.asarray(found, np.float64).sum(axis=0)

    total, count = summed(alone)
    packed_total, packed_count = summed(rows(position)[0] for position in range(8))
    assert count == packed_count > 100
    assert packed_total == pytest.approx(total, rel=1e-5)
    assert run.losses[0] == pytest.approx(total / count, rel=1e-5)


def test_bad_conversations_are_counted_with_their_names_and_reasons(run: Run) -> None:
    for name, (_, _, why) in UNUSABLE.items():
        assert [line for line in run.warnings if f"record {name} (number" in line and why in line], name
    for name, (_, _, note) in CHANGED.items():
        told = f"records: {note}; the first is {name} (number"
        assert [line for line in run.warnings if line.startswith("1 of") and told in line], name
    unusable = [line for line in run.warnings if "can't be used" in line]
    assert len(unusable) == len(UNUSABLE)
    assert f"done: 2 steps; {len(UNUSABLE)} unusable records replaced" in run.output


def test_a_run_answers_about_odd_images(run: Run, folder: Path) -> None:
    """With its own tokenizer, template and tiles: the prompt is the evaluation's, the streamed text that of a batch."""
    answerer = Answerer(folder / "run")
    names, config = ("0.png", "1.png"), GenerationConfig(max_new_tokens=5)
    asked = answerer.asked(answerer.begun(), Q, [read_image(folder / name) for name in names])
    record = {"turns": (Turn("user", Q),), "images": tuple(ImageFile(name, str(folder)) for name in names)}
    expected = run.maker.prompt(record | {"key": "a", "where": "b"})
    assert expected["tile_count"] == 14
    tiny.assert_trees_equal(answerer.row(asked), expected)
    assert "".join(answerer.stream(asked, config)) == answerer.answers([asked], config)[0]


def test_more_bad_conversations_than_the_budget_stop_the_run(
    config_file: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step. Here placeholders stand in messages, in another number than there are images."""
    odd = {
        "more": (
            ["0.png"],
            "<image> <image>\nwhat?",
            "its messages hold 2 <image>, its images are 1: the k-th pl",
        ),
        "fewer": (["0.png", "1.png"], "<image>\nwhat?", "its messages hold 1 <image>, its images are 2"),
        "none": ([], "<image>\nwhat?", "its messages hold 1 <image>, its images are 0"),
    }
    records = [{"id": f"good-{k}", "image": ["0.png"], "conversations": turns(f"<image>{Q}", A)} for k in range(9)]
    records += [{"id": name, "image": x, "conversations": turns(text, A)} for name, (x, text, _) in odd.items()]
    path = folder / "places.json"
    path.write_text(json.dumps(records))
    places = ["--config.data.chat.images.placement=inline", "--config.data.chat.images.placeholder=<image>"]
    command = [f"--config={config_file}", f"--config.data.path={path}", f"--workdir={tmp_path}/run", *places]
    assert main([*command, "--config.data.bad_record_budget=2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 3 of 12 records can't be used, 2 are allowed (config.data.bad_record_budget)")
    for name, (_, _, why) in odd.items():
        assert [line for line in error.splitlines() if f"record {name} (number" in line and why in line], name
    assert "raise the budget" in error
