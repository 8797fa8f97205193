"""BEiT in training: its rows, its frozen tokenizer, meshes and microbatches, initial weights, and its pictures."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from PIL import Image

import vlm_jax
from vlm_jax.checkpoint import save_params
from vlm_jax.checkpoint_format import find_step, read_meta
from vlm_jax.config import load_config, to_json
from vlm_jax.data.augment import ColorJitter
from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.data.examples import MaskedImages
from vlm_jax.data.images import AugmentConfig, PreprocessConfig, crop_box
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.beit import BeitModelConfig, beit_encoder
from vlm_jax.models.dvae import DvaeModelConfig
from vlm_jax.objectives.base import ModelObjective
from vlm_jax.objectives.beit import BeitConfig, draw_masks
from vlm_jax.objectives.dvae import DvaeConfig
from vlm_jax.parts import Part
from vlm_jax.schema import ConfigError, override, validate
from vlm_jax.train import train
from vlm_jax.warm_start import InitFrom

TOKENIZER = DvaeModelConfig(image_size=32, vocab_size=24, width=8, blocks=1, decoder=False, decoder_width=8)
BEIT = BeitConfig(
    model=BeitModelConfig(
        dataclasses.replace(beit_encoder(32, 2, 4, 4, image_size=16), drop_path=0.3),
        vocab_size=24,
        tokenizer=TOKENIZER,
        masks=BlockMasks(count=7, least=2),
    )
)
PARTS = (Part("image", "image/.*"), Part("head", "head/.*"), Part("tokenizer", "tokenizer/.*", frozen=True))
RUN: dict[str, Any] = {"objective": BEIT, "parts": PARTS, "data__source": ShapesConfig(image_size=32), "evals": ()}


def rows(mesh: Any, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Noise, with masks of very different sizes: a mean of means would be another number."""
    rng = np.random.default_rng(seed)
    masked = np.stack([rng.permutation(16) < (7 if row % 4 == 0 else rng.integers(1, 7)) for row in range(rows)])
    host = {name: rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8) for name, side in SIDES.items()}
    return {key: jax.device_put(x, batch_sharding(mesh)) for key, x in (host | {"masked": masked}).items()}


SIDES = {"image": 16, "code_image": 32}


def test_ten_thousand_masks_have_the_published_sizes() -> None:
    """On the host, as in training, and on the chip, as for pictures."""
    rng = np.random.default_rng(0)
    host = np.asarray([BlockMasks().draw((14, 14), rng).sum() for _ in range(10_000)])
    keys = jax.random.split(jax.random.key(0), 10_000)
    chip = np.asarray(jax.jit(lambda keys: draw_masks(BlockMasks(), (14, 14), keys))(keys)).sum(1)
    for counts in (host, chip):
        assert counts.max() == 75
        assert (counts == 75).mean() == pytest.approx(0.671, abs=0.02)
        assert (counts == 74).mean() == pytest.approx(0.227, abs=0.02)
        assert counts.mean() == pytest.approx(74.48, abs=0.05)
        assert 55 <= counts.min() <= 70


