"""CLIP's weights under their three spellings: OpenAI and open_clip (one set of names), and Hugging Face's CLIPModel.

One table of rows drives both directions. Sizes and activations are read in `clip_config`; files in `files`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax.interop.layouts import LAYOUTS
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig

Family = Literal["hf", "open_clip"]
Tensors = Mapping[str, np.ndarray]


class ConversionError(ValueError):
    """Weights that do not fit the model: the sentence lists every name concerned."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and what the families call it.

    A name may hold `{layer}`, the block's number, and end in `#i`: the i-th third of a fused tensor.
    """

    ours: str  # path in the parameter tree
    hf: str  # name in transformers.CLIPModel
    open_clip: str  # name in OpenAI's and open_clip's CLIP
    layout: str  # key of LAYOUTS
    open_clip_layout: str | None = None  # where it differs from `layout`


def _tower_rows(tower: str, hf: str, open_clip: str) -> list[Row]:
    """The rows of a tower's blocks, the same in both towers but for the prefixes."""
    rows = []
    for i, name in enumerate(("query", "key", "value")):
        rows += [
            Row(f"attn/{name}/kernel", f"self_attn.{name[0]}_proj.weight", f"attn.in_proj_weight#{i}", "to_heads"),
            Row(f"attn/{name}/bias", f"self_attn.{name[0]}_proj.bias", f"attn.in_proj_bias#{i}", "heads_bias"),
        ]
    rows += [
        Row("attn/out/kernel", "self_attn.out_proj.weight", "attn.out_proj.weight", "from_heads"),
        Row("attn/out/bias", "self_attn.out_proj.bias", "attn.out_proj.bias", "same"),
    ]
    for ours, theirs, fused in (("mlp/fc1", "mlp.fc1", "mlp.c_fc"), ("mlp/fc2", "mlp.fc2", "mlp.c_proj")):
        rows += [
            Row(f"{ours}/kernel", f"{theirs}.weight", f"{fused}.weight", "linear"),
            Row(f"{ours}/bias", f"{theirs}.bias", f"{fused}.bias", "same"),
        ]
    for i in (1, 2):
        rows += _norm_rows(f"ln_{i}", f"layer_norm{i}", f"ln_{i}")
    return [
        Row(
            f"{tower}/blocks/{row.ours}",
            f"{hf}.encoder.layers.{{layer}}.{row.hf}",
            f"{open_clip}transformer.resblocks.{{layer}}.{row.open_clip}",
            row.layout,
        )
        for row in rows
    ]


def _norm_rows(ours: str, hf: str, open_clip: str) -> list[Row]:
    return [
        Row(f"{ours}/scale", f"{hf}.weight", f"{open_clip}.weight", "same"),
        Row(f"{ours}/bias", f"{hf}.bias", f"{open_clip}.bias", "same"),
    ]


_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"
ROWS: tuple[Row, ...] = (
    Row("logit_scale", "logit_scale", "logit_scale", "same"),
    Row("image/patch_embed/kernel", f"{_IMAGE}.patch_embedding.weight", "visual.conv1.weight", "conv"),
    Row("image/class_token", f"{_IMAGE}.class_embedding", "visual.class_embedding", "same"),
    Row("image/pos_embed", f"{_IMAGE}.position_embedding.weight", "visual.positional_embedding", "same"),
    *_norm_rows("image/ln_pre", "vision_model.pre_layrnorm", "visual.ln_pre"),  # Hugging Face's own spelling
    *_tower_rows("image", "vision_model", "visual."),
    *_norm_rows("image/ln_post", "vision_model.post_layernorm", "visual.ln_post"),
    Row("image/projection/kernel", "visual_projection.weight", "visual.proj", "linear", "same"),
    Row("text/token_embed", f"{_TEXT}.token_embedding.weight", "token_embedding.weight", "same"),
    Row("text/pos_embed", f"{_TEXT}.position_embedding.weight", "positional_embedding", "same"),
    *_tower_rows("text", "text_model", ""),
    *_norm_rows("text/ln_final", "text_model.final_layer_norm", "ln_final"),
    Row("text/projection/kernel", "text_projection.weight", "text_projection", "linear", "same"),
)

# Constants that files carry beside weights.
BUFFERS = {
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    f"{_IMAGE}.position_ids",
    f"{_TEXT}.position_ids",
}


