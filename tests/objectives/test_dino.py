"""DINOv2's training: loss by loops, meshes and microbatches, the teacher's way, what is judged, and a broken run."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import dino_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from sinkhorn_loop import published_sinkhorn

import vlm_jax
from vlm_jax.assemble import build_program
from vlm_jax.checkpoint import read_params
from vlm_jax.config import load_config
from vlm_jax.evaluate import evaluate_checkpoint
from vlm_jax.flops import TRAIN_OVER_FORWARD, count_dot_flops
from vlm_jax.losses.dino import koleo
from vlm_jax.mesh import batch_sharding
from vlm_jax.models.dino import PrototypeHead
from vlm_jax.objectives.base import normalise_images
from vlm_jax.preemption import EXIT_PREEMPTED, StopRequest
from vlm_jax.schema import ConfigError, override, validate
from vlm_jax.train import _Run, train

# As in test_step: with this eps Adam's updates stay proportional to the gradient.
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}
DROPPED = {"objective__model__image__drop_path": 0.3, "objective__model__image__drop_path_rates": "uniform"}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def reference() -> tuple[Any, list[dict[str, float]]]:
    return cases.run_steps(cases.program(**SMOOTH, **DROPPED), 2)


@pytest.mark.parametrize(("shape", "accum"), [((8, 1, 1), 1), ((4, 2, 1), 2), ((2, 2, 2), 1), ((1, 1, 1), 4)], ids=str)
def test_mesh_and_microbatches_change_nothing(shape: tuple[int, int, int], accum: int, reference: Any) -> None:
    """Losses, gradients, student and teacher; with drop path, whose draws belong to image and view."""
    program = cases.program(tiny.mesh(*shape), train__accum_steps=accum, **SMOOTH, **DROPPED)
    state, history = cases.run_steps(program, 2)
    for got, want in zip(history, reference[1], strict=True):
        for name in ("loss", "dino_local_loss", "dino_global_loss", "ibot_loss", "koleo_loss"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4)
    tiny.assert_trees_close(state.params, reference[0].params, rtol=5e-4)
    tiny.assert_trees_close(state.extra, reference[0].extra, rtol=5e-4)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def test_the_loss_is_that_of_loops_over_images_views_and_patches() -> None:
    """From the models' outputs on each view by itself, by the formulas of the published training code."""
    program = cases.program()
    objective: Any = program.objective
    config = objective.config.model
    state, batch = cases.first_state(program), cases.batch(program.mesh)
    # A teacher of its own, so that mixing up the two is seen.
    teacher = jax.tree.map(lambda x: x * 1.1, state.params)
    keys = jax.random.split(jax.random.key(0), cases.ROWS)
    loss = jax.jit(objective.loss)
    (total, count), aux = loss(state.params, {"teacher": teacher}, batch, keys, jnp.int32(1))

    temperature = 0.04 + 0.03 / 3  # the second of four steps of a rise
    masked = np.asarray(batch["masked"])
    flat = (np.arange(32) == masked[:, :, None]).any(axis=1).reshape(cases.ROWS, 2, 16)

    @jax.jit
    def scores(params: Any, images: jax.Array, masks: jax.Array | None) -> tuple[jax.Array, ...]:
        """Of a class token, of each patch, and the class token itself."""
        pixels = normalise_images(images, objective.preprocess)
        out = objective.tower.apply({"params": params["image"]}, pixels, masked_BxN=masks)
        tokens = {"dino": out["pooled"], "ibot": out["tokens"][:, 1:].reshape(-1, 32)}
        dino, ibot = (
            PrototypeHead(config.dino_head).apply({"params": params[f"{name}_head"]}, x) for name, x in tokens.items()
        )
        return dino, ibot.reshape(cases.ROWS, -1, ibot.shape[-1]), out["pooled"]

    views = [batch["global_views"][:, v] for v in range(2)]
    student = [tiny.host(scores(state.params, view, flat[:, v])) for v, view in enumerate(views)]
    local = [tiny.host(scores(state.params, batch["local_views"][:, v], None))[0] for v in range(3)]
    taught = [tiny.host(scores(teacher, view, None)) for view in views]
    dino_targets = published_sinkhorn(np.concatenate([t[0] for t in taught]), temperature).reshape(2, cases.ROWS, -1)
    places = [(b, v, n) for b in range(cases.ROWS) for v in range(2) for n in range(16) if flat[b, v, n]]
    ibot_targets = published_sinkhorn(np.stack([taught[v][1][b, n] for b, v, n in places]), temperature)

    def entropy(target: np.ndarray, score: np.ndarray) -> float:
        return -float((target * log_softmax(score.astype(np.float64) / 0.1)).sum())

    images, pairs = range(cases.ROWS), 2 + 2 * 3
    crossed = sum(entropy(dino_targets[1 - v][b], student[v][0][b]) for v in range(2) for b in images)
    small = sum(entropy(dino_targets[v][b], local[s][b]) for v in range(2) for s in range(3) for b in images)
    patches = sum(
        entropy(target, student[v][1][b, n]) / flat[b, v].sum()
        for (b, v, n), target in zip(places, ibot_targets, strict=True)
    )
    spread = sum(float(koleo(student[v][2]).sum()) for v in range(2))
    expected = ((crossed + small) / pairs + patches / 2 + 0.1 * spread) / cases.ROWS
    assert float(count) == cases.ROWS
    assert float(total / count) == pytest.approx(expected, rel=1e-5)
    assert float(aux.metrics["ibot_loss"][0]) == pytest.approx(patches / 2, rel=1e-5)


