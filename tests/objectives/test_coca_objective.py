"""CoCa's loss: exact over microbatches and meshes, its two terms alone, and captions that can be read afterwards."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.assemble import build_program
from vlm_jax.config import load_config
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.losses.contrastive import info_nce
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.attentional_pool import AttentionalPoolConfig
from vlm_jax.models.captioner import CaptionerModelConfig, TextDecoderConfig
from vlm_jax.models.captions import CaptionStart, Sampling
from vlm_jax.models.coca import CoCaModelConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import CrossDecoderConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.caption import CaptionConfig
from vlm_jax.objectives.coca import CoCaConfig
from vlm_jax.schedule import Constant
from vlm_jax.schema import ConfigError, override

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
START = CaptionStart("model", 1)
TOWER = ViTConfig(image_size=8, patch_size=4, pool="none", **SIZES)
COCA = CoCaConfig(
    model=CoCaModelConfig(
        image=AttentionalPoolConfig(TOWER, queries=3, width=32, heads=4),
        text=TextConfig(vocab_size=320, length=16, pool="cls", mask_padding=True, eos_id=1, **SIZES),
        decoder=CrossDecoderConfig(**SIZES),
        start=START,
        embed_dim=16,
    )
)
CAPTION = CaptionConfig(
    model=CaptionerModelConfig(TOWER, TextDecoderConfig(vocab_size=320, length=16, start=START, eos_id=1, **SIZES))
)
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}
FULL_BATCH = tiny.batch


def ragged(mesh: Any, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Captions of very different lengths: a mean of means would be another number."""
    batch = jax.tree.map(np.array, FULL_BATCH(mesh, rows, seed))
    for row, (text, end) in enumerate(
        zip(batch["text"], np.random.default_rng(seed).integers(1, 16, rows), strict=True)
    ):
        end = 15 if row % 4 == 0 else end  # microbatches differ in their number of tokens too
        text[end], text[end + 1 :] = 1, 0
    return {key: jax.device_put(value, batch_sharding(mesh)) for key, value in batch.items()}


@pytest.mark.slow
def test_mesh_and_microbatches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "batch", ragged)
    want, history = tiny.run_steps(tiny.program(objective=COCA, **SMOOTH), 2)
    program = tiny.program(tiny.mesh(2, 2, 2), objective=COCA, train__accum_steps=4, **SMOOTH)
    state, others = tiny.run_steps(program, 2)
    for got, expected in zip(others, history, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


def loss(objective: Any, params: Any, batch: Any) -> Any:
    """((sum, count), metrics) under jit, and the FLOPs of the compiled program."""

    def ratio(params: Any, batch: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), len(batch["text"]))
        total, aux = objective.loss(params, {}, batch, keys, jnp.zeros((), jnp.int32))
        return total, aux.metrics

    program = jax.jit(ratio).lower(params, batch).compile()
    return *program(params, batch), program.cost_analysis()["flops"]


def nats_and_words(logits_BxTxV: Any, ids_BxL: Any) -> tuple[float, int]:
    """By a loop: the end token is predicted, padding is not, and the first logits stand at the start."""
    nats, words = 0.0, 0
    for logits, ids in zip(np.asarray(logits_BxTxV, np.float64), np.asarray(ids_BxL), strict=True):
        for position, word in enumerate(ids[: list(ids).index(1) + 1]):
            nats += np.log(np.exp(logits[position]).sum()) - logits[position, word]
            words += 1
    return nats, words


def test_each_term_alone() -> None:
    """A weight of 0 leaves the other term, by definition, and takes its work out of the program."""
    program = tiny.program(objective=COCA)
    params, batch, preprocess = program.setup.init().params, ragged(program.mesh), program.objective.preprocess
    out = tiny.host(jax.jit(program.objective.outputs, static_argnums=2)(params, batch, False))
    total, count = info_nce(out["image_features"], out["text_features"], out["logit_scale"], impl="global")
    contrastive = float(total / count)
    nats, words = nats_and_words(out["caption_logits"], batch["text"])

    (both, rows), metrics, flops = loss(program.objective, params, batch)
    assert float(both / rows) == pytest.approx(contrastive + 2 * nats / words, rel=1e-5)
    assert float(metrics["caption_loss"][1]) == words
    for weights, wanted in (((1.0, 0.0), contrastive), ((0.0, 1.0), nats / words)):
        config = override(COCA, {"contrastive_weight": weights[0], "caption_weight": weights[1]})
        (alone, rows), _, fewer = loss(config.build(preprocess, jnp.float32), params, batch)
        assert float(alone / rows) == pytest.approx(wanted, rel=1e-5)
        assert fewer < flops
    assert fewer > flops / 2  # the captioner alone keeps both towers and the decoder


def test_the_captioning_loss_counts_tokens() -> None:
    """Sums and counts of two halves add up to those of the batch, though the halves have other numbers of tokens."""
    objective: Any = CAPTION.build(tiny.config().data.preprocess, jnp.float32)
    params = unbox(jax.jit(lambda: objective.init(jax.random.key(0))[0])())
    batch = jax.tree.map(np.asarray, ragged(tiny.mesh()))
    halves = [jax.tree.map(lambda x, half=half: x[half::2], batch) for half in (0, 1)]
    totals = [loss(objective, params, half)[0] for half in halves]
    assert totals[0][1] != totals[1][1]
    logits = jax.jit(objective.outputs, static_argnums=2)(params, batch, False)["caption_logits"]
    nats, words = nats_and_words(logits, batch["text"])
    assert sum(float(total) for total, _ in totals) == pytest.approx(nats, rel=1e-5)
    assert sum(float(count) for _, count in totals) == words


