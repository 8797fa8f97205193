"""The discrete autoencoder: its likelihood, divergence and samples by definition, and a run that learns codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.config import load_config
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.flops import TRAIN_OVER_FORWARD, count_dot_flops
from vlm_jax.losses.autoencoding import divergence_from_uniform, gumbel_softmax, logit_laplace
from vlm_jax.mesh import batch_sharding
from vlm_jax.models.dvae import DvaeModelConfig, map_pixels, unmap_pixels
from vlm_jax.objectives.dvae import Annealed, DvaeConfig
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import ConfigError, override

MODEL = DvaeModelConfig(image_size=16, vocab_size=16, width=8, blocks=1, decoder_width=8)
DVAE = DvaeConfig(model=MODEL, temperature=Annealed(1.0, 0.5, 200), kl_weight=Annealed(6.6, 6.6, 1))
RUN: dict[str, Any] = {
    "objective": DVAE,
    "parts": (Part("encoder", "encoder/.*"), Part("decoder", "decoder/.*")),
    "data__source": ShapesConfig(image_size=16),
    "evals": (),
}


def images(mesh: Any, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Drawn scenes."""
    source = ShapesConfig(image_size=16, count=512).build("")
    host = np.stack([np.asarray(source[(seed * rows + row) % 512]["image"]) for row in range(rows)])
    return {"image": jax.device_put(host, batch_sharding(mesh))}


def test_the_likelihood_is_the_density_of_a_sigmoid_of_a_laplace_variable() -> None:
    """In float64 by the change of variables, and its integral over all pixel values is 1."""
    rng = np.random.default_rng(0)
    location, log_scale, pixels = (rng.normal(0, 0.7, (2, 3, 3, 3)) for _ in range(3))
    pixels = 1 / (1 + np.exp(-pixels))
    decoded = jnp.asarray(np.concatenate([location, log_scale], -1), jnp.float32)
    scale = np.exp(log_scale)
    logit = np.log(pixels / (1 - pixels))
    density = np.exp(-np.abs(logit - location) / scale) / (2 * scale) / (pixels * (1 - pixels))
    np.testing.assert_allclose(
        logit_laplace(decoded, jnp.asarray(pixels, jnp.float32)), -np.log(density).sum((1, 2, 3)), rtol=1e-5
    )
    # 1e5 images of one pixel whose three values are equal: the density of one is the cube root
    grid = (np.arange(100_000) + 0.5) / 100_000
    one = jnp.broadcast_to(jnp.asarray([0.3] * 3 + [-0.5] * 3, jnp.float32), (100_000, 1, 1, 6))
    values = jnp.broadcast_to(jnp.asarray(grid, jnp.float32)[:, None, None, None], (100_000, 1, 1, 3))
    assert np.exp(-np.asarray(logit_laplace(one, values), np.float64) / 3).mean() == pytest.approx(1, abs=1e-3)


def test_divergence_and_samples_are_those_of_the_codes() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (1, 1, 1, 5)).astype(np.float32)
    q = np.exp(logits[0, 0, 0].astype(np.float64))
    q /= q.sum()
    np.testing.assert_allclose(divergence_from_uniform(jnp.asarray(logits)), [(q * np.log(q * 5)).sum()], rtol=1e-5)
    np.testing.assert_allclose(divergence_from_uniform(jnp.zeros((1, 2, 2, 5))), [0.0], atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 20_000)
    many = jnp.broadcast_to(jnp.asarray(logits), (20_000, 1, 1, 5))
    samples = np.asarray(gumbel_softmax(many, jnp.float32(0.5), keys))[:, 0, 0]
    np.testing.assert_allclose(samples.sum(1), 1, rtol=1e-5)
    # the largest entry of a relaxed sample is an exact sample (Maddison et al. 2014): 5 standard errors
    shares = np.bincount(samples.argmax(1), minlength=5) / 20_000
    assert (np.abs(shares - q) < 5 * np.sqrt(q * (1 - q) / 20_000) + 1e-9).all()
    cold = np.asarray(gumbel_softmax(many[:200], jnp.float32(1e-3), keys[:200]))
    assert (cold.max(-1) > 0.99).mean() > 0.97