def test_the_teacher_and_the_centre_follow_and_last_layers_wait() -> None:
    """Teacher and centre by the published averages, written out; the last layers stand until their first step."""
    program = cases.program(train__steps=8, parts__last__start_step=2, objective__centring="mean")
    objective: Any = program.objective
    scores = jax.jit(lambda params, images: objective.module.apply({"params": params}, images)["dino_scores"])
    with jax.set_mesh(program.mesh):
        state = cases.first_state(program)
        start = teacher = tiny.host(state.params)
        centre = np.zeros(32)
        tiny.assert_trees_equal(state.extra["teacher"], teacher)
        for step in range(3):
            batch = cases.batch(program.mesh, seed=step)
            images = normalise_images(batch["global_views"].reshape(-1, 16, 16, 3), objective.preprocess)
            centre = 0.9 * centre + 0.1 * np.asarray(scores(state.extra["teacher"], images)).mean(axis=0)
            state, metrics = program.step(state, batch)
            np.testing.assert_allclose(state.extra["centre"]["dino"], centre, atol=1e-5)
            still = np.array_equal(state.params["ibot_head"]["last"]["kernel"], start["ibot_head"]["last"]["kernel"])
            assert still == (step < 2)
            assert not np.array_equal(state.params["ibot_head"]["fc3"]["kernel"], start["ibot_head"]["fc3"]["kernel"])
            momentum = 1 + (0.994 - 1) * 0.5 * (1 + np.cos(np.pi * step / 8))
            assert float(metrics["teacher_momentum"][0]) == pytest.approx(momentum, rel=1e-6)
            teacher = jax.tree.map(lambda t, p, m=momentum: m * t + (1 - m) * p, teacher, tiny.host(state.params))
    tiny.assert_trees_close(state.extra["teacher"], teacher, rtol=1e-6)
    assert not np.array_equal(state.params["image"]["pos_embed"], teacher["image"]["pos_embed"])


def test_the_teacher_is_split_like_the_student() -> None:
    abstract = cases.program(tiny.mesh(2, 2, 2)).setup.abstract
    ours, theirs = (jax.tree.map(lambda x: x.sharding.spec, tree) for tree in (abstract.params, abstract.extra))
    assert ours == theirs["teacher"]
    assert ours["dino_head"]["last"]["kernel"] == P("fsdp", "tensor")


@pytest.mark.parametrize("swiglu", [False, True])
def test_flops_of_the_formula_are_those_of_the_step(swiglu: bool) -> None:
    gated = {"objective__model__image__gated": swiglu, "objective__model__image__activation": "silu"}
    program = cases.program(**(gated if swiglu else {}))
    objective, config = program.objective, program.config.objective
    state, batch = program.setup.abstract, config.batch_shapes(cases.ROWS)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), cases.ROWS))
    counted = count_dot_flops(
        lambda *arguments: objective.loss(*arguments)[0][0], state.params, state.extra, batch, keys, state.step
    )
    student, teacher = config.forward_flops()  # pyright: ignore[reportAttributeAccessIssue]
    neighbours = 2 * (2 * cases.ROWS**2 * 32)  # grows with the batch, so it is no property of an image
    resize = 2 * (2 * 4 * 4 * 32 + 2 * 2 * 4 * 32)  # of the local views' positions, once a batch
    assert counted == pytest.approx(cases.ROWS * (student + teacher) + neighbours + resize, rel=1e-12)
    assert config.train_flops() == TRAIN_OVER_FORWARD * student + teacher


