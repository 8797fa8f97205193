"""Rows of ids in which another id stands for each image or image feature, as the batch of our models."""

from typing import Any

import numpy as np

from vlm_jax.data.tiles import NO_SLOT

IGNORED = -100


def expanded_rows(
    ids: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray,
    image_id: int,
    features: int,
    tiles: list[np.ndarray],
    side: str,
) -> dict[str, Any]:
    """LLaVA's rows: each `image_id` becomes `features` tokens; filled up on one side.

    Args:
        ids: [B, L].
        mask: [B, L], False for padding.
        labels: [B, L], `IGNORED` where nothing is learned, not shifted.
        image_id: stands for a whole image.
        features: of an image.
        tiles: of each row, normalised [T, H, W, 3].
        side: "left" or "right".
    """
    rows = []
    for row_ids, row_labels in zip((x[m] for x, m in zip(ids, mask, strict=True)),
                                   (x[m] for x, m in zip(labels, mask, strict=True)), strict=True):  # fmt: skip
        row, seen = [], 0
        for token, label in zip(row_ids.tolist(), row_labels.tolist(), strict=True):
            if token == image_id:
                row += [(0, False, seen * features + feature) for feature in range(features)]
                seen += 1
            else:
                row.append((token, label != IGNORED, NO_SLOT))
        rows.append(row)
    length, most = max(map(len, rows)), max(1, *map(len, tiles))
    batch = empty_rows(len(rows), length, (most, *tiles[0].shape[1:]))
    for place, (row, images) in enumerate(zip(rows, tiles, strict=True)):
        span = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        batch["text"][place, span], batch["supervised"][place, span], batch["tile_slots"][place, span] = zip(
            *row, strict=True
        )
        batch["segments"][place, span], batch["positions"][place, span] = 1, np.arange(len(row))
        batch["tiles"][place, : len(images)] = images
        batch["tile_count"][place] = len(images)
    return batch


def empty_rows(count: int, length: int, tiles: tuple[int, ...]) -> dict[str, Any]:
    """Rows of nothing but padding; `tiles` is [T, H, W, 3], normalised."""
    batch: dict[str, Any] = {name: np.zeros((count, length), np.int32) for name in ("text", "segments", "positions")}
    batch |= {"supervised": np.zeros((count, length), bool), "tile_slots": np.full((count, length), NO_SLOT, np.int32)}
    return batch | {"tiles": np.zeros((count, *tiles), np.float32), "tile_count": np.zeros(count, np.int32)}
