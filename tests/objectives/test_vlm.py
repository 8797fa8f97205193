"""Vision-language training: its loss by hand, meshes, microbatches, frozen parts, and what it refuses."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.assemble import build_program
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.tiles import AnyresTiling
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.model_flops import step_flops
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.projector import (
    LinearProjectorConfig,
    MlpProjectorConfig,
    PixelShuffleConfig,
    ProjectorConfig,
    ResamplerConfig,
)
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.parts import Part
from vlm_jax.schema import ConfigError, override, validate

LENGTH, TILES, ROWS = 16, 2, 16
TOWER = ViTConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, mlp_dim=32, pool="none")
DECODER = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=64)
CONFIG = VlmConfig(
    model=VisionLanguageConfig(image=TOWER, layer=-2, newline=True, decoder=DECODER), length=LENGTH, tiles=TILES
)
CHAT = ChatConfig(row_length=LENGTH, max_tiles=TILES)
FROZEN_TOWER = (Part("image", "image/.*", frozen=True), Part("projector", "projector/.*"), Part("rest", ".*"))
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1, "data__chat": CHAT, "data__augment": None}


def rows(mesh: Any, count: int = ROWS, seed: int = 0) -> dict[str, jax.Array]:
    """Two documents in a row, with 0 to 2 images; the rows learn very different numbers of tokens, some none."""
    rng = np.random.default_rng(seed)
    host = {
        "text": rng.integers(3, 64, (count, LENGTH)).astype(np.int32),
        "segments": np.repeat([[1] * 9 + [2] * 5 + [0] * 2], count, axis=0).astype(np.int32),
        "positions": np.repeat([[*range(9), *range(5), 0, 0]], count, axis=0).astype(np.int32),
        "supervised": rng.random((count, LENGTH)) < (np.arange(count) % 4)[:, None] / 4,
        "tiles": rng.integers(0, 256, (count, TILES, 8, 8, 3)).astype(np.uint8),
        "tile_slots": np.full((count, LENGTH), -1, np.int32),
        "tile_count": (np.arange(count) % 3).astype(np.int32),
    }
    host["supervised"][:, :5] = False
    for row, tiles in enumerate(host["tile_count"]):
        host["tile_slots"][row, 1 : 1 + 4 * min(tiles, 1)] = np.arange(4 * min(tiles, 1))
        host["tile_slots"][row, 9 : 9 + 4 * max(0, tiles - 1)] = np.arange(4, 4 * max(1, tiles))
        host["tile_slots"][row, 5] = -2 if tiles else -1
    return {name: jax.device_put(value, batch_sharding(mesh)) for name, value in host.items()}


def objective(config: VlmConfig = CONFIG, **changes: Any) -> Any:
    return override(config, changes).build(PreprocessConfig(), jnp.float32)


@pytest.fixture(scope="module")
def params() -> Any:
    return unbox(jax.jit(objective().init)(jax.random.key(0))[0])


def by_hand(params: Any, batch: Any, vlm: Any) -> tuple[np.ndarray, np.ndarray]:
    """(nats of every token that is learned, its row)."""
    logits = np.asarray(jax.jit(vlm.outputs)(params, batch)["logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    host = jax.tree.map(np.asarray, batch)
    counted = [
        (row, t)
        for row in range(len(logits))
        for t in range(LENGTH - 1)
        if host["segments"][row, t] == host["segments"][row, t + 1] > 0 and host["supervised"][row, t + 1]
    ]
    nats = [-log_p[row, t, host["text"][row, t + 1]] for row, t in counted]
    return np.asarray(nats), np.asarray([row for row, _ in counted])


def test_the_loss_is_the_mean_over_what_the_assistant_says(params: Any) -> None:
    batch = rows(tiny.mesh())
    (total, count), aux = jax.jit(objective().loss)(params, {}, batch, None, jnp.int32(0))
    nats, row = by_hand(params, batch, objective())
    assert count == len(nats) > 20
    assert float(total / count) == pytest.approx(nats.mean(), rel=1e-5)
    assert aux.metrics["unsupervised_rows"] == (ROWS - len(set(row)), ROWS)
    assert len(set(row)) < ROWS


def test_the_mean_of_the_means_of_devices(params: Any) -> None:
    """Groups of four rows, as four devices would have them; one of them learns nothing and doesn't count."""
    batch = rows(tiny.mesh())
    batch["supervised"] = batch["supervised"].at[1::4].set(False)
    nats, row = by_hand(params, batch, objective())
    means = [nats[row % 4 == group].mean() for group in range(4) if (row % 4 == group).any()]
    assert len(means) < 4
    (total, count), _ = jax.jit(objective(mean_rows=4).loss)(params, {}, batch, None, jnp.int32(0))
    assert count == len(means)
    assert float(total / count) == pytest.approx(np.mean(means), rel=1e-5)
    assert abs(np.mean(means) - nats.mean()) > 1e-3
    with pytest.raises(ValueError, match=r"mean_rows = 6 rows don't divide a microbatch of 16"):
        jax.eval_shape(objective(mean_rows=6).loss, params, {}, batch, None, jnp.int32(0))


