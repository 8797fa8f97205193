"""How one tensor is laid out in another library and in our parameter trees, both ways. Names belong to the formats."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A bijection between another library's tensor and one of our leaves, whose shape tells how heads are split."""

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    from_ours: Callable[[Any], Any]  # reshapes and transposes only: it is traced too, for the shape of the result


LAYOUTS: dict[str, Layout] = {
    "same": Layout(lambda x, shape: x, lambda x: x),
    # (out, in) <-> (in, out)
    "linear": Layout(lambda x, shape: x.T, lambda x: x.T),
    # OIHW <-> HWIO
    "conv": Layout(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    # query, key, value: (heads head_dim, width) <-> (width, heads, head_dim)
    "to_heads": Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T),
    # their biases: (heads head_dim) <-> (heads, head_dim)
    "heads_bias": Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
    # attention's output: (width, heads head_dim) <-> (heads, head_dim, width)
    "from_heads": Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T),
    # (1, ...) <-> (...)
    "batch_of_one": Layout(lambda x, shape: x.reshape(shape), lambda x: x[None]),
    # (1, 1, width) <-> (width)
    "one_token": Layout(lambda x, shape: x.reshape(shape), lambda x: x[None, None]),
}
