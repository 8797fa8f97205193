"""Small models of images alone, as evaluations see them: an encoder on a mesh and its parameters."""

import dataclasses
from typing import Any

import jax
import tiny
from jax.sharding import Mesh

from vlm_jax.assemble import Program
from vlm_jax.data.text import Tokenizer
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.held_out import HeldOut
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.masked_autoencoder import MaskedAutoencoderConfig, PixelDecoderConfig, mae_encoder
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.classify import ClassifyConfig
from vlm_jax.objectives.mae import MaeConfig
from vlm_jax.parts import EVERYTHING, Part

TOWER = ViTConfig(
    image_size=8, patch_size=4, width=16, depth=4, heads=2, mlp_dim=32, pool="mean", drop_path=0.4, pre_norm=False
)
CLASSIFY = ClassifyConfig(model=ClassifierConfig(image=TOWER, classes=10, head_init=0.5))
MAE = MaeConfig(
    model=MaskedAutoencoderConfig(
        mae_encoder(16, 1, 2, 2, image_size=8), PixelDecoderConfig(width=16, depth=1, heads=2, mlp_dim=32)
    )
)


def encoder(
    objective: Any,
    mesh: Mesh | None = None,
    batch_size: int = 16,
    tokenizer: Tokenizer | None = None,
    parts: tuple[Part, ...] = EVERYTHING,
) -> tuple[MeshEncoder, Any, Program]:
    """(encoder, initial parameters, program)."""
    program = tiny.program(mesh, objective=objective, parts=parts, evals=())
    config = program.config
    method = config.objective.without_dropping().build(config.data.preprocess, config.compute_dtype())
    plain = dataclasses.replace(config.data, augment=None)
    held_out = HeldOut(method, config.objective.make_example(tokenizer, plain))
    made = MeshEncoder(program.objective, tokenizer, config.objective.image_size, program.mesh, batch_size, held_out)
    with jax.set_mesh(program.mesh):
        return made, program.setup.init().params, program
