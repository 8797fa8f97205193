"""Questions: answers by brute force, with images and blind, and how they are compared."""

import dataclasses
from typing import Any

import image_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.held_out import HeldOut
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.schema import ConfigError

SCENES = ShapesConfig(count=7, image_size=16, conversations=("color", "compare", "text"))
TOKENIZER = build_tokenizer(
    SentencePieceConfig(vocab_size=400), [text for i in range(60) for text in SCENES.build("").texts(i % 7)]
)
TOWER = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32, pool="none")
DECODER = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=400, init="smollm")
CHAT = ChatConfig(template="paligemma", tiling=SquareTiling(), row_length=96, max_tiles=2)
OBJECTIVE = VlmConfig(model=VisionLanguageConfig(image=TOWER, decoder=DECODER), length=96, tiles=2, prefix=True)
NEW = 4


@pytest.fixture(scope="module")
def made() -> Any:
    """(encoder on a mesh, its parameters, the method)."""
    program = tiny.program(
        tiny.mesh(2, 2, 2), objective=OBJECTIVE, evals=(), data__chat=CHAT, data__augment=None, data__batch_size=8
    )
    method = OBJECTIVE.build(program.config.data.preprocess, jnp.float32)
    held_out = HeldOut(method, OBJECTIVE.make_example(TOKENIZER, program.config.data))
    encoder = MeshEncoder(program.objective, TOKENIZER, 16, program.mesh, 8, held_out)
    with jax.set_mesh(program.mesh):
        # Far from the start, where every text ends alike.
        params = jax.tree.map(lambda x: 3 * x, program.setup.init().params)
    return encoder, params, method


def test_answers_are_the_likeliest_tokens_one_after_the_other(made: Any) -> None:
    """Each as the whole row with all that was said so far gives it."""
    encoder, params, method = made
    host, source = tiny.host(params), SCENES.build("")
    batches = list(encoder.prompt_batches(source))
    assert len(batches) == 1
    assert np.asarray(batches[0]["mask"]).tolist() == [True] * 7 + [False]
    outputs, differ = jax.jit(method.outputs), 0
    found = {blank: np.asarray(encoder.answer(params, batches[0], NEW, blank)) for blank in (False, True)}
    for blank, ids in found.items():
        batch = tiny.host(encoder.blanked(batches[0]) if blank else batches[0])
        rows = {name: np.roll(x[:7], -NEW, axis=1) for name, x in batch.items() if name in ("text", "segments")}
        rows |= {name: np.roll(batch[name][:7], -NEW, axis=1) for name in ("positions", "tile_slots")}
        rows |= {name: batch[name][:7] for name in ("tiles", "tile_count")}
        rows["supervised"] = np.zeros_like(rows["segments"], bool)
        rows["tile_slots"][:, -NEW:], rows["segments"][:, -NEW:] = -1, 0
        ended = np.zeros(7, bool)
        for step in range(NEW):
            place = rows["text"].shape[1] - NEW + step
            logits = np.asarray(outputs(host, rows)["logits"])[:, place - 1]
            token = np.where(ended, TOKENIZER.pad_id, logits.argmax(-1))
            np.testing.assert_array_equal(ids[:7, step], token)
            ended |= token == TOKENIZER.eos_id
            rows["text"][:, place], rows["segments"][:, place] = token, 1
            rows["positions"][:, place] = rows["positions"][:, place - 1] + 1
            rows["supervised"][:, place] = True
    differ = (found[False] != found[True]).any(axis=1)
    needs_image = np.asarray([source[i]["kind"] != "text" for i in range(7)])
    assert not differ[:7][~needs_image].any()
    assert differ[:7][needs_image].any()


class Told:
    """The encoder with the answers that a test gives it."""

    def __init__(self, encoder: Any, sighted: list[str], blind: list[str]):
        self._encoder, self._answers = encoder, {False: sighted, True: blind}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def answer(self, params: Any, batch: Any, max_new_tokens: int, blank: bool = False) -> Any:
        return jnp.full((8, 1), int(blank))

    def written(self, ids: np.ndarray) -> list[str]:
        return self._answers[bool(ids[0, 0])][: len(ids)]


def test_answers_are_compared_but_for_case_and_a_full_stop(made: Any) -> None:
    encoder, params, _ = made
    source = SCENES.build("")
    right = [source[i]["turns"][-1].text for i in range(7)]
    told = Told(encoder, [f" {right[0].upper()}.", *right[1:6], f"{right[6]} red"], [*right[:2], *["?"] * 5])
    config = VqaConfig("shapes", SCENES, max_new_tokens=NEW)
    found = {k.removeprefix("vqa/shapes/"): v for k, v in config.build(told, "").run(params, 0).metrics.items()}
    assert found["exact_match"] == pytest.approx(6 / 7)
    assert found["exact_match_blank"] == pytest.approx(2 / 7)
    assert found["examples"] == 7
    kinds = [source[i]["kind"] for i in range(7)]
    for kind in set(kinds):
        hits = [i != 6 for i in range(7) if kinds[i] == kind]
        assert found[f"exact_match/{kind}"] == pytest.approx(np.mean(hits))
    assert found["loss"] != found["loss_blank"]


def test_a_model_without_answers_is_refused() -> None:
    encoder, _, _ = image_models.encoder(image_models.CLASSIFY)
    with pytest.raises(ConfigError, match=r"'shapes' \(vqa\) asks questions about images, and this model answers none"):
        dataclasses.replace(VqaConfig("shapes", SCENES)).build(encoder, "")
