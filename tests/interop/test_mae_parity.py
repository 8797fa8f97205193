"""MAE against transformers' class on random weights, and both formats of its files there and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.data.images import IMAGENET_MEAN, PreprocessConfig
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.hf_vit_mae import HfViTMae
from vlm_jax.interop.mae import Mae as MaeFormat
from vlm_jax.interop.preprocess import KNOWN, import_preprocess
from vlm_jax.interop.tables import ConversionError, from_params
from vlm_jax.models.masked_autoencoder import MaskedAutoencoderConfig, PixelDecoderConfig, mae_encoder
from vlm_jax.models.position import sincos_2d
from vlm_jax.objectives.mae import MaeConfig
from vlm_jax.schema import ConfigError

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def twin() -> Any:
    settings = transformers.ViTMAEConfig(
        **SIZES,
        **{f"decoder_{name}": value for name, value in DECODER.items()},
        image_size=24,
        patch_size=4,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
    )
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(settings).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "pos" in name:
                # The library starts at other positions than the published models have.
                tensor.copy_(torch.from_numpy(sincos_2d((6, 6), tensor.shape[-1], 1)[None]))
            else:
                tensor.uniform_(-0.3, 0.3).add_(0.5 if "norm" in name and name.endswith("weight") else 0.0)
    return model


@pytest.fixture(scope="module")
def folder(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved")
    twin.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["import", f"--from={folder}", f"--to={target}"]) == 0
    return target


def test_prediction_loss_and_gradients_are_the_library_s(twin: Any, imported: Path) -> None:
    model = vlm_jax.load(imported)
    config: Any = model.config.objective
    objective = config.build(PreprocessConfig(), np.float32)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 24, 24, 3)).astype(np.float32)
    noise = rng.uniform(size=(3, 36)).astype(np.float32)
    expected = twin(torch.from_numpy(images.transpose(0, 3, 1, 2)), noise=torch.from_numpy(noise))

    def loss(params: Any) -> Any:
        (total, count), outputs = objective.loss_and_outputs(params, images, noise)
        return total / count, outputs

    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    np.testing.assert_allclose(outputs["prediction"], expected.logits.detach(), atol=2e-5)
    np.testing.assert_array_equal(outputs["removed"], expected.mask.numpy().astype(bool))
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-5)
    twin.zero_grad()
    expected.loss.backward()
    form = HfViTMae()
    ours = from_params(gradients, form.rows(config.model), form.title)
    theirs = form.canonical({name: p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None})
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(ours[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_it_goes_back_bit_for_bit_and_the_library_loads_it(
    twin: Any, folder: Path, imported: Path, tmp_path: Path
) -> None:
    assert vlm_jax.load(imported).config.data.preprocess == KNOWN["imagenet"]
    assert main(["export", f"--from={imported}", f"--to={tmp_path}", "--family=hf"]) == 0
    again, loading = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in twin.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for key, value in json.loads((tmp_path / "config.json").read_text()).items():
        assert getattr(twin.config, key) == value
    # The Hub's spelling, which transformers 5 reads but does not write.
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "decoder.decoder_layers.1.attention.attention.query.weight" in names
    assert len(names) == len(load_file(folder / "model.safetensors"))


def test_live_and_hub_names_are_one_model(twin: Any, folder: Path, imported: Path, tmp_path: Path) -> None:
    """What `torch.save(model.state_dict())` writes, in a file of the Hub, and in one of this library."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(twin.state_dict(), tmp_path / "pytorch_model.bin")
    assert main(["import", f"--from={tmp_path}", f"--to={tmp_path / 'a'}"]) == 0
    assert_same(vlm_jax.load(tmp_path / "a").params, vlm_jax.load(imported).params)


@pytest.mark.parametrize("size", [24, {"height": 24, "width": 24}])
def test_the_preprocessing_of_the_hub_s_models(size: Any) -> None:
    """ViTFeatureExtractor makes both sides the size; with Pillow's number of bilinear."""
    settings = {"feature_extractor_type": "ViTFeatureExtractor", "size": size, "resample": 2, "do_resize": True}
    settings |= {"image_mean": list(IMAGENET_MEAN), "image_std": [0.229, 0.224, 0.225], "do_normalize": True}
    found = import_preprocess(settings, "hf", (24, 24))
    assert (found.resize, found.interpolation, found.mean) == ("squash", "bilinear", IMAGENET_MEAN)


