"""Language models as folders: their tokenizer, added tokens, texts that a loaded model writes, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.data.text import SentencePieceConfig, Tokenizer, build_tokenizer
from vlm_jax.data.text_rows import document_ids, prompt_ids
from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.hf_decoder import HfDecoder
from vlm_jax.interop.tables import ConversionError, from_params
from vlm_jax.interop.tokenizer_export import export_tokenizer
from vlm_jax.interop.tokenizer_import import import_document_tokenizer
from vlm_jax.mesh import unbox
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.models.language_model import LanguageModel, LanguageModelConfig

FORMAT = HfDecoder()
WORDS = ["the small red star", "a large blue circle and a star", "the circle is red", "a star is a star"] * 5
MODEL = LanguageModelConfig(
    DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=300, init="llama")
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(SentencePieceConfig(length=32, vocab_size=300, sticky_eos=True), WORDS)


def params_of(model: LanguageModelConfig) -> Any:
    ids = np.zeros((1, 2), np.int32)
    return unbox(jax.jit(LanguageModel(model).init)(jax.random.key(0), ids)["params"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model as transformers keeps it, with the tokenizer's files beside the weights."""
    path = tmp_path_factory.mktemp("model")
    tensors = from_params(params_of(MODEL), FORMAT.rows(MODEL), FORMAT.title)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(FORMAT.write_config(MODEL)))
    export_tokenizer(tokenizer, path)
    return path


def test_the_tokenizer_beside_the_weights_comes_along(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    said = import_weights(folder, tmp_path / "ours")
    assert "LlamaForCausalLM" in said
    assert "it reads no images" in said
    loaded = vlm_jax.load(tmp_path / "ours")
    assert loaded.tokenizer is not None
    assert document_ids(loaded.tokenizer, WORDS[1]) == document_ids(tokenizer, WORDS[1])
    export_weights(tmp_path / "ours", tmp_path / "back", family="hf")
    assert not (tmp_path / "back" / "preprocessor_config.json").exists()
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["dtype"]) == (tokenizer.eos_id, "float32")


def test_an_export_puts_no_end_token_behind_a_prompt(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import_weights(folder, tmp_path / "ours")
    export_weights(tmp_path / "ours", tmp_path / "back", family="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs(WORDS[1])["input_ids"] == prompt_ids(tokenizer, WORDS[1])


def test_texts_that_go_on_get_no_end_token_in_transformers(tmp_path: Path) -> None:
    """A training's tokenizer may drop the end token of a text that is cut, which no prompt has."""
    transformers = pytest.importorskip("transformers")
    ours = build_tokenizer(SentencePieceConfig(length=32, vocab_size=300, sticky_eos=False), WORDS)
    with pytest.raises(ConversionError, match="sticky_eos"):
        export_tokenizer(ours, tmp_path)
    export_tokenizer(ours, tmp_path, prompts=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(WORDS[1])["input_ids"] == prompt_ids(ours, WORDS[1]) == document_ids(ours, WORDS[1])[:-1]
    assert theirs.eos_token_id == ours.eos_id


def test_special_tokens_are_those_of_its_settings(folder: Path, tmp_path: Path) -> None:
    """As Llama's and Qwen's files say them: with a start token unless they deny it, tokens as texts or objects."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for settings, bos in (
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<unk>", "eos_token": {"content": "</s>"}}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "eos_token": "</s>"}, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<unk>"}, False),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        built, _ = import_document_tokenizer(tmp_path, "", 64)
        assert built is not None
        assert (built.config.bos, built.config.eos, built.length) == (bos, True, 64)
        ids = document_ids(built, "red")
        assert (ids[0] == 2) == bos, "<unk>, here as the start token"
        assert ids[-1] == (2 if settings["eos_token"] == "<unk>" else 1)


def test_a_loaded_model_writes(folder: Path, tmp_path: Path) -> None:
    """The likeliest tokens of each prompt alone, and samples that a seed repeats."""
    import_weights(folder, tmp_path / "ours")
    loaded = vlm_jax.load(tmp_path / "ours")
    config = GenerationConfig(max_new_tokens=6)
    prompts = ["the small", "a large blue circle and"]
    together = loaded.write(prompts, config)
    assert together == [loaded.write([prompt], config)[0] for prompt in prompts]
    drawn = [loaded.write(prompts, config, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match=r"a prompt holds no token"):
        loaded.write([""], config)


def test_added_tokens_go_out_in_one_table(tmp_path: Path) -> None:
    for tied in (True, False):
        decoder = dataclasses.replace(MODEL.decoder, extra_tokens=5, tied=tied)
        model = LanguageModelConfig(decoder)
        params = params_of(model)
        tensors = FORMAT.published(from_params(params, FORMAT.rows(model), FORMAT.title))
        settings = FORMAT.write_config(model)
        assert settings["vocab_size"] == 305
        whole = FORMAT.read_config(tensors, settings, None)
        assert whole.decoder == dataclasses.replace(decoder, vocab_size=305, extra_tokens=0)
        table = tensors["model.embed_tokens.weight"]
        np.testing.assert_array_equal(table[300:], params["decoder"]["extra_embed"])
        assert ("lm_head.weight" in tensors) != tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, r"model_type = 'mistral' is not supported, only llama, qwen2, gemma"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type = 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 2.0}}, r"rope_parameters\.mscale is not supported"),
        ({"hidden_act": "relu"}, r"hidden_act = 'relu' is not supported for llama"),
        ({"use_sliding_window": True}, r"use_sliding_window = True"),
    ],
)
def test_what_our_decoder_does_not_compute_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    with pytest.raises(ConversionError, match=message):
        FORMAT.read_config(load_file(folder / "model.safetensors"), settings, None)


def test_positions_of_older_config_files(folder: Path) -> None:
    """Before transformers 5 `rope_theta` and `rope_scaling` stood apart."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"]
    scaling = {"type": "linear", "factor": 2.0}
    rope = FORMAT.read_config(
        load_file(folder / "model.safetensors"), settings | {"rope_theta": 5e5, "rope_scaling": scaling}, None
    ).decoder.rope
    assert (rope.kind(), rope.theta, vars(rope)["factor"]) == ("linear", 5e5, 2.0)


def test_what_transformers_has_no_class_for_is_refused() -> None:
    for changes in ({"activation": "relu"}, {"norm": "layer"}, {"norm": "rms_offset"}):
        with pytest.raises(ConversionError, match=r"can't be expressed as \w+ForCausalLM of transformers"):
            FORMAT.write_config(LanguageModelConfig(dataclasses.replace(MODEL.decoder, **changes)))
