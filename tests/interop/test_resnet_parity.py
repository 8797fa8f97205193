"""CLIP's ResNet in training against open_clip's: batch statistics, their gradients, and the running ones afterwards."""

from typing import Any

import clip_reference as reference
import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import to_params
from vlm_jax.models.two_tower import TwoTower

ROWS = 3


def test_a_step_of_training_agrees():
    settings = reference.resnet_settings()
    peer: Any = reference.open_clip_model(settings).double()
    found, tensors = recognise(reference.to_numpy(peer.state_dict()))
    config = found.read_config(tensors, settings, None)

    def convert(state: Any) -> Any:
        return to_params(recognise(reference.to_numpy(state))[1], found.rows(config), found.shapes(config), found.title)

    params = convert(peer.state_dict())
    images, ids = reference.batch(size=ROWS, side=64)
    images += np.arange(ROWS, dtype=np.float32).reshape(-1, 1, 1, 1)  # rows whose means differ
    direction = np.random.default_rng(8).normal(size=(ROWS, reference.EMBED_DIM)).astype(np.float32)

    peer.train()
    features = peer.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2).double())
    (features * torch.from_numpy(direction)).sum().backward()
    gradients = {name: torch.zeros_like(value) for name, value in peer.state_dict().items()}
    gradients |= {name: p.grad for name, p in peer.visual.named_parameters(prefix="visual")}

    def loss(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), ROWS)
        out: Any = TwoTower(config).apply({"params": params}, images, ids, keys, normalize=False)
        return (out["image_features"] * direction).sum(), out

    (_, out), ours = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out["image_features"], features.detach().numpy(), atol=1e-5)
    for path, wanted in flatten_dict(convert(gradients)["image"], sep="/").items():
        got = flatten_dict(ours["image"], sep="/")[path]
        scale = np.linalg.norm(wanted) if "key/bias" not in path else 1.0  # which has no gradient but rounding
        # A mean over few values cancels in the norms' gradients.
        assert np.linalg.norm(got - wanted) <= 2e-4 * scale, path

    moved = config.image.updated(params["image"], out["image/statistics"])
    wanted = flatten_dict(convert(peer.state_dict())["image"], sep="/")
    got = flatten_dict(moved, sep="/")
    assert got.keys() == wanted.keys()
    before = flatten_dict(params["image"], sep="/")
    changed = {path for path in wanted if not np.array_equal(got[path], before[path])}
    assert changed == {path for path in wanted if "running_" in path}
    for path, value in wanted.items():
        np.testing.assert_allclose(got[path], value, rtol=2e-5, atol=1e-6, err_msg=path)
