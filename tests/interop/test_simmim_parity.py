"""SimMIM with a Swin against transformers' class on random weights, and both formats of its files there and back."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.hf_swin import HfSwinSimMim
from vlm_jax.interop.preprocess import KNOWN
from vlm_jax.interop.simmim import SwinSimMim
from vlm_jax.interop.tables import ConversionError, from_params
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.models.swin import SwinConfig
from vlm_jax.objectives.simmim import SimMimConfig

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "simmim.safetensors")

# Image and window, in patches of 2 pixels: windows that divide both stages, of which the second is a single one, and
# windows that divide neither, so that tokens are added at the edges.
SHAPES = {"divides": (16, 4), "padded": (20, 3)}


def settings(name: str, **changes: Any) -> Any:
    side, window = SHAPES[name]
    sizes = {"embed_dim": 8, "depths": [2, 4], "num_heads": [2, 4], "mlp_ratio": 2.0, "patch_size": 2}
    return transformers.SwinConfig(**sizes, image_size=side, window_size=window, encoder_stride=4, **changes)


@pytest.fixture(scope="module", params=SHAPES)
def twin(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = transformers.SwinForMaskedImageModeling(settings(request.param)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.uniform_(-0.3, 0.3).add_(0.5 if "norm" in name and name.endswith("weight") else 0.0)
    return model


@pytest.fixture(scope="module")
def imported(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simmim")
    twin.save_pretrained(folder / "saved")
    assert main(["import", f"--from={folder / 'saved'}", f"--to={folder / 'checkpoint'}"]) == 0
    return folder


def test_reconstruction_loss_and_gradients_are_the_library_s(twin: Any, imported: Path) -> None:
    model = vlm_jax.load(imported / "checkpoint")
    assert model.config.data.preprocess == KNOWN["imagenet"]
    config: Any = model.config.objective
    objective = config.build(PreprocessConfig(), np.float32)
    rng, side, (rows, columns) = np.random.default_rng(0), config.image_size, config.model.cells
    images = rng.standard_normal((3, side, side, 3)).astype(np.float32)
    hidden = rng.uniform(size=(3, rows, columns)) < 0.6
    patches = hidden.repeat(config.model.cell // 2, axis=1).repeat(config.model.cell // 2, axis=2)
    expected = twin(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), bool_masked_pos=torch.from_numpy(patches.reshape(3, -1))
    )

    def loss(params: Any) -> Any:
        (total, count), outputs = objective.loss_and_outputs(params, images, hidden.reshape(3, -1))
        return total / count, outputs["prediction"]

    (value, prediction), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    theirs = expected.reconstruction.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(prediction, theirs, atol=2e-5)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-5)
    twin.zero_grad()
    expected.loss.backward()
    form = HfSwinSimMim()
    ours = from_params(gradients, form.rows(config.model), form.title)
    gradients = form.canonical({name: p.grad.numpy() for name, p in twin.named_parameters()})
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), 1e-2)
        np.testing.assert_allclose(ours[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


def test_it_goes_back_bit_for_bit_and_the_library_loads_it(twin: Any, imported: Path, tmp_path: Path) -> None:
    assert main(["export", f"--from={imported / 'checkpoint'}", f"--to={tmp_path}", "--family=hf"]) == 0
    again, loading = transformers.SwinForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in twin.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for key, value in json.loads((tmp_path / "config.json").read_text()).items():
        assert getattr(twin.config, key) == value
    saved, written = (load_file(path / "model.safetensors") for path in (imported / "saved", tmp_path))
    assert saved.keys() == written.keys()


def test_the_authors_files_come_in_and_go_out_bit_for_bit(tmp_path: Path) -> None:
    """At widths with the published 32 channels a head; the file holds indices and masks as well."""
    model = MaskedImageModelConfig(
        SwinConfig(image_size=32, patch_size=2, width=32, depths=(2, 2), heads=(1, 2), window=4, mask_token=True)
    )
    form, rng = SwinSimMim(), np.random.default_rng(0)
    flat = {path: rng.uniform(-0.5, 0.5, shape).astype(np.float32) for path, shape in form.shapes(model).items()}
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    tensors = from_params(tree, form.rows(model), form.title) | form.constants(model)
    torch.save({"model": {name: torch.from_numpy(x) for name, x in tensors.items()}, "epoch": 99}, tmp_path / "x.pth")
    assert main(["import", f"--from={tmp_path / 'x.pth'}", f"--to={tmp_path / 'a'}"]) == 0
    loaded = vlm_jax.load(tmp_path / "a")
    assert isinstance(loaded.config.objective, SimMimConfig)
    assert loaded.config.objective.model == model
    assert loaded.encode_image(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 64)
    assert main(["export", f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--family=official"]) == 0
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, strict=True, err_msg=name)


def test_the_golden_file_is_read_by_name(tmp_path: Path) -> None:
    """The published code's own names, buffers among them, through the command."""
    weights = {name.removeprefix("weights/"): x for name, x in GOLDEN.items() if name.startswith("weights/")}
    save_file(weights, tmp_path / "golden.safetensors")
    assert main(["import", f"--from={tmp_path / 'golden.safetensors'}", f"--to={tmp_path / 'a'}"]) == 0
    config: Any = vlm_jax.load(tmp_path / "a").config.objective
    image = config.model.image
    assert (image.image_size, image.patch_size, image.width, image.window) == (32, 4, 16, 4)
    assert (image.depths, image.heads, image.mlp_ratio) == ((2, 2), (2, 4), 4.0)


def test_a_window_that_one_stage_is_smaller_than_stays_here() -> None:
    model = MaskedImageModelConfig(
        SwinConfig(image_size=32, patch_size=4, width=32, depths=(2, 2), heads=(1, 2), window=6, mask_token=True)
    )
    with pytest.raises(ConversionError, match=r"window of stage 2 = 4 \(only \(6,\)\)"):
        HfSwinSimMim().write_config(model)
