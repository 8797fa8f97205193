"""Small conversations, and the two tokenizers of the reference vectors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.chat import ChatWriter
from vlm_jax.data.chat_config import NANOVLM
from vlm_jax.data.chat_templates import TEMPLATES
from vlm_jax.data.rounds import ImagePlaces
from vlm_jax.data.sources.chats import DrawnImage, Turn
from vlm_jax.data.text import HfTokenizerConfig, SentencePieceConfig, Tokenizer, build_tokenizer
from vlm_jax.data.tiles import SplitTiling, SquareTiling, Tiling

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def llava_tokenizer() -> Tokenizer:
    return build_tokenizer(SentencePieceConfig(path=str(GOLDEN / "llava_tokenizer.model"), bos=True), None)


def nanovlm_tokenizer() -> Tokenizer:
    path = str(GOLDEN / "nanovlm_tokenizer.json")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return build_tokenizer(HfTokenizerConfig(path=path, bos=False, **special), None)


def grey(height: int = 8, width: int = 8, value: int = 128) -> DrawnImage:
    return DrawnImage(lambda: np.full((height, width, 3), value, np.uint8), height, width)


def record(*texts: str, images: int | tuple[Any, ...] = 0, key: str = "r1", first: str = "user") -> dict[str, Any]:
    """Turns that alternate, from the user on."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    turns = tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))
    found = tuple(grey() for _ in range(images)) if isinstance(images, int) else images
    return {"turns": turns, "images": found, "key": key, "where": "mix.json"}


def llava_writer(template: str = "vicuna_v1", placement: Any = "llava", tiling: Tiling | None = None) -> ChatWriter:
    places = ImagePlaces(placement=placement)
    return ChatWriter(llava_tokenizer(), TEMPLATES[template], places, tiling or SquareTiling(), 28, 1)


def nanovlm_writer(template: str = "nanovlm", max_side: int = 64) -> ChatWriter:
    tiling = SplitTiling(max_side=max_side)
    return ChatWriter(nanovlm_tokenizer(), TEMPLATES[template], NANOVLM.images, tiling, 16, 4)


def nanovlm_items() -> list[dict[str, Any]]:
    """The records of the reference items, with their images' sizes alone."""
    from safetensors.numpy import load_file

    stored, items = load_file(GOLDEN / "nanovlm_tiles.safetensors"), golden("nanovlm_dataset_items")
    found = []
    for number, item in enumerate(items["items"]):
        ratings = item.get("relevance_ratings", [])
        texts = []
        for turn, both in enumerate(item["texts"]):
            if turn >= len(ratings) or ratings[turn] >= items["relevance_min_rating"]:
                texts += [both["user"], both["assistant"]]
        pictures = [stored[f"image.{name}"] for name in item["images"]]
        images = tuple(DrawnImage(lambda p=picture: p, *picture.shape[:2]) for picture in pictures)
        found.append(record(*texts, images=images, key=str(number)))
    return found


def nanovlm_config(**changes: Any) -> Any:
    """As published, for small tiles."""
    published = dataclasses.replace(NANOVLM, tiling=SplitTiling(max_side=64), packing="balanced", isolation="none")
    return dataclasses.replace(published, **changes)
