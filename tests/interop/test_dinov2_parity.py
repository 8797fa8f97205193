"""DINOv2's encoder against transformers' classes with random weights, both ways."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from vlm_jax.interop.dinov2 import HfDinov2, OfficialDinov2
from vlm_jax.interop.files import write_json
from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import ConversionError, from_params, to_params
from vlm_jax.models.presets import DINOV2

CLASSES: dict[str, tuple[Any, Any]] = {
    "plain": (Dinov2Config, Dinov2Model),
    "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}
FORMAT = HfDinov2()


class Peer:
    def __init__(self, kind: str, swiglu: bool) -> None:
        make_config, make_model = CLASSES[kind]
        self.settings = make_config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
            use_swiglu_ffn=swiglu, layerscale_value=1.0, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = make_model(self.settings).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        live = {name: value.numpy() for name, value in self.model.state_dict().items()}
        found, self.tensors = recognise(live)
        assert isinstance(found, HfDinov2)
        self.config = FORMAT.read_config(self.tensors, self.settings.to_dict(), None)
        self.rows = FORMAT.rows(self.config)
        self.params = to_params(self.tensors, self.rows, FORMAT.shapes(self.config), FORMAT.title)

    def ours(self, images: np.ndarray, **options: Any) -> dict[str, jax.Array]:
        module: Any = self.config.build(None, np.float32)
        encode = jax.jit(lambda params, images, options: module.apply({"params": params}, images, **options))
        return encode(self.params["image"], images, options)

    def theirs(self, images: np.ndarray, masked: np.ndarray | None = None) -> Any:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.no_grad():
            return self.model(pixels, bool_masked_pos=None if masked is None else torch.from_numpy(masked))


@pytest.fixture(scope="module", params=[(k, s) for k in CLASSES for s in (False, True)], ids=str)
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(*request.param)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)


@pytest.mark.parametrize("shape", [(32, 32), (48, 40), (16, 24)], ids=str)
def test_tokens_of_any_size(peer: Peer, shape: tuple[int, int]) -> None:
    """transformers resizes by size alone, without DINOv2's 0.1, which the imported config says."""
    images = pictures(*shape)
    ours, theirs = peer.ours(images), peer.theirs(images)
    np.testing.assert_allclose(ours["tokens"], theirs.last_hidden_state, atol=2e-5)
    np.testing.assert_allclose(ours["pooled"], theirs.pooler_output, atol=2e-5)


def test_masked_tokens(peer: Peer) -> None:
    images, masked = pictures(32, 32), np.random.default_rng(2).random((2, 16)) < 0.4
    ours = peer.ours(images, masked_BxN=masked)
    np.testing.assert_allclose(ours["tokens"], peer.theirs(images, masked).last_hidden_state, atol=2e-5)


def test_their_files_and_ours_are_the_same(peer: Peer, tmp_path: Path) -> None:
    peer.model.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    written = FORMAT.published(from_params(peer.params, peer.rows, FORMAT.title))
    assert written.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    (tmp_path / "ours").mkdir()
    save_file(written, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    write_json(tmp_path / "ours" / "config.json", FORMAT.write_config(peer.config))
    back = type(peer.model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    images = torch.from_numpy(pictures(32, 32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert torch.equal(back(images).last_hidden_state, peer.model(images).last_hidden_state)


def test_through_the_official_names(peer: Peer) -> None:
    official = OfficialDinov2()
    tensors = from_params(peer.params, official.rows(peer.config), official.title)
    found, canonical = recognise({f"teacher.backbone.{name}": value for name, value in tensors.items()})
    assert isinstance(found, OfficialDinov2)
    config = official.read_config(canonical, {"num_heads": 4}, None)
    assert (config.width, config.gated, config.registers, config.heads) == (
        peer.config.width, peer.config.gated, peer.config.registers, peer.config.heads,
    )  # fmt: skip
    back = to_params(canonical, official.rows(config), official.shapes(config), official.title)
    jax.tree.map(np.testing.assert_array_equal, back, peer.params)


def test_a_tower_of_another_kind_is_refused() -> None:
    peer = Peer("registers", False)
    with pytest.raises(ConversionError, match="heads = 4"):
        OfficialDinov2().write_config(peer.config)
    with pytest.raises(ConversionError, match="pool = 'mean'"):
        FORMAT.write_config(dataclasses.replace(peer.config, pool="mean"))
    assert OfficialDinov2().write_config(DINOV2["DINOv2-g/14-reg"]) == {}
    assert not FORMAT.claims(dataclasses.replace(peer.config, pos_embed="sincos"))


def test_blocks_in_chunks_are_numbered_through() -> None:
    names = {"cls_token": 0, "blocks.0.0.norm1.weight": 0, "blocks.1.6.norm1.weight": 1}
    canonical = OfficialDinov2().canonical({name: np.array(value) for name, value in names.items()})
    assert set(canonical) == {"cls_token", "blocks.0.norm1.weight", "blocks.6.norm1.weight"}


@pytest.mark.parametrize("name", DINOV2)
def test_presets_have_the_published_parameters(name: str) -> None:
    """Counted on transformers' class of the same sizes, which holds no array here."""
    preset = DINOV2[name]
    make_config, make_model = CLASSES["registers" if preset.registers else "plain"]
    settings = make_config(
        hidden_size=preset.width, num_hidden_layers=preset.depth, num_attention_heads=preset.heads, image_size=518,
        patch_size=14, use_swiglu_ffn=preset.gated,
    )  # fmt: skip
    with torch.device("meta"):
        model = make_model(settings)
    theirs = sum(parameter.numel() for parameter in model.parameters())
    assert sum(int(np.prod(shape)) for shape in FORMAT.shapes(preset).values()) == theirs
    millions = {"S": 21, "B": 86, "L": 300, "g": 1100}[name[7]]  # as the paper's repository rounds them
    assert theirs / 1e6 == pytest.approx(millions, rel=0.06)
