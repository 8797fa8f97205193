"""Our decoder against LlamaForCausalLM, Qwen2ForCausalLM and GemmaForCausalLM with random weights."""

from pathlib import Path
from typing import Any

import decoder_peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_peers import FORMAT, WORDS, DecoderPeer, ids
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlm_jax.interop.commands import export_weights, import_weights
from vlm_jax.interop.files import read_weights
from vlm_jax.interop.tables import from_params
from vlm_jax.losses.vocabulary import vocabulary_cross_entropy
from vlm_jax.models.generation import GenerationConfig, allowed_logits, generate
from vlm_jax.objectives.lm import next_tokens


@pytest.fixture(scope="module", params=decoder_peers.CLASSES)
def peer(request: pytest.FixtureRequest) -> DecoderPeer:
    return DecoderPeer(request.param)


def test_logits(peer: DecoderPeer) -> None:
    tokens = ids()
    np.testing.assert_allclose(peer.logits(tokens), peer.their_logits(tokens), atol=1e-5)


def test_loss_and_gradients(peer: DecoderPeer) -> None:
    """Every gradient, by the table of names that imports weights, ours the other way round."""
    tokens = ids()

    def loss(params: Any) -> jax.Array:
        hidden: Any = peer.decoder.apply({"params": params}, tokens)
        head: Any = peer.decoder.apply({"params": params}, method="head_rows")
        targets, valid = next_tokens(tokens, jnp.ones_like(tokens))
        found = vocabulary_cross_entropy(hidden, head, targets, valid, chunk=5)
        return found.total / found.count

    ours, gradients = jax.jit(jax.value_and_grad(loss))(peer.params)
    peer.model.zero_grad()
    theirs = peer.model(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()).loss
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-5)
    named = from_params({"decoder": gradients}, FORMAT.rows(peer.model_config), FORMAT.title)
    wanted = dict(peer.model.named_parameters())
    assert named.keys() <= wanted.keys()
    for name, gradient in named.items():
        found = wanted[name].grad.numpy()
        np.testing.assert_allclose(gradient, found, atol=1e-4 * np.abs(found).max(), rtol=0, err_msg=name)


def padded(tokens: np.ndarray, lengths: list[int], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of these lengths, filled up with 0 at one side, and where they are."""
    out, valid = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, length in enumerate(lengths):
        place = slice(tokens.shape[1] - length, None) if side == "left" else slice(0, length)
        out[row, place], valid[row, place] = tokens[row, :length], True
    return out, valid


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beams_write_what_transformers_writes(peer: DecoderPeer, beams: int) -> None:
    """Rows of different lengths filled up on the left, for both; and filled up on the right."""
    lengths, most = [13, 4, 9], 12
    prompts, valid = padded(ids(3), lengths, "left")
    config = GenerationConfig(max_new_tokens=most, eos_ids=(2,), beams=beams)
    write = jax.jit(lambda params, tokens, valid: generate(peer.decoder, params, tokens, valid, config))
    ours = write(peer.params, prompts, valid)
    theirs = peer.model.generate(
        torch.from_numpy(prompts).long(),
        attention_mask=torch.from_numpy(valid).long(),
        max_new_tokens=most,
        num_beams=beams,
        do_sample=False,
        length_penalty=1.0,
    )[:, prompts.shape[1] :].numpy()
    theirs = np.pad(theirs, ((0, 0), (0, most - theirs.shape[1])))
    np.testing.assert_array_equal(ours.ids, theirs)
    right, right_valid = padded(ids(3), lengths, "right")
    np.testing.assert_array_equal(write(peer.params, right, right_valid).ids, theirs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_stretched_positions(rope: dict[str, Any]) -> None:
    """Frequencies of 128 channels, and logits at positions beyond the original length."""
    settings = {"rope_parameters": {"rope_theta": 500.0, **rope}, "max_position_embeddings": 256}
    peer = DecoderPeer("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=128, **settings)
    rotary: Any = peer.model.model.rotary_emb
    np.testing.assert_allclose(peer.config.rope.frequencies(128), rotary.inv_freq.numpy(), rtol=2e-6)
    assert peer.config.rope.amplitude == pytest.approx(rotary.attention_scaling)
    tokens = ids(1, 100)
    np.testing.assert_allclose(peer.logits(tokens), peer.their_logits(tokens), atol=1e-4)


def test_sampling_leaves_out_what_transformers_leaves_out() -> None:
    logits = np.random.default_rng(0).normal(scale=2.0, size=(5, WORDS)).astype(np.float32)
    for temperature, top_k, top_p in ((0.7, 0, 0.8), (1.3, 10, 1.0), (0.9, 20, 0.5), (1.0, 0, 0.01)):
        warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)] if top_k else []
        warpers = warpers or [TemperatureLogitsWarper(temperature)]
        theirs = LogitsProcessorList([*warpers, TopPLogitsWarper(top_p)])(None, torch.from_numpy(logits).clone())
        ours = allowed_logits(jnp.asarray(logits), GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_there_and_back_are_bit_equal(peer: DecoderPeer, tmp_path: Path, dtype: str) -> None:
    """transformers writes shards with an index, we read and write shards, transformers reads ours."""
    model = (
        peer.model
        if dtype == "float32"
        else AutoModelForCausalLM.from_config(peer.settings, dtype=torch.bfloat16).eval()
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    import_weights(tmp_path / "theirs", tmp_path / "ours")
    export_weights(tmp_path / "ours", tmp_path / "back", family="hf", dtype=dtype, shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    before, after = (read_weights(tmp_path / name).tensors for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.tobytes() == after[name].tobytes(), name
    options: Any = {"dtype": model.dtype, "attn_implementation": "eager"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", **options).eval()
    assert type(again) is type(model)
    tokens = torch.from_numpy(ids()).long()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
