"""Our towers against transformers' CLIP and SigLIP and open_clip's CLIPs with the same random weights."""

import functools
from collections.abc import Callable
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
from vlm_jax.interop.open_clip_vit import OpenClipViT
from vlm_jax.interop.registry import for_export, recognise
from vlm_jax.interop.tables import ConversionError, from_params, to_params
from vlm_jax.losses.contrastive import info_nce
from vlm_jax.losses.sigmoid import sigmoid_loss
from vlm_jax.models.resnet import ResNetConfig
from vlm_jax.models.two_tower import TwoTower

# Name -> model and settings of the other library.
CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "hf-gelu": lambda: hf(reference.hf_model("gelu")),
    "hf-siglip": lambda: hf(reference.siglip_model()),
    "open_clip-quick_gelu": lambda: open_clip(reference.open_clip_settings("quick_gelu")),
    "open_clip-tanh": lambda: open_clip(variant()),
    "open_clip-resnet": lambda: open_clip(reference.resnet_settings()),
}


def hf(model: Any) -> tuple[Any, Any]:
    return model, model.config.to_dict()


def open_clip(settings: Any) -> tuple[Any, Any]:
    return reference.open_clip_model(settings), settings


def variant() -> Any:
    """What the plain settings leave out: another GELU, pooling, eps, a bias on the projection and on the logits."""
    settings = reference.open_clip_settings("gelu")
    tanh = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
    settings["vision_cfg"] |= tanh | {"pool_type": "avg", "no_ln_pre": True}
    settings["text_cfg"] |= tanh | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "mlp_ratio": 3.3}
    return settings | {"init_logit_bias": -4.0}


