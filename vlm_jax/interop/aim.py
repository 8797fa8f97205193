"""AIM v1 in the names of its authors: the released backbones (ml-aim), and pre-training with its head (ml-l3m)."""

from collections.abc import Sequence

from vlm_jax.interop.tables import Row, affine, norm, within


def trunk_rows(preprocessor: str, attention: Sequence[Row]) -> list[Row]:
    """The trunk, at `image/`.

    Args:
        preprocessor: prefix of what embeds the patches.
        attention: query, key and value of a block.
    """
    block = [
        *attention,
        Row("attn/out/kernel", "attn.proj.weight", "from_heads"),
        Row("mlp/fc1/kernel", "mlp.fc1.weight", "linear"),
        Row("mlp/fc2/kernel", "mlp.fc2.weight", "linear"),
        *norm("ln_1", "norm_1"),
        *norm("ln_2", "norm_2"),
    ]
    rows = [
        *affine("patch_embed", f"{preprocessor}.patchifier.proj", "conv"),
        *norm("patch_norm", f"{preprocessor}.patchifier.norm"),
        *within(block, "blocks/", "trunk.blocks.{layer}."),
        *norm("ln_post", "trunk.post_trunk_norm"),
    ]
    return within(rows, "image/", "")


FUSED = [
    Row(f"attn/{name}/kernel", f"attn.qkv.weight#{i}/3", "to_heads") for i, name in enumerate(("query", "key", "value"))
]
APART = [Row(f"attn/{name}/kernel", f"attn.{name[0]}_proj.weight", "to_heads") for name in ("query", "key", "value")]


def head_rows() -> list[Row]:
    """The pixel head of MLPs, at `head/`."""
    block = [
        Row("mlp/fc1/kernel", "mlp.fc1.weight", "linear"),
        Row("mlp/fc2/kernel", "mlp.fc2.weight", "linear"),
        *norm("ln_1", "norm_1"),
        *norm("ln_2", "norm_2"),
    ]
    rows = [
        *affine("projection", "decoder_projection"),
        *within(block, "blocks/", "decoder_blocks.{layer}."),
        *norm("norm", "decoder_norm"),
        *affine("pixels", "decoder_pred"),
    ]
    return within(rows, "head/", "head.")