class Run(NamedTuple):
    """Two steps on one device, and one more on a batch of which nothing is learned."""

    start: Any
    state: Any
    metrics: list[dict[str, float]]
    after_nothing: Any
    nothing: dict[str, Any]


@pytest.fixture(scope="module")
def reference() -> Run:
    program = tiny.program(objective=CONFIG, parts=FROZEN_TOWER, evals=(), objective__mean_rows=2, **SMOOTH)
    with jax.set_mesh(program.mesh):
        state = program.setup.init()
        start, metrics = tiny.host(state.params), []
        for seed in range(2):
            state, found = program.step(state, rows(program.mesh, seed=seed))
            metrics.append({name: float(total) / float(count) for name, (total, count) in found.items()})
        after = tiny.host(state)
        empty = rows(program.mesh) | {
            "supervised": jax.device_put(np.zeros((ROWS, LENGTH), bool), batch_sharding(program.mesh))
        }
        state, nothing = program.step(state, empty)
    return Run(start, after, metrics, tiny.host(state), tiny.host(nothing))


@pytest.mark.parametrize(
    ("shape", "accum"),
    [
        ((2, 2, 2), 4),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), 2, marks=pytest.mark.slow),
    ],
)
def test_mesh_and_microbatches_change_nothing(
    monkeypatch: pytest.MonkeyPatch, reference: Run, shape: tuple[int, int, int], accum: int
) -> None:
    monkeypatch.setattr(tiny, "batch", rows)
    want, history = reference.state, reference.metrics
    program = tiny.program(
        tiny.mesh(*shape), objective=CONFIG, parts=FROZEN_TOWER, evals=(), objective__mean_rows=2,
        train__accum_steps=accum, **SMOOTH,
    )  # fmt: skip
    state, others = tiny.run_steps(program, 2)
    for got, expected in zip(others, history, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


def test_frozen_parts_stay_bit_for_bit_and_own_no_slots(reference: Run) -> None:
    start, state = reference.start, reference.state
    tiny.assert_trees_equal(state.params["image"], start["image"])
    slots = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    assert slots
    assert not any("image" in jax.tree_util.keystr(path) for path, _ in slots)
    for part in ("projector", "decoder", "newline"):
        for before, after in zip(jax.tree.leaves(start[part]), jax.tree.leaves(state.params[part]), strict=True):
            assert np.any(before != after)


def test_each_part_that_learns_tells_the_norm_of_its_gradients(reference: Run) -> None:
    for metrics in reference.metrics:
        norms = {name: x for name, x in metrics.items() if name.startswith("gradient_norm/")}
        assert norms.keys() == {"gradient_norm/projector", "gradient_norm/rest"}
        assert np.sqrt(sum(x**2 for x in norms.values())) == pytest.approx(metrics["gradient_norm"], rel=1e-5)
        assert min(norms.values()) > 0


def test_a_batch_without_a_learned_token_has_loss_and_gradient_zero(reference: Run) -> None:
    """No NaN, and it is counted."""
    metrics = reference.nothing
    assert metrics["loss"][0] == 0
    assert metrics["unsupervised_rows"] == (ROWS, ROWS)
    assert metrics["nonfinite_steps"][0] == 0
    assert metrics["gradient_norm"][0] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reference.after_nothing.params))


PROJECTORS: dict[str, ProjectorConfig] = {
    "linear": LinearProjectorConfig(),
    "mlp3": MlpProjectorConfig(depth=3),
    "pixel_shuffle": PixelShuffleConfig(factor=2),
    "resampler": ResamplerConfig(queries=3, width=24, depth=2, heads=2, mlp_dim=40),
}


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("layer", [None, -2])
def test_flops_are_those_of_the_jaxpr(name: str, layer: int | None) -> None:
    """With a feature of the block before the last, that block is not run."""
    config = override(CONFIG, {"model.projector": PROJECTORS[name], "model.layer": layer})
    vlm = config.build(PreprocessConfig(), jnp.float32)
    shapes = unbox(jax.eval_shape(vlm.init, jax.random.key(0))[0])
    assert shapes["image"]["blocks"]["attn"]["query"]["kernel"].shape[0] == TOWER.depth
    loss = lambda params, batch: vlm.loss(params, {}, batch, None, jnp.int32(0))[0][0]  # noqa: E731
    assert config.train_flops() == 3 * count_dot_flops(loss, shapes, config.batch_shapes(1))


