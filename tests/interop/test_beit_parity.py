"""BEiT against transformers' class, its tokenizer against a plain torch encoder, and every format there and back."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.checkpoint import save_params
from vlm_jax.config import load_config, to_json
from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.beit import Beit as BeitFormat
from vlm_jax.interop.hf_beit import HfBeit
from vlm_jax.interop.tables import from_params
from vlm_jax.models.beit import BEIT
from vlm_jax.models.dvae import Dvae, DvaeModelConfig
from vlm_jax.objectives.beit import BeitConfig
from vlm_jax.schema import ConfigError, override

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
functional = torch.nn.functional

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
FORM = {"use_mask_token": True, "use_shared_relative_position_bias": True, "layer_norm_eps": 1e-6}


@pytest.fixture(scope="module")
def twin() -> Any:
    settings = transformers.BeitConfig(**SIZES, **FORM, image_size=32, patch_size=8, vocab_size=20)
    torch.manual_seed(0)
    model = transformers.BeitForMaskedImageModeling(settings).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            one = ("norm" in name and name.endswith("weight")) or "lambda" in name
            tensor.uniform_(-0.3, 0.3).add_(0.5 if one else 0.0)
    return model


@pytest.fixture(scope="module")
def imported(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    twin.save_pretrained(folder)
    target = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["import", f"--from={folder}", f"--to={target}", "--preprocess=inception"]) == 0
    return target


def test_logits_loss_and_gradients_are_the_library_s(twin: Any, imported: Path) -> None:
    """Rows with different numbers of hidden patches, one of them with none."""
    model = vlm_jax.load(imported)
    config = override(model.config.objective, {"model.masks": BlockMasks(count=9, least=1)})
    objective: Any = config.build(PreprocessConfig(), np.float32)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 32, 32, 3)).astype(np.float32)
    masked = np.stack([rng.permutation(16) < count for count in (9, 1, 0, 5)])
    codes = rng.integers(0, 20, (4, 16)).astype(np.int32)
    hidden = torch.from_numpy(masked)
    expected = twin(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        bool_masked_pos=hidden,
        labels=torch.from_numpy(codes).long()[hidden],
    )
    outputs: Any = objective.module.apply({"params": model.params}, images, masked)
    np.testing.assert_allclose(outputs["logits"], expected.logits.detach(), atol=2e-5)

    def loss(params: Any) -> jax.Array:
        (total, count), _ = objective.loss_of(params, images, masked, codes)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-5)
    twin.zero_grad()
    expected.loss.backward()
    form = HfBeit()
    ours = from_params(gradients, form.rows(config.model), form.title)
    theirs = form.canonical({name: p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None})
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(ours[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_it_goes_back_bit_for_bit_and_the_library_loads_it(twin: Any, imported: Path, tmp_path: Path) -> None:
    assert main(["export", f"--from={imported}", f"--to={tmp_path}", "--family=hf"]) == 0
    again, loading = transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in twin.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert "beit.encoder.layer.1.attention.attention.key.weight" in load_file(tmp_path / "model.safetensors")


def test_the_authors_names_go_out_and_come_in_bit_for_bit(imported: Path, tmp_path: Path) -> None:
    model = vlm_jax.load(imported)
    save = {"config": to_json(override(model.config, {"objective.model.image.norm_eps": 1e-6})), "tokenizer": None}
    save_params(tmp_path / "ours", model.params, preprocess={}, **save)
    assert main(["export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'out'}", "--family=official"]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    golden = load_file(Path(__file__).parents[1] / "golden" / "beit.safetensors")
    names = {name.removeprefix("weights/") for name in golden if name.startswith("weights/")}
    assert tensors.keys() == {name for name in names if not name.startswith("blocks.2.")}
    torch.save({"model": {name: torch.from_numpy(x) for name, x in tensors.items()}}, tmp_path / "beit.pth")
    source, target = tmp_path / "beit.pth", tmp_path / "back"
    assert main(["import", f"--from={source}", f"--to={target}", "--preprocess=imagenet"]) == 0
    again: Any = vlm_jax.load(target)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config.objective.model.image == model.config.objective.model.image
    assert again.encode_image(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 24)
    with pytest.raises(ConfigError, match="leaves nothing to learn from"):
        again.config.objective.make_example(None, again.config.data)


@pytest.mark.parametrize("name", BEIT)
def test_parameters_are_as_many_as_the_library_s(name: str) -> None:
    image = BEIT[name].image
    settings = transformers.BeitConfig(
        hidden_size=image.width,
        num_hidden_layers=image.depth,
        num_attention_heads=image.heads,
        intermediate_size=image.mlp_dim,
        **FORM,
    )
    with torch.device("meta"):
        expected = sum(p.numel() for p in transformers.BeitForMaskedImageModeling(settings).parameters())
    objective = BeitConfig(model=override(BEIT[name], {"tokenizer": None})).build(PreprocessConfig(), jnp.float32)
    shapes: Any = meta.unbox(jax.eval_shape(lambda: objective.init(jax.random.key(0))[0]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert {"BEiT-B/16": 92, "BEiT-L/16": 311}[name] == pytest.approx(expected / 1e6, abs=1)


class TorchCode:
    """DALL-E's encoder and decoder from the paper's appendix A and the published names, on plain tensors."""

    def __init__(self, tensors: dict[str, Any], layers: int):
        self.tensors, self.gain = tensors, 1 / layers**2

    def convolve(self, name: str, x: Any) -> Any:
        kernel = self.tensors[f"blocks.{name}.w"]
        return functional.conv2d(x, kernel, self.tensors[f"blocks.{name}.b"], padding=kernel.shape[-1] // 2)

    def block(self, name: str, x: Any) -> Any:
        branch = x
        for i in range(1, 5):
            branch = self.convolve(f"{name}.res_path.conv_{i}", torch.relu(branch))
        same = f"blocks.{name}.id_path.w" not in self.tensors
        return (x if same else self.convolve(f"{name}.id_path", x)) + self.gain * branch

    def __call__(self, x: Any, blocks: int, between: Any) -> Any:
        x = self.convolve("input", x)
        for group in range(1, 5):
            x = between(x) if group > 1 else x
            for block in range(1, blocks + 1):
                x = self.block(f"group_{group}.block_{block}", x)
        return self.convolve("output.conv", torch.relu(x))


def published(widths: list[int], blocks: int, first: tuple[int, int, int], last: int, sizes: tuple[int, ...]) -> Any:
    """Random tensors in the published names; `first` is the input's channels, width and kernel."""
    shapes = {"input": (first[1], first[0], first[2]), "output.conv": (last, widths[-1], 1)}
    channels = first[1]
    for group, width in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            name, inner = f"group_{group}.block_{block}", width // 4
            if channels != width:
                shapes[f"{name}.id_path"] = (width, channels, 1)
            ends = (channels, inner, inner, inner, width)
            for i, size in enumerate(sizes):
                shapes[f"{name}.res_path.conv_{i + 1}"] = (ends[i + 1], ends[i], size)
            channels = width
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{name}.w": rng.normal(0, 0.3, (*s, s[-1])).astype(np.float32) for name, s in shapes.items()}
    return tensors | {f"blocks.{n}.b": rng.normal(0, 0.3, s[0]).astype(np.float32) for n, s in shapes.items()}


