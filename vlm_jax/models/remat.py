"""Rematerialisation policies by name: what a block keeps for its backward pass. Applied by `transformer`."""

from collections.abc import Callable
from typing import Any, Literal

import jax

RematName = Literal["auto", "none", "full", "dots", "save_qkv_ctx", "save_qkv_mid", "offload"]

_ATTENTION = ("query", "key", "value")

# "none" keeps every activation; "full" only a block's input; "dots" the products with weights. "save_qkv_ctx" keeps the
# four tensors that attention names, so that the backward pass repeats norms, MLP and softmax but no attention
# projection; "save_qkv_mid" the tokens after attention in place of its context, for the same bytes one product less.
# "offload" sends the latter's four to the host's memory and keeps a block's input on the chip. "auto" is what
# `config.chips` says of the chip that a step is trained on; where nothing is trained it keeps nothing back.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "auto": None,
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_qkv_ctx": jax.checkpoint_policies.save_only_these_names(*_ATTENTION, "context"),
    "save_qkv_mid": jax.checkpoint_policies.save_only_these_names(*_ATTENTION, "middle"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*_ATTENTION, "middle"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
