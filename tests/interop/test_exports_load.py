"""What is exported, loaded by the libraries that it is for, from the folder alone: same features, ids and pixels."""

import json
from pathlib import Path
from typing import Any

import clip_reference as reference
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from PIL import Image

import vlm_jax
from vlm_jax.data.bpe import ClipBpe
from vlm_jax.data.sentencepieces import train
from vlm_jax.data.text import ClipBpeConfig, Tokenizer
from vlm_jax.interop import files
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.preprocess import KNOWN, export_preprocess
from vlm_jax.interop.registry import for_export
from vlm_jax.interop.tables import from_params
from vlm_jax.interop.tokenizer_export import export_tokenizer
from vlm_jax.models.presets import siglip
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

TEXTS = ["A photo of the Number 3", "it's  a\ncafé ☕ 日本語, nice!", "", "a photo of the number " * 8]
SIDE = 16
VIT = ViTConfig(image_size=SIDE, patch_size=8, width=16, depth=1, heads=2, mlp_dim=24)
CONFIGS = {
    "clip": TwoTowerConfig(
        VIT,
        TextConfig(vocab_size=520, length=12, width=8, depth=1, heads=2, mlp_dim=20, pool="eot_argmax", eos_id=519),
        embed_dim=6,
    ),
    "clip_pieces": TwoTowerConfig(
        VIT,
        TextConfig(vocab_size=300, length=12, width=8, depth=1, heads=2, mlp_dim=20, pool="first_eos", eos_id=1),
        embed_dim=6,
    ),
    "siglip": siglip((16, 1, 2, 24), 8, SIDE, text=(8, 1, 2, 20), length=12, vocab_size=300),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, its preprocessing and its tokenizer."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    found, rng = for_export(config, "hf"), np.random.default_rng(0)
    flat = {path: rng.normal(0, 0.5, shape).astype(np.float32) for path, shape in found.shapes(config).items()}
    tensors = from_params(unflatten_dict(flat, sep="/"), found.rows(config), found.title)
    files.write_weights(folder / "model.safetensors", tensors, "float32")
    files.write_json(folder / "config.json", found.write_config(config))
    view = export_preprocess(KNOWN[request.param.partition("_")[0]], (SIDE, SIDE), "hf")
    files.write_json(folder / "preprocessor_config.json", view)
    if request.param == "clip":
        merges = [("a", "p"), ("h", "o"), ("t", "h"), ("th", "e</w>"), ("n", "u"), ("nu", "m")]
        export_tokenizer(Tokenizer(ClipBpeConfig(length=12), ClipBpe(merges)), folder)
    else:
        captions = [f"a photo of the number {i}" for i in range(50)]
        (folder / "spiece.model").write_bytes(train(captions, 290, "nmt_nfkc_cf", ()))
    assert main(["import", f"--from={folder}", f"--to={folder / 'ours'}"]) == 0
    return folder / "ours"


def photograph() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((9, 9, 1))).astype(np.uint8)


def up_to_the_end(ids: np.ndarray, end: int) -> list[list[int]]:
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


def test_transformers_loads_the_folder(checkpoint: Path):
    from transformers import AutoModel, AutoProcessor

    ours, folder = vlm_jax.load(checkpoint), checkpoint.parent / "hf"
    assert main(["export", f"--from={checkpoint}", f"--to={folder}", "--family=hf"]) == 0
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor: Any = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=TEXTS, images=Image.fromarray(photograph()), padding="max_length", truncation=True, return_tensors="pt"
    )
    pixels = inputs["pixel_values"].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels[0], ours.preprocess(photograph()))
    ids, theirs = ours.tokenize(TEXTS), inputs["input_ids"].numpy()
    assert ours.tokenizer is not None
    if isinstance(ours.tokenizer.encoder, ClipBpe):
        # That library pads with the end token, which the model does not see.
        assert up_to_the_end(theirs, ours.tokenizer.eos_id) == up_to_the_end(ids, ours.tokenizer.eos_id)
    else:
        np.testing.assert_array_equal(theirs, ids)
    with torch.no_grad():
        out = model.eval()(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    np.testing.assert_allclose(out.text_embeds, ours.encode_text(TEXTS), atol=1e-5)
    np.testing.assert_allclose(out.image_embeds, ours.encode_image([photograph()]), atol=1e-5)

    # and what that library saves comes back whole
    saved = checkpoint.parent / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    assert main(["import", f"--from={saved}", f"--to={checkpoint.parent / 'again'}"]) == 0
    again = vlm_jax.load(checkpoint.parent / "again")
    np.testing.assert_array_equal(again.tokenize(TEXTS), ids)
    assert again.config.data.preprocess == ours.config.data.preprocess
    assert again.config.objective == ours.config.objective
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


def test_open_clip_loads_the_folder(checkpoint: Path):
    ours, folder = vlm_jax.load(checkpoint), checkpoint.parent / "open_clip"
    code = main(["export", f"--from={checkpoint}", f"--to={folder}", "--family=open_clip"])
    if ours.config.objective.kind() == "siglip":
        assert code == 2  # its image tower would be one of timm's
        return
    assert code == 0
    open_clip = reference.import_open_clip()
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        text = model.encode_text(tokenizer(TEXTS), normalize=True)
        image = model.encode_image(
            torch.from_numpy(ours.preprocess(photograph())).permute(2, 0, 1)[None], normalize=True
        )
    np.testing.assert_allclose(text, ours.encode_text(TEXTS), atol=1e-5)
    np.testing.assert_allclose(image, ours.encode_image([photograph()]), atol=1e-5)
    settings = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    theirs = open_clip.get_model_preprocess_cfg(model)
    assert json.loads(json.dumps({key: theirs[key] for key in settings})) == settings
