"""Classes of texts beside one image or two, and text assignment: losses by hand, meshes, microbatches, FLOPs."""

import dataclasses
from typing import Any

import albef_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.assemble import build_program
from vlm_jax.config import Config
from vlm_jax.data.sources import ShapesStatementsConfig
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.pair_classifier import PairClassifierConfig, TextAssignerConfig
from vlm_jax.objectives.pair_classify import PairClassifyConfig
from vlm_jax.objectives.text_assignment import FIRST, NEITHER, SECOND, TextAssignmentConfig, assigned_images
from vlm_jax.parts import Part
from vlm_jax.schema import override

ROWS = 8


def config(kind: str) -> Config:
    """Of "one" or "two" images beside a text, or the "assignment" of texts to one of two."""
    base = cases.config()
    model: Any = base.objective.model  # pyright: ignore[reportAttributeAccessIssue]
    two = override(model.fusion, {"contexts": 2})
    if kind == "assignment":
        assigner = TextAssignerConfig(image=model.image, text=model.text, fusion=two, embed_dim=8)
        objective: Any = TextAssignmentConfig(model=assigner, text_length=cases.LENGTH)
        parts = (Part("image_projection", "image_projection/.*", frozen=True), Part("rest", ".*"))
        return dataclasses.replace(base, objective=objective, parts=parts)
    images = 1 + (kind == "two")
    classifier = PairClassifierConfig(
        image=model.image, text=model.text, fusion=two if images == 2 else model.fusion, classes=4 - images
    )
    objective = PairClassifyConfig(model=classifier, text_length=cases.LENGTH, distillation_steps=4)
    source = ShapesStatementsConfig(image_size=16, count=64, images=images)  # pyright: ignore[reportArgumentType]
    return override(base, {"objective": objective, "data.source": source})


def host_batch(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = cases.host_batch(seed, ROWS)
    del batch["identity"]
    if kind == "assignment":
        return batch
    if kind == "two":
        batch["image"] = np.stack([batch["image"], batch["image"][::-1]], axis=1)
    return batch | {"label": rng.integers(0, 3 if kind == "one" else 2, ROWS).astype(np.int32)}


def run_steps(kind: str, shape: tuple[int, int, int], accum: int) -> tuple[Any, list[dict[str, float]]]:
    mesh, history = tiny.mesh(*shape), []
    program = build_program(override(config(kind), {"train.accum_steps": accum}), mesh)
    with jax.set_mesh(mesh):
        state = program.setup.init()
        for index in range(2):
            batch = {k: jax.device_put(v, batch_sharding(mesh)) for k, v in host_batch(kind, index).items()}
            state, metrics = program.step(state, batch)
            history.append({name: float(total) / float(n) for name, (total, n) in metrics.items()})
    return state, history


@pytest.mark.parametrize("kind", ["two", pytest.param("assignment", marks=pytest.mark.slow)])
def test_mesh_and_microbatches_change_nothing(kind: str) -> None:
    """With dropout and drop path in model and copy, and wrong images from the whole batch."""
    (state, history), (other, others) = run_steps(kind, (1, 1, 1), 1), run_steps(kind, (2, 2, 2), 2)
    for got, want in zip(others, history, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["top1"] == pytest.approx(want["top1"])
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4)
    tiny.assert_trees_close(other.params, state.params, rtol=5e-4)
    tiny.assert_trees_close(other.extra, state.extra, rtol=5e-4)
    if kind == "two":
        # The share rises in four steps, and the copy follows at its pace.
        assert [entry["distillation"] for entry in history] == pytest.approx([0.0, 0.1])
        begun = unbox(config(kind).objective.build(config(kind).data.preprocess, jnp.float32).init(jax.random.key(0)))[
            0
        ]
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.extra["averaged"]["text"], begun["text"])
        gone = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params["text"], begun["text"])
        assert 0 < max(jax.tree.leaves(moved)) < 0.011 * max(jax.tree.leaves(gone))


