"""Head and losses of DINOv2 against golden vectors of the official code, and what padding must not change."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from sinkhorn_loop import published_sinkhorn

from vlm_jax.losses import dino
from vlm_jax.models.dino import PrototypeHead, PrototypeHeadConfig

TENSORS = load_file(Path(__file__).parents[1] / "golden" / "dinov2_reg_mlp.safetensors")
TEMPERATURE = 0.07
# Compiled as a whole: operation by operation takes much longer.
centred_softmax, cross_entropy, koleo, mean_logits, sinkhorn_knopp = map(
    jax.jit, (dino.centred_softmax, dino.cross_entropy, dino.koleo, dino.mean_logits, dino.sinkhorn_knopp)
)


def golden(name: str) -> np.ndarray:
    return TENSORS[name]


def test_head() -> None:
    weights = {k.removeprefix("weights/dino_head."): v for k, v in TENSORS.items() if "dino_head" in k}
    params = {
        f"fc{i + 1}": {"kernel": weights[f"mlp.{2 * i}.weight"].T, "bias": weights[f"mlp.{2 * i}.bias"]}
        for i in range(3)
    }
    params["last"] = {"kernel": weights["last_layer.weight_v"].T, "magnitude": weights["last_layer.weight_g"][:, 0]}
    head = PrototypeHead(PrototypeHeadConfig(hidden=24, bottleneck=12, prototypes=20))
    got = jax.jit(head.apply)({"params": params}, golden("outputs/native.x_norm_clstoken"))
    np.testing.assert_allclose(got, golden("outputs/head_out"), atol=2e-5)


def test_sinkhorn_and_centring() -> None:
    teacher = golden("inputs/dino_teacher")
    np.testing.assert_allclose(sinkhorn_knopp(teacher, TEMPERATURE), golden("outputs/dino.sinkhorn"), atol=2e-6)
    centred = centred_softmax(teacher, jnp.zeros(20), TEMPERATURE)
    np.testing.assert_allclose(centred, golden("outputs/dino.softmax_center"), atol=1e-6)
    shifted = centred_softmax(teacher + 3.0 * np.arange(20, dtype=np.float32), 3.0 * jnp.arange(20.0), TEMPERATURE)
    np.testing.assert_allclose(shifted, centred, atol=1e-4)


def test_sinkhorn_passes_over_padding() -> None:
    rng = np.random.default_rng(0)
    logits, valid = rng.normal(size=(12, 7)).astype(np.float32), rng.random(12) < 0.6
    got = sinkhorn_knopp(np.where(valid[:, None], logits, 50.0), TEMPERATURE, jnp.asarray(valid, jnp.float32))
    np.testing.assert_allclose(got[valid], published_sinkhorn(logits[valid], TEMPERATURE), rtol=1e-4, atol=1e-7)
    assert not np.asarray(got[~valid]).any()
    nothing = sinkhorn_knopp(logits, TEMPERATURE, jnp.zeros(12))
    assert not np.asarray(nothing).any()


def test_dino_loss() -> None:
    """Two student crops against two teacher crops of a batch of two, all four pairs, a mean over the batch."""
    targets = golden("outputs/dino.sinkhorn").reshape(2, 2, 20)
    student = golden("inputs/dino_student").reshape(2, 2, 20)
    got = sum(cross_entropy(student[s], targets[t], 0.1).mean() for s in range(2) for t in range(2))
    np.testing.assert_allclose(got, golden("outputs/dino.loss"), rtol=1e-5)


def test_ibot_loss() -> None:
    masks = golden("inputs/ibot_masks")
    weights = np.concatenate([np.full(n, 1 / n) for n in masks.sum(axis=1)])
    targets = centred_softmax(golden("inputs/ibot_teacher"), jnp.zeros(20), TEMPERATURE)
    got = (cross_entropy(golden("inputs/ibot_student"), targets, 0.1) * weights).sum() / 2
    np.testing.assert_allclose(got, golden("outputs/ibot.loss_masked"), rtol=1e-5)


def test_koleo() -> None:
    features = golden("inputs/koleo_features")
    np.testing.assert_allclose(koleo(features).mean(), golden("outputs/koleo.loss"), rtol=1e-5)
    twins = koleo(np.concatenate([features, features]))
    assert np.isfinite(twins).all()
    gradient = jax.jit(jax.grad(lambda x: dino.koleo(x).sum()))(jnp.concatenate([features, features]))
    assert np.isfinite(gradient).all()


def test_centre() -> None:
    teacher = golden("inputs/dino_teacher")
    np.testing.assert_allclose(0.1 * mean_logits(teacher), golden("outputs/dino.center_after_update")[0], atol=1e-6)
    padded = np.concatenate([teacher, np.full((2, 20), 9.0, np.float32)])
    weights = jnp.asarray([1.0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(mean_logits(padded, weights), mean_logits(teacher), rtol=1e-6)
