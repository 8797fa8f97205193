"""`vlm_jax.load`: a trained or imported model, ready to be used in plain Flax, with its own tokenizer and images."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.assemble import Restored, open_checkpoint
from vlm_jax.data import images
from vlm_jax.data.text_rows import prompt_ids
from vlm_jax.models.generation import GenerationConfig

LIKELIEST = GenerationConfig()


class Model:
    """A model with what it needs to be used rightly. Made by `vlm_jax.load`.

    Attributes:
        params: nested dict of fp32 arrays; the moving average where the run kept one.
        config: the config that it was trained or imported with.
        module: the Flax module: `m.module.apply({"params": m.params}, images, texts)`.
        tokenizer: the tokenizer of the checkpoint, None for a model without text.
        step: optimiser steps that the parameters have seen.
    """

    def __init__(self, restored: Restored):
        self.params, self.config, self.tokenizer, self.step = (
            restored.params,
            restored.config,
            restored.tokenizer,
            restored.step,
        )
        self._objective = objective = restored.objective
        self.module: nn.Module = objective.module
        self._outputs = jax.jit(lambda params, batch: objective.outputs(params, batch, intermediates=True))
        self._image, self._text = jax.jit(objective.image_features), jax.jit(objective.text_features)
        self._continue = jax.jit(objective.continue_texts, static_argnums=3)

    def apply(self, params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Named outputs of the model on a batch.

        Args:
            params: `m.params`, or others of the same tree.
            batch: for two towers `image`, uint8 or normalised float [B, H, W, 3], and `text`, int32 [B, L].

        Returns:
            `image_features` and `text_features` [B, E] of unit length, `logit_scale` (), and intermediates by name
            such as `image/blocks` [layers, B, tokens, width].
        """
        return self._outputs(params, dict(batch))

    def preprocess(self, image: Any) -> np.ndarray:
        """One image as the model wants it: float32 [H, W, 3], resized, cropped and normalised as in evaluation.

        Args:
            image: a path, the bytes of a file, uint8 [H, W], [H, W, 3], or a Pillow image.

        Raises:
            ValueError: it can't be decoded.
        """
        if isinstance(image, str | os.PathLike):
            with open(image, "rb") as file:
                image = file.read()
        elif not isinstance(image, bytes | np.ndarray):
            image = np.asarray(image.convert("RGB"))
        settings = self._objective.preprocess
        view = images.preprocess(images.decode(image), settings, self.config.objective.image_size)
        return images.normalise(view, settings)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> int32 [n, L], by the tokenizer of the checkpoint; raises ValueError for a model without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint holds no tokenizer; import it again with --tokenizer=FILE")
        return self.tokenizer(texts)

    def encode_image(self, images: Sequence[Any] | np.ndarray | jax.Array) -> jax.Array:
        """Images -> features [B, E] of unit length, fp32.

        Args:
            images: an array [B, H, W, 3] of the model's size (float: preprocessed, uint8: cropped), or a list of
                anything that `preprocess` takes.
        """
        if not (isinstance(images, np.ndarray | jax.Array) and images.ndim == 4):
            images = np.stack([self.preprocess(image) for image in images])
        return self._image(self.params, images)

    def encode_text(self, texts: Sequence[str] | np.ndarray | jax.Array) -> jax.Array:
        """Texts, or token ids [B, L], -> features [B, E] of unit length, fp32."""
        tokens = texts if isinstance(texts, np.ndarray | jax.Array) else self.tokenize(texts)
        return self._text(self.params, tokens)

    def write(self, prompts: Sequence[str], config: GenerationConfig = LIKELIEST, seed: int | None = None) -> list[str]:
        """Continues texts, by a language model; returns what follows each.

        Args:
            prompts: the texts; one may be empty where the tokenizer has a start token.
            config: how; without `eos_ids` a text ends with the tokenizer's end token.
            seed: of sampling; None takes the likeliest tokens.

        Raises:
            ValueError: a prompt without a token, or a checkpoint without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this checkpoint holds no tokenizer; import it again with --tokenizer=FILE")
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        if not all(rows):
            raise ValueError("a prompt holds no token, and this tokenizer has no start token to begin with")
        # In steps of 64, so that texts of like lengths share one compiled program.
        length = -(-max(map(len, rows)) // 64) * 64
        ids, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
        for place, row in enumerate(rows):
            ids[place, -len(row) :], valid[place, -len(row) :] = row, True
        if not config.eos_ids and self.tokenizer.eos_id >= 0:
            config = dataclasses.replace(config, eos_ids=(self.tokenizer.eos_id,))
        keys = None if seed is None else jax.random.split(jax.random.key(seed), len(rows))
        written = self._continue(self.params, ids, valid, config, keys)
        texts = zip(np.asarray(written.ids), np.asarray(written.lengths), strict=True)
        return [self.tokenizer.encoder.decode([i for i in row[:n] if i not in config.eos_ids]) for row, n in texts]


def load(path: str | os.PathLike[str], mesh: Mesh | None = None) -> Model:
    """A model for evaluation or use.

    Args:
        path: a workdir (its newest checkpoint), a step directory, or an imported checkpoint.
        mesh: where the parameters shall lie, sharded as in training; None: whole on one device.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    return Model(open_checkpoint(path, mesh))
