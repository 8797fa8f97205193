"""What a set of conversations costs in tokens: lengths, tiles, truncation, packing, and the records that are lost.

python -m vlm_jax.data.budget --config=configs/NAME.py --config.data.source.path=mix.json
python -m vlm_jax.data.budget --recipe=llava_stage_2 --path=mix.json --tokenizer=tokenizer.model

The first form reads the settings of a run, the second those of a published recipe. `--config.data.KEY=VALUE` changes
them in both.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax import schema
from vlm_jax.data.chat import Document
from vlm_jax.data.chat_config import RECIPES, ChatConfig
from vlm_jax.data.chat_examples import ChatExamples
from vlm_jax.data.measure import Measured, counted_reasons, measure
from vlm_jax.data.packing import pack_windows
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources.base import BadRecord, Record, Source
from vlm_jax.data.text import HfTokenizerConfig, SentencePieceConfig, TokenizerConfig, build_tokenizer
from vlm_jax.main import EXIT_CONFIG, split_overrides
from vlm_jax.schema import ConfigError

_SIZES = {"llava_stage_1": (336, 576), "llava_stage_2": (336, 576), "llava_next": (336, 576), "nanovlm": (512, 64)}


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What a run's config would hold."""

    data: DataConfig


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """(flags, overrides); `--config.data.KEY=VALUE` becomes {"data.KEY": "VALUE"}."""
    overrides, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m vlm_jax.data.budget",
        description="Tokens, tiles, truncation, packing efficiency and lost records of a set of conversations.",
        epilog="Settings: --config.data.KEY=VALUE. Exit codes: 0 reported, 2 bad config or data, 1 any other error.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="config file of a run, with its variant")
    parser.add_argument("--recipe", choices=RECIPES, help="settings of a published recipe, in place of --config")
    parser.add_argument("--path", default="", help="the data, as config.data.path: a .json, *.parquet, tar shards ...")
    parser.add_argument("--tokenizer", default="", help="with --recipe: a *.model or a tokenizer.json")
    parser.add_argument("--tile_size", type=int, default=0, help="with --recipe: side of a tile, if not the published")
    parser.add_argument("--tokens_per_tile", type=int, default=0, help="with --recipe: likewise, tokens of a tile")
    parser.add_argument("--check_images", action="store_true", help="also read the header of every image")
    parser.add_argument("--records", type=int, default=0, help="look at this many, spread evenly; 0: at all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads that read and tokenise")
    parser.add_argument("--cache_dir", default="", help="folder that keeps the lengths, such as WORKDIR/index")
    parser.add_argument("--show", type=int, default=0, help="first print so many, what is learned in [[brackets]]")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    return parser.parse_args(rest), overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when everything was counted, 2 when settings or data don't allow it."""
    flags, overrides = parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        source, maker = _from_config(flags, overrides) if flags.config else _from_recipe(flags, overrides)
        print_documents(source, maker, flags.show)
        records = _Part(source, flags.records) if flags.records else source
        measured = measure(records, _ImagesToo(maker) if flags.check_images else maker, flags.threads, flags.cache_dir)
        found = numbers(measured, maker.config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    print(report(found))
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)
    return 0


def print_documents(source: Source, maker: ChatExamples, count: int) -> None:
    """Prints the first `count` records as the model reads them; of an unusable one the reason."""
    for index in range(min(count, len(source))):
        try:
            print(f"{index}: {maker.writer.shown(maker.fitted(source[index])[0])}\n")
        except BadRecord as error:
            print(f"{index}: {error}\n")


def _from_config(flags: argparse.Namespace, overrides: dict[str, str]) -> tuple[Source, ChatExamples]:
    from vlm_jax.assemble import build_run_tokenizer  # loads the models, which the other form does without
    from vlm_jax.config import load_config

    config = load_config(flags.config, overrides | ({"data.path": flags.path} if flags.path else {}))
    source = config.data.build_source(flags.cache_dir)
    maker = config.objective.make_example(build_run_tokenizer(config, source, None), config.data)
    if not isinstance(maker, ChatExamples):
        raise ConfigError(f"--config={flags.config} trains no model on conversations; give one that does, or --recipe")
    return source, maker


def _from_recipe(flags: argparse.Namespace, overrides: dict[str, str]) -> tuple[Source, ChatExamples]:
    if not flags.recipe:
        raise ConfigError(f"give --config=FILE, or --recipe with one of {', '.join(RECIPES)}")
    pad = "<|im_end|>" if flags.recipe == "nanovlm" else ""
    tokenizer: TokenizerConfig = HfTokenizerConfig(
        path=flags.tokenizer, bos=False, eos=False, sticky_eos=False, pad_token=pad
    )
    if flags.tokenizer.endswith(".model"):
        tokenizer = SentencePieceConfig(path=flags.tokenizer)
    if not flags.tokenizer:
        raise ConfigError("--tokenizer is missing; give the *.model or tokenizer.json of the language model")
    chat = RECIPES[flags.recipe]
    settings = _Settings(DataConfig(path=flags.path, tokenizer=tokenizer, chat=chat))
    data = schema.override(settings, overrides).data
    schema.validate(data, "config.data")
    assert data.chat is not None, "the recipe has set it"
    size, per_tile = _SIZES[flags.recipe]
    maker = ChatExamples(
        build_tokenizer(data.tokenizer, None), data.chat, flags.tile_size or size, flags.tokens_per_tile or per_tile
    )
    return data.build_source(flags.cache_dir), maker


