"""Checkpoints with questions of benchmarks: evaluated alone, and asked by lmms-eval, which a stand-in plays.

The stand-in has the base class, the registry's record and the requests of lmms-eval 0.3 to 0.6 (lmms_eval/api/model.py,
api/instance.py, models/registry_v2.py).
"""

import abc
import dataclasses
import importlib
import json
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from tiny_vlm import CHAT, OBJECTIVE, TOKENIZER

from vlm_jax.checkpoint import save_params
from vlm_jax.config import to_json
from vlm_jax.data.sources import BenchmarkConfig
from vlm_jax.data.sources.chats import ImageArray
from vlm_jax.evals.generate import GenerateConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.evaluate import evaluate_checkpoint
from vlm_jax.mesh import unbox
from vlm_jax.schema import ConfigError

QUESTIONS = ("What colour is it?", "What shape is the object in the left?", "Where is the red square?")
NEW = 5
CONFIG = tiny.config(
    objective=dataclasses.replace(OBJECTIVE, prefix=False), evals=(), data__chat=CHAT, data__augment=None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, method_and_params: tuple[Any, Any]) -> Path:
    """A checkpoint in `run`, and LLaVA's questions about drawn images with their answers."""
    folder = tmp_path_factory.mktemp("vlm")
    save_params(
        folder / "run", method_and_params[1], config=to_json(CONFIG), tokenizer=TOKENIZER.state(), preprocess={}
    )
    lines = []
    for number, question in enumerate(QUESTIONS):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
        line = {"question_id": number, "image": f"{number}.png", "text": question, "answers": ["red"] * 9 + ["blue"]}
        lines.append(json.dumps(line))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def method_and_params() -> tuple[Any, Any]:
    method = CONFIG.objective.build(CONFIG.data.preprocess, jnp.float32)
    # Far from the start, where every text ends alike.
    return method, jax.tree.map(lambda x: 3 * np.asarray(x), unbox(jax.jit(method.init)(jax.random.key(0))[0]))


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> tuple[dict[str, float], Path]:
    """Metrics and workdir of an evaluation of the checkpoint."""
    source = BenchmarkConfig("llava", str(folder / "questions.jsonl"))
    evals = (
        VqaConfig("mine", source, score="vqa", predictions=True, max_new_tokens=NEW, blank=False),
        GenerateConfig("mine", source, count=2, max_new_tokens=NEW),
    )
    workdir = folder / "evaluated"
    return evaluate_checkpoint(str(folder / "run"), str(workdir), {"evals": evals}), workdir


def test_a_checkpoint_is_evaluated_on_a_benchmarks_files(evaluated: tuple[dict[str, float], Path]) -> None:
    metrics, workdir = evaluated
    assert {"vqa/mine/accuracy", "vqa/mine/loss", "vqa/mine/examples"} == set(metrics)
    assert metrics["vqa/mine/examples"] == 3
    assert json.loads((workdir / "eval.json").read_text())["vqa/mine/loss"] == metrics["vqa/mine/loss"]
    lines = [json.loads(line) for line in (workdir / "predictions" / "vqa-mine-00000000.jsonl").open()]
    assert [(line["question_id"], line["prompt"]) for line in lines] == list(enumerate(QUESTIONS))
    assert np.mean([line["score"] for line in lines]) == pytest.approx(metrics["vqa/mine/accuracy"])
    names = {path.name for kind in ("pictures", "texts") for path in (workdir / kind).iterdir()}
    assert names == {f"generate-mine-{n}-00000000.{end}" for n in ("answers", "supervised") for end in ("png", "md")}


class Base(abc.ABC):
    """The base class, as far as an adapter meets it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.hooked: list[tuple[Any, ...]] = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *found: self.hooked.append(found))

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclasses.dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass
class Request:
    arguments: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@pytest.fixture(scope="module")
def adapter() -> Any:
    """The class, found in both of the ways in which lmms-eval finds it."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules["lmms_eval.api.model"])["lmms"] = Base
    vars(modules["lmms_eval.models.registry_v2"])["ModelManifest"] = Manifest
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        plugin = "vlm_jax.evals.lmms_eval"
        ((name, class_name),) = importlib.import_module(f"{plugin}.models").AVAILABLE_MODELS.items()
        manifest = importlib.import_module(plugin).manifest()
        assert (manifest.model_id, manifest.simple_class_path) == (name, f"{plugin}.models.{name}.{class_name}")
        yield getattr(importlib.import_module(f"{plugin}.models.{name}"), class_name)
        sys.modules.pop(f"{plugin}.models.{name}")


@pytest.fixture(scope="module")
def model(adapter: Any, folder: Path) -> Any:
    model = adapter(pretrained=str(folder / "run"), batch_size="3", device="cuda:0")
    docs = [{"number": number, "image": Image.fromarray(picture(number))} for number in range(3)]
    model.task_dict = {"mine": {"val": docs}}
    return model


def visuals(doc: Any) -> list[Image.Image]:
    return [doc["image"]]


def asked(number: int, **wish: Any) -> Request:
    return Request((QUESTIONS[number], {"max_new_tokens": NEW, **wish}, visuals, number, "mine", "val"))


def test_the_entry_point_of_the_package_is_the_one_that_is_looked_for() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nvlm_jax = "vlm_jax.evals.lmms_eval:manifest"' in text
    for point in metadata.entry_points(group="lmms_eval.models"):
        assert point.value == "vlm_jax.evals.lmms_eval:manifest"


