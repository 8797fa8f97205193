"""ALBEF's training: meshes and microbatches, scopes and identities, what a weight of 0 saves, copies and resumption."""

import dataclasses
from pathlib import Path
from typing import Any

import albef_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from vlm_jax.assemble import build_program
from vlm_jax.checkpoint import CheckpointConfig, Checkpointer, read_extra, read_params
from vlm_jax.config import load_config
from vlm_jax.data.text import build_tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD, count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.preemption import EXIT_PREEMPTED, StopRequest
from vlm_jax.schema import ConfigError, validate
from vlm_jax.train import train

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def reference() -> tuple[Any, list[dict[str, float]]]:
    return cases.run_steps(cases.program())


@pytest.mark.parametrize(
    ("shape", "accum"),
    [
        ((2, 2, 2), 2),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), 2, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mesh_and_microbatches_change_nothing(shape: tuple[int, int, int], accum: int, reference: Any) -> None:
    """Losses, hard negatives, gradients, copies and queues; with dropout in model and copy, and drop path."""
    state, history = cases.run_steps(cases.program(tiny.mesh(*shape), train__accum_steps=accum))
    for got, want in zip(history, reference[1], strict=True):
        for name in ("loss", "itc_loss", "itm_loss", "mlm_loss", "itm_accuracy"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4)
    tiny.assert_trees_close(state.params, reference[0].params, rtol=5e-4)
    tiny.assert_trees_close(state.extra, reference[0].extra, rtol=5e-4)


def test_the_queue_goes_around_and_knows_whose_its_features_are(reference: Any) -> None:
    """Two batches of 16 in 24 places: the second begins at 16 and ends at 8."""
    queue = tiny.host(reference[0].extra["queue"])
    assert int(queue["pointer"]) == 8
    ids = [cases.host_batch(seed)["identity"] for seed in (0, 1)]
    np.testing.assert_array_equal(queue["identity"], np.concatenate([ids[1][8:], ids[0][8:], ids[1][:8]]))
    np.testing.assert_allclose(np.linalg.norm(queue["image"], axis=1), 1.0, atol=1e-5)


def test_copies_and_queues_are_laid_out_like_what_they_follow() -> None:
    abstract = cases.program(tiny.mesh(2, 2, 2)).setup.abstract
    ours, copies = (jax.tree.map(lambda x: x.sharding.spec, tree) for tree in (abstract.params, abstract.extra))
    assert copies["averaged"] == {name: ours[name] for name in copies["averaged"]}
    assert ours["fusion"]["blocks"]["cross"]["key"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert ours.keys() - copies["averaged"].keys() == {"matching_head", "temperature"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlm_weight": 0.0},
        {"itm_weight": 0.0},
        {"itc_weight": 0.0},
        {"itc_weight": 0.0, "mlm_weight": 0.0},
        {"momentum_image": False},
        {"momentum_text": False},
        {"distillation": 0.0},
        {"queue": 0},
    ],
    ids=str,
)
def test_flops_of_the_formula_are_those_of_the_loss(changes: dict[str, Any]) -> None:
    """And so a weight of 0, a tower without a copy, or no queue cost what the formula says: nothing."""
    rows = 6
    config: Any = cases.config(**{f"objective__{key}": value for key, value in changes.items()}).objective
    objective = config.build(cases.config().data.preprocess, jnp.float32)
    params, extra = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    params, batch = unbox(params), config.batch_shapes(rows)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    counted = count_dot_flops(lambda *args: objective.loss(*args)[0][0], params, extra, batch, keys, step)
    online, averaged = config.forward_flops()
    products = 2 + 2 * (config.distillation > 0)
    within = products * 2 * rows**2 * config.model.embed_dim * (config.itc_weight > 0)  # grows with the batch
    assert counted == rows * (online + averaged + products * config.queue_flops()) + within
    full = cases.config().objective.train_flops()
    assert (config.train_flops() < full) == bool(changes)
    assert config.train_flops() >= TRAIN_OVER_FORWARD * online + averaged


def loss_parts(rows: int, **changes: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(objective, parameters, extra, embeddings of random features) without any encoder run."""
    config: Any = cases.config(**{f"objective__{key}": value for key, value in changes.items()}).objective
    objective = config.build(cases.config().data.preprocess, jnp.float32)
    rng = np.random.default_rng(1)

    def features(count: int) -> np.ndarray:
        x = rng.normal(size=(count, 8)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    names = ("image_features", "text_features", "slow_image_features", "slow_text_features")
    embeddings: dict[str, Any] = {name: features(rows) for name in names} | {"rows": np.ones(rows, np.float32)}
    embeddings["identity"] = cases.host_batch(0, rows)["identity"]
    ids = np.full((cases.QUEUE, 2), -1, np.int32)
    ids[3, 0], ids[4, 1] = embeddings["identity"][6, 0], embeddings["identity"][7, 1]
    queue = {"image": features(cases.QUEUE), "text": features(cases.QUEUE), "identity": ids, "pointer": np.int32(0)}
    return objective, {"temperature": jnp.float32(0.07)}, {"queue": queue}, embeddings


@pytest.mark.parametrize("positives", ["row", "image", "image_or_caption"])
@pytest.mark.parametrize("scope", [("global", 0), ("group", 4)], ids=str)
def test_the_contrast_is_that_of_loops(positives: str, scope: tuple[str, int]) -> None:
    """Each row by itself: which columns there are, which of them share the hard mass, and the copy's softmax."""
    rows = 8
    objective, params, extra, found = loss_parts(
        rows, positives=positives, negatives_scope=scope[0], negatives_group=scope[1], itm_weight=0.0, mlm_weight=0.0
    )
    _, aux = objective.pair_loss(params, extra, found, jnp.int32(0))
    ids, queue = found["identity"], extra["queue"]
    kinds = {"row": 0, "image": 1, "image_or_caption": 2}[positives]
    total = 0.0
    for own, other in (("image", "text"), ("text", "image")):
        for b in range(rows):
            columns = [(found[f"slow_{other}_features"][c], ids[c]) for c in range(rows)]
            kept = [c for c in range(rows) if not scope[1] or b // scope[1] == c // scope[1]]
            vectors = [columns[c][0] for c in kept] + list(queue[other])
            same = [c == b or any(ids[b][k] == columns[c][1][k] for k in range(kinds)) for c in kept]
            same += [any(ids[b][k] == row[k] for k in range(kinds)) for row in queue["identity"]]
            logits = np.stack(vectors).astype(np.float64) @ found[f"{own}_features"][b] / 0.07
            taught = np.stack(vectors).astype(np.float64) @ found[f"slow_{own}_features"][b] / 0.07
            soft = np.exp(taught - taught.max()) / np.exp(taught - taught.max()).sum()
            target = 0.4 * soft + 0.6 * np.asarray(same) / sum(same)
            log_p = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            total -= 0.5 * float((target * log_p).sum())
    assert float(aux.metrics["itc_loss"][0]) == pytest.approx(total, rel=1e-5)


def test_a_device_scope_is_that_of_groups_of_its_rows() -> None:
    """Four devices of four rows have the loss of groups of four, and not that of the whole batch."""
    losses = {}
    for name, scope, group, mesh in (
        ("device", "device", 0, tiny.mesh(4)),
        ("group", "group", 4, tiny.mesh(4)),
        ("global", "global", 0, tiny.mesh(4)),
    ):
        objective, params, extra, found = loss_parts(
            16, negatives_scope=scope, negatives_group=group, itm_weight=0.0, mlm_weight=0.0
        )
        placed = {key: jax.device_put(value, batch_sharding(mesh)) for key, value in found.items()}
        with jax.set_mesh(mesh):
            (total, count), _ = jax.jit(objective.pair_loss)(params, extra, placed, jnp.int32(0))
        losses[name] = float(total / count)
    assert losses["device"] == pytest.approx(losses["group"], rel=1e-6)
    assert abs(losses["device"] - losses["global"]) > 1e-3


def test_the_share_of_the_copy_rises() -> None:
    objective, *_ = loss_parts(8, distillation_steps=10)
    assert [float(objective._share(jnp.int32(step))) for step in (0, 5, 10, 99)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    objective, *_ = loss_parts(8)
    assert float(objective._share(jnp.int32(0))) == pytest.approx(0.4)


def test_the_temperature_is_clamped() -> None:
    objective, *_ = loss_parts(8)
    for value, expected in ((2.0, 0.5), (-1.0, 0.001), (0.1, 0.1)):
        params = {"temperature": jnp.float32(value), "image": {}}
        assert float(objective.constrain(params, {"statistics": None})["temperature"]) == pytest.approx(expected)


class StopAt(StopRequest):
    """A stop request that comes before a chosen step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def now(self, step: int) -> bool:
        return step == self.step


def test_copies_queues_and_pointer_are_in_the_checkpoint(reference: Any, tmp_path: Path) -> None:
    """Saved on one device and restored on eight, bit for bit."""
    state = reference[0]
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every=1))
    checkpointer.save(2, state, data_position=32, config={}, tokenizer=None, preprocess={})
    restored = checkpointer.restore(cases.program(tiny.mesh(2, 2, 2)).setup.abstract)
    checkpointer.close()
    assert restored is not None
    tiny.assert_trees_equal(restored[0], state)
    assert int(restored[0].extra["queue"]["pointer"]) == 8


@pytest.mark.slow
def test_a_broken_run_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    """Bit for bit, copies, queues and pointer too."""
    config = cases.config(train__steps=4, mesh__data=2, mesh__fsdp=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(config, str(whole)) == 0
    assert train(config, str(broken), stop=StopAt(2)) == EXIT_PREEMPTED
    assert train(config, str(broken)) == 0
    tiny.assert_trees_equal(read_params(broken)[0], read_params(whole)[0])
    extra = read_extra(whole)
    assert extra.keys() == {"averaged", "queue"}
    assert int(extra["queue"]["pointer"]) == 4 * cases.ROWS % cases.QUEUE
    tiny.assert_trees_equal(read_extra(broken), extra)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective__itc_weight": -1.0}, "itc_weight = -1.0 must not be negative"),
        ({f"objective__{name}_weight": 0.0 for name in ("itc", "itm", "mlm")}, "leave no loss"),
        ({"objective__negatives_group": 4}, "negatives_group = 4: give it if and only if"),
        ({"objective__negatives_scope": "group", "objective__negatives_group": 3}, "= 3 does not divide"),
        ({"objective__text_length": 99}, "text_length = 99 exceeds"),
        ({"data__tokenizer__length": 9}, "must equal config.objective.text_length = 8"),
        ({"objective__model__fusion__cross_every": 0}, "would fuse nothing"),
        ({"objective__model__fusion__depth": 3, "objective__model__fusion__cross_every": 2}, "must divide depth = 3"),
        ({"objective__model__feature_layer": 3}, "is no layer of a text encoder of 2"),
        ({"objective__temperature_limits": (0.1, 0.5)}, "must hold model.temperature_init"),
        ({"objective__hidden_words__masked": 0.95}, "their sum must not exceed 1"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_can_not_be_is_a_sentence(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(cases.config(**overrides))


@pytest.mark.parametrize(("name", "pairs"), [("albef_4m", 5_100_000), ("albef_14m", 15_100_000)])
def test_the_published_numbers(name: str, pairs: int) -> None:
    config = load_config(f"{CONFIGS}/{name}.py")
    objective: Any = config.objective
    model, optimizer = objective.model, config.optimizer
    assert (model.image.width, model.image.depth, model.image.image_size, model.image.patch_size) == (768, 12, 256, 16)
    assert (model.text.depth, model.fusion.depth, model.text.width, model.embed_dim) == (6, 6, 768, 256)
    assert (objective.queue, objective.momentum, objective.distillation, objective.text_length) == (
        65536,
        0.995,
        0.4,
        25,
    )
    assert (optimizer.learning_rate, optimizer.weight_decay, config.data.batch_size) == (1e-4, 0.02, 512)
    epoch = pairs // 512
    assert (config.train.steps, objective.distillation_steps) == (30 * epoch, epoch)
    factor = optimizer.schedule.factor
    assert float(factor(jnp.int32(150), 30 * epoch)) == pytest.approx(0.145)
    assert float(factor(jnp.int32(29 * epoch), 30 * epoch)) == pytest.approx(0.102465, rel=1e-4)


def test_the_step_lowers_at_full_size() -> None:
    """The whole step at the published size and batch from shapes alone, over eight devices."""
    program = build_program(load_config(f"{CONFIGS}/albef_4m.py"))
    with jax.set_mesh(program.mesh):
        step: Any = program.step
        lowered = step.lower(program.setup.abstract, program.batch_shapes(0))
    state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, program.setup.abstract)
    assert metrics["loss"][0].shape == ()
    count = sum(x.size for x in jax.tree.leaves(program.setup.abstract.params))
    assert count == pytest.approx(
        210e6, rel=0.01
    )  # paper, section 4.1: 123.7M of the encoders of text and pairs, 85.8M


def test_identities_stand_in_the_rows() -> None:
    """Equal for one image and for one caption, wherever they stand; absent where nothing asks for them."""
    config = cases.config()
    tokenizer = build_tokenizer(config.data.tokenizer, ["a red circle and a blue star"])
    make = config.objective.make_example(tokenizer, config.data)
    image = np.zeros((16, 16, 3), np.uint8)
    records = [
        {"image": image, "texts": (text,), "key": key, "where": "x", **more}
        for text, key, more in (
            ("a red star", "1", {"image_id": "p"}),
            ("a blue star", "2", {"image_id": "p"}),
            ("a red star", "3", {}),
        )
    ]
    first, second, third = (make(record, None)["identity"] for record in records)
    assert first[0] == second[0] != third[0]
    assert first[1] == third[1] != second[1]
    assert {x.dtype for x in (first, second, third)} == {np.dtype(np.int32)}
    plain = dataclasses.replace(config.objective, positives="row")  # pyright: ignore[reportCallIssue]
    assert "identity" not in plain.make_example(tokenizer, config.data)(records[0], None)
