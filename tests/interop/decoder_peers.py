"""Tiny decoders of transformers with random weights, and ours with the same: for parity tests."""

from typing import Any

import jax
import numpy as np
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlm_jax.interop.hf_decoder import HfDecoder
from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import to_params
from vlm_jax.models.decoder import Decoder, DecoderConfig

WORDS = 96
CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16, "num_key_value_heads": 1}),
}
FORMAT = HfDecoder()


class DecoderPeer:
    """A class of transformers beside our decoder.

    Attributes:
        model: theirs, in evaluation mode.
        tensors: its weights under canonical names.
        config: what we read from its config file.
        params: ours, the tree under `decoder`.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        make_config, make_model, own = CLASSES[kind]
        sizes = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": WORDS, "max_position_embeddings": 128, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
        }  # fmt: skip
        self.settings = make_config(**{**sizes, **own, **settings})
        torch.manual_seed(0)
        self.model = make_model(self.settings).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        live = {name: value.numpy() for name, value in self.model.state_dict().items()}
        found, self.tensors = recognise(live)
        assert isinstance(found, HfDecoder)
        self.model_config = FORMAT.read_config(self.tensors, self.settings.to_dict(), None)
        self.all_params = to_params(
            self.tensors, FORMAT.rows(self.model_config), FORMAT.shapes(self.model_config), FORMAT.title
        )
        self.config: DecoderConfig = self.model_config.decoder
        self.params = self.all_params["decoder"]
        self.decoder = Decoder(self.config)

    def logits(self, ids: np.ndarray, **options: Any) -> jax.Array:
        """Ours."""

        def run(params: Any, ids: Any, options: Any) -> Any:
            hidden = self.decoder.apply({"params": params}, ids, **options)
            return self.decoder.apply({"params": params}, hidden, method="logits")

        return jax.jit(run)(self.params, ids, options)

    def their_logits(self, ids: np.ndarray, **options: Any) -> np.ndarray:
        """Theirs."""
        with torch.no_grad():
            return self.model(torch.from_numpy(ids).long(), **options).logits.numpy()


def ids(rows: int = 2, length: int = 13, seed: int = 0) -> np.ndarray:
    """int32 [rows, length], no special tokens among them."""
    return np.random.default_rng(seed).integers(3, WORDS, (rows, length)).astype(np.int32)
