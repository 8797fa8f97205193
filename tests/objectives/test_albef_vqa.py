"""ALBEF for questions: its loss by numpy, meshes and microbatches, answers ranked one by one, rows, and its recipe."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax.assemble import Program, build_program, build_run_tokenizer
from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, load_config
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import BadRecord, QuestionListsConfig, ShapesConfig, source_for_path
from vlm_jax.data.text import ALBEF_TOKENIZER
from vlm_jax.evals.answer_ranking import AnswerRankingConfig
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.held_out import HeldOut
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.albef import deit_b16
from vlm_jax.models.albef_vqa import AlbefVqaModelConfig
from vlm_jax.models.bert import TextEncoderConfig, TextStackConfig
from vlm_jax.objectives.albef_vqa import AlbefVqaConfig
from vlm_jax.optim import AdamW
from vlm_jax.schedule import Constant
from vlm_jax.schema import override

CONFIG_FILE = Path(__file__).parents[2] / "configs" / "albef_vqa.py"
ROWS, LENGTH, ANSWERS, ANSWER_LENGTH, VOCABULARY = 8, 8, 3, 5, 128
SIZES: dict[str, Any] = {"width": 16, "heads": 2, "mlp_dim": 32, "depth": 1}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "positions": 16}
DROPOUT = ("dropout", "attention_dropout")
SCENES = ShapesConfig(
    image_size=16, count=11, max_objects=2, split="test", conversations=("color", "shape", "count", "position")
)


def config(**overrides: Any) -> Config:
    """Images of 16 pixels; overrides with `__` for the dot."""
    model = AlbefVqaModelConfig(
        image=override(deit_b16(16), {**SIZES, "patch_size": 8}),
        text=TextEncoderConfig(**SIZES, **TEXT),
        fusion=TextStackConfig(**SIZES, cross_every=1),
        decoder=TextEncoderConfig(**SIZES, **TEXT, cross_every=1),
    )
    base = Config(
        name="tiny_albef_vqa",
        objective=AlbefVqaConfig(
            model=model,
            text_length=LENGTH,
            answer_length=ANSWER_LENGTH,
            max_answers=ANSWERS,
            distillation_steps=2,
            momentum=0.9,
        ),
        data=DataConfig(
            source=SCENES,
            batch_size=ROWS,
            augment=None,
            tokenizer=override(ALBEF_TOKENIZER, {"length": LENGTH, "vocab_size": VOCABULARY}),
            threads=1,
        ),
        # As in test_step: with this eps Adam's updates stay proportional to the gradient.
        optimizer=AdamW(learning_rate=0.1, eps=0.01, schedule=Constant()),
        train=TrainConfig(steps=8, log_every=1, dtype="float32"),
        checkpoint=CheckpointConfig(every=4),
    )
    return override(base, {key.replace("__", "."): value for key, value in overrides.items()})


def without_dropout(method: AlbefVqaConfig) -> AlbefVqaConfig:
    stacks = ("text", "fusion", "decoder")
    return override(method, {f"model.{stack}.{key}": 0.0 for stack in stacks for key in DROPOUT})


def host_batch(seed: int) -> dict[str, np.ndarray]:
    """Random images and questions, and one to three answers of one to three tokens."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(5, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    texts[:, 0], texts[::2, 5:] = 2, 0
    answers = np.zeros((ROWS, ANSWERS, ANSWER_LENGTH), np.int32)
    weights = np.zeros((ROWS, ANSWERS), np.float32)
    answers[:, :, 0] = 2
    for row in range(ROWS):
        for place in range(1 + row % ANSWERS):
            count = int(rng.integers(1, 4))
            answers[row, place, 1 : count + 2] = [*rng.integers(5, VOCABULARY, count), 3]
            weights[row, place] = rng.uniform(0.1, 1.0)
    images = rng.integers(0, 256, (ROWS, 16, 16, 3)).astype(np.uint8)
    return {"image": images, "text": texts, "answers": answers, "weights": weights}


def run_steps(program: Program) -> tuple[list[Any], Any, list[dict[str, float]]]:
    """(parameters before and after each, state after, metrics of each) of two steps."""
    history = []
    with jax.set_mesh(program.mesh):
        state = program.setup.init()
        params = [tiny.host(state.params)]
        for seed in range(2):
            batch = {key: jax.device_put(x, batch_sharding(program.mesh)) for key, x in host_batch(seed).items()}
            state, metrics = program.step(state, batch)
            params.append(tiny.host(state.params))
            history.append({name: float(total) / float(n) for name, (total, n) in metrics.items()})
    return params, state, history