def test_both_views_are_one_crop_of_one_changed_image() -> None:
    """The tokenizer's view by Pillow itself, from the same generator; and colours change both alike."""
    augment = AugmentConfig(scale=(0.3, 0.6), flip=1.0)
    picture = np.random.default_rng(1).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((200, 160), Image.Resampling.BICUBIC))
    record: Any = {"image": picture, "where": "here", "key": "0"}
    make = MaskedImages(32, 16, (4, 4), BlockMasks(count=6, least=2), PreprocessConfig(), augment)
    row = make(record, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    rng.random()  # for the flip
    top, left, height, width = crop_box(160, 200, rng, augment)
    crop = Image.fromarray(np.ascontiguousarray(picture[:, ::-1][top : top + height, left : left + width]))
    np.testing.assert_array_equal(row["image"], crop.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(row["code_image"], crop.resize((16, 16), Image.Resampling.LANCZOS))
    assert row["masked"].shape == (16,)
    np.testing.assert_array_equal(row["masked"], BlockMasks(count=6, least=2).draw((4, 4), rng).reshape(-1))
    again = make(record, np.random.default_rng(5))
    jax.tree.map(np.testing.assert_array_equal, row, again)

    darker = dataclasses.replace(augment, color_jitter=ColorJitter(brightness=0.9))
    make = MaskedImages(32, 16, (4, 4), BlockMasks(count=6, least=2), PreprocessConfig(), darker)
    means = np.asarray([[make(record, np.random.default_rng(i))[name].mean() for name in SIDES] for i in range(6)])
    np.testing.assert_allclose(means[:, 0], means[:, 1], rtol=0.02)
    assert np.ptp(means[:, 0]) > 20

    evaluation = make(record, None)
    jax.tree.map(np.testing.assert_array_equal, evaluation, make(record, None))
    assert evaluation["masked"].sum() > 0


@pytest.mark.slow
def test_mesh_and_microbatches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "batch", rows)
    smooth: dict[str, Any] = RUN | {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}
    want, history = tiny.run_steps(tiny.program(**smooth), 2)
    state, others = tiny.run_steps(tiny.program(tiny.mesh(2, 2, 2), train__accum_steps=4, **smooth), 2)
    for got, expected in zip(others, history, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


@pytest.mark.slow
def test_a_trained_tokenizer_stays_bit_for_bit_and_owns_no_slots(tmp_path: Path) -> None:
    """From the checkpoint of a whole autoencoder, whose decoder then shows what is predicted."""
    whole = override(TOKENIZER, {"decoder": True})
    autoencoder = tiny.config(objective=DvaeConfig(model=whole), evals=())
    shapes: Any = jax.eval_shape(
        lambda: DvaeConfig(model=whole).build(PreprocessConfig(), np.float32).init(jax.random.key(0))
    )
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), unbox(shapes[0]))
    save_params(tmp_path / "dvae", trained, config=to_json(autoencoder), tokenizer=None, preprocess={})
    init_from = InitFrom(path=str(tmp_path / "dvae"), map=((r"tokenizer/(.*)", r"\1"),), skip=("image/.*", "head/.*"))
    config = tiny.config(
        **RUN | {"objective": override(BEIT, {"model.tokenizer": whole})},
        init_from=init_from,
        train__steps=3,
        train__ema_decay=0.9,
        mesh__data=8,
    )
    assert train(config, str(tmp_path / "run")) == 0
    model = vlm_jax.load(tmp_path / "run")
    tiny.assert_trees_equal(model.params["tokenizer"], trained)
    stored = read_meta(find_step(tmp_path / "run"))["manifest"]
    for group in ("params/", "opt_state/", "ema/"):
        paths = [path for path in stored if path.startswith(group)]
        assert any("image/" in path for path in paths)
        assert any("tokenizer/" in path for path in paths) == (group == "params/")

    objective = BeitConfig.build(config.objective, PreprocessConfig(), np.float32)  # pyright: ignore
    images = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(0), 2)
    pictures = tiny.host(jax.jit(objective.reconstruct)(model.params, images, keys))
    hidden = (pictures["masked"] == 128).all(-1)
    assert 0 < hidden.mean() < 0.5
    np.testing.assert_array_equal(pictures["masked"][~hidden], images[~hidden])
    np.testing.assert_array_equal(pictures["prediction"][~hidden], images[~hidden])
    assert (pictures["prediction"][hidden] != images[hidden]).any()

    alone: ModelObjective = BEIT.build(PreprocessConfig(), np.float32)
    encoder_only = model.params | {"tokenizer": {"encoder": model.params["tokenizer"]["encoder"]}}
    only = tiny.host(alone.reconstruct(encoder_only, jnp.asarray(images), keys))
    assert only.keys() == {"masked"}
    np.testing.assert_array_equal(only["masked"], pictures["masked"])


def test_flops_are_those_of_the_jaxpr() -> None:
    """Tower and head count three times, the tokenizer once."""
    config = override(BEIT, {"model.image.attention_impl": "xla"})
    objective = config.build(PreprocessConfig(), np.float32)
    shapes: Any = unbox(jax.eval_shape(lambda: objective.init(jax.random.key(0))[0]))
    batch: Any = config.batch_shapes(1)
    codes = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def predict(params: Any, batch: Any, codes: Any) -> Any:
        return objective.loss_of(params, batch["image"].astype(jnp.float32), batch["masked"], codes)[0]

    def name(params: Any, images: Any) -> Any:
        return objective.module.apply({"params": params}, images, method="codes")

    trained = 3 * count_dot_flops(predict, shapes, batch, codes)
    assert trained + count_dot_flops(name, shapes, batch["code_image"]) == config.train_flops()


