"""The loss on held-out images: a loop over records, any mesh and batch, and methods that have no such loss."""

import dataclasses
from typing import Any

import image_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.evals.held_out_loss import HeldOutLossConfig
from vlm_jax.models.aimv2 import Aimv2ModelConfig, MultimodalDecoderConfig, aimv2_encoder
from vlm_jax.objectives.aimv2 import Aimv2Config
from vlm_jax.objectives.beit import BeitConfig
from vlm_jax.objectives.mixing import MixingConfig
from vlm_jax.parts import EVERYTHING, Part
from vlm_jax.schema import ConfigError, override
from vlm_jax.train import train

CONFIG = HeldOutLossConfig("digits", DigitsConfig(split="test"), limit=21, seed=3)


def run(objective: Any, mesh: Any = None, batch_size: int = 16, config: Any = CONFIG) -> dict[str, float]:
    encoder, params, _ = image_models.encoder(objective, mesh, batch_size)
    return config.build(encoder, "").run(params, 0).metrics


@pytest.mark.parametrize("objective", [image_models.MAE, image_models.CLASSIFY], ids=["mae", "classify"])
def test_it_is_a_loop_over_records(objective: Any) -> None:
    """One record after the other, each with the key of its place; drop path and mixtures are off, masks are not."""
    _, params, program = image_models.encoder(objective)
    method = objective.without_dropping().build(program.config.data.preprocess, jnp.float32)
    rows = objective.make_example(None, program.config.data)
    source, total, count = DigitsConfig(split="test").build(""), 0.0, 0.0
    loss = jax.jit(lambda row, key: method.loss(params, {}, row, key, jnp.int32(0))[0])
    for place in range(21):
        row = {name: value[None] for name, value in rows(source[place], None).items()}
        row_total, row_count = loss(row, jax.random.fold_in(jax.random.key(3), place)[None])
        total, count = total + float(row_total), count + float(row_count)
    found = run(objective)
    assert found["held_out_loss/digits/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["held_out_loss/digits/count"] == count
    assert np.isfinite(total)


def test_a_loss_of_two_means_takes_each_over_the_whole_source() -> None:
    """AIMv2: one mean over all hidden patches and one over all words, of one record after the other.

    Which of a record's captions it is (seed, place) decides too, and they differ in length.
    """
    source = DigitsConfig(split="test").build("")
    texts = [text for place in range(60) for text in source.texts(place)]
    tokenizer = build_tokenizer(SentencePieceConfig(length=16, vocab_size=320, bos=False), texts)
    objective = Aimv2Config(
        model=Aimv2ModelConfig(
            override(aimv2_encoder(16, 1, 2, 24, image_size=8), {"patch_size": 2}),
            MultimodalDecoderConfig(width=16, depth=1, heads=2, mlp_dim=24, vocab_size=320, length=16, pad_id=0),
        )
    )
    _, params, program = image_models.encoder(objective, tokenizer=tokenizer)
    method = program.objective
    rows = objective.make_example(tokenizer, dataclasses.replace(program.config.data, augment=None))
    embed = jax.jit(lambda row, key: method.embed(params, {}, row, key, jnp.int32(0)))
    sums: dict[str, float] = {}
    words = set()
    for place in range(21):
        row = {name: value[None] for name, value in rows(source[place], np.random.default_rng((3, place))).items()}
        words.add(int((row["text"] != 0).sum()))
        for name, value in embed(row, jax.random.fold_in(jax.random.key(3), place)[None]).items():
            sums[name] = sums.get(name, 0.0) + float(value[0])
    assert len(words) > 1
    want = sums["words/sum"] / sums["words/count"] + 0.4 * sums["pixels/sum"] / sums["pixels/count"]
    for mesh, batch_size in ((None, 16), (tiny.mesh(2, 2), 8), (None, 21)):
        encoder, params, _ = image_models.encoder(objective, mesh, batch_size, tokenizer)
        found = CONFIG.build(encoder, "").run(params, 0).metrics
        assert found["held_out_loss/digits/loss"] == pytest.approx(want, rel=1e-5)
        assert found["held_out_loss/digits/count"] == 21


def test_no_mesh_and_no_batch_changes_it() -> None:
    want = run(image_models.MAE)["held_out_loss/digits/loss"]
    for shape, batch_size in (((2, 2, 2), 4), ((1, 1, 1), 21)):
        assert run(image_models.MAE, tiny.mesh(*shape), batch_size)["held_out_loss/digits/loss"] == pytest.approx(
            want, rel=1e-5
        )
    other = HeldOutLossConfig("digits", DigitsConfig(split="test"), limit=21, seed=4)
    assert run(image_models.MAE, config=other)["held_out_loss/digits/loss"] != pytest.approx(want, rel=1e-4)


def test_what_is_drawn_on_the_host_is_drawn_by_the_place() -> None:
    """BEiT's masks: the same whatever the batch, another with another seed; never a mask for all."""
    beit = override(
        BeitConfig(),
        {
            "model.image.image_size": 32, "model.image.patch_size": 8, "model.image.width": 16, "model.image.depth": 1,
            "model.image.heads": 2, "model.image.mlp_dim": 32, "model.vocab_size": 12, "model.masks.count": 6,
            "model.masks.least": 2, "model.tokenizer.image_size": 32, "model.tokenizer.vocab_size": 12,
            "model.tokenizer.width": 4,
        },
    )  # fmt: skip
    parts = (Part("tokenizer", "tokenizer/.*", frozen=True), *EVERYTHING)
    encoder, _, _ = image_models.encoder(beit, batch_size=8, parts=parts)
    source = DigitsConfig(split="test").build("")
    first = [np.asarray(batch["masked"]) for batch in encoder.loss_batches(source, 0)][:2]
    wide, _, _ = image_models.encoder(beit, batch_size=16, parts=parts)
    again = np.asarray(next(iter(wide.loss_batches(source, 0)))["masked"])
    np.testing.assert_array_equal(np.concatenate(first), again)
    assert not np.array_equal(again, np.asarray(next(iter(wide.loss_batches(source, 1)))["masked"]))
    assert len(np.unique(again, axis=0)) > 8


def test_nothing_is_dropped_or_mixed() -> None:
    config = override(image_models.CLASSIFY, {"mixing": MixingConfig(mixup=0.8), "model.image.dropout": 0.1})
    plain = config.without_dropping()
    assert (plain.model.image.drop_path, plain.model.image.dropout, plain.mixing.on) == (0.0, 0.0, False)
    assert override(plain, {"model.image.drop_path": 0.4, "model.image.dropout": 0.1}).model == config.model


def test_a_loss_that_couples_rows_has_none(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"'digits' \(held_out_loss\): the loss of this method couples the rows"):
        train(tiny.config(evals=(CONFIG,)), str(tmp_path))
