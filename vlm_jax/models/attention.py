"""The one attention of every tower, and the choice of its kernel. Masks are built by the towers, not here."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import Initializers
from vlm_jax.models.linear import Linear
from vlm_jax.models.rotary import Rotary, rotate
from vlm_jax.models.softmax_attention import attention_weights, dropped_attention, softmax_attention
from vlm_jax.models.splash import splash_attention

AttentionImpl = Literal["auto", "xla", "cudnn", "flash"]

# Below this length the [T, S] matrix is small and XLA's fused softmax is as good as a tiled kernel.
FLASH_MIN_LENGTH = 1024


class KeyValues(NamedTuple):
    """Keys, after their rotation, and values: [B, S, K, D] each, or of a stack of layers [L, B, S, K, D]."""

    keys: jax.Array
    values: jax.Array


def attend(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    segments_BxT: jax.Array | None = None,
    causal: bool = False,
    impl: AttentionImpl = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt D + bias) v per head (Vaswani et al. 2017, eq. 1), softmax in fp32.

    Args:
        q_BxTxHxD: queries.
        k_BxSxKxD: keys, of as many heads as the queries, or of K that divide H: each then serves H / K heads of
            queries (Ainslie et al. 2023, GQA).
        v_BxSxKxD: values.
        bias: added to the logits; 4 axes that broadcast to [B, H, T, S].
        mask: bool, True where attention is allowed; 4 axes that broadcast to [B, H, T, S].
        segments_BxT: int32, for tokens that attend to themselves (S = T): those of other numbers are not seen.
        causal: whether query t sees keys 0..t only.
        impl: the kernel. "auto" takes cuDNN on GPU and Pallas on TPU where they apply and pay, XLA elsewhere.

    Returns:
        The context, [B, T, H, D] in the dtype of the queries.

    Raises:
        ValueError: `impl` names a kernel that can't compute this.
    """
    platform = _platform()
    if impl == "auto":
        impl = _choose(platform, q_BxTxHxD, bias, mask)
    if segments_BxT is not None and impl != "flash":
        same = segments_BxT[:, None, :, None] == segments_BxT[:, None, None, :]
        mask = same if mask is None else mask & same
    if impl == "cudnn":
        bias = None if bias is None else bias.astype(q_BxTxHxD.dtype)  # cuDNN wants one dtype
        return jax.nn.dot_product_attention(
            q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, bias, mask, is_causal=causal, implementation="cudnn"
        )
    if impl == "flash":
        if bias is not None or not _masks_keys_only(mask):
            raise ValueError(
                "attention_impl 'flash' takes masks over keys (shape [B, 1, 1, S]) and no bias; "
                "use attention_impl 'xla' or 'auto' for this model"
            )
        batch, keys = k_BxSxKxD.shape[:2]
        key_mask = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, keys))
        return splash_attention(
            q_BxTxHxD,
            k_BxSxKxD,
            v_BxSxKxD,
            key_mask_BxS=key_mask,
            segments_BxT=segments_BxT,
            causal=causal,
            interpret=platform != "tpu",
        )
    return _grouped(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, bias, mask, causal)


def _grouped(
    q_BxTxHxD: jax.Array,
    k_BxSxKxD: jax.Array,
    v_BxSxKxD: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """XLA's attention where a head of keys may serve several of queries."""
    batch, queries, heads, depth = q_BxTxHxD.shape
    kv_heads = k_BxSxKxD.shape[2]
    if kv_heads == heads:
        return softmax_attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, bias, mask, causal)
    if queries == 1 and bias is None and not causal and (mask is None or mask.shape[1:3] == (1, 1)):
        # A token that is generated: the group's queries as queries of one head, so that no cache is copied.
        q_BxGxKxD = q_BxTxHxD.reshape(batch, kv_heads, heads // kv_heads, depth).swapaxes(1, 2)
        out_BxGxKxD: Any = softmax_attention(q_BxGxKxD, k_BxSxKxD, v_BxSxKxD, None, mask, False)
        return out_BxGxKxD.swapaxes(1, 2).reshape(batch, 1, heads, depth)
    k_BxSxHxD, v_BxSxHxD = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_BxSxKxD, v_BxSxKxD))
    return softmax_attention(q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, bias, mask, causal)