def test_initial_weights_are_cut_at_one_spread_and_shrink_with_depth() -> None:
    image = beit_encoder(64, 4, 4, 8, image_size=32)
    objective = BeitConfig(model=BeitModelConfig(image, 512, None, BlockMasks(6, 2))).build(
        PreprocessConfig(), np.float32
    )
    leaves: Any = unbox(jax.jit(lambda: objective.init(jax.random.key(3))[0])())
    spread = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))
    assert spread == pytest.approx(0.0108, abs=1e-4)
    for path, leaf in flatten_dict(leaves, sep="/").items():
        if path.endswith(("bias", "table")):
            assert not leaf.any(), path
        elif "layer_scale" in path:
            np.testing.assert_allclose(leaf, 0.1, rtol=1e-6)
        elif not path.endswith("scale"):
            layers = leaf if path.startswith("image/blocks/") else leaf[None]
            writes = path.endswith(("attn/out/kernel", "fc2/kernel"))
            for layer, x in enumerate(layers, start=1):
                factor = math.sqrt(2 * layer) if writes else 1.0
                assert np.abs(x).max() * factor <= 0.02 + 1e-8, path
                assert abs(np.std(x) * factor / spread - 1) < 5 / math.sqrt(2 * x.size) + 1e-3, path


def test_the_published_numbers() -> None:
    for name, sizes in {"beit_b16": (768, 12, 12, 0.1), "beit_l16": (1024, 24, 16, 1e-5)}.items():
        config = load_config(f"configs/{name}.py")
        objective: Any = config.objective
        image, optimizer = objective.model.image, config.optimizer
        assert (image.width, image.depth, image.heads, image.layer_scale_init) == sizes
        assert (image.drop_path, image.norm_eps, image.relative_position) == (0.1, 1e-6, "shared")
        schedule = optimizer.schedule
        assert (config.data.batch_size, optimizer.learning_rate, optimizer.weight_decay) == (2048, 1.5e-3, 0.05)
        assert optimizer.learning_rate * schedule.final == pytest.approx(1e-5)  # pyright: ignore
        assert (optimizer.clip_norm, optimizer.b1, optimizer.b2, optimizer.eps) == (3.0, 0.9, 0.999, 1e-8)  # pyright: ignore
        assert (config.train.steps, schedule.warmup_steps) == (500_455, 6255)
        large = load_config(f"configs/{name}.py:in22k")
        assert (large.train.steps, large.optimizer.schedule.warmup_steps) == (1_039_828, 10_000)
        assert large.data.preprocess.mean == (0.5, 0.5, 0.5)


def test_mask_token_and_table_decay_and_the_class_token_does_not() -> None:
    setup = tiny.program(**RUN).setup
    live, _ = setup.parts.split(setup.abstract.params)
    factors = flatten_dict(setup.parts.decay_factors(live), sep="/")
    decayed = {path for path, factor in factors.items() if factor}
    assert {"image/mask_token", "image/relative_position/table", "image/blocks/mlp/fc1/kernel"} <= decayed
    spared = {"image/class_token", "image/blocks/layer_scale_1", "image/ln_post/scale", "head/bias"}
    assert spared <= factors.keys() - decayed


def test_what_does_not_fit_is_a_sentence() -> None:
    wrong: dict[str, Any] = {
        "model.tokenizer.image_size": 16,
        "model.vocab_size": 25,
        "model.masks.count": 17,
        "model.image.mask_token": False,
    }
    sentences = ("gives 2x2 codes for 4x4 patches; use 32", "must be the tokenizer's 24", "more than the 16", "leaves")
    for (key, value), sentence in zip(wrong.items(), sentences, strict=True):
        with pytest.raises(ConfigError, match=sentence):
            validate(override(BEIT, {key: value}))
    erasing = tiny.config(**RUN, data__augment__erasing__probability=0.1)
    with pytest.raises(ConfigError, match="would erase what the tokenizer names"):
        validate(erasing)
    with pytest.raises(ConfigError, match="leaves nothing to learn from"):
        override(BEIT, {"model.tokenizer": None}).make_example(None, erasing.data)


def test_a_tokenizer_that_is_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.parts\.tokenizer trains the parameter tokenizer/.* no gradient"):
        tiny.program(**RUN | {"parts": (*PARTS[:2], Part("tokenizer", "tokenizer/.*"))})
