"""Conversations to rows of a batch of fixed shapes, one or several to a row. The batch that a model with images reads.

| key | shape | what it holds |
|---|---|---|
| `text` | int32 [B, L] | ids; the image token (or padding) where image features go, padding where there is nothing |
| `supervised` | bool [B, L] | whether the token is learned: predicted from those before it in its own document |
| `segments` | int32 [B, L] | 1, 2, ... by document, 0 for padding; a token sees its own segment alone |
| `positions` | int32 [B, L] | for the position embedding; they begin at 0 in every document |
| `tiles` | uint8 [B, T, S, S, 3] | the images' tiles, zeros beyond `tile_count` |
| `tile_slots` | int32 [B, L] | `tile * K + feature`, -1 for text, -2 for the learned newline |
| `tile_count` | int32 [B] | tiles in use |

L tokens and T tiles to a row; the model makes K features of a tile of S x S pixels, and token l takes row
`tile_slots[b, l]` of the features of row b, [T * K, D]. Nothing is counted off or scattered at run time.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from vlm_jax import schema
from vlm_jax.data.chat import ChatWriter, Document
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.chat_rows import PackedRows, chat_rows
from vlm_jax.data.examples import Example
from vlm_jax.data.packing import WINDOW, Padding, lay_out
from vlm_jax.data.rows import TrainRows
from vlm_jax.data.sources.base import BadRecord, Record, Source
from vlm_jax.data.text import Tokenizer
from vlm_jax.data.tiles import NO_SLOT, SplitTiling
from vlm_jax.schema import ConfigError


def row_shapes(row_length: int, max_tiles: int, tile_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """(shape, dtype) of a row's arrays, for lowering a step without data."""
    return {
        "text": ((row_length,), np.int32),
        "supervised": ((row_length,), np.bool_),
        "segments": ((row_length,), np.int32),
        "positions": ((row_length,), np.int32),
        "tiles": ((max_tiles, tile_size, tile_size, 3), np.uint8),
        "tile_slots": ((row_length,), np.int32),
        "tile_count": ((), np.int32),
    }


class ChatExamples:
    """One record to a row in evaluation; in training several, if the config packs them.

    Args:
        tokenizer: gives ids and special tokens.
        config: how conversations become rows.
        tile_size: side of a tile in pixels, from the model.
        tokens_per_tile: features that the model makes of a tile.

    Raises:
        ConfigError: a special token is missing, or the tiles don't fit the image.
    """

    def __init__(self, tokenizer: Tokenizer, config: ChatConfig, tile_size: int, tokens_per_tile: int):
        tiling = config.tiling
        if isinstance(tiling, SplitTiling) and tiling.max_side % tile_size:
            raise ConfigError(
                f"config.data.chat.tiling.max_side = {tiling.max_side} must be a multiple of the model's image size "
                f"{tile_size}"
            )
        self.config = config
        self.writer = ChatWriter(tokenizer, config.chat_template(), config.images, tiling, tile_size, tokens_per_tile)

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """A row with one conversation; nothing is random. Raises `BadRecord`."""
        return self.joined([self.read(record)])

    def read(self, record: Record) -> tuple[Document, np.ndarray]:
        """The document of a record, no longer than a row, and its tiles; raises `BadRecord`."""
        document, _ = self.fitted(record)
        return document, self.writer.tiles(document, record)

    def fitted(self, record: Record) -> tuple[Document, int]:
        """The document of a record, no longer than a row, and its tokens before it was cut; raises `BadRecord`."""
        config, document = self.config, self.writer.document(record)
        whole = len(document)
        if whole > config.row_length and config.too_long == "drop":
            why = f"it has {whole} tokens, and a row holds {config.row_length} (config.data.chat.row_length)"
            raise BadRecord(record["where"], record["key"], why)
        document = self.writer.cut(document, config.row_length, record)
        self._check_tiles(document, record)
        return document, whole

    def _check_tiles(self, document: Document, record: Record) -> None:
        most = self.config.max_tiles
        if document.tile_count > most:
            why = f"its {len(document.images)} images make {document.tile_count} tiles, and a row holds {most}"
            raise BadRecord(record["where"], record["key"], f"{why} (config.data.chat.max_tiles)")

    def prompt(self, record: Record) -> Example:
        """A row with a conversation up to where the last answer would begin, filled up on the left, to generate from.

        Raises:
            BadRecord: it can't be used, or is longer than a row.
        """
        document, config = self.writer.prompt(record), self.config
        if len(document) > config.row_length:
            why = f"its question has {len(document)} tokens, and a row holds {config.row_length}"
            raise BadRecord(record["where"], record["key"], f"{why} (config.data.chat.row_length)")
        self._check_tiles(document, record)
        return self.joined([(document, self.writer.tiles(document, record))], "left")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.writer.end_ids

    @property
    def pad_id(self) -> int:
        """What follows the end."""
        return self.writer.vocabulary.pad_id

    def written(self, ids: Sequence[int]) -> str:
        """The text of an answer, without its end."""
        return self.writer.text(ids)

    def spans(self, record: Record) -> list[tuple[str, bool]]:
        """A record as a row of training: texts, and whether they are learned, in turn; raises `BadRecord`."""
        return self.writer.spans(self.fitted(record)[0])

    def joined(self, documents: Sequence[tuple[Document, np.ndarray]], padding: Padding | None = None) -> Example:
        """A row of these documents, side by side.

        Raises:
            ValueError: they don't fit.
        """
        config, side, per_tile = self.config, self.writer.tile_size, self.writer.tokens_per_tile
        lengths = [len(document) for document, _ in documents]
        layout = lay_out(lengths, config.row_length, config.isolation, padding or config.padding)
        text = np.full(config.row_length, self.writer.vocabulary.pad_id, np.int32)
        supervised = np.zeros(config.row_length, bool)
        slots = np.full(config.row_length, NO_SLOT, np.int32)
        tiles = np.zeros((config.max_tiles, side, side, 3), np.uint8)
        count = 0
        for (document, pixels), start in zip(documents, layout.starts, strict=True):
            place = slice(start, start + len(document))
            text[place], supervised[place] = document.ids, document.supervised
            slots[place] = np.where(document.slots >= 0, document.slots + count * per_tile, document.slots)
            tiles[count : count + len(pixels)] = pixels
            count += len(pixels)
        return {
            "text": text,
            "supervised": supervised,
            "segments": layout.segments,
            "positions": layout.positions,
            "tiles": tiles,
            "tile_slots": slots,
            "tile_count": np.asarray(count, np.int32),
        }

    def rows(self, source: Source, seed: int, threads: int, cache_dir: str) -> TrainRows | PackedRows:
        """The rows of training: see `MakesRows`."""
        return chat_rows(source, self, seed, threads, cache_dir)

    def fingerprint(self) -> str:
        """A digest of all that decides the length of a record's document."""
        tokenizer = self.writer.vocabulary.tokenizer.state()
        sizes = self.writer.tile_size, self.writer.tokens_per_tile
        # Which rows the documents then go to doesn't change them.
        config = dataclasses.replace(
            self.config, padding="right", packing="none", isolation="document", window=WINDOW, group=0
        )
        parts = json.dumps([tokenizer, schema.to_dict(config), sizes], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()