def canonical_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors under the table's names: wrappers' prefixes removed, constants dropped."""
    renamed = {}
    for name, value in tensors.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        # open_clip's CustomTextCLIP keeps the text tower in a module of its own.
        name = re.sub(r"^text\.", "", name)
        if name not in BUFFERS:
            renamed[name] = value
    return renamed


def detect_family(tensors: Tensors) -> Family | None:
    """The family whose names these are (canonical names), or None."""
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        return "hf"
    return "open_clip" if "visual.conv1.weight" in tensors else None


def count_layers(tensors: Tensors, tower: str, family: Family) -> int:
    """The number of blocks of `tower`, "image" or "text", that the names speak of."""
    row = next(row for row in ROWS if row.ours == f"{tower}/blocks/ln_1/scale")
    pattern = re.escape(_names(row, family, 0)[0]).replace(r"\{layer\}", r"(\d+)")
    return len({match.group(1) for name in tensors if (match := re.fullmatch(pattern, name))})


def shape_of(tensors: Tensors, ours: str, family: Family) -> tuple[int, ...]:
    """The shape of what becomes our leaf `ours` (its first layer's if stacked), in the family's layout.

    Raises:
        ConversionError: the tensor is not there.
    """
    row = next(row for row in ROWS if row.ours == ours)
    name = _names(row, family, 1 if "/blocks/" in ours else 0)[0]
    if name not in tensors:
        raise ConversionError(f"these weights have no {name}, which a {family} CLIP has; missing names: {name}")
    return tensors[name].shape


def to_params(tensors: Tensors, config: TwoTowerConfig, family: Family, *, allow_unexpected: bool = False) -> Any:
    """A family's tensors as our parameter tree.

    Args:
        tensors: under canonical names; any float dtype.
        config: the model that they are for.
        family: whose names they carry.
        allow_unexpected: whether names that the model has no place for are passed over.

    Returns:
        Nested dict of fp32 numpy arrays.

    Raises:
        ConversionError: lists missing names, unexpected names and wrong shapes.
    """
    expected, remaining = _expected_shapes(config), dict(_split_fused(tensors, family))
    params, missing, misshapen = {}, [], []
    for row, layers in _rows_of(config, expected, family):
        names = _names(row, family, layers)
        missing += [name for name in names if name not in remaining]
        found = [_to_ours(row, family, remaining.pop(name), _heads(config, row)) for name in names if name in remaining]
        shape = expected[row.ours][1:] if layers else expected[row.ours]
        misshapen += [f"{names[0]} makes {leaf.shape} of {row.ours} {shape}" for leaf in found if leaf.shape != shape]
        if not missing and not misshapen:
            params[row.ours] = np.stack(found) if layers else found[0]
    _raise_for(family, missing, [] if allow_unexpected else sorted(remaining), misshapen)
    return unflatten_dict(params, sep="/")


def from_params(params: Any, config: TwoTowerConfig, family: Family) -> dict[str, np.ndarray]:
    """Our parameter tree as a family's tensors, fp32 under its names; the inverse of `to_params`.

    Raises:
        ConversionError: the family's model has no place for a leaf; lists them.
    """
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(params, sep="/").items()}
    tensors: dict[str, np.ndarray] = {}
    for row, layers in _rows_of(config, {path: leaf.shape for path, leaf in flat.items()}, family):
        names, leaf = _names(row, family, layers), flat[row.ours]
        for name, part in zip(names, leaf if layers else [leaf], strict=True):
            tensors[name] = _from_ours(row, family, np.asarray(part), _heads(config, row))
    return {name: np.asarray(value, order="C") for name, value in _join_fused(tensors).items()}


def _rows_of(
    config: TwoTowerConfig, shapes: Mapping[str, tuple[int, ...]], family: Family
) -> Iterator[tuple[Row, int]]:
    """The rows and the number of layers stacked in each leaf (0: none), of a model that has just these leaves."""
    differing = sorted(set(shapes) ^ {row.ours for row in ROWS})
    if differing:
        raise ConversionError(
            f"this model is no CLIP to {family}: it should have all of, and only, CLIP's parameters, but differs in "
            f"{', '.join(differing)}; set the config's towers as in vlm_jax.models.presets.CLIP"
        )
    for row in ROWS:
        yield row, (getattr(config, row.ours.split("/")[0]).depth if "/blocks/" in row.ours else 0)


def _names(row: Row, family: Family, layers: int) -> list[str]:
    pattern = row.hf if family == "hf" else row.open_clip
    return [pattern.format(layer=i) for i in range(layers)] if layers else [pattern]


def _layout(row: Row, family: Family) -> str:
    return row.open_clip_layout if family == "open_clip" and row.open_clip_layout else row.layout


def _heads(config: TwoTowerConfig, row: Row) -> int:
    return config.image.heads if row.ours.startswith("image/") else config.text.heads


def _to_ours(row: Row, family: Family, tensor: np.ndarray, heads: int) -> np.ndarray:
    return LAYOUTS[_layout(row, family)].to_ours(tensor.astype(np.float32), heads)


def _from_ours(row: Row, family: Family, leaf: np.ndarray, heads: int) -> np.ndarray:
    return LAYOUTS[_layout(row, family)].from_ours(leaf, heads)


def _split_fused(tensors: Tensors, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Fused query-key-value tensors as three, named `NAME#0` to `NAME#2`."""
    for name, value in tensors.items():
        if family == "open_clip" and re.search(r"\.in_proj_(weight|bias)$", name):
            yield from ((f"{name}#{i}", part) for i, part in enumerate(np.split(value, 3)))
        else:
            yield name, value


def _join_fused(tensors: Tensors) -> dict[str, np.ndarray]:
    joined: dict[str, list[np.ndarray]] = {}
    for name, value in tensors.items():  # rows come in the order query, key, value
        joined.setdefault(name.split("#")[0], []).append(value)
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()}


def _expected_shapes(config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model, without building one."""
    images = jax.ShapeDtypeStruct((1, *config.image.image_shape, 3), jnp.float32)
    texts = jax.ShapeDtypeStruct((1, config.text.length), jnp.int32)
    variables = meta.unbox(jax.eval_shape(TwoTower(config).init, jax.random.key(0), images, texts))
    leaves: Any = flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def _raise_for(family: Family, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    kinds = (
        ("missing names", missing),
        ("unexpected names (--allow_unexpected passes over them)", unexpected),
        ("wrong shapes", misshapen),
    )
    # Thirds of one fused tensor are one name to the reader.
    listed = {kind: dict.fromkeys(item.split("#")[0] for item in items) for kind, items in kinds}
    problems = [f"{kind}: {', '.join(items)}" for kind, items in listed.items() if items]
    if problems:
        raise ConversionError(f"these weights do not fit the {family} CLIP of this config: {'; '.join(problems)}")


__all__ = [
    "ConversionError",
    "Family",
    "Tensors",
    "canonical_names",
    "count_layers",
    "detect_family",
    "from_params",
    "shape_of",
    "to_params",
]
