"""ALBEF for questions: its authors' files in and out, and a start from what pre-training left."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from vlm_jax.checkpoint import read_extra, read_params, save_params
from vlm_jax.config import Config, config_module, to_json
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.word_pieces import SPECIAL
from vlm_jax.interop.albef_vqa import OfficialAlbefVqa
from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.tables import from_params
from vlm_jax.losses.masked_words import WordMaskConfig
from vlm_jax.mesh import unbox
from vlm_jax.models.albef import AlbefModelConfig, deit_b16
from vlm_jax.models.albef_vqa import AlbefVqaModelConfig
from vlm_jax.models.bert import TextEncoderConfig, TextStackConfig
from vlm_jax.objectives.albef import AlbefConfig
from vlm_jax.objectives.albef_vqa import AlbefVqaConfig
from vlm_jax.schema import override, to_dict
from vlm_jax.warm_start import warm_extra, warm_start

RECIPE = config_module(Path(__file__).parents[2] / "configs" / "albef_vqa.py")
SIZES: dict[str, Any] = {"width": 64, "heads": 1, "mlp_dim": 32}
TEXT: dict[str, Any] = {"vocab_size": 24, "positions": 16}
MODEL = AlbefVqaModelConfig(
    image=override(deit_b16(16), {**SIZES, "depth": 1, "patch_size": 8}),
    text=TextEncoderConfig(**SIZES, **TEXT, depth=1),
    fusion=TextStackConfig(**SIZES, depth=2, cross_every=1),
    decoder=TextEncoderConfig(**SIZES, **TEXT, depth=2, cross_every=1),
)
METHOD = AlbefVqaConfig(model=MODEL, text_length=8, answer_length=5)
FORMAT = OfficialAlbefVqa()


def start(method: Any, seed: int) -> tuple[Any, Any]:
    objective = method.build(PreprocessConfig(), jnp.float32)
    return unbox(jax.jit(objective.init)(jax.random.key(seed)))


def test_files_come_in_and_go_out(tmp_path: Path) -> None:
    params, extra = start(METHOD, 0)
    extra = jax.tree.map(lambda x: np.asarray(1.5 * x), extra)
    tensors = FORMAT.published(from_params(params, FORMAT.rows(MODEL), FORMAT.title))
    tensors = {**tensors, **FORMAT.write_extra(extra, MODEL)}
    # As `state_dict` of the published model names them.
    for name in (
        "visual_encoder.blocks.0.attn.qkv.weight",
        "text_encoder.embeddings.word_embeddings.weight",
        "text_encoder.encoder.layer.2.crossattention.self.value.bias",
        "text_decoder.bert.embeddings.LayerNorm.bias",
        "text_decoder.bert.encoder.layer.1.crossattention.output.dense.weight",
        "text_decoder.cls.predictions.decoder.weight",
        "text_encoder_m.encoder.layer.0.attention.self.query.weight",
        "text_decoder_m.cls.predictions.transform.dense.weight",
    ):
        assert name in tensors
    assert not any("crossattention" in name for name in tensors if ".layer.0." in name and "text_encoder" in name)
    file = tmp_path / "vqa.safetensors"
    positions = {name: np.arange(16)[None] for name in ("text_encoder.embeddings.position_ids",)}
    save_file({name: np.ascontiguousarray(x) for name, x in {**tensors, **positions}.items()}, file)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a", "dog"]) + "\n")
    note = import_weights(file, tmp_path / "imported")
    assert "an official ALBEF for questions" in note
    tiny.assert_trees_equal(read_params(tmp_path / "imported")[0], params)
    tiny.assert_trees_equal(read_extra(tmp_path / "imported"), extra)
    export_weights(tmp_path / "imported", tmp_path / "exported", family="official")
    written = load_file(tmp_path / "exported" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(an ALBEF's checkpoint, its parameters, its copies and queues)."""
    model = AlbefModelConfig(image=MODEL.image, text=MODEL.text, fusion=MODEL.fusion, embed_dim=8)
    words = WordMaskConfig(mask_id=4, spared_ids=(0, 2))
    method = AlbefConfig(model=model, text_length=8, queue=12, hidden_words=words)
    params, extra = start(method, 1)
    extra = {**extra, "averaged": jax.tree.map(lambda x: 1.5 * x, extra["averaged"])}
    folder = tmp_path_factory.mktemp("pretrained") / "albef"
    saved = to_json(dataclasses.replace(RECIPE.get_config("smoke"), objective=method))
    save_params(folder, params, config=saved, tokenizer=None, preprocess={}, extra=extra)
    return folder, params, extra


def test_the_decoder_starts_as_the_fusion_encoder(pretrained: Any) -> None:
    """By the rules of the recipe; with larger images, whose positions are resized in the copies as well."""
    folder, params, extra = pretrained
    larger: AlbefVqaConfig = override(METHOD, {"model.image.image_size": 24})
    ours, own = start(larger, 2)
    init = dataclasses.replace(RECIPE.INIT, path=str(folder))
    config = {"objective": to_dict(larger)}
    new, copies = warm_start(ours, init, config), warm_extra(own, init, config)["averaged"]
    averaged = extra["averaged"]
    for found, source in ((new, params), (copies, averaged)):
        tiny.assert_trees_equal(found["decoder"]["blocks"], source["fusion"]["blocks"])
        tiny.assert_trees_equal(found["fusion"], source["fusion"])
        tiny.assert_trees_equal(found["text"], source["text"])
        for name in ("token_embed", "position_embed", "segment_embed", "embed_norm"):
            tiny.assert_trees_equal(found["decoder"][name], source["text"][name])
        tiny.assert_trees_equal(found["words"], source["words"])
        assert found["image"]["pos_embed"].shape == (10, 64)
    np.testing.assert_allclose(copies["image"]["pos_embed"], 1.5 * new["image"]["pos_embed"], atol=1e-6)
    # The step gives all its buffers away: no two leaves may be one.
    leaves = jax.tree.leaves((new, copies))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_the_small_model_fits_the_run_that_it_starts_from() -> None:
    """Sizes, vocabulary and lengths of `:shapes` are those of albef_shapes.py."""
    whole: Config = RECIPE.get_config("shapes")
    source = RECIPE.SHAPES.get_config()
    assert isinstance(whole.objective, AlbefVqaConfig)
    model, pretrained = whole.objective.model, source.objective.model
    assert (model.image, model.text, model.fusion) == (pretrained.image, pretrained.text, pretrained.fusion)
    assert model.decoder == dataclasses.replace(model.text, depth=model.fusion.depth, cross_every=1)
    assert whole.data.tokenizer == source.data.tokenizer
    assert whole.init_from.path == f"runs/{source.name}"