@pytest.fixture(scope="module")
def reference() -> Any:
    return run_steps(build_program(config(), tiny.mesh()))


@pytest.mark.parametrize(
    ("shape", "accum"),
    [
        ((2, 2, 2), 2),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mesh_and_microbatches_change_nothing(shape: tuple[int, int, int], accum: int, reference: Any) -> None:
    """With dropout in model and averaged model."""
    _, state, history = run_steps(build_program(config(train__accum_steps=accum), tiny.mesh(*shape)))
    for got, want in zip(history, reference[2], strict=True):
        for name in ("loss", "token_accuracy", "distillation"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4)
    tiny.assert_trees_close(state.params, reference[1].params, rtol=5e-4)
    tiny.assert_trees_close(state.extra, reference[1].extra, rtol=5e-4)


def test_the_averaged_model_follows_all_of_the_model(reference: Any) -> None:
    """First it is the model; then it moves towards where the model has gone, before the next step uses it."""
    (first, second, third), state, history = reference
    averaged = tiny.host(state.extra)["averaged"]
    assert averaged.keys() == third.keys() == {"image", "text", "fusion", "decoder", "words"}
    assert [step["distillation"] for step in history] == pytest.approx([0.0, 0.2])
    expected = jax.tree.map(lambda a, b, c: 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c, first, second, third)
    tiny.assert_trees_close(averaged, expected, rtol=1e-5)
    assert not np.allclose(averaged["decoder"]["token_embed"], third["decoder"]["token_embed"])


class Small:
    """A method without dropout, its parameters, and an averaged model that differs."""

    def __init__(self) -> None:
        self.config = without_dropout(config().objective)  # pyright: ignore[reportArgumentType]
        self.objective = self.config.build(config().data.preprocess, jnp.float32)
        params, extra = jax.jit(lambda key: unbox(self.objective.init(key)))(jax.random.key(0))
        # Far from the start, so that answers differ.
        self.params, self.extra = self._moved(params, 1), self._moved(extra, 2)

    def _moved(self, tree: Any, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + 0.4 * rng.normal(size=x.shape).astype(np.float32), tree)

    def log_p(self, params: Any, batch: dict[str, np.ndarray], answer_L: np.ndarray) -> np.ndarray:
        """[B, L - 1, V] of one answer to every question."""
        answers = np.broadcast_to(answer_L, (len(batch["text"]), 1, len(answer_L)))
        outputs = self._outputs(params, {**batch, "answers": answers})
        return np.asarray(jax.nn.log_softmax(outputs["word_logits"]))[:, :-1]

    @property
    def _outputs(self) -> Any:
        if not hasattr(self, "_jitted"):
            self._jitted = jax.jit(lambda params, batch: self.objective.outputs(params, batch, intermediates=False))
        return self._jitted


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def test_the_loss_is_that_of_each_answer_by_itself(small: Small) -> None:
    """Hard and soft targets, summed over tokens, weighted, over the rows of the batch; padding counts nothing."""
    batch, expected = host_batch(3), 0.0
    for row in range(ROWS):
        one = {key: x[row : row + 1] for key, x in batch.items()}
        for answer, weight in zip(batch["answers"][row], batch["weights"][row], strict=True):
            learned = answer[1:] != 0
            log_p, log_q = (small.log_p(p, one, answer)[0] for p in (small.params, small.extra["averaged"]))
            hard = -log_p[np.arange(ANSWER_LENGTH - 1), answer[1:]]
            soft = -(np.exp(log_q) * log_p).sum(axis=-1)
            expected += weight * ((1 - 0.2) * hard + 0.2 * soft)[learned].sum()
    keys = jax.random.split(jax.random.key(0), ROWS)
    loss = jax.jit(lambda batch: small.objective.loss(small.params, small.extra, batch, keys, jnp.int32(1))[0])
    total, count = loss(batch)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == ROWS
    more = {
        **batch,
        "answers": np.pad(batch["answers"], ((0, 0), (0, 2), (0, 3))),
        "weights": np.pad(batch["weights"], ((0, 0), (0, 2))),
    }
    more["answers"][:, :, 0] = 2
    assert float(loss(more)[0]) == pytest.approx(expected, rel=1e-5)


WORDS = ([7], [7, 8], [7, 9], [9], [9, 9], [20], [21, 22], [30], [31, 7])
LIST = np.asarray([([2, *ids, 3] + [0] * ANSWER_LENGTH)[:ANSWER_LENGTH] for ids in WORDS], np.int32)


@pytest.mark.parametrize(("k", "twice"), [(9, False), (9, True), (4, True)])
def test_answers_are_ranked_as_if_one_by_one(k: int, twice: bool, small: Small) -> None:
    batch = {key: x for key, x in host_batch(4).items() if key in ("image", "text")}
    log_p = np.stack([small.log_p(small.params, batch, answer) for answer in LIST], axis=1)  # [B, N, L - 1, V]
    own = np.take_along_axis(log_p, np.broadcast_to(LIST[None, :, 1:, None], (ROWS, 9, ANSWER_LENGTH - 1, 1)), axis=-1)
    own = np.where(LIST[None, :, 1:] == 0, 0.0, own[..., 0])
    firsts, scores = own[:, :, 0], own.sum(axis=-1) + twice * own[:, :, 0]
    rank = jax.jit(small.objective.rank_answers, static_argnums=(3, 4))
    places, shares = (np.asarray(x) for x in rank(small.params, batch, LIST, k, twice))
    longer = rank(small.params, batch, np.pad(LIST, ((0, 0), (0, 2))), k, twice)
    np.testing.assert_allclose(longer[1], shares, atol=1e-5)
    for row in range(ROWS):
        kept = np.argsort(-firsts[row], kind="stable")[:k]
        order = kept[np.argsort(-scores[row, kept], kind="stable")]
        np.testing.assert_array_equal(places[row], order)
        expected = scores[row, order] - np.log(np.exp(scores[row, order]).sum())
        np.testing.assert_allclose(shares[row], expected, atol=2e-5)
    assert len(np.unique(places[:, 0])) > 1


def test_the_evaluation_gives_the_answer_that_the_model_prefers(small: Small) -> None:
    """With everything sharded over eight devices; 11 scenes, so that the last batch is not full."""
    program, source = build_program(config(), tiny.mesh(2, 2, 2)), SCENES.build("")
    tokenizer = build_run_tokenizer(program.config, source, None)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), small.params, program.setup.abstract.params)
    maker = small.config.make_example(tokenizer, program.config.data)
    encoder = MeshEncoder(program.objective, tokenizer, 16, program.mesh, 8, HeldOut(program.objective, maker))
    evaluation = AnswerRankingConfig("toy", SCENES, k=100, predictions=True, first_twice=False)
    evaluator = evaluation.build(encoder, "")
    result = evaluator.run(params, step=0)
    known = [source[index]["answer"] for index in range(11)]
    assert evaluator.answers == sorted(set(known))
    rows = [maker.prompt(source[index]) for index in range(11)]
    batch = {key: np.stack([row[key] for row in rows]) for key in ("image", "text")}
    answers = maker.answer_rows(evaluator.answers)
    scores = []
    for answer in answers:
        log_p = small.log_p(small.params, batch, answer)
        own = log_p[:, np.arange(ANSWER_LENGTH - 1), answer[1:]]
        scores.append(np.where(answer[1:] == 0, 0.0, own).sum(axis=1))
    said = [evaluator.answers[place] for place in np.argmax(scores, axis=0)]
    lines = result.predictions["vqa/toy"]
    assert [line["answer"] for line in lines] == said
    right = np.mean([a == b for a, b in zip(said, known, strict=True)])
    assert result.metrics["vqa/toy/exact_match"] == pytest.approx(right)
    assert result.metrics.keys() >= {"vqa/toy/exact_match_blank", "vqa/toy/examples"}