class StopAt(StopRequest):
    """A stop request that comes before a chosen step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def now(self, step: int) -> bool:
        return step == self.step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("dino")
    assert train(cases.config(train__steps=4, mesh__data=2, mesh__fsdp=4), str(workdir)) == 0
    return workdir


def stored(workdir: Path, which: str) -> Any:
    return read_params(workdir, prefer=which)[0]  # pyright: ignore[reportArgumentType]


def test_a_broken_run_ends_as_the_unbroken_one(run: Path, tmp_path: Path) -> None:
    config = cases.config(train__steps=4, mesh__data=2, mesh__fsdp=4)
    assert train(config, str(tmp_path), stop=StopAt(2)) == EXIT_PREEMPTED
    assert train(config, str(tmp_path)) == 0
    for which in ("params", "ema"):
        tiny.assert_trees_equal(stored(tmp_path, which), stored(run, which))


def test_the_teacher_is_what_is_judged(run: Path, tmp_path: Path) -> None:
    student, teacher = stored(run, "params"), stored(run, "ema")
    assert not np.array_equal(student["image"]["pos_embed"], teacher["image"]["pos_embed"])
    model = vlm_jax.load(run)
    tiny.assert_trees_equal(model.params, teacher)
    during = json.loads((run / "eval.json").read_text())
    alone = evaluate_checkpoint(str(run), str(tmp_path), {})
    assert alone.items() <= during.items()
    assert model.encode_image(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 32)


def test_a_warm_start_gives_teacher_and_student_the_old_teacher(run: Path, tmp_path: Path) -> None:
    config = cases.config(init_from__path=str(run), mesh__data=2, mesh__fsdp=4, evals=())
    program = build_program(config)
    with jax.set_mesh(program.mesh):
        new = _Run(program, [None], str(tmp_path), time.time(), "")
        new.close()
    for tree in (new.state.params, new.state.extra["teacher"]):
        tiny.assert_trees_equal(tree, stored(run, "ema"))
    kernel = new.state.extra["teacher"]["dino_head"]["last"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8 // 4, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__augment": cases.config().objective.views.first}, "data.augment has no effect here"),  # pyright: ignore
        ({"objective__views__local_size": 10}, "views.local_size = 10 must be a multiple of"),
        ({"objective__model__image__mask_token": False}, "mask_token = false must be true"),
        ({"objective__model__image__pos_resize": None}, "pos_resize = None must name a form"),
        ({"objective__masks__share": (0.0, 0.01)}, "masks none of 16 patches"),
        ({"objective__momentum": 1.5}, "momentum = 1.5 must lie in"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_can_not_be_is_a_sentence(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(cases.config(**overrides))


def test_the_published_numbers() -> None:
    config = load_config(f"{CONFIGS}/dinov2_vitl14.py")
    objective, optimizer, parts = config.objective, config.optimizer, {part.name: part for part in config.parts}
    assert isinstance(objective, type(cases.config().objective))
    image = objective.model.image
    assert (image.width, image.depth, image.mlp_dim, image.gated, image.drop_path) == (1024, 24, 2736, True, 0.4)
    heads = [(head.prototypes, head.bottleneck) for head in (objective.model.dino_head, objective.model.ibot_head)]
    assert heads == [(131_072, 384), (131_072, 256)]
    assert (config.data.batch_size, config.train.steps, optimizer.schedule.warmup_steps) == (3072, 625_000, 100_000)
    assert optimizer.learning_rate == pytest.approx(2e-4 * 3**0.5)
    end = jnp.int32(config.train.steps)
    assert optimizer.weight_decay * float(optimizer.decay_schedule.factor(end, 625_000)) == pytest.approx(0.2)
    assert optimizer.learning_rate * float(optimizer.schedule.factor(end, 625_000)) == pytest.approx(1e-6, rel=1e-3)
    assert (parts["patch_embed"].lr, parts["last_layers"].start_step) == (0.2, 1250)
    assert (objective.slots, objective.views.local_views, objective.views.local_size) == (128, 8, 98)
    dino: Any = dataclasses.replace(objective, momentum_steps=625_000).build(config.data.preprocess, jnp.float32)
    temperatures = [float(dino._temperature(jnp.int32(step))) for step in (0, 37_499, 600_000)]
    assert temperatures == pytest.approx([0.04, 0.07, 0.07])
    assert float(dino._momentum(end)) == pytest.approx(1.0)
    small = override(config, {"train.steps": 10}).objective.phases(10)[0][1]
    assert small.momentum_steps == 10  # pyright: ignore[reportAttributeAccessIssue]


def test_the_step_lowers_at_full_size() -> None:
    """The whole step of ViT-L/14 at batch 3072 from shapes alone, weights and teacher split over eight devices."""
    program = build_program(load_config(f"{CONFIGS}/dinov2_vitl14.py"))
    sharding = batch_sharding(program.mesh)
    shapes = program.config.objective.batch_shapes(program.config.data.batch_size)
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for key, x in shapes.items()}
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.setup.abstract, batch)  # pyright: ignore[reportFunctionMemberAccess]
    state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, program.setup.abstract)
    assert metrics["loss"][0].shape == ()
    kernel = program.setup.abstract.extra["teacher"]["ibot_head"]["last"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (256 // 8, 131_072)