def test_the_published_schedules_and_pixels() -> None:
    config: Any = load_config("configs/dvae.py").objective
    for annealed, values in ((config.temperature, (1.0, 17 / 32, 1 / 16)), (config.kl_weight, (0.0, 3.3, 6.6))):
        steps = (0, annealed.steps // 2, 10 * annealed.steps)
        for step, value in zip(steps, values, strict=True):
            assert float(annealed.at(jnp.int32(step))) == pytest.approx(value, abs=1e-5)
    every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    mapped = np.asarray(map_pixels(every))
    assert (mapped.min(), mapped.max()) == (pytest.approx(0.1), pytest.approx(0.9))
    np.testing.assert_array_equal(unmap_pixels(jnp.asarray(mapped)), every)


def mosaic(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(index of its colour [B, 2, 2], images uint8 [B, 16, 16, 3]) of tiles as large as the place of one code."""
    colours = np.array([[30, 30, 30], [220, 220, 220], [220, 30, 30], [30, 30, 220]], np.uint8)
    tiles = np.random.default_rng(seed).integers(0, len(colours), (rows, 2, 2))
    return tiles, colours[tiles].repeat(8, axis=1).repeat(8, axis=2)


def shared_bits(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two arrays of small integers, in bits."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a.ravel(), b.ravel()), 1 / a.size)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return float((joint[joint > 0] * np.log2(joint[joint > 0] / independent[joint > 0])).sum())


def test_its_loss_falls_and_its_codes_tell_colours_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles have one of four colours; a single code for all of them, or codes at random, would tell 0 bits.

    How many colours share a code is a matter of the seed: 17 runs of other seeds and weights told 1.0 to 2.0 bits.
    """
    monkeypatch.setattr(tiny, "batch", lambda mesh, rows, seed: {"image": jax.device_put(mosaic(rows, seed)[1])})
    config = override(DVAE, {"kl_weight": Annealed(10.0, 10.0, 1), "temperature": Annealed(1.0, 0.5, 100)})
    settings: dict[str, Any] = RUN | {"objective": config}
    program = tiny.program(
        **settings,
        optimizer__learning_rate=1e-2,
        optimizer__weight_decay=1e-4,
        optimizer__schedule=Cosine(warmup_steps=10),
        train__steps=100,
    )
    state, history = tiny.run_steps(program, 100)
    colours, pixels = mosaic(128, seed=1000)
    codes = np.asarray(jax.jit(program.objective.outputs)(state.params, {"image": jnp.asarray(pixels)})["codes"])
    assert shared_bits(colours, colours) == pytest.approx(2, abs=0.02)  # four colours, equally often
    assert shared_bits(colours, codes) > 0.5
    assert np.mean([line["reconstruction"] for line in history[-10:]]) < history[0]["reconstruction"] - 1


def constant_likelihood(pixels: np.ndarray) -> float:
    """-log p in nats a value of the best Laplace distribution of each pixel and channel, the same for all images."""
    logit = np.log(pixels) - np.log1p(-pixels)
    scale = np.abs(logit - np.median(logit, axis=0)).mean(axis=0)  # the likeliest one, at which |distance| / scale is 1
    return float((np.log(2 * scale * pixels * (1 - pixels)) + 1).mean())


@pytest.mark.slow
def test_its_codes_tell_more_of_a_scene_than_any_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without codes the decoder could at best give every pixel the distribution that it has over all images."""
    rows, steps, codes = 32, 500, 32
    scenes = ShapesConfig(image_size=16, count=1024, min_objects=3, max_objects=9)
    source = scenes.build("")
    host = np.stack([np.asarray(source[index]["image"]) for index in range(len(source))])
    seen, held_out = host[:-256], host[-256:]
    monkeypatch.setattr(
        tiny,
        "batch",
        lambda mesh, rows, seed: {"image": jax.device_put(seen[(seed * rows + np.arange(rows)) % 768])},
    )
    config = override(
        DVAE,
        {
            "model": DvaeModelConfig(image_size=16, vocab_size=codes, width=16, blocks=1, decoder_width=16),
            "temperature": Annealed(1.0, 0.125, steps),
            "kl_weight": Annealed(0.0, 10.0, 20),
        },
    )
    program = tiny.program(
        **RUN | {"objective": config, "data__source": scenes},
        data__batch_size=rows,
        optimizer__learning_rate=5e-3,
        optimizer__weight_decay=1e-4,
        optimizer__schedule=Cosine(warmup_steps=20),
        train__steps=steps,
    )
    state, _ = tiny.run_steps(program, steps, rows)
    objective: Any = program.objective
    pixels = map_pixels(jnp.asarray(held_out))
    found = jax.jit(objective.outputs)(state.params, {"image": jnp.asarray(held_out)})["codes"]
    decoded = objective.module.apply({"params": state.params}, jax.nn.one_hot(found, codes), method="decode")
    likelihood = float(logit_laplace(decoded, pixels).mean()) / (3 * 16 * 16)
    assert likelihood < constant_likelihood(np.asarray(pixels, np.float64))
    assert np.unique(found).size > codes / 8


def test_mesh_and_microbatches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "batch", images)
    smooth: dict[str, Any] = RUN | {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}
    want, history = tiny.run_steps(tiny.program(**smooth), 2)
    state, others = tiny.run_steps(tiny.program(tiny.mesh(2, 2, 2), train__accum_steps=4, **smooth), 2)
    for got, expected in zip(others, history, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


@pytest.mark.parametrize("blocks", [1, 2])
def test_flops_are_those_of_the_jaxpr(blocks: int) -> None:
    config = override(DVAE, {"model.blocks": blocks})
    settings: dict[str, Any] = RUN | {"objective": config}
    program = tiny.program(**settings)
    params = program.setup.abstract.params
    batch = config.batch_shapes(3)

    def forward(params: Any, batch: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), 3)
        return program.objective.loss(params, {}, batch, keys, jnp.int32(0))[0]

    assert TRAIN_OVER_FORWARD * count_dot_flops(forward, params, batch) == 3 * config.train_flops()


def test_an_encoder_alone_is_not_trained() -> None:
    config = override(DVAE, {"model.decoder": False})
    with pytest.raises(ConfigError, match="leaves an encoder without a loss"):
        config.make_example(None, tiny.config().data)