def test_flops_of_the_formula_are_those_of_the_loss() -> None:
    for share in (0.4, 0.0):
        method = override(config().objective, {"distillation": share})
        objective = method.build(config().data.preprocess, jnp.float32)
        params, extra = jax.eval_shape(lambda o=objective: o.init(jax.random.key(0)))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
        inputs = (unbox(params), unbox(extra), method.batch_shapes(ROWS), keys, jax.ShapeDtypeStruct((), jnp.int32))
        counted = count_dot_flops(lambda *args, o=objective: o.loss(*args)[0][0], *inputs)
        assert counted == ROWS * method.forward_flops() * (1 + (share > 0))
        assert method.train_flops() == method.forward_flops() * (3 + (share > 0))


def write_lists(folder: Path) -> None:
    """Two lists as the authors publish theirs, and three images."""
    for name in ("a.png", "b.png", "vg/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), 90, np.uint8)).save(folder / name)
    said = ["red"] * 5 + ["dark red"] * 3 + ["pink", "a very long answer"]
    vqa = [
        {"question_id": 11, "question": "What colour is it?", "image": "a.png", "dataset": "vqa", "answer": said},
        {"question_id": 12, "question": "And where?", "image": "b.png", "dataset": "vqa"},
    ]
    vg = [{"question_id": 5, "question": "Is it red?", "image": "c.png", "dataset": "vg", "answer": "yes"}]
    for name, rows in (("vqa.json", vqa), ("vg_qa.json", vg)):
        (folder / name).write_text(json.dumps(rows))


def test_published_lists_become_rows(tmp_path: Path) -> None:
    write_lists(tmp_path)
    path = f"{tmp_path}/vqa.json,{tmp_path}/vg_qa.json"
    assert isinstance(source_for_path(path), QuestionListsConfig)
    source = QuestionListsConfig(path=path, vg_root=str(tmp_path / "vg")).build("")
    assert [len(source), source[2]["question_id"]] == [3, 5]
    whole = config()
    tokenizer = build_run_tokenizer(whole, source, None)
    assert tokenizer is not None
    maker = whole.objective.make_example(tokenizer, whole.data)
    row: Any = maker(source[0], None)
    assert {key: (x.shape, x.dtype) for key, x in row.items()} == {
        key: (x.shape[1:], x.dtype) for key, x in whole.objective.batch_shapes(1).items()
    }
    # Of the four answers the three that most people gave; the question is cleaned, and has no end token.
    np.testing.assert_allclose(row["weights"], [0.5, 0.3, 0.1])
    assert [tokenizer.encoder.decode(answer.tolist()) for answer in row["answers"]][:2] == ["red", "dark red"]
    assert (row["answers"][:, 0] == tokenizer.bos_id).all()
    assert ((row["answers"] == tokenizer.eos_id).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(row["text"], tokenizer(["what colour is it"])[0])
    assert tokenizer.eos_id not in row["text"]
    vg: Any = maker(source[2], None)
    np.testing.assert_allclose(vg["weights"], [0.5, 0.0, 0.0])
    assert vg["answers"][0, -1] in (0, tokenizer.eos_id)
    np.testing.assert_array_equal(vg["answers"][1:], [[tokenizer.bos_id, 0, 0, 0, 0]] * 2)
    with pytest.raises(BadRecord, match="its answer is not known"):
        maker(source[1], None)
    assert maker.prompt(source[1]).keys() == {"image", "text"}  # pyright: ignore
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadRecord, match=r"'b.png' can't be read"):
        maker.prompt(source[1])  # pyright: ignore


def test_the_published_numbers() -> None:
    whole = load_config(str(CONFIG_FILE))
    method, evaluation, rates = whole.objective, whole.evals[0], whole.optimizer
    assert isinstance(method, AlbefVqaConfig)
    assert isinstance(evaluation, AnswerRankingConfig)
    assert (method.image_size, method.text_length, method.distillation, method.momentum) == (384, 25, 0.4, 0.995)
    stacks = (method.model.text, method.model.fusion, method.model.decoder)
    assert [(stack.width, stack.depth, stack.cross_every) for stack in stacks] == [
        (768, 6, 0),
        (768, 6, 1),
        (768, 6, 1),
    ]
    assert (whole.data.batch_size, whole.data.augment.scale) == (256, (0.5, 1.0))  # pyright: ignore
    assert (evaluation.k, evaluation.score, evaluation.first_twice) == (128, "vqa", True)
    epoch = method.distillation_steps
    assert (whole.train.steps, rates.learning_rate, rates.weight_decay) == (8 * epoch, 2e-5, 0.02)
    # A stair each hundred steps from 1e-5 on, then a cosine once an epoch.
    found = [
        2e-5 * float(rates.schedule.factor(jnp.int32(s), whole.train.steps)) for s in (0, 99, 100, 399, 400, epoch)
    ]
    second = 1e-6 + 1.9e-5 * 0.5 * (1 + np.cos(np.pi / 8))
    assert found == pytest.approx([1e-5, 1e-5, 1.25e-5, 1.75e-5, 2e-5, second], rel=1e-5)
