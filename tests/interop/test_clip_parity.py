"""Our towers against transformers' CLIPModel and open_clip's CLIP with the same random weights."""

import functools
from typing import Any

import clip_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from vlm_jax import schema
from vlm_jax.interop import files
from vlm_jax.interop.clip import ConversionError, canonical_names, detect_family, from_params, to_params
from vlm_jax.interop.clip_config import export_config, import_config
from vlm_jax.losses.contrastive import info_nce
from vlm_jax.models.two_tower import TwoTower

CASES = [(family, activation) for family in ("hf", "open_clip") for activation in ("gelu", "quick_gelu")]


class Peer:
    """A model of another library, in float64, beside ours in float32 with its weights (which float32 holds exactly)."""

    def __init__(self, family: str, activation: str) -> None:
        self.family: Any = family
        if family == "hf":
            self.model: Any = reference.hf_model(activation)
            self.settings = self.model.config.to_dict()
        else:
            self.model = reference.open_clip_model(activation)
            self.settings = reference.open_clip_settings(activation)
        self.tensors = canonical_names(reference.to_numpy(self.model.state_dict()))
        self.config = import_config(self.tensors, self.family, self.settings, None)
        self.params = to_params(self.tensors, self.config, self.family)
        self.images, self.ids = reference.batch()
        self.model.double()

    def features(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit-length features and the scale, with gradients."""
        images, ids = self.torch_batch()
        if self.family == "hf":
            out = self.model(input_ids=ids, pixel_values=images)
            return out.image_embeds, out.text_embeds, self.model.logit_scale.exp()
        return self.model(images, ids)

    def torch_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.images).permute(0, 3, 1, 2).double(), torch.from_numpy(self.ids).long()

    @functools.cached_property
    def expected(self) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(x.numpy() for x in self.features())

    @functools.cached_property
    def outputs(self) -> dict[str, jax.Array]:
        apply = jax.jit(TwoTower(self.config).apply, static_argnames="intermediates")
        return apply({"params": self.params}, self.images, self.ids, intermediates=True)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(*request.param)


def test_the_family_and_the_sizes_are_found(peer: Peer):
    assert detect_family(peer.tensors) == peer.family
    image, text = peer.config.image, peer.config.text
    assert {key: getattr(image, key) for key in reference.IMAGE} == reference.IMAGE
    assert {key: getattr(text, key) for key in reference.TEXT} == reference.TEXT
    assert peer.config.embed_dim == reference.EMBED_DIM


def test_features_agree(peer: Peer):
    image, text, scale = peer.expected
    np.testing.assert_allclose(peer.outputs["image_features"], image, atol=1e-5)
    np.testing.assert_allclose(peer.outputs["text_features"], text, atol=1e-5)
    np.testing.assert_allclose(peer.outputs["logit_scale"], scale, rtol=1e-6)


def test_the_other_activation_would_be_noticed(peer: Peer):
    other = "gelu" if peer.config.image.activation == "quick_gelu" else "quick_gelu"
    config = schema.override(peer.config, {"image.activation": other})
    encode = jax.jit(functools.partial(TwoTower(config).apply, method="encode_image"))
    features = encode({"params": peer.params}, peer.images)
    assert np.abs(features - peer.expected[0]).max() > 1e-4


def test_the_loss_and_every_gradient_agree(peer: Peer):
    def loss_of(params: Any) -> jax.Array:
        outputs = TwoTower(peer.config).apply({"params": params}, peer.images, peer.ids)
        total, count = info_nce(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
        return total / count

    peer.model.zero_grad()
    expected = reference.import_open_clip().ClipLoss()(*peer.features())
    expected.backward()
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(peer.params)
    np.testing.assert_allclose(loss, expected.item(), atol=1e-6)
    theirs = {name: p.grad for name, p in peer.model.named_parameters()}
    wanted = flatten_dict(to_params(canonical_names(reference.to_numpy(theirs)), peer.config, peer.family), sep="/")
    ours = flatten_dict(gradients, sep="/")
    assert ours.keys() == wanted.keys()
    for path, gradient in wanted.items():
        # The bias of keys moves all logits of a row alike: its gradient is 0, so rounding is measured by the kernel's.
        scale = np.linalg.norm(wanted[path.replace("key/bias", "key/kernel")])
        error = np.linalg.norm(np.asarray(ours[path]) - gradient)
        assert error <= 1e-4 * scale, f"{path}: {error} of {scale}"


def test_intermediates_are_the_blocks_of_the_other_library(peer: Peer):
    layers = peer.model.vision_model.encoder.layers if peer.family == "hf" else peer.model.visual.transformer.resblocks
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in layers]
    with torch.no_grad():
        peer.features()
    for hook in hooks:
        hook.remove()
    blocks = np.stack([x[0].numpy() if isinstance(x, tuple) else x.numpy() for x in outputs])
    np.testing.assert_allclose(peer.outputs["image/blocks"], blocks, atol=2e-5)


def test_the_way_there_and_back_is_bit_equal(peer: Peer):
    exported = from_params(peer.params, peer.config, peer.family)
    assert exported.keys() == peer.tensors.keys()
    for name, value in peer.tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name, strict=True)


def test_the_settings_survive_the_way_there_and_back(peer: Peer):
    for family in ("hf", "open_clip"):
        tensors = from_params(peer.params, peer.config, family)
        config = import_config(tensors, family, export_config(peer.config, family), None)
        changed = dict.fromkeys(schema.differences(schema.to_dict(peer.config), schema.to_dict(config)))
        # open_clip's file names an end id only for the pool that uses it
        assert all(".eos_id" in line for line in changed), changed


def test_an_export_loads_into_transformers(tmp_path, peer: Peer):
    from transformers import CLIPModel

    files.write_json(tmp_path / "config.json", export_config(peer.config, "hf"))
    files.write_weights(tmp_path / "model.safetensors", from_params(peer.params, peer.config, "hf"), "float32")
    loaded, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, ids = peer.torch_batch()
    with torch.no_grad():
        out = loaded.double().eval()(input_ids=ids, pixel_values=images)
    np.testing.assert_allclose(out.image_embeds, peer.expected[0], atol=1e-6)
    np.testing.assert_allclose(out.text_embeds, peer.expected[1], atol=1e-6)


def test_an_export_loads_into_open_clip(peer: Peer):
    loaded = reference.import_open_clip().CLIP(**export_config(peer.config, "open_clip")).double().eval()
    tensors = from_params(peer.params, peer.config, "open_clip")
    loaded.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=True)
    with torch.no_grad():
        image, text, _ = loaded(*peer.torch_batch())
    np.testing.assert_allclose(image, peer.expected[0], atol=1e-6)
    np.testing.assert_allclose(text, peer.expected[1], atol=1e-6)


def test_bfloat16_towers_stay_close(peer: Peer):
    outputs = jax.jit(TwoTower(peer.config, dtype=jnp.bfloat16).apply)({"params": peer.params}, peer.images, peer.ids)
    for name, expected in zip(("image_features", "text_features"), peer.expected, strict=False):
        assert outputs[name].dtype == jnp.float32
        assert (np.asarray(outputs[name]) * expected).sum(-1).min() > 0.999


def test_pickles_of_training_runs_are_unwrapped(tmp_path, peer: Peer):
    state = {f"module.{name}": torch.from_numpy(value) for name, value in peer.tensors.items()}
    torch.save({"epoch": 3, "state_dict": state | {"module.attn_mask": torch.zeros(2, 2)}}, tmp_path / "epoch_3.pt")
    weights = files.read_weights(tmp_path / "epoch_3.pt")
    assert not weights.torchscript
    tensors = canonical_names(weights.tensors)
    assert tensors.keys() == peer.tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, to_params(tensors, peer.config, peer.family), peer.params)


def test_torchscript_archives_are_openais(tmp_path):
    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.5).half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.logit_scale

    torch.jit.script(Archive()).save(tmp_path / "ViT.pt")
    weights = files.read_weights(tmp_path / "ViT.pt")
    assert weights.torchscript
    assert weights.tensors["logit_scale"].dtype == np.float16


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("this must not run",))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(files.WeightsError, match=r"evil\.pt"):
        files.read_weights(tmp_path / "evil.pt")


def test_custom_text_towers_prefix_is_removed(peer: Peer):
    if peer.family == "open_clip":
        renamed = {
            name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": value
            for name, value in peer.tensors.items()
        }
        assert canonical_names(renamed).keys() == peer.tensors.keys()


def test_towers_of_unusual_width_need_their_config_file(peer: Peer):
    with pytest.raises(ConversionError, match="no config file says how many heads"):
        import_config(peer.tensors, peer.family, None, "gelu")
