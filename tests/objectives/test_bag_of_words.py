"""The methods without a joint space: words predicted from an image, and prompts scored by them in an evaluation."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.evals.zero_shot import ZeroShotConfig
from vlm_jax.models.text import TextConfig, TextTower
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.word_predictor import WordPredictorConfig
from vlm_jax.objectives.bag_of_words import BagOfWordsConfig
from vlm_jax.schedule import Constant
from vlm_jax.schema import ConfigError, override
from vlm_jax.train import train

TOWER = ViTConfig(image_size=8, patch_size=4, width=32, depth=2, heads=4, mlp_dim=64)
WORDS = BagOfWordsConfig(model=WordPredictorConfig(TOWER, 320, 16), special_ids=(0, 1))


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_loss_and_scores_are_those_of_the_definition(form: Any) -> None:
    """Sums over the set of words of a row, in float64, from the logits."""
    objective = override(WORDS, {"loss": form})
    program = tiny.program(objective=objective)
    model: Any = program.objective
    params, batch = program.setup.init().params, tiny.batch(program.mesh)
    logits = np.asarray(model.outputs(params, batch)["word_logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True)) if form == "softmax" else -np.log1p(np.exp(-logits))
    sets = [sorted(set(row.tolist()) - {0, 1}) for row in np.asarray(batch["text"])]
    losses = []
    for row, words in enumerate(sets):
        absent = [word for word in range(320) if word not in words]
        losses.append(
            -log_p[row, words].mean()
            if form == "softmax"
            else -log_p[row, words].sum() + np.log1p(np.exp(logits[row, absent])).sum()
        )
    _, (metrics,) = tiny.run_steps(program, 1)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)

    scores = jax.jit(model.prompt_scores)(params, batch["image"], batch["text"][:5])
    wanted = [[log_p[row, words].sum() for words in sets[:5]] for row in range(16)]
    np.testing.assert_allclose(scores, wanted, rtol=1e-4)


@pytest.mark.slow
def test_it_learns_to_classify_without_a_joint_space(tmp_path: Path) -> None:
    """Through the training loop and its zero-shot evaluation, which scores prompts."""
    config = tiny.config(
        objective=WORDS,
        train__steps=100,
        train__log_every=50,
        optimizer__learning_rate=3e-3,
        optimizer__schedule=Constant(warmup_steps=5),
        data__batch_size=64,
        data__source=DigitsConfig(templates=("{}", "a {}")),
        checkpoint__every=1000,
        evals=(ZeroShotConfig("digits", DigitsConfig(split="test"), templates=("{}",)),),
    )
    assert train(config, str(tmp_path)) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["zero_shot/digits/top1"] > 0.7


def test_ids_that_every_row_holds_must_be_named() -> None:
    tokenizer = build_tokenizer(SentencePieceConfig(length=16, vocab_size=320), ["a photo of a dog", "two cats"] * 20)
    with pytest.raises(
        ConfigError, match=r"special_ids = \(7,\) must hold what this tokenizer puts into every row: 0, 1"
    ):
        override(WORDS, {"special_ids": (7,)}).check_tokenizer(tokenizer)


def test_a_text_tower_without_blocks_and_positions_is_a_bag_of_words() -> None:
    """The contrastive method's other text: order changes nothing, padding changes nothing, words do."""
    config = TextConfig(
        vocab_size=30, length=6, width=16, depth=0, heads=2, pool="mean", mask_padding=True, pos_embed="none", eos_id=29
    )
    tower = TextTower(config)
    ids = jnp.asarray([[4, 5, 6, 29, 0, 0], [6, 4, 5, 29, 0, 0], [4, 5, 7, 29, 0, 0]], jnp.int32)
    params = nn.unbox(tower.init(jax.random.key(0), ids))
    assert set(params["params"]) == {"token_embed", "ln_final"}
    pooled = np.asarray(tower.apply(params, ids)["pooled"])
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-6)
    np.testing.assert_allclose(tower.apply(params, ids[:1, :4])["pooled"][0], pooled[0], atol=1e-6)
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-2
