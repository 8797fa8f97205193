"""The machinery of every conversion: a table of rows, one a leaf of ours, drives both directions.

What the rows are is the formats' business (`formats`); how a tensor is laid out is in `layouts`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax.interop.layouts import LAYOUTS, Shape

Tensors = Mapping[str, np.ndarray]


class ConversionError(ValueError):
    """Weights that do not fit the model: the sentence lists every name concerned."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and what a library calls it.

    Their name may hold `{layer}`, the block's number: the leaf is then a stack of layers; `{even}` and `{odd}` are the
    numbers of the blocks of a stack that holds every other one. It may end in `#i/n`: the i-th of n tensors that are
    stored as one, joined along the first axis.
    """

    ours: str  # path in the parameter tree
    theirs: str  # name of the tensor
    layout: str  # key of LAYOUTS
    first: int = 0  # their number of the first layer of a stack
    step: int = 1  # from their number of a layer to that of the next one in the stack

    def names(self, shape: Shape) -> list[str]:
        """Their names of a leaf of that shape, one a layer where it is a stack."""
        if not self.stacked:
            return [self.theirs]
        numbers = range(self.first, self.first + self.step * shape[0], self.step)
        return [self.theirs.format(layer=i, even=2 * i, odd=2 * i + 1) for i in numbers]

    @property
    def stacked(self) -> bool:
        """Whether the leaf holds all layers."""
        return "{" in self.theirs


def within(rows: Iterable[Row], ours: str, theirs: str) -> list[Row]:
    """The rows of a submodule under its prefixes."""
    return [dataclasses.replace(row, ours=f"{ours}{row.ours}", theirs=f"{theirs}{row.theirs}") for row in rows]


def affine(ours: str, theirs: str, layout: str = "linear") -> list[Row]:
    """Kernel and bias of a linear map or of a convolution."""
    return [Row(f"{ours}/kernel", f"{theirs}.weight", layout), Row(f"{ours}/bias", f"{theirs}.bias", "same")]


def norm(ours: str, theirs: str) -> list[Row]:
    """Scale and bias of a normalisation."""
    return [Row(f"{ours}/scale", f"{theirs}.weight", "same"), Row(f"{ours}/bias", f"{theirs}.bias", "same")]


def to_heads(ours: str, theirs: str) -> list[Row]:
    """Kernel and bias of a query, key or value projection of its own."""
    return split_to_heads(ours, f"{theirs}.weight", f"{theirs}.bias")


def split_to_heads(ours: str, weight: str, bias: str) -> list[Row]:
    """Kernel and bias of a query, key or value projection by the names of both tensors."""
    return [Row(f"{ours}/kernel", weight, "to_heads"), Row(f"{ours}/bias", bias, "heads_bias")]


def from_heads(ours: str, theirs: str) -> list[Row]:
    """Kernel and bias of attention's output projection."""
    return affine(ours, theirs, "from_heads")


def fused_attention(ours: str, weight: str, bias: str, out: str) -> list[Row]:
    """An attention whose query, key and value are one tensor each of weights and biases, as in torch's module."""
    rows = []
    for i, name in enumerate(("query", "key", "value")):
        rows += split_to_heads(f"{ours}/{name}", f"{weight}#{i}/3", f"{bias}#{i}/3")
    return rows + from_heads(f"{ours}/out", out)


def without_wrappers(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors without the prefixes that data-parallel and compiled modules put before every name."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in tensors.items()}


def count_layers(tensors: Tensors, pattern: str) -> int:
    """The number of layers that names of the form `pattern`, which holds `{layer}`, speak of."""
    regex = re.escape(pattern).replace(r"\{layer\}", r"(\d+)")
    return len({match.group(1) for name in tensors if (match := re.fullmatch(regex, name))})


def shape_of(tensors: Tensors, name: str, what: str) -> Shape:
    """The shape of a tensor; raises `ConversionError` if `what`, the title of a format, lacks it."""
    if name not in tensors:
        raise ConversionError(f"these weights have no {name}, which {what} has; missing names: {name}")
    return tensors[name].shape


def parameter_shapes(module: Any, *inputs: jax.ShapeDtypeStruct) -> dict[str, Shape]:
    """Path -> shape of every parameter of a module, without building one."""
    variables = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    leaves: Any = flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def module_shapes(module: Any, *inputs: Shape) -> dict[str, Shape]:
    """As `parameter_shapes`, of a module that is called with fp32 arrays of these shapes."""
    return parameter_shapes(module, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs))


