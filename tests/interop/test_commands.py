"""Import and export through the command line's own entry, with files on disk."""

import json
import resource
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.data.sentencepieces import train
from vlm_jax.data.text import SIGLIP_TOKENIZER, SentencePieceConfig
from vlm_jax.interop import files
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.preprocess import KNOWN, export_preprocess
from vlm_jax.interop.registry import for_export
from vlm_jax.interop.tables import from_params
from vlm_jax.models.presets import siglip
from vlm_jax.models.resnet import ResNetConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

TEXT = TextConfig(
    vocab_size=300, length=8, width=8, depth=1, heads=2, mlp_dim=20, pool="first_eos", eos_id=1, activation="gelu"
)
VIT = ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=24, activation="gelu")
CLIP = TwoTowerConfig(VIT, TEXT, embed_dim=6)
RESNET = TwoTowerConfig(ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=2, heads=1), TEXT, embed_dim=6)
SIGLIP = siglip((16, 2, 2, 24), 8, 16, text=(8, 1, 2, 20), length=8, vocab_size=300)


def random_params(config: TwoTowerConfig) -> Any:
    shapes, rng = for_export(config, "open_clip").shapes(config), np.random.default_rng(0)
    flat = {path: rng.uniform(0.1, 0.5, shape).astype(np.float32) for path, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


def write_directory(folder: Path, config: TwoTowerConfig, params: Any) -> Path:
    """What Hugging Face's library stores, without a tokenizer."""
    found = for_export(config, "hf")
    files.make_directory(folder)
    tensors = from_params(params, found.rows(config), found.title)
    files.write_weights(folder / "model.safetensors", tensors, "float32")
    files.write_json(folder / "config.json", found.write_config(config))
    view = KNOWN["siglip" if config.logit_bias_init is not None else "clip"]
    files.write_json(folder / "preprocessor_config.json", export_preprocess(view, config.image.image_shape, "hf"))
    return folder


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CLIP)


@pytest.fixture
def hf_directory(tmp_path: Path, params: Any) -> Path:
    return write_directory(tmp_path / "hf", CLIP, params)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    file = tmp_path / "words.model"
    file.write_bytes(train([f"a photo of the number {i}" for i in range(50)], 290, "nmt_nfkc_cf", ()))
    return file


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), dict(a), dict(b))


def test_clip_comes_in_works_and_goes_out_with_all_that_belongs_to_it(
    tmp_path, hf_directory, tokenizer_file, params, capsys
):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    arguments = [f"--from={hf_directory}", f"--to={checkpoint}", f"--tokenizer={tokenizer_file}"]
    assert main(["import", *arguments]) == 0
    assert "a Hugging Face CLIP (gelu)" in capsys.readouterr().out
    model = vlm_jax.load(checkpoint)
    assert_same(jax.tree.map(np.asarray, model.params), params)
    assert (model.config.objective.kind(), model.config.data.preprocess) == ("clip", KNOWN["clip"])
    assert model.encode_text(["a photo of the number 3"]).shape == (1, 6)
    assert model.encode_image(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 6)

    assert main(["export", f"--from={checkpoint}", f"--to={out}", "--family=hf"]) == 0
    assert_same(load_file(hf_directory / "model.safetensors"), load_file(out / "model.safetensors"))
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((hf_directory / name).read_text())

    assert main(["import", f"--from={out}", f"--to={tmp_path / 'again'}"]) == 0
    assert f"ids from {out / 'tokenizer.json'}" in capsys.readouterr().out
    again = vlm_jax.load(tmp_path / "again")
    texts = ["A photo of the number 7", "", "ünknown, words ☕ " * 5]
    np.testing.assert_array_equal(again.tokenize(texts), model.tokenize(texts))


@pytest.mark.parametrize("config", [CLIP, RESNET], ids=["vit", "resnet"])
def test_through_open_clip_and_back_is_bit_equal(tmp_path, config, capsys):
    params = random_params(config)
    folder, found = tmp_path / "a", for_export(config, "open_clip")
    files.make_directory(folder)
    tensors = from_params(params, found.rows(config), found.title)
    files.write_weights(folder / "open_clip_model.safetensors", tensors, "float32")
    view = export_preprocess(KNOWN["siglip"], config.image.image_shape, "open_clip")
    settings = {"model_cfg": found.write_config(config), "preprocess_cfg": view}
    files.write_json(folder / "open_clip_config.json", settings)
    assert main(["import", f"--from={folder}", f"--to={tmp_path / 'b'}"]) == 0
    assert "no tokenizer is stored" in capsys.readouterr().out
    assert main(["export", f"--from={tmp_path / 'b'}", f"--to={tmp_path / 'c'}", "--family=open_clip"]) == 0
    assert_same(load_file(tmp_path / "c" / "open_clip_model.safetensors"), tensors)
    assert json.loads((tmp_path / "c" / "open_clip_config.json").read_text()) == settings
    model = vlm_jax.load(tmp_path / "b")
    assert model.config.objective.model == config  # pyright: ignore[reportAttributeAccessIssue]
    assert model.config.data.preprocess == KNOWN["siglip"]
    with pytest.raises(ValueError, match="this checkpoint holds no tokenizer; import it again with --tokenizer=FILE"):
        model.encode_text(["a photo"])


