"""`vlm_jax.load`: the public surface, against the training state and against plain Flax."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import vlm_jax
from vlm_jax.checkpoint import CheckpointError
from vlm_jax.train import train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    rules = {"parts": ({"name": "text", "pattern": "text/.*", "frozen": True}, {"name": "rest", "pattern": ".*"})}
    assert train(tiny.config(train__steps=4, train__ema_decay=0.5, mesh__data=8, **rules), str(workdir)) == 0
    return workdir


def test_a_model_has_what_it_was_trained_with(workdir: Path) -> None:
    m = vlm_jax.load(workdir)
    assert m.step == 4
    assert m.config == tiny.config(train__steps=4, train__ema_decay=0.5, mesh__data=8, parts=m.config.parts)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(m.params))
    tokens = m.tokenize(["a photo of the digit seven.", "zero"])
    assert tokens.shape == (2, 16)
    assert tokens.dtype == np.int32
    assert (tokens == 1).sum(axis=1).tolist() == [1, 1]  # one end token each


def test_apply_names_its_outputs_and_equals_plain_flax(workdir: Path) -> None:
    m = vlm_jax.load(workdir)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    texts = ["one", "two", "three"]
    out = m.apply(m.params, {"image": images, "text": m.tokenize(texts)})
    assert out["image_features"].shape == out["text_features"].shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(out["image_features"], axis=1), 1, rtol=1e-5)
    assert out["image/blocks"].shape == (2, 3, 5, 32)
    assert float(out["logit_scale"]) == pytest.approx(float(np.exp(m.params["logit_scale"])))
    normalised = np.stack([m.preprocess(image) for image in images])
    plain = m.module.apply({"params": m.params}, normalised, m.tokenize(texts))
    np.testing.assert_allclose(plain["image_features"], out["image_features"], atol=1e-5)  # pyright: ignore
    np.testing.assert_allclose(m.encode_image(images), out["image_features"], atol=1e-5)
    np.testing.assert_allclose(m.encode_image(list(images)), out["image_features"], atol=1e-5)
    np.testing.assert_allclose(m.encode_text(texts), out["text_features"], atol=1e-5)


def test_preprocess_takes_files_bytes_and_pillow_images(workdir: Path, tmp_path: Path) -> None:
    m = vlm_jax.load(workdir)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3)).astype(np.uint8))
    image.save(tmp_path / "x.png")
    data = io.BytesIO()
    image.save(data, "PNG")
    views = [m.preprocess(source) for source in (image, np.asarray(image), data.getvalue(), str(tmp_path / "x.png"))]
    assert views[0].shape == (8, 8, 3)
    assert views[0].dtype == np.float32
    for view in views[1:]:
        np.testing.assert_array_equal(view, views[0])


def test_the_average_is_loaded_and_frozen_parts_with_it(workdir: Path) -> None:
    """Frozen parameters have no average: they come from the parameters themselves."""
    m = vlm_jax.load(workdir)
    program = tiny.program(tiny.mesh(8), train__steps=4, train__ema_decay=0.5)
    start = tiny.host(program.setup.init().params)
    tiny.assert_trees_equal(m.params["text"], start["text"])
    assert not np.array_equal(m.params["image"]["pos_embed"], start["image"]["pos_embed"])


def test_a_mesh_by_option_and_a_step_directory(workdir: Path) -> None:
    whole = vlm_jax.load(workdir / "checkpoints" / "4")
    split = vlm_jax.load(workdir, mesh=tiny.mesh(1, 4, 2))
    kernel = split.params["image"]["blocks"]["attn"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 2, 8)
    tiny.assert_trees_equal(split.params, whole.params)
    np.testing.assert_allclose(split.encode_text(["nine"]), whole.encode_text(["nine"]), atol=1e-5)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        vlm_jax.load(tmp_path)
