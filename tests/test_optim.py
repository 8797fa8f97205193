"""Optimisers against torch's update written out, optax on unstacked layers, and the traps of stacked ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from vlm_jax.optim import Adafactor, AdamW, Lion, Matrix, Muon, Optimizer, OptimizerConfig
from vlm_jax.parts import EVERYTHING, Part, Parts
from vlm_jax.schedule import Constant, Cosine

NAMES = {
    "blocks/attn/query/kernel": ("layers", "embed", "heads", "kv"),
    "blocks/attn/out/kernel": ("layers", "heads", "kv", "embed"),
    "blocks/mlp/bias": ("layers", "mlp"),
    "token_embed": ("vocab", "embed"),
}
SHAPES = {
    "blocks/attn/query/kernel": (3, 64, 4, 16),
    "blocks/attn/out/kernel": (3, 4, 16, 64),
    "blocks/mlp/bias": (3, 48),
    "token_embed": (96, 64),
}


def trees(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
    attn = {name: {"kernel": flat[f"blocks/attn/{name}/kernel"]} for name in ("query", "out")}
    return {"blocks": {"attn": attn, "mlp": {"bias": flat["blocks/mlp/bias"]}}, "token_embed": flat["token_embed"]}


def optimizer(config: OptimizerConfig, rules: tuple[Part, ...] = EVERYTHING) -> Optimizer:
    return Optimizer(config, Parts(rules, NAMES, SHAPES), total_steps=100)


def apply(optim: Optimizer, steps: int = 3) -> tuple[Any, Any]:
    params = trees()
    slots = optim.init(params)
    for step in range(steps):
        gradients = trees(seed=step + 1)
        norm = optax.global_norm(gradients)
        updates, slots = optim.update(gradients, norm, slots, params, jnp.int32(step))
        params = optax.apply_updates(params, updates)
    return params, slots


def test_adamw_is_torchs() -> None:
    """torch.optim.AdamW: p -= lr wd p, then p -= lr m_hat / (sqrt(v_hat) + eps); no decay on the bias."""
    lr, wd, b1, b2, eps = 0.1, 0.2, 0.9, 0.98, 1e-6
    config = AdamW(learning_rate=lr, weight_decay=wd, b1=b1, b2=b2, eps=eps, schedule=Constant())
    got, _ = apply(optimizer(config))
    for path, decay in ((("token_embed",), wd), (("blocks", "mlp", "bias"), 0.0)):
        pick = lambda tree, path=path: np.asarray(jax.tree.reduce(lambda a, _: a, _descend(tree, path)), np.float64)  # noqa: E731
        p, m, v = pick(trees()), 0.0, 0.0
        for step in range(3):
            g = pick(trees(seed=step + 1))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p * (1 - lr * decay)
            p = p - lr * (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps)
        np.testing.assert_allclose(pick(got), p, rtol=2e-5, atol=1e-6)


def _descend(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def test_decay_by_schedule_does_not_know_the_learning_rate() -> None:
    config = AdamW(learning_rate=0.0, weight_decay=0.01, decay_by="schedule", schedule=Constant())
    got, _ = apply(optimizer(config), steps=1)
    np.testing.assert_allclose(got["token_embed"], trees()["token_embed"] * 0.99, rtol=1e-6)


def test_clipping_by_global_norm() -> None:
    """Lion's sign hides the size of a gradient, Adam's ratio too: clip is seen in Adam's first moment."""
    optim = optimizer(AdamW(clip_norm=0.5, b1=0.0, schedule=Constant()))
    _, slots = apply(optim, steps=1)
    norm = optax.global_norm(slots.mu)
    assert float(norm) == pytest.approx(0.5, rel=1e-5)


def test_learning_rate_factors_of_parts() -> None:
    rules = (Part("slow", "token_embed", lr=0.5), Part("rest", ".*"))
    config = Lion(learning_rate=0.1, schedule=Constant())
    whole, _ = apply(optimizer(config), steps=1)
    half, _ = apply(optimizer(config, rules), steps=1)
    start = trees()
    np.testing.assert_allclose(
        half["token_embed"] - start["token_embed"], 0.5 * (whole["token_embed"] - start["token_embed"]), atol=1e-6
    )
    np.testing.assert_array_equal(half["blocks"]["mlp"]["bias"], whole["blocks"]["mlp"]["bias"])


def test_low_precision_moments() -> None:
    for config, leaves in ((AdamW(mu_dtype="bfloat16"), 4), (Lion(), 4), (Adafactor(), 4)):
        slots = optimizer(config).init(trees())
        assert sum(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(slots)) == leaves


def test_adafactor_factors_every_layer_by_itself() -> None:
    """A stack of attention kernels [3, 64, 4, 16] holds row and column moments of its 64 x 64 matrices."""
    slots = optimizer(Adafactor(momentum=None)).init(trees())
    sizes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(slots)[0]}
    query = [shape for path, shape in sizes.items() if "'query'" in path]
    assert (3, 64) in query
    assert (3, 64, 64) not in query


