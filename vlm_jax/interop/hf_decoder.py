"""Hugging Face's causal language models of the Llama family: LlamaForCausalLM, Qwen2ForCausalLM, GemmaForCausalLM.

One table of names serves all three (and Vicuna, SmolLM2, Qwen2.5, which are of these classes); what differs is said by
config.json and by which biases there are.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.text import HfTokenizerConfig, Tokenizer, TokenizerConfig
from vlm_jax.interop.formats import Format, check_expressible, check_supported
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.tables import ConversionError, Row, Tensors, count_layers, parameter_shapes, shape_of, within
from vlm_jax.interop.tokenizer_import import import_document_tokenizer
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.language_model import LanguageModel, LanguageModelConfig
from vlm_jax.models.rotary import PlainRope, RopeConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.objectives.lm import LmConfig

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ADDED = {_EMBED: "model.embed_tokens.added", _HEAD: "lm_head.added"}
_FIRST = "model.layers.0."
_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
# What the classes share, and what each has of its own.
_COMMON: dict[str, Any] = {"gated": True, "layer_scale_init": None, "key_bias": True}
_LLAMA: dict[str, Any] = {"activation": "silu", "norm": "rms", "scaled_embeddings": False}
_GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "norm": "rms_offset", "scaled_embeddings": True}
_FORMS = {"llama": _LLAMA, "qwen2": _LLAMA, "gemma": _GEMMA}
_LIMITS = {"llama": {}, "qwen2": {"mlp_bias": False}, "gemma": {"mlp_bias": False, "tied": True}}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma": "GemmaForCausalLM"}
# Of transformers' classes, where config.json does not say.
_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_ACTIVATIONS = {"silu": ("silu",), "gelu_tanh": ("gelu", "gelu_pytorch_tanh")}  # Gemma's first files said "gelu"
_ROPE_NAMES = {"original_length": "original_max_position_embeddings"}  # the other keys have the same name there


class HfDecoder(Format):
    """A decoder with its head."""

    library, title, reads_images = "hf", "a Hugging Face language model (Llama, Qwen2, Gemma)", False

    def canonical(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """See the base. A head that repeats the embeddings is tied, and older files hold constants."""
        named = {k: v for k, v in super().canonical(tensors).items() if not k.endswith(_BUFFERS)}
        if _HEAD in named and _EMBED in named and np.array_equal(named[_HEAD], named[_EMBED]):
            del named[_HEAD]
        return named

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        block = {f"{_FIRST}{name}.weight" for name in ("self_attn.q_proj", "mlp.gate_proj", "post_attention_layernorm")}
        return {_EMBED, *block} <= tensors.keys()

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> LanguageModelConfig:
        """See the base."""
        if settings is None:
            raise ConversionError(f"{self.title} needs its config.json beside the weights: it tells the heads")
        kind = settings.get("model_type")
        if kind not in _FORMS:
            raise ConversionError(f"config.json: model_type = {kind!r} is not supported, only {', '.join(_FORMS)}")
        check_supported("config.json: ", settings, {"use_sliding_window": False})
        known = {**_DEFAULTS, **settings}
        own = _FORMS[kind]
        stated = settings.get("hidden_activation") or settings.get("hidden_act", _ACTIVATIONS[own["activation"]][0])
        if stated not in _ACTIVATIONS[own["activation"]]:
            raise ConversionError(f"config.json: hidden_act = {stated!r} is not supported for {kind}")
        width = shape_of(tensors, _EMBED, self.title)[1]
        heads, head_dim = known["num_attention_heads"], known.get("head_dim") or 0
        decoder = DecoderConfig(
            width=width,
            depth=count_layers(tensors, "model.layers.{layer}.input_layernorm.weight"),
            heads=heads,
            kv_heads=known.get("num_key_value_heads") or heads,
            head_dim=0 if head_dim * heads == width else head_dim,
            mlp_dim=shape_of(tensors, f"{_FIRST}mlp.up_proj.weight", self.title)[0],
            norm_eps=known["rms_norm_eps"],
            qkv_bias=f"{_FIRST}self_attn.q_proj.bias" in tensors,
            out_bias=f"{_FIRST}self_attn.o_proj.bias" in tensors,
            mlp_bias=f"{_FIRST}mlp.up_proj.bias" in tensors,
            vocab_size=tensors[_EMBED].shape[0],
            tied=_HEAD not in tensors,
            rope=_read_rope(settings),
            max_length=known["max_position_embeddings"],
            **own,
        )
        return LanguageModelConfig(decoder)

    def objective(self, model: LanguageModelConfig) -> ObjectiveConfig:
        """See the base."""
        return LmConfig(model=model, length=min(2048, model.decoder.max_length))

    def remark(self, objective: ObjectiveConfig, model: LanguageModelConfig) -> str:
        """See the base."""
        return _CLASSES[_kind(model.decoder)]

    def tokenizer(
        self, folder: Path, flag: str, model: LanguageModelConfig
    ) -> tuple[Tokenizer | None, str, TokenizerConfig]:
        """See the base."""
        length = min(2048, model.decoder.max_length)
        built, note = import_document_tokenizer(folder, flag, length)
        return built, note, built.config if built else HfTokenizerConfig(length=length)

    def claims(self, config: Any) -> bool:
        """See the base."""
        return isinstance(config, LanguageModelConfig)

    def rows(self, config: LanguageModelConfig) -> list[Row]:
        """See the base."""
        decoder, block = config.decoder, []
        biased = {"query": decoder.qkv_bias, "key": decoder.qkv_bias, "value": decoder.qkv_bias}
        for name, bias in biased.items():
            block.append(Row(f"attn/{name}/kernel", f"self_attn.{name[0]}_proj.weight", "to_heads"))
            block += [Row(f"attn/{name}/bias", f"self_attn.{name[0]}_proj.bias", "heads_bias")] * bias
        block.append(Row("attn/out/kernel", "self_attn.o_proj.weight", "from_heads"))
        block += [Row("attn/out/bias", "self_attn.o_proj.bias", "same")] * decoder.out_bias
        for ours, theirs in (("gate", "gate"), ("fc1", "up"), ("fc2", "down")):
            block.append(Row(f"mlp/{ours}/kernel", f"mlp.{theirs}_proj.weight", "linear"))
            block += [Row(f"mlp/{ours}/bias", f"mlp.{theirs}_proj.bias", "same")] * decoder.mlp_bias
        block += [Row("ln_1/scale", "input_layernorm.weight", "same")]
        block += [Row("ln_2/scale", "post_attention_layernorm.weight", "same")]
        rows = within(block, "blocks/", "model.layers.{layer}.")
        rows += [Row("token_embed", _EMBED, "same"), Row("norm/scale", "model.norm.weight", "same")]
        rows += [Row("head", _HEAD, "same")] * (not decoder.tied)
        if decoder.extra_tokens:
            rows += [Row("extra_embed", _ADDED[_EMBED], "same")]
            rows += [Row("extra_head", _ADDED[_HEAD], "same")] * (not decoder.tied)
        return within(rows, "decoder/", "")

    def published(self, tensors: Tensors) -> Tensors:
        """The rows of added tokens after the others, in one table."""
        named = dict(tensors)
        for table, added in _ADDED.items():
            if added in named:
                named[table] = np.concatenate([named[table], named.pop(added)])
        return named

    def shapes(self, config: LanguageModelConfig) -> dict[str, Shape]:
        """See the base."""
        return parameter_shapes(LanguageModel(config), jax.ShapeDtypeStruct((1, 2), jnp.int32))

    def write_config(self, config: LanguageModelConfig) -> dict[str, Any]:
        """See the base."""
        decoder = config.decoder
        kind = _kind(decoder)
        wanted = {**_COMMON, **_FORMS[kind], **_LIMITS[kind], "out_bias": decoder.qkv_bias and kind != "qwen2"}
        check_expressible(
            f"{_CLASSES[kind]} of transformers",
            {f"decoder.{key}": (getattr(decoder, key), (value,)) for key, value in wanted.items()},
        )
        theirs = {
            "architectures": [_CLASSES[kind]],
            "model_type": kind,
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_dim,
            "num_hidden_layers": decoder.depth,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads or decoder.heads,
            "head_dim": decoder.head_width,
            "hidden_act": _ACTIVATIONS[decoder.activation][-1],
            "rms_norm_eps": decoder.norm_eps,
            "vocab_size": decoder.table_size,
            "max_position_embeddings": decoder.max_length,
            "tie_word_embeddings": decoder.tied,
            "rope_parameters": _write_rope(decoder.rope),
        }
        if kind == "qwen2":
            return theirs | {"use_sliding_window": False}
        theirs["attention_bias"] = decoder.qkv_bias
        return theirs | ({"mlp_bias": decoder.mlp_bias} if kind == "llama" else {})


def _kind(decoder: DecoderConfig) -> str:
    """Which class a decoder is of."""
    if decoder.norm == "rms_offset" or decoder.scaled_embeddings:
        return "gemma"
    return "qwen2" if decoder.qkv_bias and not decoder.out_bias else "llama"


def _read_rope(settings: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` of files before transformers 5."""
    stated = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = stated.get("rope_theta") or settings.get("rope_theta") or PlainRope.theta
    name = stated.get("rope_type") or stated.get("type") or "default"
    kinds = RopeConfig.kinds()
    if name not in kinds:
        raise ConversionError(f"config.json: rope_type = {name!r} is not supported, only {', '.join(kinds)}")
    fields = {field.name: _ROPE_NAMES.get(field.name, field.name) for field in dataclasses.fields(kinds[name])}
    values = {ours: stated[theirs] for ours, theirs in fields.items() if theirs in stated and ours != "theta"}
    passive = {"rope_theta", "rope_type", "type", *(fields[ours] for ours in values)}
    unknown = [key for key, value in stated.items() if key not in passive and value is not None]
    if unknown:
        raise ConversionError(f"config.json: rope_parameters.{unknown[0]} is not supported with rope_type {name!r}")
    return kinds[name](theta=float(theta), **values)


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    values = {_ROPE_NAMES.get(key, key): value for key, value in dataclasses.asdict(rope).items() if key != "theta"}
    return {"rope_type": rope.kind(), "rope_theta": rope.theta, **values}


__all__ = ["HfDecoder"]