@pytest.mark.parametrize("kind", ["one", "two"])
def test_the_loss_is_the_published_one(kind: str) -> None:
    """(1 - a) cross-entropy with labels + a with what the averaged model says, in torch; of texts and their images."""
    torch = pytest.importorskip("torch")
    own: Any = override(config(kind).objective.without_dropping(), {"distillation_steps": 0})  # pyright: ignore
    own = override(own, {f"model.{part}.attention_dropout": 0.0 for part in ("text", "fusion")})
    objective = own.build(config(kind).data.preprocess, jnp.float32)
    params, extra = unbox(jax.jit(objective.init)(jax.random.key(0)))
    params = jax.tree.map(lambda x: 3 * x, params)
    keys, batch = jax.random.split(jax.random.key(1), ROWS), host_batch(kind)

    @jax.jit
    def found(params: Any, extra: Any, batch: Any) -> Any:
        (total, count), aux = objective.loss(params, extra, batch, keys, jnp.int32(7))
        scores = [objective.pair_class_scores(p, batch) for p in (params, extra["averaged"])]
        return total / count, aux.metrics["top1"], scores, objective.after(extra, params, aux.updates, jnp.int32(7))

    loss, top1, (online, slow), new = found(params, extra, batch)
    logits, taught, labels = (torch.tensor(np.asarray(x)) for x in (online, slow, batch["label"].astype(np.int64)))
    assert float((logits - taught).abs().max()) > 0.01
    cross = torch.nn.functional.cross_entropy
    expected = 0.6 * cross(logits, labels) + 0.4 * cross(logits, torch.softmax(taught, dim=1))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(top1[0]) == float((logits.argmax(dim=1) == labels).sum())
    wanted = jax.tree.map(lambda old, now: 0.995 * old + 0.005 * now, extra["averaged"], params)
    tiny.assert_trees_close(new["averaged"], wanted, rtol=1e-6)
    # A row's own images, each at its place, and nothing of other rows.
    changed = {name: x.copy() for name, x in batch.items()}
    changed["image"][3] = changed["image"][3][::-1]
    if kind == "two":
        changed["image"][3] = batch["image"][3][::-1]
    rows = np.abs(np.asarray(found(params, extra, changed)[2][0] - online)).max(axis=1) > 1e-5
    assert rows.tolist() == [row == 3 for row in range(ROWS)]


@pytest.mark.parametrize("kind", ["one", "two", "assignment"])
def test_flops_of_the_formula_are_those_of_the_loss(kind: str) -> None:
    own: Any = config(kind).objective
    objective = own.build(config(kind).data.preprocess, jnp.float32)
    params, extra = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    shapes = (unbox(params), unbox(extra), own.batch_shapes(ROWS), keys, jax.ShapeDtypeStruct((), jnp.int32))
    counted = count_dot_flops(lambda *args: objective.loss(*args)[0][0], *shapes)
    if kind == "assignment":
        width = own.model.image.pooled_width
        trained = (own.train_flops() - 2 * width * 8) / 3
        assert counted == ROWS * (trained + 2 * width * 8) + 2 * ROWS**2 * 8  # the cosines grow with the batch
    else:
        assert counted == ROWS * 2 * own.model.forward_flops(cases.LENGTH)
        assert own.train_flops() == 4 * own.model.forward_flops(cases.LENGTH)


def test_texts_are_assigned_to_their_own_image_or_to_none() -> None:
    """Wrong ones are others, two of them differ, and they are drawn as the softmax of their cosines says."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 3)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.asarray([FIRST, SECOND, NEITHER, FIRST, NEITHER])
    draws = 4000
    keys = jax.random.split(jax.random.key(0), (draws, 5))
    index, found = jax.jit(jax.vmap(lambda key: assigned_images(features, labels, key, 0.5)))(keys)
    index = np.asarray(index)
    assert np.all(np.asarray(found)) and np.all(index[..., 0] != index[..., 1])
    for row, label in enumerate(labels):
        own = index[:, row] == row
        assert own.any(axis=0).tolist() == [label == FIRST, label == SECOND] == own.all(axis=0).tolist()
    weights = np.exp(features @ features.T / 0.5) * ~np.eye(5, dtype=bool)
    weights /= weights.sum(axis=1, keepdims=True)
    for row, place in ((0, 1), (1, 0), (2, 0)):
        shares = np.bincount(index[:, row, place], minlength=5) / draws
        np.testing.assert_allclose(shares, weights[row], atol=0.03)
    alone = assigned_images(features[:2], jnp.asarray([FIRST, NEITHER]), keys[0, :2], 0.5)[1]
    assert alone.tolist() == [True, False]  # of two rows there is no second wrong image
