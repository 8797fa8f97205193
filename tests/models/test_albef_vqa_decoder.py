"""ALBEF's decoder of answers against transformers' with random weights: its logits, and what it writes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.interop.albef_vqa import OfficialAlbefVqa
from vlm_jax.interop.tables import to_params
from vlm_jax.models.albef import deit_b16
from vlm_jax.models.albef_vqa import AlbefVqaModelConfig, AlbefVqaModule, AnswerWriter
from vlm_jax.models.bert import TextEncoderConfig, TextStackConfig
from vlm_jax.models.generation import GenerationConfig, generate
from vlm_jax.schema import override

torch = pytest.importorskip("torch")
from transformers import BertConfig, BertLMHeadModel  # noqa: E402 - transformers needs torch

START, END, WIDTH = 2, 3, 16
SIZES: dict[str, Any] = {"width": WIDTH, "heads": 2, "mlp_dim": 32, "depth": 2}
TEXT: dict[str, Any] = {"vocab_size": 24, "positions": 12}
CONFIG = AlbefVqaModelConfig(
    image=override(deit_b16(16), {**SIZES, "patch_size": 8}),
    text=TextEncoderConfig(**SIZES, **TEXT),
    fusion=TextStackConfig(**SIZES, cross_every=1),
    decoder=TextEncoderConfig(**SIZES, **TEXT, cross_every=1),
)
ANSWERS = np.asarray([[2, 7, 9, 3, 0, 0], [2, 11, 3, 0, 0, 0], [2, 5, 6, 7, 8, 3]], np.int32)
STATES = np.random.default_rng(0).normal(size=(3, 5, WIDTH)).astype(np.float32)
VALID = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], bool)


@pytest.fixture(scope="module")
def reference() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.5,
        attn_implementation="eager",
        is_decoder=True,
        add_cross_attention=True,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=0,
    )
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(reference: Any) -> Any:
    """Parameters of decoder and head."""
    form = OfficialAlbefVqa()
    tensors = {f"text_decoder.{name}": value.detach().numpy() for name, value in reference.state_dict().items()}
    own = form.own(form.canonical(tensors), CONFIG)
    parts = ("decoder/", "words/")
    rows = [row for row in form.rows(CONFIG) if row.ours.startswith(parts)]
    shapes = {path: shape for path, shape in form.shapes(CONFIG).items() if path.startswith(parts)}
    return jax.tree.map(jnp.asarray, to_params(own, rows, shapes, form.title))


def test_logits_are_the_references(reference: Any, ours: Any) -> None:
    with torch.no_grad():
        expected = reference(
            torch.tensor(ANSWERS),
            attention_mask=torch.tensor(ANSWERS != 0),
            encoder_hidden_states=torch.tensor(STATES),
            encoder_attention_mask=torch.tensor(VALID),
        ).logits.numpy()
    module = AlbefVqaModule(CONFIG)
    call = jax.jit(lambda *x: module.apply({"params": ours}, *x, method="word_logits"))
    found = np.asarray(call(ANSWERS, STATES, VALID))
    np.testing.assert_allclose(found[ANSWERS != 0], expected[ANSWERS != 0], atol=2e-5)
    # What comes later, and what pads the question, changes nothing.
    later, hidden = ANSWERS.copy(), np.where(VALID[:, :, None], STATES, 7.0).astype(np.float32)
    later[:, 3:] = 4
    np.testing.assert_allclose(np.asarray(call(later, hidden, VALID))[:, :3], found[:, :3], atol=1e-6)
    log_p = jax.nn.log_softmax(expected, axis=-1)
    own = np.take_along_axis(np.asarray(log_p)[:, :-1], ANSWERS[:, 1:, None], axis=-1)[:, :, 0]
    likelihoods = module.apply({"params": ours}, ANSWERS, STATES, VALID, method="answer_likelihoods")
    np.testing.assert_allclose(likelihoods, np.where(ANSWERS[:, 1:] == 0, 0, own), atol=5e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_what_the_reference_does(beams: int, reference: Any, ours: Any) -> None:
    """Greedily, and by a beam search whose hypotheses all see their own question."""
    start = np.full((3, 1), START, np.int32)
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(start),
            attention_mask=torch.ones(3, 1),
            encoder_hidden_states=torch.tensor(STATES),
            encoder_attention_mask=torch.tensor(VALID),
            max_new_tokens=7,
            num_beams=beams,
            do_sample=False,
            use_cache=False,
        ).numpy()[:, 1:]
    config = GenerationConfig(7, (END,), beams=beams)
    writer = AnswerWriter(AlbefVqaModule(CONFIG), jnp.asarray(STATES), jnp.asarray(VALID))
    found = jax.jit(lambda start: generate(writer, ours, start, jnp.ones((3, 1), bool), config).ids)(start)  # pyright: ignore
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert not np.asarray(found)[:, expected.shape[1] :].any()
    assert len(np.unique(expected, axis=0)) > 1
