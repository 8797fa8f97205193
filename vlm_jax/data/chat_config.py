"""How conversations become rows: the keys of `config.data.chat`, and the settings of published recipes."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from vlm_jax.data.chat_templates import TEMPLATES, ChatTemplate
from vlm_jax.data.packing import WINDOW, Isolation, Padding
from vlm_jax.data.rounds import ImagePlaces
from vlm_jax.data.tiles import AnyresTiling, SplitTiling, SquareTiling, Tiling

Template = Literal["vicuna_v1", "plain", "plain_eos", "llama_2", "chatml", "smollm2", "qwen", "paligemma", "nanovlm"]


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations become rows."""

    # what stands around the messages
    template: Template = "vicuna_v1"
    # system message of conversations without one; empty: that of the template
    system: str = ""
    # where images stand in a conversation
    images: ImagePlaces = ImagePlaces()
    # how an image becomes tiles
    tiling: Tiling = SquareTiling()
    # tokens of a row, those of images included
    row_length: int = 2048
    # image tiles of a row
    max_tiles: int = 1
    # conversations longer than a row: cut, or counted among the unusable ones
    too_long: Literal["truncate", "drop"] = "truncate"
    # the side where rows are filled up
    padding: Padding = "right"
    # conversations to a row: one; as many as fit, by the tightest fit or by nanoVLM's balanced one
    packing: Literal["none", "tight", "balanced"] = "none"
    # conversations that share a row don't see each other, and each has positions from 0; "none" is nanoVLM's row, in
    # which they do
    isolation: Isolation = "document"
    # conversations that are packed together
    window: int = WINDOW
    # without packing: rows of like length and kind (with images, without) come in groups of this many (LLaVA's
    # group_by_modality_length: a global batch); 0 leaves them in random order
    group: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Sizes that hold nothing, and settings without effect."""
        for key, least in (("row_length", 2), ("max_tiles", 0), ("window", 1), ("group", 0)):
            if getattr(self, key) < least:
                yield key, f"= {getattr(self, key)} must be {least} or more"
        if self.group and self.packing != "none":
            yield "group", f"= {self.group} has no effect with packing = {self.packing!r}; set one of them"
        if not self.images.placeholder:
            yield "images.placeholder", "is empty; name what stands for an image in a message"

    def chat_template(self) -> ChatTemplate:
        """The template, with the system message of this config."""
        template = TEMPLATES[self.template]
        return dataclasses.replace(template, default_system=self.system) if self.system else template


LLAVA_STAGE_1 = ChatConfig(
    template="plain", images=ImagePlaces(placement="llava"), tiling=SquareTiling(fit="crop"), row_length=768
)
"""LLaVA-1.5's first stage: image and caption alone (Liu et al. 2024, scripts/v1_5/pretrain.sh).

The published length of 2048 is a limit; rows have one shape here, and captions leave two thirds of that empty."""

LLAVA_STAGE_2 = ChatConfig(
    template="vicuna_v1", images=ImagePlaces(placement="llava"), tiling=SquareTiling(fit="pad"), group=128
)
"""LLaVA-1.5's second stage (scripts/v1_5/finetune.sh)."""

LLAVA_NEXT = ChatConfig(
    images=ImagePlaces(placement="llava"), tiling=AnyresTiling(), row_length=4096, max_tiles=5, group=128
)
"""LLaVA-NeXT: up to four tiles beside the whole image, a newline after each row of features."""

NANOVLM = ChatConfig(
    template="nanovlm",
    images=ImagePlaces("start", placeholder="<|image|>", label="<image: {}>", image_token="<|image|>"),
    tiling=SplitTiling(),
    row_length=4096,
    max_tiles=63,
    too_long="drop",
    padding="left",
    packing="tight",
)
"""nanoVLM (models/config.py), with conversations of a row kept apart.

As published they are not: `packing="balanced", isolation="none"`. A row counts its tiles, of which 63 is the most that
its tokens can take, where nanoVLM counts images."""

PALIGEMMA = ChatConfig(
    template="paligemma", images=ImagePlaces(placement="llava"), tiling=SquareTiling(fit="squash"), row_length=288
)
"""PaliGemma at 224 pixels (big_vision, transfers/vqav2.py): 256 tokens of the image and 32 of text."""

RECIPES = {
    "llava_stage_1": LLAVA_STAGE_1,
    "llava_stage_2": LLAVA_STAGE_2,
    "llava_next": LLAVA_NEXT,
    "nanovlm": NANOVLM,
}
"""The settings of published recipes by name."""