def original_file(file: Path) -> dict[str, np.ndarray]:
    """Random weights as the authors' code stores them, of sizes that follow its rule of heads."""
    encoder = mae_encoder(64, 2, 1, 8, image_size=16)
    model = MaskedAutoencoderConfig(encoder, PixelDecoderConfig(width=32, depth=1, heads=1, mlp_dim=48))
    form, rng = MaeFormat(), np.random.default_rng(0)
    flat = {path: rng.uniform(-0.5, 0.5, shape).astype(np.float32) for path, shape in form.shapes(model).items()}
    tensors = from_params(unflatten_dict(flat, sep="/"), form.rows(model), form.title) | form.constants(model)
    torch.save({"model": {name: torch.from_numpy(x) for name, x in tensors.items()}, "epoch": 3}, file)
    return tensors


def test_the_authors_files_come_in_and_go_out_bit_for_bit(tmp_path: Path) -> None:
    tensors = original_file(tmp_path / "mae.pth")
    assert main(["import", f"--from={tmp_path / 'mae.pth'}", f"--to={tmp_path / 'a'}"]) == 0
    model = vlm_jax.load(tmp_path / "a")
    assert isinstance(model.config.objective, MaeConfig)
    assert model.config.objective.model.normalise_pixels
    assert model.config.data.preprocess.mean == IMAGENET_MEAN
    assert model.encode_image(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 64)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        model.tokenize(["a photo"])
    assert main(["export", f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--family=official"]) == 0
    assert_same(load_file(tmp_path / "b" / "model.safetensors"), tensors)


def test_an_encoder_alone_gives_features_and_starts_a_run(tmp_path: Path, capsys: Any) -> None:
    """Most released files hold no decoder. The features are those of the whole model's encoder."""
    tensors = original_file(tmp_path / "mae.pth")
    encoder = {name: x for name, x in tensors.items() if "decoder" not in name and name != "mask_token"}
    save_file(encoder, tmp_path / "mae_pretrain.safetensors")
    for name in ("mae.pth", "mae_pretrain.safetensors"):
        assert main(["import", f"--from={tmp_path / name}", f"--to={tmp_path / Path(name).stem}"]) == 0
    whole, alone = vlm_jax.load(tmp_path / "mae"), vlm_jax.load(tmp_path / "mae_pretrain")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(alone.encode_image(images), whole.encode_image(images))
    assert main(["export", f"--from={tmp_path / 'mae_pretrain'}", f"--to={tmp_path / 'b'}", "--family=official"]) == 0
    assert_same(load_file(tmp_path / "b" / "model.safetensors"), encoder)
    with pytest.raises(ConfigError, match="no loss to train by; give a method and start it from this checkpoint"):
        alone.config.objective.make_example(None, alone.config.data)


def test_positions_that_are_not_the_published_ones_are_refused(tmp_path: Path, capsys: Any) -> None:
    tensors = original_file(tmp_path / "mae.pth")
    save_file(tensors | {"pos_embed": tensors["pos_embed"] + 0.1}, tmp_path / "mae.safetensors")
    assert main(["import", f"--from={tmp_path / 'mae.safetensors'}", f"--to={tmp_path / 'a'}"]) == 2
    assert "pos_embed of these weights is not the constant that the authors' MAE" in capsys.readouterr().err


def test_a_model_that_is_no_published_mae_does_not_go_out(tmp_path: Path, capsys: Any) -> None:
    original_file(tmp_path / "mae.pth")
    assert main(["import", f"--from={tmp_path / 'mae.pth'}", f"--to={tmp_path / 'a'}"]) == 0
    objective: Any = vlm_jax.load(tmp_path / "a").config.objective
    other = dataclasses.replace(objective.model, image=dataclasses.replace(objective.model.image, heads=2))
    with pytest.raises(ConversionError, match=r"image\.heads = 2 \(only \(1,\)\)"):
        MaeFormat().write_config(other)
    assert main(["export", f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--family=open_clip"]) == 2
    assert "open_clip has no such model; it can be exported with --family=hf|official" in capsys.readouterr().err


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), dict(a), dict(b))