def to_params(
    tensors: Tensors, rows: Sequence[Row], shapes: Mapping[str, Shape], what: str, *, allow_unexpected: bool = False
) -> Any:
    """Another library's tensors as our parameter tree.

    Args:
        tensors: name -> array of any float dtype.
        rows: one for each leaf.
        shapes: path -> shape of each leaf of the model.
        what: title of the format, for messages.
        allow_unexpected: whether names that no row speaks of are passed over.

    Returns:
        Nested dict of fp32 numpy arrays.

    Raises:
        ConversionError: lists missing names, unexpected names and wrong shapes.
    """
    _check_cover(rows, shapes, what)
    params, used, missing, misshapen = {}, set(), [], []
    for row in rows:
        shape = shapes[row.ours][1:] if row.stacked else shapes[row.ours]
        wanted, found = _their_shape(row, shape), []
        for name in row.names(shapes[row.ours]):
            used.add(_base(name))
            tensor = _part(tensors, name)
            if tensor is None:
                missing.append(name)
            elif tensor.shape != wanted:
                misshapen.append(f"{name} {tensor.shape}, not {wanted}")
            else:
                found.append(LAYOUTS[row.layout].to_ours(tensor.astype(np.float32), shape))
        if not missing and not misshapen:
            params[row.ours] = np.stack(found) if row.stacked else found[0]
    unexpected = [] if allow_unexpected else sorted(set(tensors) - used)
    _raise_for(what, missing, unexpected, misshapen)
    return unflatten_dict(params, sep="/")


def from_params(params: Any, rows: Sequence[Row], what: str) -> dict[str, np.ndarray]:
    """Our parameter tree as another library's tensors, fp32 under its names; the inverse of `to_params`.

    Raises:
        ConversionError: the library's model has no place for a leaf; lists them.
    """
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(params, sep="/").items()}
    _check_cover(rows, {path: leaf.shape for path, leaf in flat.items()}, what)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for row in rows:
        leaf = flat[row.ours]
        for name, value in zip(row.names(leaf.shape), leaf if row.stacked else [leaf], strict=True):
            index = int(name.partition("#")[2].partition("/")[0] or 0)
            parts.setdefault(_base(name), {})[index] = LAYOUTS[row.layout].from_ours(value)
    joined = {name: [found[i] for i in sorted(found)] for name, found in parts.items()}
    return {name: np.asarray(np.concatenate(x) if x[1:] else x[0], order="C") for name, x in joined.items()}


def without_constants(tensors: Tensors, constants: Tensors, what: str) -> dict[str, np.ndarray]:
    """The tensors that are parameters here.

    Args:
        tensors: name -> array.
        constants: what a file holds beside the parameters and our model computes; it may be missing in the file.
        what: title of the format, for messages.

    Raises:
        ConversionError: a constant has another value than our model computes.
    """
    for name, expected in constants.items():
        found = tensors.get(name, expected)
        if found.shape != expected.shape or not np.allclose(found.astype(np.float32), expected, atol=1e-5):
            raise ConversionError(
                f"{name} of these weights is not the constant that {what} of this config has, so they were trained "
                "otherwise; they can't be imported"
            )
    return {name: value for name, value in tensors.items() if name not in constants}


def _base(name: str) -> str:
    return name.partition("#")[0]


def _part(tensors: Tensors, name: str) -> np.ndarray | None:
    """The tensor of that name, or its part; whole if it can't be cut so, which its shape then shows."""
    base, _, place = name.partition("#")
    if base not in tensors or not place:
        return tensors.get(base)
    index, count = map(int, place.split("/"))
    tensor = tensors[base]
    return np.split(tensor, count)[index] if tensor.ndim and tensor.shape[0] % count == 0 else tensor


def _their_shape(row: Row, shape: Shape) -> Shape:
    return jax.eval_shape(LAYOUTS[row.layout].from_ours, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def _check_cover(rows: Sequence[Row], shapes: Mapping[str, Shape], what: str) -> None:
    known = {row.ours for row in rows}
    kinds = (
        ("it has no place for", sorted(set(shapes) - known)),
        ("it also has", sorted(known - set(shapes))),
    )
    problems = [f"{kind} {', '.join(paths)}" for kind, paths in kinds if paths]
    if problems:
        raise ConversionError(f"this model can't be expressed as {what}: {'; '.join(problems)}")


def _raise_for(what: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    kinds = (
        ("missing names", missing),
        ("unexpected names (--allow_unexpected passes over them)", unexpected),
        ("wrong shapes", misshapen),
    )
    # Parts of one tensor are one name to the reader.
    listed = {kind: dict.fromkeys(re.sub(r"#\d+/\d+", "", item) for item in items) for kind, items in kinds}
    problems = [f"{kind}: {', '.join(items)}" for kind, items in listed.items() if items]
    if problems:
        raise ConversionError(f"these weights are not {what} of this config: {'; '.join(problems)}")


__all__ = [
    "ConversionError",
    "Row",
    "Tensors",
    "affine",
    "count_layers",
    "from_heads",
    "from_params",
    "fused_attention",
    "module_shapes",
    "norm",
    "parameter_shapes",
    "shape_of",
    "split_to_heads",
    "to_heads",
    "to_params",
    "within",
    "without_constants",
    "without_wrappers",
]
