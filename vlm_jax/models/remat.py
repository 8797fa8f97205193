"""Rematerialisation policies by name: what a block keeps for its backward pass. Applied by `transformer`."""

from collections.abc import Callable
from typing import Any, Literal

import jax

RematName = Literal["none", "full", "dots", "save_qkv_ctx", "save_qkv_mid"]

# "none" keeps every activation; "full" only a block's input; "dots" the products with weights; "save_qkv_ctx" the four
# tensors that attention names, so that the backward pass repeats norms, MLP and softmax but no attention projection.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_qkv_ctx": jax.checkpoint_policies.save_only_these_names("query", "key", "value", "context"),
    "save_qkv_mid": jax.checkpoint_policies.save_only_these_names("query", "key", "value", "middle"),
}