class _Part:
    """Some records of a source, spread evenly."""

    class_names: tuple[str, ...] = ()

    def __init__(self, source: Source, count: int):
        self.source = source
        self.indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def texts(self, index: int) -> tuple[str, ...]:
        """See `Source`."""
        return self.source.texts(int(self.indices[index]))


class _ImagesToo:
    """Documents whose images are there, as far as their headers tell."""

    def __init__(self, maker: ChatExamples):
        self.maker = maker

    def fitted(self, record: Record) -> tuple[Document, int]:
        """See `Measurable`."""
        document, whole = self.maker.fitted(record)
        for image in document.images:
            try:
                image.size()
            except ValueError as error:
                raise BadRecord(record["where"], record["key"], str(error)) from error
        return document, whole

    def fingerprint(self) -> str:
        """See `Measurable`."""
        return f"{self.maker.fingerprint()} with images"


def numbers(measured: Measured, config: ChatConfig) -> dict[str, Any]:
    """The counts of a report.

    Raises:
        ConfigError: no record can be used.
    """
    usable = measured.tokens >= 0
    lost = [
        {"reason": why, "records": count, "first": str(first)}
        for why, count, first in counted_reasons(measured.failures)
    ]
    if not usable.any():
        raise ConfigError(f"none of the {len(usable)} records can be used; the first: {measured.failures[0]}")
    tokens, whole = measured.tokens[usable], measured.whole[usable]
    gap = int(config.isolation == "none")
    fit = "balanced" if config.packing == "balanced" else "tight"
    packing = pack_windows(
        np.where(usable, measured.tokens + gap, -1),
        config.row_length + gap,
        0,
        tiles=measured.tiles,
        max_tiles=config.max_tiles,
        window=config.window,
        fit=fit,
        spare_rows=5 if fit == "balanced" else 0,
    )
    return {
        "records": len(usable),
        "usable": int(usable.sum()),
        "lost": lost,
        "changed": {note: count for note, (count, _) in measured.notes.items()},
        "tokens": int(tokens.sum()),
        "image_tokens": int(measured.image_tokens[usable].sum()),
        "learned_tokens": int(measured.learned[usable].sum()),
        "lengths": {f"p{q}": int(np.percentile(whole, q)) for q in (50, 90, 99)} | {"longest": int(whole.max())},
        "truncated_records": int((whole > tokens).sum()),
        "truncated_tokens": int((whole - tokens).sum()),
        "tiles": int(measured.tiles[usable].sum()),
        "most_tiles": int(measured.tiles[usable].max()),
        "with_images": int((measured.tiles[usable] > 0).sum()),
        "row_length": config.row_length,
        "max_tiles": config.max_tiles,
        "packing": config.packing,
        "packed_rows": len(packing),
        "packed_share": float(tokens.sum() / (len(packing) * config.row_length)),
        "single_share": float(tokens.sum() / (len(tokens) * config.row_length)),
        "packed_tile_share": float(measured.tiles[usable].sum() / (len(packing) * max(1, config.max_tiles))),
    }


def report(found: dict[str, Any]) -> str:
    """The counts as a page of text."""
    lost = found["records"] - found["usable"]
    lines = [
        f"records          {found['records']:>14,}",
        f"  usable         {found['usable']:>14,}   {found['with_images']:,} with images",
        f"  lost           {lost:>14,}   {lost / found['records']:.2%}",
    ]
    for item in found["lost"]:
        lines.append(f"    {item['records']:>8,} x {item['reason']}\n               first: {item['first']}")
    for note, count in found["changed"].items():
        lines.append(f"  changed        {count:>14,}   {note}")
    tokens = found["tokens"]
    lengths = ", ".join(f"{name} {value:,}" for name, value in found["lengths"].items())
    lines += [
        f"tokens           {tokens:>14,}   {lengths}",
        f"  of images      {found['image_tokens']:>14,}   {found['image_tokens'] / tokens:.1%}",
        f"  learned        {found['learned_tokens']:>14,}   {found['learned_tokens'] / tokens:.1%}",
        f"truncated        {found['truncated_records']:>14,}   records, by {found['truncated_tokens']:,} tokens",
        f"tiles            {found['tiles']:>14,}   {found['most_tiles']} at most in a record",
        f"rows of {found['row_length']} tokens and {found['max_tiles']} tiles",
        f"  one a record   {found['usable']:>14,}   {found['single_share']:.1%} full",
        f"  packed         {found['packed_rows']:>14,}   {found['packed_share']:.1%} full, tiles "
        f"{found['packed_tile_share']:.1%}; config.data.chat.packing = {found['packing']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