ENCODER = published([8, 16, 32, 64], 2, (3, 8, 7), 40, (3, 3, 3, 1))


def as_torch(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.from_numpy(x) for name, x in tensors.items()}


def test_the_published_encoder_comes_in_and_gives_its_logits(tmp_path: Path) -> None:
    torch.save(as_torch(ENCODER), tmp_path / "encoder.pth")
    assert main(["import", f"--from={tmp_path / 'encoder.pth'}", f"--to={tmp_path / 'a'}"]) == 0
    model: Any = vlm_jax.load(tmp_path / "a")
    assert model.config.objective.model == DvaeModelConfig(vocab_size=40, width=8, blocks=2, decoder=False)
    images = np.random.default_rng(1).integers(0, 256, (2, 24, 32, 3)).astype(np.uint8)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255 * 0.8 + 0.1
    expected = TorchCode(as_torch(ENCODER), 8)(pixels, 2, lambda x: functional.max_pool2d(x, 2))
    found = model.apply(model.params, {"image": images})
    scale = float(expected.abs().max())
    np.testing.assert_allclose(found["code_logits"] / scale, expected.permute(0, 2, 3, 1) / scale, atol=2e-6)
    np.testing.assert_array_equal(found["codes"], expected.argmax(1))
    assert main(["export", f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--family=official"]) == 0
    again = load_file(tmp_path / "b" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, dict(again), ENCODER)


def test_the_decoder_is_the_published_one() -> None:
    config = DvaeModelConfig(image_size=16, vocab_size=12, width=8, blocks=2, decoder_width=8)
    theirs = published([64, 32, 16, 8], 2, (12, 8, 1), 6, (1, 3, 3, 3))
    params: dict[str, Any] = {}
    for name, x in theirs.items():
        *path, leaf = name.removeprefix("blocks.").split(".")
        place = path[0] if not path[0].startswith("group") else None
        if place is None:
            group, block = path[0][-1], int(path[1][-1]) - 1
            inner = {"id_path": "shortcut"}.get(path[2]) or path[3].replace("_", "")
            node = params.setdefault(f"group{group}_block{block}", {}).setdefault(inner, {})
        else:
            node = params.setdefault(place, {})
        node["kernel" if leaf == "w" else "bias"] = x.transpose(2, 3, 1, 0) if leaf == "w" else x
    codes = np.random.default_rng(2).dirichlet(np.ones(12), (2, 2, 3)).astype(np.float32)
    expected = TorchCode(as_torch(theirs), 8)(
        torch.from_numpy(codes.transpose(0, 3, 1, 2)), 2, lambda x: functional.interpolate(x, scale_factor=2)
    ).permute(0, 2, 3, 1)
    found: Any = Dvae(config).apply({"params": {"decoder": params}}, codes, method="decode")
    np.testing.assert_allclose(found / float(expected.abs().max()), expected / expected.abs().max(), atol=2e-6)


def test_the_published_sizes() -> None:
    """215 MB and 175 MB of fp32 weights, as OpenAI's files have; counted from the names, not from our shapes."""
    config: Any = load_config("configs/dvae.py").objective
    shapes: Any = jax.eval_shape(lambda: config.build(PreprocessConfig(), jnp.float32).init(jax.random.key(0))[0])
    found = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in meta.unbox(shapes).items()}
    with_names = {
        "encoder": published([256, 512, 1024, 2048], 2, (3, 256, 7), 8192, (3, 3, 3, 1)),
        "decoder": published([2048, 1024, 512, 256], 2, (8192, 128, 1), 6, (1, 3, 3, 3)),
    }
    assert found == {name: sum(x.size for x in tensors.values()) for name, tensors in with_names.items()}
    assert found == {"encoder": 53_786_240, "decoder": 43_829_766}


def test_a_run_of_ours_goes_out_without_its_tokenizer(tmp_path: Path) -> None:
    config = load_config("configs/beit_b16.py:smoke")
    objective: Any = config.objective.build(PreprocessConfig(), jnp.float32)
    params = meta.unbox(objective.init(jax.random.key(0))[0])
    save_params(tmp_path / "run", params, config=to_json(config), tokenizer=None, preprocess={})
    for family, form in (("official", BeitFormat()), ("hf", HfBeit())):
        assert main(["export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / family}", f"--family={family}"]) == 0
        tensors = load_file(tmp_path / family / "model.safetensors")
        assert not any("tokenizer" in name for name in tensors)
        assert tensors.keys() >= {
            row.theirs.format(layer=1).partition("#")[0] for row in form.rows(config.objective.model)
        }


def test_a_pickled_module_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "encoder.pkl").write_bytes(b"anything")
    assert main(["import", f"--from={tmp_path / 'encoder.pkl'}", f"--to={tmp_path / 'a'}"]) == 1
    assert "is neither .safetensors nor .npz" in capsys.readouterr().err
    save_file({"blocks.input.w": np.zeros((8, 12, 1, 1), np.float32)}, tmp_path / "decoder.safetensors")
    assert main(["import", f"--from={tmp_path / 'decoder.safetensors'}", f"--to={tmp_path / 'a'}"]) == 2
    assert "are those of none of" in capsys.readouterr().err
