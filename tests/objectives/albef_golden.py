"""One published pre-training step of ALBEF: its weights in our tree, and its batch with everything random injected."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from golden_vectors import GoldenVectors

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.albef import OfficialAlbef
from vlm_jax.interop.tables import to_params
from vlm_jax.objectives.albef import AlbefConfig

FORMAT, GOLDEN = OfficialAlbef(), GoldenVectors("albef")
TENSORS = FORMAT.canonical(GOLDEN.weights)
HEADS = {"image_heads": 4, "text_heads": 4}


def model_config() -> Any:
    """Sizes from the tensors, without dropout, as the reference ran in evaluation mode."""
    model = FORMAT.read_config(TENSORS, HEADS, None)
    still = {"dropout": 0.0, "attention_dropout": 0.0}
    text, fusion = (dataclasses.replace(part, **still) for part in (model.text, model.fusion))
    return dataclasses.replace(model, text=text, fusion=fusion)


def config(**changes: Any) -> AlbefConfig:
    return AlbefConfig(**{"model": model_config(), "text_length": 10, "queue": 24, **changes})


def objective(**changes: Any) -> Any:
    return config(**changes).build(PreprocessConfig(), jnp.float32)


def params() -> Any:
    model = model_config()
    return to_params(FORMAT.own(TENSORS, model), FORMAT.rows(model), FORMAT.shapes(model), FORMAT.title)


def extra() -> Any:
    return FORMAT.read_extra(TENSORS, model_config())


def batch() -> dict[str, np.ndarray]:
    """The rows, with the hidden words and the negatives that the reference drew."""
    inputs = {name: value.astype(np.int32) for name, value in GOLDEN.inputs.items() if name != "image"}
    # The reference reads no [SEP] and pads with 0, as ours; its mask says the same as the ids.
    np.testing.assert_array_equal(inputs["attention_mask"], inputs["input_ids"] != 0)
    chosen = inputs["mlm_labels"] != -100
    np.testing.assert_array_equal(inputs["mlm_labels"][chosen], inputs["input_ids"][chosen])
    return {
        "image": GOLDEN.images(),
        "text": inputs["input_ids"],
        "masked_text": inputs["mlm_input_ids"],
        "chosen": chosen,
        "negative_image": inputs["neg_image_for_text"],
        "negative_text": inputs["neg_text_for_image"],
    }