def test_answers_are_those_of_the_evaluation_in_the_order_of_requests(
    model: Any, evaluated: tuple[dict[str, float], Path]
) -> None:
    lines = [json.loads(line) for line in (evaluated[1] / "predictions" / "vqa-mine-00000000.jsonl").open()]
    expected = [line["answer"] for line in lines]
    order = (2, 0, 1, 2)
    model.hooked.clear()
    wish = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": []}
    found = model.generate_until([asked(number, **wish) for number in order])
    assert found == [expected[number] for number in order]
    assert len(set(expected)) == 3
    assert model.hooked[1] == ("generate_until", (QUESTIONS[0], {"max_new_tokens": NEW, **wish}), expected[0])
    # A placeholder in the question is the image's place, and no second one is added.
    context, *rest = asked(1).args
    assert model.generate_until([Request((f"<image>\n{context}", *rest))]) == [expected[1]]


def test_the_wishes_of_a_task_are_heard(model: Any, adapter: Any) -> None:
    (whole,) = model.generate_until([asked(0)])
    assert len(whole) > 2
    letter = whole[1]
    mixed = model.generate_until([asked(0, until=[letter, "zzz"]), asked(0), asked(0, max_new_tokens=1)])
    assert mixed == [whole.partition(letter)[0], whole, mixed[2]]
    assert len(mixed[2]) < len(whole)
    sampled = [model.generate_until([asked(0, temperature=3.0)]) for _ in range(2)]
    assert sampled[0] == sampled[1] != [whole]
    heard = vars(sys.modules[adapter.__module__])["generation"] if adapter.__module__ in sys.modules else None
    assert heard is not None
    config, samples = heard({"temperature": 0.5, "top_p": 0.9, "top_k": 7, "num_beams": 3})
    assert (config.temperature, config.top_p, config.top_k, config.beams, samples) == (0.5, 0.9, 7, 1, True)
    config, samples = heard({"temperature": 0.5, "do_sample": False, "num_beams": 3})
    assert (config.temperature, config.beams, config.max_new_tokens, samples) == (1.0, 3, 1024, False)


def test_two_images_and_none(model: Any) -> None:
    model.task_dict["other"] = {"val": [{"images": [Image.fromarray(picture(n)) for n in (0, 1)]}, {"images": []}]}

    def shown(doc: Any) -> Any:
        return doc["images"] or None

    wish = {"max_new_tokens": NEW}
    requests = [Request(("Which?", wish, shown, number, "other", "val")) for number in (0, 1)]
    two, none = model.generate_until(requests)
    assert two != none
    with pytest.raises(ConfigError, match="a task shows a str; this model sees images alone"):
        model.generate_until([Request(("Which?", wish, lambda doc: ["a.mp4"], 0, "other", "val"))])


def test_rounds_go_on_until_the_task_ends_them(model: Any) -> None:
    seen: list[Any] = []

    def follow(doc: Any, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        seen.append((doc["number"], tuple(previous_output), round_idx, previous_round_info))
        ended = round_idx == doc["number"] + 1
        question = f"And {round_idx}?"
        return visuals(doc), question, ended, previous_output, f"after {round_idx}"

    requests = []
    for number in (0, 1):
        context, wish, show, *rest = asked(number).args
        requests.append(Request((context, wish, show, follow, *rest)))
    found = model.generate_until_multi_round(requests)
    first = model.generate_until([asked(0), asked(1)])
    second = model.generate_until([Request(("And 1?", {"max_new_tokens": NEW}, visuals, 1, "mine", "val"))])
    assert found == [[first[0]], [first[1], second[0]]]
    assert seen == [
        (0, (first[0],), 1, None),
        (1, (first[1],), 1, None),
        (1, (first[1], second[0]), 2, "after 1"),
    ]


def test_likelihoods_are_sums_over_the_answers_tokens(model: Any, method_and_params: tuple[Any, Any]) -> None:
    """Those of the answer and its end, token by token from the logits of each row alone."""
    targets = ["red", "top left", lambda doc: f"a {doc['number']}"]
    requests = [Request((QUESTIONS[n], targets[n], visuals, n, "mine", "val")) for n in range(3)]
    found = model.loglikelihood(requests)
    method, params = method_and_params
    maker = CONFIG.objective.make_example(TOKENIZER, CONFIG.data)
    outputs = jax.jit(method.outputs)
    for number, (total, likeliest) in enumerate(found):
        answer = targets[number] if number < 2 else "a 2"
        record = {"question": QUESTIONS[number], "reference": answer, "images": (ImageArray(picture(number)),)}
        row = maker({**record, "key": "", "where": ""}, None)
        alone = {name: value[None] for name, value in row.items()}
        logits = np.asarray(outputs(params, alone)["logits"][0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = np.flatnonzero(row["supervised"])
        assert TOKENIZER.encoder.decode(row["text"][places[:-1]].tolist()).strip() == answer
        assert total == pytest.approx(sum(log_p[place - 1, row["text"][place]] for place in places), rel=1e-5)
        assert likeliest == all(logits[place - 1].argmax() == row["text"][place] for place in places)


def test_wrong_arguments_are_one_sentence(adapter: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_args holds 'conv_mode'; give pretrained, batch_size, seed"):
        adapter(pretrained=str(folder / "run"), conv_mode="vicuna_v1")
    with pytest.raises(ConfigError, match="batch_size = 'auto' must be a number"):
        adapter(pretrained=str(folder / "run"), batch_size="auto")
    with pytest.raises(ConfigError, match=r"config.mesh.sdp is not a key"):
        adapter(pretrained=str(folder / "run"), **{"config.mesh.sdp": 2})