def test_a_frozen_tower_costs_its_forward_pass_alone() -> None:
    live, frozen = (
        step_flops(tiny.program(objective=CONFIG, parts=parts, evals=(), **SMOOTH), 0)
        for parts in ((Part("norm", "image/ln_post/.*", frozen=True), Part("all", ".*")), FROZEN_TOWER)
    )
    tower = ROWS * TILES * dataclasses.replace(TOWER, depth=1).forward_flops(0)
    assert live is not None
    assert frozen is not None
    assert live - frozen == pytest.approx(2 * tower, rel=0.2)  # patches' own gradient doesn't exist


def test_what_the_loss_gives_no_gradient_to_must_be_frozen() -> None:
    with pytest.raises(ConfigError, match=r"trains the parameter image/ln_post/bias, .* put a rule for"):
        build_program(tiny.config(objective=CONFIG, parts=(Part("all", ".*"),), evals=(), **SMOOTH), tiny.mesh())


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_make_the_tokens_that_they_promise(name: str) -> None:
    projector = PROJECTORS[name]
    features = jax.ShapeDtypeStruct((2, 4, 16), jnp.float32)
    module = projector.build((2, 2), 8, jnp.float32)
    out, _ = jax.eval_shape(module.init_with_output, jax.random.key(1), features)
    assert out.shape == (2, projector.tokens(4), 8)


def test_an_mlp_projector_is_linear_maps_with_gelu_between() -> None:
    module = MlpProjectorConfig(depth=3).build((2, 2), 8, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 4, 16))
    found, variables = module.init_with_output(jax.random.key(1), x)
    for layer in (1, 2, 3):
        kernel, bias = (np.asarray(unbox(variables)["params"][f"fc{layer}"][k]) for k in ("kernel", "bias"))
        x = np.asarray(x if layer == 1 else jax.nn.gelu(x, approximate=False)) @ kernel + bias.reshape(1, 1, -1)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_images_and_prompt_are_seen_as_a_whole_with_a_prefix(params: Any) -> None:
    """A later word of the prompt changes what an image's token sees; a learned one changes nothing before it."""
    batch = jax.tree.map(np.array, rows(tiny.mesh(), 4))
    batch["supervised"][:] = False
    batch["supervised"][:, 7:9] = True
    outputs = jax.jit(objective(prefix=True).outputs)
    hidden = np.asarray(outputs(params, batch)["hidden"])
    for place, reaches in ((6, True), (7, False)):
        other = batch | {"text": batch["text"].copy()}
        other["text"][:, place] = 3 + (other["text"][:, place] + 1) % 60
        changed = np.abs(np.asarray(outputs(params, other)["hidden"]) - hidden).max(axis=(0, 2))
        assert (changed[0] > 1e-4) == reaches
        assert (changed[9:] < 1e-6).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image.pool": "cls"}, r"image.pool = 'cls' makes a vector that nothing reads"),
        ({"model.layer": -3}, r"model.layer = -3 must lie in -2..-1"),
        ({"model.projector": PixelShuffleConfig(factor=4)}, r"don't divide a grid of 2x2"),
        ({"model.features": "cls_patch", "model.image.registers": 1}, r"'cls_patch' needs image.class_token"),
        ({"length": 1}, r"length = 1 must be at least 2"),
    ],
)
def test_what_can_not_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(CONFIG, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.chat.row_length": 32}, r"row_length = 32 must equal config.objective.length = 16"),
        ({"data.chat.max_tiles": 1}, r"max_tiles = 1 must equal config.objective.tiles = 2"),
        ({"data.chat.tiling": AnyresTiling(), "objective.model.newline": False}, r"set objective.model.newline = true"),
        ({"objective.mean_rows": 5}, r"mean_rows = 5 does not divide config.data.batch_size = 16"),
    ],
)
def test_what_must_agree_with_the_data(changes: dict[str, Any], message: str) -> None:
    config = tiny.config(objective=CONFIG, evals=(), **SMOOTH)
    with pytest.raises(ConfigError, match=message):
        validate(override(config, changes))