def _platform() -> str:
    """Of the mesh the computation is for when there is one: a TPU program may be compiled on a CPU-only machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _choose(platform: str, q: jax.Array, bias: jax.Array | None, mask: jax.Array | None) -> AttentionImpl:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # cuDNN has no gradient of a bias between odd numbers of tokens
    takes_bias = bias is None or bias.shape[-2] % 2 == bias.shape[-1] % 2 == 0
    generating = q.shape[1] == 1 and mask is not None  # from a cache: nothing to tile
    if platform in ("gpu", "cuda") and half and takes_bias and not generating:
        return "cudnn" if q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 else "xla"
    if platform == "tpu" and q.shape[1] >= FLASH_MIN_LENGTH and bias is None and _masks_keys_only(mask):
        return "flash"
    return "xla"


def _masks_keys_only(mask: jax.Array | None) -> bool:
    return mask is None or mask.shape[1:3] == (1, 1)


class Attention(nn.Module):
    """Multi-head attention; over x itself, or from x to a context.

    Attributes:
        heads: number of heads; divides the width.
        initializers: those of the tower.
        qkv_bias: whether query, key and value have biases.
        impl: see `attend`.
        key_bias: false leaves the keys without one all the same (BEiT).
        out_bias: whether the output projection has one.
        dtype: compute dtype.
        dropout: share of the attention's weights that is dropped in training (BERT); no kernel but XLA's does that.
    """

    heads: int
    initializers: Initializers
    qkv_bias: bool = True
    impl: AttentionImpl = "auto"
    key_bias: bool = True
    out_bias: bool = True
    dtype: Dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        context_BxSxC: jax.Array | KeyValues | None = None,
        *,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        causal: bool = False,
        keys: jax.Array | None = None,
        perturbation_BxHxTxS: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D] (and a context [B, S, C]) -> [B, T, D]; `bias`, `mask` and `causal` as in `attend`.

        Of a context that is keys and values already, of all heads, none are made here.

        `keys` are those of the rows for dropout, or None at evaluation. Dropout does not go with a bias. To the weights
        of attention a `perturbation` is added, zeros by which a result may be differentiated; the weights themselves
        are then sown as "weights", fp32 [B, H, T, S], into the collection "intermediates". It goes with neither.
        """
        width = x_BxTxD.shape[-1]
        q = self._split_heads("query", x_BxTxD, self.heads, width // self.heads)
        if isinstance(context_BxSxC, KeyValues):
            k, v = context_BxSxC
        else:
            source = x_BxTxD if context_BxSxC is None else context_BxSxC
            k, v = (self._split_heads(name, source, self.heads, width // self.heads) for name in ("key", "value"))
        if perturbation_BxHxTxS is not None:
            weights = attention_weights(q, k, mask, causal)
            self.sow("intermediates", "weights", weights)
            context = jnp.einsum("BHTS,BSHD->BTHD", (weights + perturbation_BxHxTxS).astype(v.dtype), v)
        elif self.dropout and keys is not None:
            context = dropped_attention(q, k, v, mask, causal, self.dropout, keys)
        else:
            context = attend(q, k, v, bias=bias, mask=mask, causal=causal, impl=self.impl)
        return self._out(context, width)

    def _split_heads(self, name: str, x: jax.Array, heads: int, head_dim: int) -> jax.Array:
        linear = Linear(
            (heads, head_dim),
            ("embed", "heads", "kv"),
            self.initializers.qkv_kernel,
            use_bias=self.qkv_bias and (self.key_bias or name != "key"),
            dtype=self.dtype,
            name=name,
        )
        return checkpoint_name(constrain(linear(x), "batch", "length", "heads", "kv"), name)

    def _out(self, context_BxTxHxD: jax.Array, width: int) -> jax.Array:
        context = checkpoint_name(constrain(context_BxTxHxD, "batch", "length", "heads", "kv"), "context")
        out = Linear(
            (width,),
            ("heads", "kv", "embed"),
            self.initializers.out_kernel,
            use_bias=self.out_bias,
            contracted=2,
            dtype=self.dtype,
            name="out",
        )
        return out(context)


class DecoderAttention(Attention):
    """Attention of tokens to themselves, with rotary positions, shared heads of keys, and a cache.

    Attributes:
        kv_heads: heads of keys and values; 0: as many as `heads`.
        head_dim: channels of a head; 0: the width divided by `heads`.
    """

    kv_heads: int = 0
    head_dim: int = 0

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x_BxTxD: jax.Array,
        angles: Rotary,
        *,
        mask: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
        causal: bool = False,
        cache: KeyValues | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """[B, T, D] -> [B, T, D], and the tokens' own keys and values [B, T, K, D].

        Args:
            x_BxTxD: tokens.
            angles: by which queries and keys are rotated.
            mask: as in `attend`.
            segments_BxT: as in `attend`.
            causal: as in `attend`.
            cache: [B, S, K, D], what is attended to once the tokens' own keys and values stand in it.
            slot: () int32, where in the cache those begin.
        """
        width = x_BxTxD.shape[-1]
        heads = {"query": self.heads, "key": self.kv_heads or self.heads, "value": self.kv_heads or self.heads}
        head_dim = self.head_dim or width // self.heads
        q, k, v = (self._split_heads(name, x_BxTxD, count, head_dim) for name, count in heads.items())
        q, k = rotate(q, angles), rotate(k, angles)
        own = KeyValues(k, v)
        if cache is not None:
            assert slot is not None, "a cache is written at a slot"
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1) for old, new in zip(cache, own, strict=True))
        context = attend(q, k, v, mask=mask, segments_BxT=segments_BxT, causal=causal, impl=self.impl)
        return self._out(context, width), own
