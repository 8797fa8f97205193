"""Probes trained step by step: AIM's golden vectors, optimisers written in numpy, grids against single runs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax import schema
from vlm_jax.evals.attentive_probe import PUBLISHED, attentive_head
from vlm_jax.evals.probe_training import (
    Grid,
    Probe,
    ProbeState,
    ProbeTraining,
    batch_normalised,
    linear_head,
    logits,
    train_probes,
)
from vlm_jax.evals.sgd_probe import PROTOCOLS
from vlm_jax.schema import ConfigError

GOLDEN = Path(__file__).parent.parent / "golden" / "aim_probe.safetensors"
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(40, 6)).astype(np.float32)
LABELS = RNG.integers(0, 3, 40).astype(np.int32)
BATCH, EPOCHS = 10, 3


def select(features: Any) -> jax.Array:
    return features["x"]


def batches() -> Any:
    for _ in range(EPOCHS):
        for start in range(0, len(VECTORS), BATCH):
            rows = slice(start, start + BATCH)
            yield {"x": jnp.asarray(VECTORS[rows])}, jnp.asarray(LABELS[rows])


def trained(training: ProbeTraining, eps: float | None = None) -> ProbeState:
    probe = Probe(select, linear_head(eps=eps))
    return train_probes({"only": probe}, training, batches(), len(VECTORS) // BATCH, BATCH, 3)["only"]


def test_the_attentive_probe_is_aims() -> None:
    """Logits in evaluation and in training, and the running statistics after a step in training."""
    golden = load_file(GOLDEN)
    params = {
        "query": golden["head.cls_token"].reshape(-1),
        **{name: golden[f"head.{short}.weight"].T for name, short in (("key", "k"), ("value", "v"))},
        "classifier": golden["head.linear.weight"].T,
    }
    head, tokens = attentive_head(4), jnp.asarray(golden["tokens"])
    mean, variance = (jnp.asarray(golden[f"head.bn.running_{name}"]) for name in ("mean", "var"))
    state = ProbeState(jax.tree.map(lambda x: x[None], params), {}, mean, variance)
    np.testing.assert_allclose(logits(state, tokens, head)[0], golden["probe_logits_eval"], atol=2e-5)
    assert head.eps is not None
    normed, new_mean, new_variance = batch_normalised(tokens, mean, variance, head.eps)
    np.testing.assert_allclose(head.logits(params, normed), golden["probe_logits_train"], atol=2e-5)
    np.testing.assert_allclose(new_mean, golden["probe_bn_running_mean_after_train_step"], atol=1e-6)
    np.testing.assert_allclose(new_variance, golden["probe_bn_running_var_after_train_step"], atol=1e-6)


def by_hand(training: ProbeTraining, rate: float, decay: float, kernel: np.ndarray) -> dict[str, np.ndarray]:
    """A linear classifier trained in float64 by the published formulas of SGD, LARS (MAE's) and AdamW (PyTorch's)."""
    p = {"kernel": kernel.astype(np.float64), "bias": np.zeros(3)}
    slots = {name: (np.zeros_like(x), np.zeros_like(x)) for name, x in p.items()}
    total, warmup = EPOCHS * 4, training.warmup_epochs * 4
    for step, (features, labels) in enumerate(batches()):
        x, y = np.asarray(features["x"], np.float64), np.eye(3)[np.asarray(labels)]
        scores = np.exp(x @ p["kernel"] + p["bias"])
        error = (scores / scores.sum(axis=1, keepdims=True) - y) / BATCH
        gradients = {"kernel": x.T @ error, "bias": error.sum(axis=0)}
        if training.clip_norm is not None:
            norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
            gradients = {name: g * min(1, training.clip_norm / norm) for name, g in gradients.items()}
        lr = rate * (step + 1) / warmup
        if step >= warmup:
            low = training.min_learning_rate
            lr = low + (rate - low) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))
        for name, g in gradients.items():
            first, second = slots[name]
            if training.optimizer == "adamw":
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
                corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                p[name] = p[name] * (1 - lr * decay) - lr * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
            else:
                if training.optimizer == "lars" and g.ndim > 1:
                    g = g + decay * p[name]
                    g = g * training.trust * np.linalg.norm(p[name]) / np.linalg.norm(g)
                elif training.optimizer == "sgd":
                    g = g + decay * p[name]
                first = training.momentum * first + g
                p[name] = p[name] - lr * first
            slots[name] = first, second
    return p


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_grid_is_every_member_trained_by_hand(optimizer: Any, clip: float | None) -> None:
    rates, decays = (0.3, 2.0), (0.0, 0.01)
    training = ProbeTraining(
        optimizer,
        rates,
        weight_decays=decays,
        epochs=EPOCHS,
        warmup_epochs=1,
        batch_size=BATCH,
        min_learning_rate=0.05,
        clip_norm=clip,
        trust=0.1,
    )
    state = trained(training)
    start = linear_head().init(jax.random.key(0), jnp.asarray(VECTORS[:BATCH]), 3)["kernel"]
    for member, (rate, decay) in enumerate((r, d) for r in rates for d in decays):
        expected = by_hand(training, rate, decay, np.asarray(start))
        for name in expected:
            np.testing.assert_allclose(state.params[name][member], expected[name], rtol=2e-4, atol=2e-5)
    assert not np.allclose(state.params["kernel"][0], state.params["kernel"][3], atol=1e-3)


def test_a_grid_is_its_members_trained_alone() -> None:
    """With a batch norm, whose statistics all share, and rates that grow with the batch."""
    grid = ProbeTraining("lars", (0.3, 3.0), True, (0.0, 0.01), epochs=EPOCHS, batch_size=BATCH)
    together = trained(grid, eps=1e-6)
    for member, (rate, decay) in enumerate((r, d) for r in (0.3, 3.0) for d in (0.0, 0.01)):
        alone = trained(dataclasses.replace(grid, learning_rates=(rate,), weight_decays=(decay,)), eps=1e-6)
        np.testing.assert_allclose(together.params["kernel"][member], alone.params["kernel"][0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(together.mean, alone.mean)
        np.testing.assert_allclose(together.variance, alone.variance)


def test_running_statistics_are_pytorchs() -> None:
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    state = trained(ProbeTraining("sgd", (0.1,), epochs=EPOCHS, batch_size=BATCH), eps=1e-6)
    for features, _ in batches():
        norm(torch.tensor(np.array(features["x"])))
    np.testing.assert_allclose(state.mean, norm.running_mean, atol=1e-6)
    np.testing.assert_allclose(state.variance, norm.running_var, atol=1e-6)
    with torch.no_grad():
        seen = norm.eval()(torch.tensor(VECTORS)).numpy() @ state.params["kernel"][0] + state.params["bias"][0][None]
    np.testing.assert_allclose(logits(state, jnp.asarray(VECTORS), linear_head(eps=1e-6))[0], seen, atol=1e-5)


def test_the_published_grids() -> None:
    assert len(PUBLISHED.grid(1024).learning_rate) == 14
    assert (PUBLISHED.clip_norm, PUBLISHED.min_learning_rate, PUBLISHED.warmup_epochs) == (3.0, 1e-5, 5)
    assert PROTOCOLS["mae"].grid(16384) == Grid(pytest.approx([6.4]), pytest.approx([0.0]))
    assert PROTOCOLS["dinov2"].grid(1024).learning_rate[[0, -1]] == pytest.approx([4e-5, 0.4])
    assert PROTOCOLS["beit"].grid(1024) == Grid(pytest.approx([4e-3]), pytest.approx([1e-4]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs = 0 must be 1 or more"),
        ({"warmup_epochs": 100}, r"warmup_epochs = 100 must be less than epochs = 100"),
        ({"learning_rates": (0.1, 0.0)}, r"learning_rates = .* must be one or more numbers, positive"),
        ({"weight_decays": (0.1, 0.1)}, r"weight_decays = .* names a number twice"),
        ({"clip_norm": 0.0}, r"clip_norm = 0\.0 must be positive"),
    ],
)
def test_what_can_not_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema.validate(schema.override(ProbeTraining(), changes))
