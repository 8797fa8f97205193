"""Files of LLaVA's authors and of nanoVLM: in and out with the same bits; adapters go out added; what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from golden_vectors import GoldenVectors
from safetensors.numpy import load_file, save_file

from vlm_jax.checkpoint import save_params
from vlm_jax.config import to_json
from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.tables import ConversionError
from vlm_jax.loading import load
from vlm_jax.models.lora import LoraConfig, merged
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.schema import override, to_dict

LLAVA, NANOVLM = GoldenVectors("llava_model"), GoldenVectors("nanovlm_model")


def folder(path: Path, vectors: GoldenVectors, **changes: Any) -> Path:
    path.mkdir()
    save_file(vectors.weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(vectors.settings | changes))
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    for name, vectors in (("llava", LLAVA), ("nanovlm", NANOVLM)):
        import_weights(folder(root / f"{name}_files", vectors), root / name)
    return {name: root / name for name in ("llava", "nanovlm")}


def exported(source: Path, target: Path, family: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    export_weights(source, target, family=family)
    return load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())


@pytest.mark.parametrize(("name", "vectors"), [("llava", LLAVA), ("nanovlm", NANOVLM)])
def test_the_authors_files_come_back_bit_for_bit(
    imported: dict[str, Path], tmp_path: Path, name: str, vectors: GoldenVectors
) -> None:
    tensors, settings = exported(imported[name], tmp_path / "out", "official")
    # Frequencies of rotary positions are computed.
    wanted = {key: x for key, x in vectors.weights.items() if not key.endswith("inv_freq")}
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensors[key].tobytes() == tensor.tobytes(), key
    again = tmp_path / "again"
    import_weights(tmp_path / "out", again)
    assert to_dict(load(again).config.objective) == to_dict(load(imported[name]).config.objective)
    told = {key for key in settings if key in vectors.settings and settings[key] != vectors.settings[key]}
    assert told <= {"architectures", "vision_config", "lm_base_vocab_size", "extra_token_amount", "mm_vision_tower"}


def test_llava_of_the_authors_goes_out_for_transformers(imported: dict[str, Path], tmp_path: Path) -> None:
    """Their vocabulary has no token for an image: it gets a row of its own, of zeros."""
    tensors, settings = exported(imported["llava"], tmp_path / "hf", "hf")
    words = len(LLAVA.weights["lm_head.weight"])
    assert settings["image_token_index"] == words
    assert settings["text_config"]["vocab_size"] == words + 1
    for theirs, name in (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.embed_tokens", "model.embed_tokens"),
    ):
        table = tensors[f"{theirs}.weight"]
        np.testing.assert_array_equal(table[:words], LLAVA.weights[f"{name}.weight"])
        assert not table[words:].any()
    live, _ = exported(imported["llava"], tmp_path / "live", "hf_live")
    assert "model.vision_tower.embeddings.class_embedding" in live
    assert "vision_tower.vision_model.embeddings.class_embedding" in tensors
    assert len(live) == len(tensors) == len(LLAVA.weights)


def test_small_matrices_go_out_added_to_the_others(imported: dict[str, Path], tmp_path: Path) -> None:
    model = load(imported["llava"])
    config = override(model.config, {"objective.model.lora": LoraConfig(rank=2, alpha=6.0)})
    objective = config.objective.build(config.data.preprocess, np.float32)
    shapes = jax.eval_shape(lambda: objective.module.init(jax.random.key(0), *inputs(objective))["params"])
    rng = np.random.default_rng(0)

    def filled(old: Any, new: Any) -> Any:
        if not isinstance(new, dict):
            return np.asarray(old)
        draw = lambda box: rng.normal(size=jax.tree.leaves(box)[0].shape).astype(np.float32)  # noqa: E731
        return {key: filled(old[key], child) if key in old else draw(child) for key, child in new.items()}

    params = filled(jax.tree.map(np.asarray, model.params), shapes)
    save_params(tmp_path / "ours", params, config=to_json(config), tokenizer=None, preprocess={})
    tensors, _ = exported(tmp_path / "ours", tmp_path / "out", "official")
    small = params["decoder"]["blocks"]["mlp"]["fc2"]
    product = 3.0 * np.einsum("lir,lro->lio", small["lora_a"], small["lora_b"])
    found = tensors["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_allclose(found, LLAVA.weights["model.layers.1.mlp.down_proj.weight"] + product[1].T, atol=1e-5)
    assert tensors.keys() == LLAVA.weights.keys()
    assert not any(key.startswith("lora") for key in merged(params["decoder"], LoraConfig())["blocks"]["mlp"]["fc2"])


def inputs(objective: Any) -> tuple[Any, ...]:
    side = objective.image_tower.image_shape
    return np.zeros((1, 2), np.int32), np.zeros((1, 2), np.int32), np.zeros((1, 1, *side, 3), np.float32)


@pytest.mark.parametrize(
    ("vectors", "changes", "message"),
    [
        (LLAVA, {"mm_projector_type": "spatial_pool"}, r"mm_projector_type = 'spatial_pool' is not supported"),
        (LLAVA, {"mm_use_im_start_end": True}, r"mm_use_im_start_end = True .* not supported"),
        (NANOVLM, {"lm_tie_weights": False}, r"lm_tie_weights = False .* not supported"),
    ],
)
def test_what_our_models_lack_is_refused(
    tmp_path: Path, vectors: GoldenVectors, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        import_weights(folder(tmp_path / "files", vectors, **changes), tmp_path / "ours")


def test_llava_without_its_tower_says_what_to_join(tmp_path: Path) -> None:
    path = folder(tmp_path / "files", LLAVA)
    kept = {name: x for name, x in LLAVA.weights.items() if "vision_tower" not in name}
    save_file(kept, path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lack the vision tower; join the tensors of openai/clip-vit-large"):
        import_weights(path, tmp_path / "ours")


def test_the_settings_of_conversations_come_along(imported: dict[str, Path]) -> None:
    for name, template in (("llava", "vicuna_v1"), ("nanovlm", "nanovlm")):
        config = load(imported[name]).config
        assert config.data.chat is not None
        assert config.data.chat.template == template
        assert isinstance(config.objective.model, VisionLanguageConfig)  # pyright: ignore
