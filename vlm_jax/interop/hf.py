"""What Hugging Face's CLIP and SigLIP have in common: the names in a block, and the settings of a tower."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.formats import block_sizes
from vlm_jax.interop.tables import ConversionError, Row, Tensors, affine, from_heads, norm, to_heads, within
from vlm_jax.models.mlp import ACTIVATIONS
from vlm_jax.models.transformer import TransformerConfig

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # the others have the same name there
_LAYERS = "encoder.layers.{layer}."


def tower_rows(ours: str, theirs: str) -> list[Row]:
    """The blocks of a tower."""
    rows = []
    for name in ("query", "key", "value"):
        rows += to_heads(f"attn/{name}", f"self_attn.{name[0]}_proj")
    rows += from_heads("attn/out", "self_attn.out_proj")
    rows += affine("mlp/fc1", "mlp.fc1") + affine("mlp/fc2", "mlp.fc2")
    rows += norm("ln_1", "layer_norm1") + norm("ln_2", "layer_norm2")
    return within(rows, f"{ours}/blocks/", f"{theirs}.{_LAYERS}")


def text_embedding_rows() -> list[Row]:
    """Tokens and positions."""
    return [
        Row("text/token_embed", "text_model.embeddings.token_embedding.weight", "same"),
        Row("text/pos_embed", "text_model.embeddings.position_embedding.weight", "same"),
    ]


def tower_sizes(tensors: Tensors, theirs: str, what: str) -> dict[str, Any]:
    """Width, depth and MLP of a tower."""
    return block_sizes(tensors, f"{theirs}.{_LAYERS}", "layer_norm1.weight", "mlp.fc1.bias", what)


def read_tower(name: str, settings: Mapping[str, Any], activation: str | None) -> dict[str, Any]:
    """Heads, activation and eps of the section `name` of a config file, its defaults filled in."""
    ours = {theirs: name for name, theirs in _ACTIVATIONS.items()}
    found = activation or ours.get(settings["hidden_act"], settings["hidden_act"])
    if found not in ACTIVATIONS:
        raise ConversionError(f"{name}.hidden_act {settings['hidden_act']!r} of the config file is not supported")
    return {"heads": settings["num_attention_heads"], "activation": found, "norm_eps": settings["layer_norm_eps"]}


def write_tower(tower: TransformerConfig) -> dict[str, Any]:
    """The settings that both towers of both models have."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": _ACTIVATIONS.get(tower.activation, tower.activation),
        "layer_norm_eps": tower.norm_eps,
    }


__all__ = ["read_tower", "text_embedding_rows", "tower_rows", "tower_sizes", "write_tower"]