class Peer:
    """A model of another library, in float64, beside ours in float32 with its weights (which float32 holds exactly)."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.model, self.settings = CASES[case]()
        self.format, self.tensors = recognise(reference.to_numpy(self.model.state_dict()))
        self.config = self.format.read_config(self.tensors, self.settings, None)
        schema.validate(self.config)
        self.rows = self.format.rows(self.config)
        self.params = self.to_params(self.tensors)
        self.images, self.ids = reference.batch(side=self.config.image.image_shape[0])
        self.model.double()

    def to_params(self, tensors: Any) -> Any:
        return to_params(tensors, self.rows, self.format.shapes(self.config), self.format.title)

    def from_params(self, params: Any) -> dict[str, np.ndarray]:
        return from_params(params, self.rows, self.format.title)

    def features(self) -> tuple[torch.Tensor, ...]:
        """Unit-length features, the scale and the bias if there is one, with gradients."""
        images, ids = self.torch_batch()
        if self.format.library != "hf":
            return self.model(images, ids)
        out = self.model(input_ids=ids, pixel_values=images)
        bias = (self.model.logit_bias,) if "siglip" in self.case else ()
        return out.image_embeds, out.text_embeds, self.model.logit_scale.exp(), *bias

    def torch_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.images).permute(0, 3, 1, 2).double(), torch.from_numpy(self.ids).long()

    def torch_loss(self) -> torch.Tensor:
        outputs, losses = self.features(), reference.import_open_clip().loss
        return losses.SigLipLoss()(*outputs) if len(outputs) == 4 else losses.ClipLoss()(*outputs)

    def loss(self, params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        out: Any = TwoTower(self.config).apply({"params": params}, self.images, self.ids, intermediates=True)
        arguments = out["image_features"], out["text_features"], out["logit_scale"]
        total, count = sigmoid_loss(*arguments, out["logit_bias"]) if "logit_bias" in out else info_nce(*arguments)
        return total / count, out

    @functools.cached_property
    def expected(self) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(x.numpy() for x in self.features())

    @functools.cached_property
    def computed(self) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        """((loss, outputs), gradients), in one program: compiling is what takes time here."""
        return jax.jit(jax.value_and_grad(self.loss, has_aux=True))(self.params)

    @property
    def outputs(self) -> dict[str, jax.Array]:
        return self.computed[0][1]


@pytest.fixture(scope="module", params=CASES)
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(request.param)


def test_the_sizes_are_found(peer: Peer):
    image, text = peer.config.image, peer.config.text
    if isinstance(image, ResNetConfig):
        assert image == ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=4, heads=4)
    elif peer.case in ("hf-gelu", "open_clip-quick_gelu"):
        assert {key: getattr(image, key) for key in reference.IMAGE} == reference.IMAGE
        assert {key: getattr(text, key) for key in reference.TEXT} == reference.TEXT
    assert peer.config.embed_dim == (24 if peer.case == "hf-siglip" else reference.EMBED_DIM)


def test_features_agree(peer: Peer):
    image, text, scale, *bias = peer.expected
    np.testing.assert_allclose(peer.outputs["image_features"], image, atol=1e-5)
    np.testing.assert_allclose(peer.outputs["text_features"], text, atol=1e-5)
    np.testing.assert_allclose(peer.outputs["logit_scale"], scale.reshape(()), rtol=1e-6)
    assert [peer.outputs[name] for name in ("logit_bias",) if name in peer.outputs] == [float(b.item()) for b in bias]


def test_the_other_activation_would_be_noticed(peer: Peer):
    if isinstance(peer.config.image, ResNetConfig):
        other = schema.override(peer.config, {"text.activation": "quick_gelu"})
        method, inputs, expected = "encode_text", peer.ids, peer.expected[1]
    else:
        activation = {"gelu": "quick_gelu", "quick_gelu": "gelu", "gelu_tanh": "gelu"}[peer.config.image.activation]
        other = schema.override(peer.config, {"image.activation": activation})
        method, inputs, expected = "encode_image", peer.images, peer.expected[0]
    features: Any = jax.jit(functools.partial(TwoTower(other).apply, method=method))({"params": peer.params}, inputs)
    assert np.abs(features - expected).max() > (1e-4 if "quick_gelu" in peer.case else 1e-5)


def test_the_loss_and_every_gradient_agree(peer: Peer):
    peer.model.zero_grad()
    expected = peer.torch_loss()
    expected.backward()
    (loss, _), gradients = peer.computed
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    # running statistics have none
    theirs = {name: torch.zeros_like(value) for name, value in peer.model.state_dict().items()}
    theirs |= {name: p.grad for name, p in peer.model.named_parameters()}
    tensors = recognise(reference.to_numpy(theirs))[1]
    wanted, ours = (flatten_dict(tree, sep="/") for tree in (peer.to_params(tensors), gradients))
    assert ours.keys() == wanted.keys()
    for path, gradient in wanted.items():
        # The bias of keys moves all logits of a row alike: its gradient is 0, so rounding is measured by the kernel's.
        scale = np.linalg.norm(wanted[path.replace("key/bias", "key/kernel")])
        error = np.linalg.norm(np.asarray(ours[path]) - gradient)
        assert error <= 1e-4 * scale, f"{path}: {error} of {scale}"


def test_intermediates_are_the_blocks_of_the_other_library(peer: Peer):
    if isinstance(peer.config.image, ResNetConfig):
        layers = [getattr(peer.model.visual, f"layer{i}") for i in range(1, 5)]
    elif peer.format.library == "hf":
        layers = peer.model.vision_model.encoder.layers
    else:
        layers = peer.model.visual.transformer.resblocks
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in layers]
    with torch.no_grad():
        peer.features()
    for hook in hooks:
        hook.remove()
    blocks = [x[0].numpy() if isinstance(x, tuple) else x.numpy() for x in outputs]
    if isinstance(peer.config.image, ResNetConfig):
        for i, block in enumerate(blocks, start=1):
            np.testing.assert_allclose(peer.outputs[f"image/stage{i}"], block.transpose(0, 2, 3, 1), atol=2e-5)
    else:
        np.testing.assert_allclose(peer.outputs["image/blocks"], np.stack(blocks), atol=2e-5)


def test_the_way_there_and_back_is_bit_equal(peer: Peer):
    exported = peer.from_params(peer.params)
    assert exported.keys() == peer.tensors.keys()
    for name, value in peer.tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name, strict=True)


def test_the_settings_survive_the_way_there_and_back(peer: Peer):
    assert peer.format.read_config(peer.tensors, peer.format.write_config(peer.config), None) == peer.config


@pytest.mark.parametrize("case", ["open_clip-quick_gelu", "hf-gelu"])
def test_clip_goes_from_one_library_to_the_other(case: str):
    peer = Peer(case)
    other = for_export(peer.config, "hf" if peer.format.library == "open_clip" else "open_clip")
    tensors = from_params(peer.params, other.rows(peer.config), other.title)
    config = other.read_config(tensors, other.write_config(peer.config), None)
    changed = dict.fromkeys(schema.differences(schema.to_dict(peer.config), schema.to_dict(config)))
    # open_clip's file names an end id only for the pool that uses it
    assert all(".eos_id" in line for line in changed), changed
    again = to_params(tensors, other.rows(config), other.shapes(config), other.title)
    jax.tree.map(np.testing.assert_array_equal, again, peer.params)


def test_bfloat16_towers_stay_close(peer: Peer):
    if peer.case in ("open_clip-quick_gelu", "open_clip-resnet"):
        outputs: Any = jax.jit(TwoTower(peer.config, dtype=jnp.bfloat16).apply)(
            {"params": peer.params}, peer.images, peer.ids
        )
        for name, expected in zip(("image_features", "text_features"), peer.expected, strict=False):
            assert outputs[name].dtype == jnp.float32
            assert (np.asarray(outputs[name]) * expected).sum(-1).min() > 0.999


@pytest.mark.parametrize("case", ["open_clip-quick_gelu"])
def test_pickles_of_training_runs_are_unwrapped(tmp_path, case: str):
    peer = Peer(case)
    state = {f"module.{name}": torch.from_numpy(value) for name, value in peer.tensors.items()}
    torch.save({"epoch": 3, "state_dict": state | {"module.attn_mask": torch.zeros(2, 2)}}, tmp_path / "epoch_3.pt")
    weights = files.read_weights(tmp_path / "epoch_3.pt")
    assert not weights.torchscript
    _, tensors = recognise(weights.tensors)
    assert tensors.keys() == peer.tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, peer.to_params(tensors), peer.params)
    # the text tower of CustomTextCLIP is a module of its own
    own = ("visual.", "logit_scale")
    renamed = {name if name.startswith(own) else f"text.{name}": value for name, value in peer.tensors.items()}
    assert recognise(renamed)[1].keys() == peer.tensors.keys()
    with pytest.raises(ConversionError, match="no config file says how many heads"):
        OpenClipViT().read_config(peer.tensors, None, "gelu")


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
