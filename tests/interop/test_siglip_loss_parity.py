"""SigLIP's loss and gradients against transformers' model and open_clip's loss, with random weights."""

from typing import Any

import jax
import numpy as np
import pytest
import tiny
import torch
from clip_reference import import_open_clip
from transformers import SiglipConfig, SiglipModel

from vlm_jax.objectives.siglip import SiglipConfig as ObjectiveConfig
from vlm_jax.schema import override

SCALE, BIAS, ROWS = 2.5, -3.0, 6  # the logarithm of the scale, as all three store it

Reference = tuple[dict[str, torch.Tensor], torch.Tensor]


def transformers_loss() -> Reference:
    """Inputs of the loss as the whole model computes them, and the model's own loss."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(SCALE)
        model.logit_bias.fill_(BIAS)
    out = model(torch.randint(0, 60, (ROWS, 8)), torch.randn(ROWS, 3, 16, 16), return_loss=True)
    inputs = {"image": out.image_embeds, "text": out.text_embeds, "scale": model.logit_scale, "bias": model.logit_bias}
    return inputs, out.loss


def open_clip_loss() -> Reference:
    torch.manual_seed(1)
    towers = [torch.nn.functional.normalize(torch.randn(ROWS, 32)).requires_grad_() for _ in range(2)]
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (SCALE, BIAS))
    loss = import_open_clip().loss.SigLipLoss()(*towers, scale.exp(), bias)
    return {"image": towers[0], "text": towers[1], "scale": scale, "bias": bias}, loss


@pytest.mark.parametrize("reference", [transformers_loss, open_clip_loss])
def test_loss_and_gradients(reference: Any) -> None:
    inputs, want = reference()
    want_gradients = dict(zip(inputs, torch.autograd.grad(want, list(inputs.values())), strict=True))
    config = tiny.config(
        objective=ObjectiveConfig(model=override(tiny.config().objective.model, {"logit_bias_init": BIAS}))  # pyright: ignore
    )
    objective = tiny.program(objective=config.objective).objective

    def loss(values: dict[str, jax.Array]) -> jax.Array:
        params = {"logit_scale": values["scale"].reshape(()), "logit_bias": values["bias"].reshape(())}
        features = {"image_features": values["image"], "text_features": values["text"]}
        (total, count), _ = objective.pair_loss(params, {}, features, np.int32(0))
        return total / count

    ours = {name: x.detach().numpy() for name, x in inputs.items()}
    got, gradients = jax.value_and_grad(loss)(ours)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    for name, gradient in gradients.items():
        expected = want_gradients[name].numpy()
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name)