def test_adafactor_equals_optax_on_each_layer() -> None:
    config = Adafactor(learning_rate=0.1, momentum=None, schedule=Constant(), clip_threshold=1.0)
    got, _ = apply(optimizer(config), steps=2)
    decay = lambda step, rate: jnp.minimum(1.0 - (step + 1.0) ** -rate, 0.999)  # noqa: E731
    plain = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay), optax.clip_by_block_rms(1.0)
    )
    for layer in range(3):
        param = trees()["blocks"]["attn"]["query"]["kernel"][layer].reshape(64, 64)
        state = plain.init(param)
        for step in range(2):
            gradient = trees(seed=step + 1)["blocks"]["attn"]["query"]["kernel"][layer].reshape(64, 64)
            update, state = plain.update(gradient, state, param)
            param = param - 0.1 * update
        want = param.reshape(64, 4, 16)
        np.testing.assert_allclose(got["blocks"]["attn"]["query"]["kernel"][layer], want, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_every_layer_and_leaves_the_rest_to_adam() -> None:
    config = Muon(learning_rate=1.0, momentum=0.0, schedule=Constant())
    got, _ = apply(optimizer(config), steps=1)
    moved = got["blocks"]["attn"]["query"]["kernel"] - trees()["blocks"]["attn"]["query"]["kernel"]
    for layer in range(3):
        singular = np.linalg.svd(np.asarray(moved[layer]).reshape(64, 64), compute_uv=False)
        # 0.2 sqrt(64) times the singular values that five Newton-Schulz steps leave, about 0.7 to 1.2
        assert np.all((singular / 1.6)[:-4] > 0.4)
        assert np.all(singular / 1.6 < 1.4)
    single = contrib.scale_by_muon(beta=0.0)
    gradient = trees(seed=1)["blocks"]["attn"]["query"]["kernel"][1].reshape(64, 64)
    want, _ = single.update(gradient, single.init(gradient), gradient)
    np.testing.assert_allclose(moved[1].reshape(64, 64), -1.6 * want, rtol=2e-3, atol=2e-3)
    adam, _ = apply(optimizer(AdamW(learning_rate=1.0, schedule=Constant())), steps=1)
    np.testing.assert_allclose(got["token_embed"], adam["token_embed"], rtol=1e-6)
    np.testing.assert_allclose(got["blocks"]["mlp"]["bias"], adam["blocks"]["mlp"]["bias"], rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "shape"),
    [("blocks/attn/query/kernel", (64, 64)), ("blocks/attn/out/kernel", (64, 64)), ("token_embed", (96, 64))],
)
def test_how_leaves_are_read_as_matrices(path: str, shape: tuple[int, int]) -> None:
    assert Matrix.of(NAMES[path], SHAPES[path]).shape == shape


def test_a_stack_of_biases_is_no_matrix() -> None:
    assert not Matrix.of(NAMES["blocks/mlp/bias"], SHAPES["blocks/mlp/bias"]).is_matrix


def test_weight_decay_by_its_own_schedule() -> None:
    """A cosine from the decay to five times of it, at the step's place in the run of 100; the rest is untouched."""
    config = AdamW(learning_rate=0.1, weight_decay=0.04, schedule=Constant(), decay_schedule=Cosine(final=5.0))
    optim, params, zeros = optimizer(config), trees(), jax.tree.map(jnp.zeros_like, trees())
    for step in (0, 50, 100):
        updates, _ = optim.update(zeros, jnp.zeros(()), optim.init(params), params, jnp.int32(step))
        decay = 0.04 + (0.2 - 0.04) * 0.5 * (1 - np.cos(np.pi * step / 100))
        np.testing.assert_allclose(updates["token_embed"], -0.1 * decay * params["token_embed"], rtol=1e-5)
        assert not np.asarray(updates["blocks"]["mlp"]["bias"]).any()


def test_clipping_of_each_module_by_its_own_norm() -> None:
    gradients = trees(seed=1) | {"token_embed": 1e-4 * trees(seed=1)["token_embed"]}
    optim = optimizer(AdamW(clip_norm=0.5, clip_by="module", b1=0.0, schedule=Constant()))
    _, slots = optim.update(gradients, optax.global_norm(gradients), optim.init(trees()), trees(), jnp.int32(0))
    assert float(optax.global_norm(slots.mu["blocks"])) == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(slots.mu["token_embed"], gradients["token_embed"], rtol=1e-6)  # small as it is


def test_a_part_that_starts_later_stands_still_while_its_moments_run() -> None:
    rules = (Part("late", "token_embed", start_step=2), Part("rest", ".*"))
    config = AdamW(learning_rate=0.1, weight_decay=0.1, schedule=Constant())
    early, early_slots = apply(optimizer(config, rules), steps=2)
    np.testing.assert_array_equal(early["token_embed"], trees()["token_embed"])
    _, want = apply(optimizer(config), steps=2)
    np.testing.assert_allclose(early_slots.mu["token_embed"], want.mu["token_embed"], rtol=1e-6)
    moved, _ = apply(optimizer(config, rules), steps=3)
    assert not np.array_equal(moved["token_embed"], trees()["token_embed"])
