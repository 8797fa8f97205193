"""CoCa's pooling, masks and decoder, and the FLOPs of every model that reads an image and predicts words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import schema
from vlm_jax.flops import count_dot_flops
from vlm_jax.models.attentional_pool import AttentionalPoolConfig
from vlm_jax.models.captioner import Captioner, CaptionerModelConfig, TextDecoderConfig
from vlm_jax.models.captions import CaptionStart
from vlm_jax.models.coca import CoCaModelConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import CrossDecoderConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.word_predictor import WordPredictor, WordPredictorConfig

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 24}
TOWER = ViTConfig(image_size=16, patch_size=8, pool="none", width=24, depth=1, heads=3, mlp_dim=32)
MODEL = CoCaModelConfig(
    image=AttentionalPoolConfig(TOWER, queries=3, width=20, heads=2),
    text=TextConfig(vocab_size=30, length=7, pool="cls", mask_padding=True, eos_id=29, **SIZES),
    decoder=CrossDecoderConfig(self_mlp_dim=8, **SIZES),
    start=CaptionStart("model", 28),
    embed_dim=12,
)
DECODER = TextDecoderConfig(vocab_size=30, length=7, start=CaptionStart(id=1), eos_id=29, **SIZES)
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
IDS = np.array([[5, 9, 29, 0, 0, 0, 0], [7, 7, 6, 7, 7, 3, 29]], np.int32)


@pytest.fixture(scope="module")
def params() -> Any:
    return nn.unbox(jax.jit(MODEL.build(jnp.float32).init)(jax.random.key(0), IMAGES, IDS))["params"]


@pytest.mark.parametrize(
    ("module", "config"),
    [
        *(
            (config.build(jnp.float32), config)
            for form in ("cascade", "parallel", "open_clip")
            for config in [schema.override(MODEL, {"image.form": form})]
        ),
        (Captioner(config := CaptionerModelConfig(TOWER, DECODER)), config),
        (WordPredictor(config := WordPredictorConfig(schema.override(TOWER, {"pool": "cls"}), 30, 7)), config),
    ],
    ids=["cascade", "parallel", "open_clip", "captioner", "words"],
)
def test_flops_are_those_of_the_program(module: nn.Module, config: Any) -> None:
    schema.validate(config)
    variables = jax.eval_shape(module.init, jax.random.key(0), IMAGES, IDS)
    counted = count_dot_flops(lambda v: module.apply(v, IMAGES, IDS), nn.unbox(variables))
    assert counted == len(IDS) * config.forward_flops()


def test_the_vector_is_one_query_and_the_tokens_are_the_others() -> None:
    """Every form's path, from what the vector changes with: each pooler's queries, by zeroing the gradient's source."""
    uses = {}
    for form in ("cascade", "parallel", "open_clip"):
        config = schema.override(MODEL, {"image.form": form}).image
        module: Any = config.build(None, jnp.float32)
        variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), IMAGES))
        shapes = {name: x.shape for name, x in jax.eval_shape(module.apply, variables, IMAGES).items()}
        assert shapes == {"tokens": (2, config.token_count, 20), "pooled": (2, 20)}

        def vector(query: Any, variables: Any = variables, module: Any = module) -> Any:
            params = variables["params"] | {"pooler": variables["params"]["pooler"] | {"query": query}}
            return jnp.sin(module.apply({"params": params}, IMAGES)["pooled"]).sum()

        gradient = jax.jit(jax.grad(vector))(variables["params"]["pooler"]["query"])
        uses[form] = np.abs(np.asarray(gradient)).max(axis=1) > 1e-7
    assert uses["cascade"].all()  # the vector is pooled from the tokens of all queries
    assert not uses["parallel"].any()  # it has a query of its own
    assert uses["open_clip"].tolist() == [True, False, False]


def test_a_word_is_predicted_from_the_words_before_it_and_the_image(params: Any) -> None:
    module = MODEL.build(jnp.float32)
    apply = jax.jit(lambda images, ids: module.apply({"params": params}, images, ids)["caption_logits"])
    plain = np.asarray(apply(IMAGES, IDS))
    assert plain.shape == (2, 7, 30)
    other = IDS.copy()
    other[1, 3] = 11
    changed = np.abs(np.asarray(apply(IMAGES, other)) - plain).max(axis=-1) > 1e-6
    # The first logits stand at the start token, so word 3 is an input of those from 4 on.
    assert changed.tolist() == [[False] * 7, [False] * 4 + [True] * 3]
    images = IMAGES.copy()
    images[0] += 1
    moved = np.abs(np.asarray(apply(images, IDS)) - plain).max(axis=-1) > 1e-6
    assert moved.tolist() == [[True] * 7, [False] * 7]


@pytest.mark.parametrize(("shift", "seen"), [(0, False), (1, True)])
def test_the_appended_token_sees_no_padding(shift: int, seen: bool, params: Any) -> None:
    """With a mask that comes one position late, as in open_clip, it sees the first padding."""
    module = schema.override(MODEL, {"text.mask_shift": shift}).build(jnp.float32)
    text = params["text"]
    moved = text | {"token_embed": text["token_embed"].at[0].multiply(-50)}
    encode = jax.jit(lambda text, ids: module.apply({"params": params | {"text": text}}, ids, method="encode_text"))
    change = np.abs(np.asarray(encode(moved, IDS) - encode(text, IDS))).max(axis=1)
    assert (change[0] > 1e-4) == seen
    assert change[1] < 1e-6  # no padding in that row


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"text.pool": "last"}, "text.pool"),
        ({"text.causal": False}, "text.causal"),
        ({"decoder.width": 32}, "decoder.width"),
        ({"start.id": 0}, "start.id"),
        ({"image.tower.pool": "cls"}, "image.tower"),
        ({"image.form": "open_clip", "image.queries": 1}, "image.queries"),
        ({"text.mask_shift": 2}, "text.mask_shift"),
    ],
)
def test_what_can_not_be_built_is_a_sentence(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(schema.ConfigError, match=f"^config.{key} "):
        schema.validate(schema.override(MODEL, changes))
