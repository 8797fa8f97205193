"""Our CoCa against open_clip's with the same random weights: features, caption logits, loss and gradients."""

import json
from pathlib import Path
from typing import Any

import clip_reference as reference
import coca_reference as coca
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm_jax import schema
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.files import write_json, write_weights
from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import ConversionError, from_params
from vlm_jax.mesh import unbox
from vlm_jax.models.coca import COCA_L14
from vlm_jax.objectives.coca import CoCaConfig


@pytest.fixture(scope="module")
def peer() -> Any:
    return coca.open_clip_model()


@pytest.fixture(scope="module")
def params(peer: Any) -> Any:
    tensors = reference.to_numpy(peer.state_dict())
    return jax.tree.map(lambda x: np.asarray(x, np.float32), coca.our_tree(tensors))


def test_the_large_model_has_open_clips_sizes() -> None:
    settings = json.loads(
        Path(reference.import_open_clip().__file__)
        .with_name("model_configs")
        .joinpath("coca_ViT-L-14.json")
        .read_text()
    )
    settings.pop("custom_text")
    with torch.device("meta"):
        theirs = sum(p.numel() for p in reference.import_open_clip().coca_model.CoCa(**settings).parameters())
    objective = CoCaConfig(model=COCA_L14).build(PreprocessConfig(), jnp.float32)
    ours = unbox(jax.eval_shape(objective.init, jax.random.key(0))[0])
    assert sum(x.size for x in jax.tree.leaves(ours)) == theirs


def expected(peer: Any, images: np.ndarray, ids: np.ndarray) -> dict[str, torch.Tensor]:
    return peer(torch.from_numpy(images).permute(0, 3, 1, 2).double(), torch.from_numpy(ids).long())


def test_features_logits_loss_and_gradients(peer: Any, params: Any) -> None:
    """Images are given normalised. Texts end at different places, so padding is masked and not predicted."""
    images, ids = reference.batch()
    out = expected(peer, images, ids)
    objective = CoCaConfig(model=coca.config()).build(PreprocessConfig(), jnp.float32)
    shapes = unbox(jax.eval_shape(objective.init, jax.random.key(0))[0])
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)

    ours = jax.jit(objective.outputs, static_argnums=2)(params, {"image": images, "text": ids}, False)
    names = {"image_features": "image_features", "text_features": "text_features", "caption_logits": "logits"}
    for name, theirs in names.items():
        np.testing.assert_allclose(ours[name], out[theirs].detach().numpy(), atol=1e-5)

    loss = reference.import_open_clip().loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    total = sum(loss(**out))
    total.backward()  # pyright: ignore
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    wanted = coca.our_tree(reference.to_numpy(gradients))

    def mean(params: Any) -> Any:
        rows = jax.random.split(jax.random.key(0), len(ids))
        (value, count), aux = objective.loss(params, {}, {"image": images, "text": ids}, rows, jnp.zeros((), jnp.int32))
        return value / count, aux.metrics

    (value, metrics), got = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-6)
    parts = {name: float(metrics[name][0] / metrics[name][1]) for name in ("contrastive_loss", "caption_loss")}
    assert parts["contrastive_loss"] + 2 * parts["caption_loss"] == pytest.approx(float(value), rel=1e-6)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted))
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


def test_the_files_go_both_ways(tmp_path: Path, peer: Any, params: Any) -> None:
    """The config is read, and the folder that is written loads in open_clip with every weight in its place."""
    tensors = reference.to_numpy(peer.state_dict())
    found, canonical = recognise(tensors)
    assert found.read_config(canonical, coca.settings(), None) == coca.config()
    exported = found.published(from_params(params, found.rows(coca.config()), found.title))
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value.astype(np.float32), err_msg=name, strict=True)
    settings = found.write_config(coca.config())
    assert found.read_config(canonical, settings, None) == coca.config()
    write_weights(tmp_path / "open_clip_model.safetensors", exported, "float32")
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": {}})
    loaded = reference.import_open_clip().create_model(f"local-dir:{tmp_path}", require_pretrained=True)
    images, ids = reference.batch()
    theirs, again = expected(peer, images, ids), expected(loaded.double(), images, ids)
    torch.testing.assert_close(again["logits"], theirs["logits"])
    other = schema.override(coca.config(), {"image.form": "cascade", "text.mask_shift": 0})
    with pytest.raises(ConversionError, match=r"image.form = 'cascade' .*; text.mask_shift = 0"):
        found.write_config(other)


def test_generation_is_the_likeliest_word_of_open_clips_logits(peer: Any, params: Any) -> None:
    """A greedy loop over open_clip's forward pass, which computes every length anew."""
    images, _ = reference.batch(seed=4, size=3)
    objective = CoCaConfig(model=coca.config()).build(PreprocessConfig(), jnp.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    ids = torch.full((3, 1), coca.START_ID)
    with torch.no_grad():
        while ids.shape[1] < coca.LENGTH:
            chosen = peer(pixels, ids, output_labels=False)["logits"][:, -1].argmax(-1)
            ended = (ids[:, 1:] == reference.EOS_ID).any(1)
            ids = torch.cat([ids, torch.where(ended, 0, chosen)[:, None]], 1)
    np.testing.assert_array_equal(jax.jit(objective.generate)(params, images), ids)
