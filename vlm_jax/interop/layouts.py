"""How one tensor is laid out in PyTorch and in our parameter trees, both ways. Names belong to the families."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A bijection between a PyTorch tensor and one of our leaves; `heads` is the tower's number of heads."""

    to_ours: Callable[[np.ndarray, int], np.ndarray]
    from_ours: Callable[[np.ndarray, int], np.ndarray]


LAYOUTS: dict[str, Layout] = {
    "same": Layout(lambda x, heads: x, lambda x, heads: x),
    # (out, in) <-> (in, out)
    "linear": Layout(lambda x, heads: x.T, lambda x, heads: x.T),
    # OIHW <-> HWIO
    "conv": Layout(lambda x, heads: x.transpose(2, 3, 1, 0), lambda x, heads: x.transpose(3, 2, 0, 1)),
    # query, key, value: (heads head_dim, width) <-> (width, heads, head_dim)
    "to_heads": Layout(
        lambda x, heads: x.T.reshape(x.shape[1], heads, -1), lambda x, heads: x.reshape(x.shape[0], -1).T
    ),
    # their biases: (heads head_dim) <-> (heads, head_dim)
    "heads_bias": Layout(lambda x, heads: x.reshape(heads, -1), lambda x, heads: x.reshape(-1)),
    # attention's output: (width, heads head_dim) <-> (heads, head_dim, width)
    "from_heads": Layout(
        lambda x, heads: x.T.reshape(heads, -1, x.shape[0]), lambda x, heads: x.reshape(-1, x.shape[-1]).T
    ),
}
