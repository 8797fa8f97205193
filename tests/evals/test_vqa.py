"""Questions: answers by brute force, with images and blind, and how they are compared."""

import dataclasses
import re
from typing import Any

import image_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_encoder import ListSource
from tiny_vlm import CHAT, OBJECTIVE, SCENES, TOKENIZER

from vlm_jax.data.sources.chats import DrawnImage
from vlm_jax.evals.base import EvalError
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.generate import GenerateConfig, GenerateEvaluator
from vlm_jax.evals.held_out import HeldOut
from vlm_jax.evals.vqa import VqaConfig, VqaEvaluator
from vlm_jax.metrics import MetricWriter
from vlm_jax.schema import ConfigError

NEW = 4


@pytest.fixture(scope="module")
def made() -> Any:
    """(encoder on a mesh, its parameters, the method)."""
    program = tiny.program(
        tiny.mesh(2, 2, 2), objective=OBJECTIVE, evals=(), data__chat=CHAT, data__augment=None, data__batch_size=8
    )
    method = OBJECTIVE.build(program.config.data.preprocess, jnp.float32)
    held_out = HeldOut(method, OBJECTIVE.make_example(TOKENIZER, program.config.data))
    encoder = MeshEncoder(program.objective, TOKENIZER, 16, program.mesh, 8, held_out)
    with jax.set_mesh(program.mesh):
        # Far from the start, where every text ends alike.
        params = jax.tree.map(lambda x: 3 * x, program.setup.init().params)
    return encoder, params, method


def test_answers_are_the_likeliest_tokens_one_after_the_other(made: Any) -> None:
    """Each as the whole row with all that was said so far gives it."""
    encoder, params, method = made
    host, source = tiny.host(params), SCENES.build("")
    batches = list(encoder.prompt_batches(source))
    assert len(batches) == 1
    assert np.asarray(batches[0]["mask"]).tolist() == [True] * 7 + [False]
    outputs, differ = jax.jit(method.outputs), 0
    found = {blank: np.asarray(encoder.answer(params, batches[0], NEW, blank)) for blank in (False, True)}
    for blank, ids in found.items():
        batch = tiny.host(encoder.blanked(batches[0]) if blank else batches[0])
        rows = {name: np.roll(x[:7], -NEW, axis=1) for name, x in batch.items() if name in ("text", "segments")}
        rows |= {name: np.roll(batch[name][:7], -NEW, axis=1) for name in ("positions", "tile_slots")}
        rows |= {name: batch[name][:7] for name in ("tiles", "tile_count")}
        rows["supervised"] = np.zeros_like(rows["segments"], bool)
        rows["tile_slots"][:, -NEW:], rows["segments"][:, -NEW:] = -1, 0
        ended = np.zeros(7, bool)
        for step in range(NEW):
            place = rows["text"].shape[1] - NEW + step
            logits = np.asarray(outputs(host, rows)["logits"])[:, place - 1]
            token = np.where(ended, TOKENIZER.pad_id, logits.argmax(-1))
            np.testing.assert_array_equal(ids[:7, step], token)
            ended |= token == TOKENIZER.eos_id
            rows["text"][:, place], rows["segments"][:, place] = token, 1
            rows["positions"][:, place] = rows["positions"][:, place - 1] + 1
            rows["supervised"][:, place] = True
    differ = (found[False] != found[True]).any(axis=1)
    needs_image = np.asarray([source[i]["kind"] != "text" for i in range(7)])
    assert not differ[:7][~needs_image].any()
    assert differ[:7][needs_image].any()


class Told:
    """The encoder with the answers that a test gives it."""

    def __init__(self, encoder: Any, sighted: list[str], blind: list[str]):
        self._encoder, self._answers = encoder, {False: sighted, True: blind}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def answer(self, params: Any, batch: Any, max_new_tokens: int, blank: bool = False) -> Any:
        return jnp.full((8, 1), int(blank))

    def written(self, ids: np.ndarray) -> list[str]:
        return self._answers[bool(ids[0, 0])][: len(ids)]


def test_answers_are_compared_but_for_case_and_a_full_stop(made: Any) -> None:
    encoder, params, _ = made
    source = SCENES.build("")
    right = [source[i]["turns"][-1].text for i in range(7)]
    told = Told(encoder, [f" {right[0].upper()}.", *right[1:6], f"{right[6]} red"], [*right[:2], *["?"] * 5])
    config = VqaConfig("shapes", SCENES, max_new_tokens=NEW)
    found = {k.removeprefix("vqa/shapes/"): v for k, v in config.build(told, "").run(params, 0).metrics.items()}
    assert found["exact_match"] == pytest.approx(6 / 7)
    assert found["exact_match_blank"] == pytest.approx(2 / 7)
    assert found["examples"] == 7
    kinds = [source[i]["kind"] for i in range(7)]
    for kind in set(kinds):
        hits = [i != 6 for i in range(7) if kinds[i] == kind]
        assert found[f"exact_match/{kind}"] == pytest.approx(np.mean(hits))
    assert found["loss"] != found["loss_blank"]


def questions(*entries: dict[str, Any]) -> ListSource:
    """Records of a benchmark, each with a grey image unless it says otherwise."""
    common = {"images": (DrawnImage(lambda: np.full((12, 20, 3), 99, np.uint8), 12, 20),), "where": "w", "texts": ()}
    common |= {"kind": "", "group": "", "options": ()}
    records = [
        {**common, "question": f"Question {i}?", "key": str(i), "question_id": 100 + i, **entry}
        for i, entry in enumerate(entries)
    ]
    for record in records:
        record.setdefault("reference", (*record["answers"], "")[0])
    return ListSource(records)


