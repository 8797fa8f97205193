"""AIMv2's encoder against its authors' vectors and transformers' class on random weights; files there and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_vectors import GoldenVectors
from safetensors.numpy import load_file

import vlm_jax
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.aimv2 import Aimv2, HfAimv2
from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import ConversionError, from_params, to_params
from vlm_jax.models.aimv2 import AIMV2, aimv2_encoder
from vlm_jax.models.vit import ViTConfig
from vlm_jax.schema import override

SIZES = {"hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(config: ViTConfig, params: Any, images: np.ndarray) -> Any:
    """The tower's outputs on NHWC images."""
    return config.build(None, np.float32).apply({"params": params["image"]}, images, intermediates=True)


@pytest.mark.parametrize(("name", "pos_embed"), [("aimv2_absolute", "learned"), ("aimv2_sincos", "sincos")])
def test_the_authors_encoder(name: str, pos_embed: Any) -> None:
    golden, form = GoldenVectors(name), Aimv2()
    assert isinstance(recognise(golden.weights)[0], Aimv2)
    config = override(aimv2_encoder(32, 2, 4, 48, image_size=24, pos_embed=pos_embed), {"patch_size": 6})
    params = to_params(golden.weights, form.rows(config), form.shapes(config), form.title)
    outputs, expected = run(config, params, golden.images()), golden.outputs
    np.testing.assert_allclose(outputs["embed"], expected["preprocessed"], atol=2e-5)
    for index in range(2):
        np.testing.assert_allclose(outputs["blocks"][index], expected[f"block{index}"], atol=2e-5)
    np.testing.assert_allclose(outputs["tokens"], expected["last"], atol=2e-5)
    if pos_embed == "sincos":
        wide = override(config, {"image_size": (18, 30)})
        tokens = run(wide, params, golden.images("image_18x30"))["tokens"]
        np.testing.assert_allclose(tokens, expected["last_18x30"], atol=2e-5)
    back = from_params(params, form.rows(config), form.title)
    assert back.keys() == golden.weights.keys()
    for key, value in golden.weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def twin(native: bool) -> Any:
    """transformers' encoder with random weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = transformers.Aimv2VisionConfig(**SIZES, image_size=16, patch_size=4, use_head=False, is_native=native)
    torch.manual_seed(0)
    model = transformers.Aimv2VisionModel(settings).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.uniform_(-0.05, 0.05).add_(1.0 if "norm" in name else 0.0)
    return model


@pytest.mark.parametrize("native", [False, True], ids=["learned", "native"])
def test_transformers_encoder_and_its_files(native: bool, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = twin(native)
    model.save_pretrained(tmp_path / "theirs")
    source = f"--from={tmp_path / 'theirs'}"
    assert main(["import", source, f"--to={tmp_path / 'ours'}", "--preprocess=clip"]) == 0
    loaded = vlm_jax.load(tmp_path / "ours")
    config: Any = loaded.config.objective.image_tower  # pyright: ignore[reportAttributeAccessIssue]
    rng = np.random.default_rng(0)
    for shape in ((16, 16), (8, 24)) if native else ((16, 16),):
        images = rng.normal(size=(2, *shape, 3)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
        outputs = run(override(config, {"image_size": shape}), loaded.params, images)
        np.testing.assert_allclose(outputs["tokens"], expected.last_hidden_state, atol=2e-5)
        for ours, theirs in zip(outputs["blocks"], expected.hidden_states[1:], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert main(["export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--family=hf"]) == 0
    again, loading = transformers.Aimv2VisionModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for key, value in json.loads((tmp_path / "back" / "config.json").read_text()).items():
        assert getattr(model.config, key) == value or key == "architectures"


def test_the_same_encoder_in_both_spellings(tmp_path: Path) -> None:
    """From the library's names to the authors' and back again, by the commands."""
    twin(False).save_pretrained(tmp_path / "hf")
    steps = [("import", "hf", "a", "--preprocess=clip"), ("export", "a", "official", "--family=official")]
    steps += [("import", "official", "b", "--preprocess=clip"), ("export", "b", "back", "--family=hf")]
    for command, source, target, flag in steps:
        assert main([command, f"--from={tmp_path / source}", f"--to={tmp_path / target}", flag]) == 0
    theirs, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert theirs.keys() == back.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(value, back[name], err_msg=name)


@pytest.mark.parametrize("name", AIMV2)
def test_sizes_are_those_of_the_library(name: str) -> None:
    """Parameters of transformers' class, built without memory; for B and L also the published 0.09 and 0.31 G."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    image = AIMV2[name].image
    settings = transformers.Aimv2VisionConfig(
        hidden_size=image.width,
        intermediate_size=image.mlp_dim,
        num_hidden_layers=image.depth,
        num_attention_heads=image.heads,
        use_head=False,
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.Aimv2VisionModel(settings).parameters())
    assert sum(int(np.prod(shape)) for shape in HfAimv2().shapes(image).values()) == count


def test_what_is_not_this_encoder_is_refused(tmp_path: Path) -> None:
    settings = {"model_type": "aimv2_vision_model", "use_head": True}
    weights = {"embeddings.rms_norm.weight": np.ones(4, np.float32)}
    with pytest.raises(ConversionError, match=r"needs its config\.json"):
        HfAimv2().read_config(weights, None, None)
    with pytest.raises(ConversionError, match="use_head = true"):
        HfAimv2().read_config(weights, settings, None)
    with pytest.raises(ConversionError, match=r"image\.heads = 4 \(only \(2,\)\)"):
        Aimv2().write_config(aimv2_encoder(256, 2, 4, 48))
    narrow = {f"trunk.blocks.0.{name}": np.ones((48, 32), np.float32) for name in ("norm_1.weight", "mlp.fc1.weight")}
    with pytest.raises(ConversionError, match="no file says how many heads a trunk of width 48"):
        Aimv2().read_config(narrow, None, None)