@pytest.mark.slow
@pytest.mark.parametrize("objective", [COCA, CAPTION], ids=["coca", "caption"])
def test_it_learns_to_write_eight_captions(objective: Any) -> None:
    """From the image alone, greedily, through the tokenizer and back: the very text."""
    source = DigitsConfig(templates=("a photo of the digit {}.", "someone wrote {}")).build("")
    tokenizer = build_tokenizer(
        SentencePieceConfig(length=16, vocab_size=320), [t for i in range(60) for t in source.texts(i)]
    )
    objective.check_tokenizer(tokenizer)
    records = [source[i] for i in range(8)]
    captions = [record["texts"][i % 2] for i, record in enumerate(records)]
    batch = {"image": np.stack([record["image"] for record in records]), "text": tokenizer(captions)}
    settings = {
        "optimizer__schedule": Constant(warmup_steps=10),
        "optimizer__learning_rate": 5e-3,
        "data__batch_size": 8,
    }
    program = tiny.program(objective=objective, train__steps=150, **settings)
    with jax.set_mesh(program.mesh):
        state = program.setup.init()
        for _ in range(150):
            state, _ = program.step(state, jax.device_put(batch, batch_sharding(program.mesh)))
    model: Any = program.objective
    written = jax.jit(model.generate)(state.params, batch["image"])
    assert written.shape == batch["text"].shape
    np.testing.assert_array_equal(written, batch["text"])
    assert [tokenizer.decode(row) for row in written] == [tokenizer.clean(text) for text in captions]

    if model.joint_space:
        return
    scores = jax.jit(model.prompt_scores)(state.params, batch["image"], batch["text"])
    own = jax.jit(model.outputs)(state.params, batch)["caption_loss"]
    np.testing.assert_allclose(np.diag(scores), -own, rtol=1e-4)
    np.testing.assert_array_equal(scores.argmax(axis=1), [captions.index(text) for text in captions])
    keys = jax.random.split(jax.random.key(0), 8)
    sample = jax.jit(model.generate, static_argnums=2)
    hot = sample(state.params, batch["image"], Sampling(top_k=300, temperature=50.0), keys)
    assert (np.asarray(hot) != batch["text"]).any(axis=1).all()
    turned = sample(state.params, batch["image"][::-1], Sampling(top_k=300, temperature=50.0), keys[::-1])
    np.testing.assert_array_equal(turned, hot[::-1])  # a row's caption is drawn from its own key


@pytest.mark.parametrize(
    ("objective", "tokenizer", "sentence"),
    [
        (override(COCA, {"model.start.by": "tokenizer"}), {}, "model.start.by = 'tokenizer', but .*bos is false"),
        (override(COCA, {"model.text.eos_id": 7}), {}, "model.text.eos_id = 7 must be the tokenizer's 1"),
        (override(CAPTION, {"model.decoder.pad_id": 3}), {}, "model.decoder.pad_id = 3 must be the tokenizer's 0"),
        (CAPTION, {"pad": "eos"}, "eos = true and pad = 'zero'"),
    ],
)
def test_a_tokenizer_that_begins_or_ends_texts_otherwise(objective: Any, tokenizer: Any, sentence: str) -> None:
    settings = SentencePieceConfig(length=16, vocab_size=320, **tokenizer)
    with pytest.raises(ConfigError, match=sentence):
        objective.check_tokenizer(build_tokenizer(settings, ["a photo of a dog", "two cats on a mat"] * 20))


def test_the_recipes_at_full_size() -> None:
    """CoCa's published numbers; the step of the CLIP paper's three methods traces and shards from shapes alone."""
    folder = Path(__file__).parent.parent.parent / "configs"
    recipe: Any = load_config(f"{folder}/coca_l14.py")
    optimizer, objective = recipe.optimizer, recipe.objective
    assert (recipe.data.batch_size, recipe.train.steps, optimizer.schedule.warmup_steps) == (65_536, 500_000, 10_000)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.momentum, optimizer.b2) == (
        8e-4,
        0.01,
        0.9,
        0.999,
    )
    assert (objective.contrastive_weight, objective.caption_weight) == (1.0, 2.0)
    for method in ("caption", "bag_of_words", "contrastive_bag"):
        config = load_config(f"{folder}/efficiency_rn50.py:{method}")
        program = build_program(config)
        sharding = batch_sharding(program.mesh)
        shapes = config.objective.batch_shapes(config.data.batch_size)
        batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for key, x in shapes.items()}
        with jax.set_mesh(program.mesh):
            _, metrics = jax.eval_shape(program.step, program.setup.abstract, batch)
        assert metrics["loss"][0].shape == ()
        if method == "caption":
            decoder = dict(program.setup.abstract.params["decoder"])
            cross = decoder["blocks"]["cross"]
            own = {**decoder, "blocks": {"self": decoder["blocks"]["self"], "mlp": cross["mlp"], "ln_2": cross["ln_2"]}}
            # 63 M parameters in the paper, which counts as the text tower does: without what looks at the image
            assert round(sum(x.size for x in jax.tree.leaves(own)) / 1e6) == 63