def evaluated(encoder: Any, config: Any, kind: type, source: ListSource, params: Any) -> Any:
    return kind(config, encoder, source).run(params, 3)


def test_a_benchmark_is_scored_by_its_rule_and_its_answers_are_kept(made: Any) -> None:
    encoder, params, _ = made
    entries = [{"answers": ("red",) * 9 + ("blue",), "kind": "other"}, {"answers": ("2",) * 2 + ("3",) * 8}]
    told = Told(encoder, ["Red.", "two"], ["blue", "two"])
    config = VqaConfig("v2", SCENES, score="vqa", predictions=True)
    result = evaluated(told, config, VqaEvaluator, questions(*entries), params)
    found = {k.removeprefix("vqa/v2/"): v for k, v in result.metrics.items()}
    assert found["accuracy"] == pytest.approx((1 + 0.6) / 2)
    assert found["accuracy/other"] == 1.0
    assert found["accuracy_blank"] == pytest.approx((0.3 + 0.6) / 2)
    assert "accuracy/other_blank" not in found
    assert found["loss"] > 0
    assert result.predictions["vqa/v2"] == [
        {
            "question_id": 100,
            "prompt": "Question 0?",
            "answer": "Red.",
            "reference": [*["red"] * 9, "blue"],
            "score": 1.0,
        },
        {"question_id": 101, "prompt": "Question 1?", "answer": "two", "reference": [*["2"] * 2, *["3"] * 8]}
        | {"score": pytest.approx(0.6)},
    ]


def test_secret_answers_leave_predictions_alone(made: Any) -> None:
    encoder, params, _ = made
    told = Told(encoder, ["yes", "no"], ["yes", "no"])
    config = VqaConfig("test", SCENES, score="vqa", predictions=True)
    result = evaluated(told, config, VqaEvaluator, questions({"answers": ()}, {"answers": ()}), params)
    assert result.metrics == {"vqa/test/examples": 2.0}
    assert [line["answer"] for line in result.predictions["vqa/test"]] == ["yes", "no"]
    assert "reference" not in result.predictions["vqa/test"][0]


def test_a_score_that_does_not_fit_is_one_sentence(made: Any) -> None:
    encoder, params, _ = made
    config = VqaConfig("star", SCENES, score="choice")
    with pytest.raises(EvalError, match=r"'star': score = 'choice' does not fit .* \(an answer is 'a cat', not"):
        evaluated(Told(encoder, ["A"], ["A"]), config, VqaEvaluator, questions({"answers": ("a cat",)}), params)


def test_samples_of_answers_are_drawn_and_written(made: Any, tmp_path: Any) -> None:
    """Also of a question about two images, of one without any, and of one whose answer is not known."""
    encoder, params, _ = made
    image = DrawnImage(lambda: np.full((12, 20, 3), 99, np.uint8), 12, 20)
    entries = [{"answers": ("red", "red", "rose")}, {"answers": ("two",), "images": (image, image)}]
    entries += [{"answers": ("four",), "images": ()}, {"answers": ()}, {"answers": ("left",)}]
    told = Told(encoder, ["Red.", "three", "four", "who knows", "left"], [])
    config = GenerateConfig("samples", SCENES, count=4)
    result = evaluated(told, config, GenerateEvaluator, questions(*entries), params)
    assert result.metrics == {}
    answers, supervised = (result.texts[f"generate/samples/{name}"] for name in ("answers", "supervised"))
    assert "question:  Question 0?\nanswer:    Red.\nreference: red | rose\n" in answers
    assert "answer:    who knows\nreference: \n" in answers
    assert "left" not in answers
    # The fourth has nothing to learn.
    blocks = supervised.split("````")[1::2]
    assert [re.findall(r"\[\[(.*?) <\d+>\]\]", block) for block in blocks] == [["red"], ["two"], ["four"]]
    assert ["tokens of images" in block.partition("question")[0] for block in blocks] == [True, True, False]
    drawn = {name.rpartition("/")[2]: image for name, image in result.images.items()}
    assert {image.dtype for image in drawn.values()} == {np.dtype(np.uint8)}
    assert (drawn["answers"] == 99).all(axis=-1).sum() > 3 * 10_000  # three images of the first two questions
    writer = MetricWriter(tmp_path, is_primary=True)
    for name, picture in result.images.items():
        writer.image(3, name, picture)
    for name, text in result.texts.items():
        writer.text(3, name, text)
    writer.close()
    assert (tmp_path / "texts" / "generate-samples-answers-00000003.md").read_text() == answers
    assert (tmp_path / "pictures" / "generate-samples-supervised-00000003.png").stat().st_size > 1000


def test_a_model_without_answers_is_refused() -> None:
    encoder, _, _ = image_models.encoder(image_models.CLASSIFY)
    with pytest.raises(ConfigError, match=r"'shapes' \(vqa\) asks questions about images, and this model answers none"):
        dataclasses.replace(VqaConfig("shapes", SCENES)).build(encoder, "")
    with pytest.raises(ConfigError, match=r"'shapes' \(generate\) is for models that answer"):
        GenerateConfig("shapes", SCENES).build(encoder, "")
