"""Import and export through the command line's own entry, with files on disk."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.data.sentencepieces import train
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.clip import from_params
from vlm_jax.interop.clip_config import export_config
from vlm_jax.interop.files import write_json, write_weights
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

CONFIG = TwoTowerConfig(
    ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=24, activation="gelu"),
    TextConfig(
        vocab_size=300, length=8, width=8, depth=1, heads=2, mlp_dim=20, pool="first_eos", eos_id=1, activation="gelu"
    ),
    embed_dim=6,
)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(TwoTower(CONFIG).init)
    variables = init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 8), np.int32))
    return jax.tree.map(
        np.asarray,
        jax.tree.map(
            lambda box: getattr(box, "value", box), variables["params"], is_leaf=lambda x: hasattr(x, "names")
        ),
    )


@pytest.fixture
def hf_directory(tmp_path, params):
    directory = tmp_path / "hf"
    directory.mkdir()
    write_weights(directory / "model.safetensors", from_params(params, CONFIG, "hf"), "float32")
    write_json(directory / "config.json", export_config(CONFIG, "hf"))
    return directory


@pytest.fixture
def tokenizer_file(tmp_path):
    file = tmp_path / "words.model"
    file.write_bytes(train([f"a photo of the number {i}" for i in range(50)], 290, "nmt_nfkc_cf", ()))
    return file


def test_import_load_export_is_bit_equal_and_the_model_works(tmp_path, hf_directory, tokenizer_file, params, capsys):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    arguments = [f"--from={hf_directory}", f"--to={checkpoint}", f"--tokenizer={tokenizer_file}"]
    assert main(["import", *arguments]) == 0
    assert "hf CLIP (gelu)" in capsys.readouterr().out
    model = vlm_jax.load(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.encode_text(["a photo of the number 3"]).shape == (1, 6)
    assert model.encode_image(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 6)
    assert main(["export", f"--from={checkpoint}", f"--to={out}", "--family=hf"]) == 0
    before, after = (load_file(d / "model.safetensors") for d in (hf_directory, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, strict=True)
    assert json.loads((out / "config.json").read_text()) == json.loads((hf_directory / "config.json").read_text())
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 16}


def test_through_open_clip_and_back_is_bit_equal(tmp_path, hf_directory, params):
    for source, target, action, rest in (
        (hf_directory, "a", "import", []),
        (tmp_path / "a", "b", "export", ["--family=open_clip"]),
        (tmp_path / "b", "c", "import", []),
    ):
        assert main([action, f"--from={source}", f"--to={tmp_path / target}", *rest]) == 0
    model = vlm_jax.load(tmp_path / "c")
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.config.objective.model == CONFIG


def test_missing_and_unexpected_names_are_listed(tmp_path, hf_directory, capsys):
    file = hf_directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_model.encoder.layers.0.mlp.fc1.weight"], tensors["vision_model.post_layernorm.bias"]
    save_file(tensors | {"vision_model.gate": np.zeros(2, np.float32)}, file)
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]) == 2
    message = capsys.readouterr().err
    for name in ("text_model.encoder.layers.0.mlp.fc1.weight", "vision_model.post_layernorm.bias", "vision_model.gate"):
        assert name in message
    assert not (tmp_path / "x").exists()


def test_unexpected_names_can_be_passed_over(tmp_path, hf_directory):
    file = hf_directory / "model.safetensors"
    save_file(load_file(file) | {"vision_model.gate": np.zeros(2, np.float32)}, file)
    arguments = ["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]
    assert main(arguments) == 2
    assert main([*arguments, "--allow_unexpected"]) == 0


def test_a_wrong_shape_names_the_tensor(tmp_path, hf_directory, capsys):
    file = hf_directory / "model.safetensors"
    tensors = load_file(file)
    tensors["visual_projection.weight"] = np.zeros((7, 16), np.float32)
    save_file(tensors, file)
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]) == 2
    assert "visual_projection.weight" in capsys.readouterr().err


def test_without_a_config_file_the_activation_must_be_named(tmp_path, hf_directory, capsys):
    (hf_directory / "config.json").unlink()
    arguments = ["import", f"--from={hf_directory / 'model.safetensors'}", f"--to={tmp_path / 'x'}"]
    assert main(arguments) == 2
    assert "--activation=quick_gelu" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "header", "absent", "foreign"])
def test_unusable_files_are_named(tmp_path, hf_directory, damage, capsys):
    file = hf_directory / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "header":
        file.write_bytes(b"\xff" * 200)
    elif damage == "absent":
        file.unlink()
    else:
        save_file({"weight": np.zeros(3, np.float32)}, file)
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]) == 2
    assert str(hf_directory) in capsys.readouterr().err