def test_siglip_goes_through_every_library_that_has_it(tmp_path, tokenizer_file, capsys):
    params = random_params(SIGLIP)
    source = write_directory(tmp_path / "hf", SIGLIP, params)
    (source / "spiece.model").write_bytes(tokenizer_file.read_bytes())
    assert main(["import", f"--from={source}", f"--to={tmp_path / 'a'}"]) == 0
    model = vlm_jax.load(tmp_path / "a")
    assert model.config.objective.kind() == "siglip"
    assert model.config.data.preprocess == KNOWN["siglip"]
    assert isinstance(model.config.data.tokenizer, SentencePieceConfig)
    conventions = ("pad", "lower", "canonicalize", "bos", "eos", "sticky_eos")
    for key in conventions:
        assert getattr(model.config.data.tokenizer, key) == getattr(SIGLIP_TOKENIZER, key)
    assert main(["export", f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--family=big_vision"]) == 0
    arguments = [f"--from={tmp_path / 'b'}", f"--to={tmp_path / 'c'}", f"--tokenizer={source / 'spiece.model'}"]
    assert main(["import", *arguments]) == 0
    last = vlm_jax.load(tmp_path / "c")
    assert_same(jax.tree.map(np.asarray, last.params), params)
    # That library's file holds no config, and the id of the padding is the only thing that it does not imply.
    assert last.config.objective == model.config.objective
    assert last.config.data == model.config.data
    assert main(["export", f"--from={tmp_path / 'c'}", f"--to={tmp_path / 'd'}", "--family=open_clip"]) == 2
    assert "takes its image tower from timm, which has none with width" in capsys.readouterr().err


def test_missing_and_unexpected_names_are_listed(tmp_path, hf_directory, capsys):
    file = hf_directory / "model.safetensors"
    tensors = load_file(file)
    whole = dict(tensors)
    del tensors["text_model.encoder.layers.0.mlp.fc1.weight"], tensors["vision_model.post_layernorm.bias"]
    save_file(tensors | {"vision_model.gate": np.zeros(2, np.float32)}, file)
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]) == 2
    message = capsys.readouterr().err
    for name in ("text_model.encoder.layers.0.mlp.fc1.weight", "vision_model.post_layernorm.bias", "vision_model.gate"):
        assert name in message
    assert not (tmp_path / "x").exists()

    save_file(whole | {"vision_model.gate": np.zeros(2, np.float32)}, file)
    arguments = ["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]
    assert main(arguments) == 2
    assert main([*arguments, "--allow_unexpected"]) == 0


def test_a_wrong_shape_names_the_tensor(tmp_path, hf_directory, capsys):
    file = hf_directory / "model.safetensors"
    tensors = load_file(file)
    # Of the right size, but not of the right shape.
    tensors["visual_projection.weight"] = np.zeros((16, 6), np.float32)
    save_file(tensors, file)
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]) == 2
    assert "visual_projection.weight (16, 6), not (6, 16)" in capsys.readouterr().err


def test_what_no_file_tells_must_be_named(tmp_path, hf_directory, capsys):
    arguments = ["import", f"--from={hf_directory / 'model.safetensors'}"]
    (hf_directory / "preprocessor_config.json").unlink()
    assert main([*arguments, f"--to={tmp_path / 'x'}"]) == 2
    assert "pass --preprocess=clip|siglip" in capsys.readouterr().err
    assert main([*arguments, f"--to={tmp_path / 'x'}", "--preprocess=siglip"]) == 0
    assert "images: squash, mean (0.5, 0.5, 0.5)" in capsys.readouterr().out
    assert vlm_jax.load(tmp_path / "x").config.data.preprocess == KNOWN["siglip"]
    (hf_directory / "config.json").unlink()
    assert main([*arguments, f"--to={tmp_path / 'y'}"]) == 2
    assert "--activation=quick_gelu" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, hf_directory, capsys):
    big = tmp_path / "big.model"
    big.write_bytes(train([f"word{i} other{i * 7}" for i in range(400)], 900, "nmt_nfkc_cf", ()))
    arguments = ["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]
    assert main([*arguments, f"--tokenizer={big}"]) == 2
    assert "vocab_size = 300 is smaller than the tokenizer's" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer=none"]) == 0
    assert vlm_jax.load(tmp_path / "x").tokenizer is None


@pytest.mark.parametrize(("damage", "code"), [("cut", 1), ("header", 1), ("absent", 1), ("foreign", 2)])
def test_unusable_files_are_named(tmp_path, hf_directory, damage, code, capsys):
    file = hf_directory / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "header":
        file.write_bytes(b"\xff" * 200)
    elif damage == "absent":
        file.unlink()
    else:
        save_file({"weight": np.zeros(3, np.float32)}, file)
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'x'}"]) == code
    message = capsys.readouterr().err
    assert "the names (such as weight)" in message if damage == "foreign" else str(hf_directory) in message


def test_a_full_disk_is_one_short_sentence(tmp_path, hf_directory, capsys):
    assert main(["import", f"--from={hf_directory}", f"--to={tmp_path / 'a'}"]) == 0
    target = tmp_path / "out"
    files.make_directory(target)
    (target / "config.json").symlink_to("/dev/full")
    arguments = ["export", f"--from={tmp_path / 'a'}", f"--to={target}", "--family=hf"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert f"{target / 'config.json'} can't be written: No space left on device; make room" in message
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert f"{target / 'model.safetensors'} can't be written" in message
    assert "make room" in message and len(message) < 300, message
