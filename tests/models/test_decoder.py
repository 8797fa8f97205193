"""The decoder by brute force: who sees whom, caches, published sizes, and the grouping of heads in every kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, shardings, unbox
from vlm_jax.models.attention import attend
from vlm_jax.models.decoder import Decoder, DecoderConfig, prefix_mask
from vlm_jax.models.generation import GenerationConfig, generate
from vlm_jax.models.presets import DECODERS
from vlm_jax.schema import ConfigError, override, validate

CONFIG = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=64, extra_tokens=3)
DECODER = Decoder(CONFIG)
# Documents of 5, 4 and 2 tokens and a place that none fills; the second begins with a prefix, the third is one.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 2 + [0]], np.int32)
PREFIX = np.array([[0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0]], bool)


def ids(rows: int = 1, length: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 64, (rows, length)).astype(np.int32)


@pytest.fixture(scope="module")
def params() -> Any:
    started = unbox(jax.jit(DECODER.init)(jax.random.key(0), ids())["params"])
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, started)  # so that what is seen makes a difference


run = jax.jit(
    lambda params, tokens, segments, positions, prefix: DECODER.apply(
        {"params": params}, tokens, segments_BxT=segments, positions_BxT=positions, prefix_BxT=prefix
    )
)


def seen(params: Any, segments: Any, prefix: Any) -> np.ndarray:
    """bool [T, T]: whether the state at t changes with token s."""
    tokens = ids()
    rows = np.repeat(tokens, 13, axis=0)
    for place in range(12):
        rows[place + 1, place] = (rows[place + 1, place] + 1) % 64
    spread = [None if x is None else np.repeat(x, 13, axis=0) for x in (segments, prefix)]
    states = np.asarray(run(params, rows, spread[0], None, spread[1]))
    return (np.abs(states[1:] - states[:1]).max(axis=2) > 1e-6).T


def by_hand(segments: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Of one document; before me, or in my own stretch of neighbouring prefix tokens."""
    out = np.zeros((12, 12), bool)
    for t in range(12):
        for s in range(12):
            between = range(min(s, t), max(s, t) + 1)
            stretch = all(prefix[k] and segments[k] == segments[t] for k in between)
            out[t, s] = segments[s] == segments[t] and (s <= t or stretch)
    return out


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["causal", "prefix"])
def test_what_a_token_sees(params: Any, prefix: np.ndarray | None) -> None:
    """Through two blocks a token sees what those that it sees see, which here adds nothing."""
    wanted = by_hand(SEGMENTS[0], np.zeros(12, bool) if prefix is None else prefix[0])
    np.testing.assert_array_equal(wanted, wanted @ wanted)
    np.testing.assert_array_equal(seen(params, SEGMENTS, prefix), wanted)
    if prefix is not None:
        np.testing.assert_array_equal(prefix_mask(prefix, SEGMENTS)[0, 0], wanted)
        assert (wanted[2, 3], wanted[3, 5], wanted[0, 1]) == (True, False, False)


def test_a_packed_row_is_its_documents_alone(params: Any) -> None:
    tokens = ids()
    positions = np.concatenate([np.arange(n) for n in (5, 4, 2, 1)])[None].astype(np.int32)
    packed = run(params, tokens, SEGMENTS, positions, None)[0]
    for start, stop in ((0, 5), (5, 9), (9, 11)):
        alone = jax.jit(DECODER.apply)({"params": params}, tokens[:, start:stop])
        np.testing.assert_allclose(packed[start:stop], alone[0], atol=1e-5)


def test_embeddings_in_place_of_ids(params: Any) -> None:
    embedded: Any = DECODER.apply({"params": params}, ids(), method="embed")
    table = np.concatenate([params["token_embed"], params["extra_embed"]])
    np.testing.assert_array_equal(embedded[0], table[ids()[0]])
    np.testing.assert_array_equal(run(params, embedded, None, None, None), run(params, ids(), None, None, None))


def test_added_tokens_start_by_a_recipe_of_their_own() -> None:
    config = override(CONFIG, {"extra_tokens": 500, "extra_spread": 0.3, "tied": False, "vocab_size": 500})
    started = unbox(Decoder(config).init(jax.random.key(0), ids())["params"])
    for name in ("extra_embed", "extra_head"):
        assert started[name].shape == (500, 32)
        assert float(started[name].std()) == pytest.approx(0.3, rel=0.05)
    assert float(started["token_embed"].std()) == pytest.approx(0.02, rel=0.05)
    head: Any = Decoder(config).apply({"params": started}, method="head_rows")
    np.testing.assert_array_equal(head, np.concatenate([started["head"], started["extra_head"]]))


def next_by_definition(params: Any, prompt: np.ndarray, count: int) -> list[int]:
    """The likeliest token of the whole text so far, again and again: no cache, no padding."""
    text = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 20), np.int32)
        padded[0, : len(text)] = text
        hidden = run(params, padded, None, None, None)[:, len(text) - 1 : len(text)]
        text.append(int(np.argmax(DECODER.apply({"params": params}, hidden, method="logits"))))
    return text[len(prompt) :]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_prompts_of_different_lengths_continue_as_each_alone(params: Any, shape: tuple[int, int, int]) -> None:
    """Filled up on the left, the right, and both; and the loop ends with the last end token."""
    prompts, valid = ids(4), np.ones((4, 12), bool)
    for row, (start, stop) in enumerate(((0, 12), (7, 12), (0, 4), (3, 9))):
        valid[row, :start] = valid[row, stop:] = False
    wanted = [next_by_definition(params, prompts[row][valid[row]], 8) for row in range(4)]
    end = wanted[0][5]
    cut = [text[: text.index(end) + 1] if end in text else text for text in wanted]
    mesh = tiny.mesh(*shape)
    places = shardings(jax.eval_shape(lambda: DECODER.init(jax.random.key(0), ids())["params"]), mesh)
    rows = [jax.device_put(x, batch_sharding(mesh)) for x in (prompts, valid)]
    with jax.set_mesh(mesh):
        for end_ids, texts in (((), wanted), ((end,), cut))[shape[0] - 1 :]:
            config = GenerationConfig(max_new_tokens=8, eos_ids=end_ids, pad_id=0)
            write = jax.jit(lambda p, t, v, config=config: generate(DECODER, p, t, v, config))
            written = write(jax.device_put(params, places), *rows)
            for row, text in enumerate(texts):
                assert list(written.ids[row]) == text + [0] * (8 - len(text))
            assert list(written.lengths) == [len(text) for text in texts]
            assert int(written.steps) == max(len(text) for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"beams": 3}, {"temperature": 1.5, "top_p": 0.9}], ids=str)
def test_a_mesh_changes_neither_beams_nor_samples(params: Any, options: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=6, eos_ids=(5, 9), **options)
    keys = jax.random.split(jax.random.key(2), 4)
    write = jax.jit(lambda p, t, v: generate(DECODER, p, t, v, config, keys=keys).ids)
    valid = np.arange(12)[None] >= np.array([[0], [3], [5], [9]])
    wanted = write(params, ids(4), valid)
    mesh = tiny.mesh(2, 2, 2)
    places = shardings(jax.eval_shape(lambda: DECODER.init(jax.random.key(0), ids())["params"]), mesh)
    with jax.set_mesh(mesh):
        rows = [jax.device_put(x, batch_sharding(mesh)) for x in (ids(4), valid)]
        written = write(jax.device_put(params, places), *rows)
    np.testing.assert_array_equal(written, wanted)


def test_all_rows_at_their_end_stop_the_loop(params: Any) -> None:
    """Three equal prompts that end with their second token: two steps of fifty."""
    prompts = np.repeat(ids(), 3, axis=0)
    first, end = next_by_definition(params, prompts[0], 2)
    config = GenerationConfig(max_new_tokens=50, eos_ids=(end,), pad_id=63)
    written = jax.jit(lambda p, t, v: generate(DECODER, p, t, v, config))(params, prompts, np.ones((3, 12), bool))
    assert int(written.steps) == (1 if first == end else 2)
    assert list(written.lengths) == [int(written.steps)] * 3
    assert (np.asarray(written.ids)[:, int(written.steps) :] == 63).all()


def test_samples_depend_on_the_rows_key_alone(params: Any) -> None:
    keys = jax.random.split(jax.random.key(1), 4)
    config = GenerationConfig(max_new_tokens=6, temperature=2.0, top_k=20)
    write = jax.jit(lambda t, k: generate(DECODER, params, t, np.ones((4, 12), bool), config, keys=k).ids)
    prompts = np.repeat(ids(), 4, axis=0)
    written = np.asarray(write(prompts, keys))
    np.testing.assert_array_equal(write(prompts, keys[::-1]), written[::-1])
    assert len({tuple(row) for row in written}) == 4


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("length", [1, 5, 130])
def test_a_head_of_keys_serves_several_of_queries(kv_heads: int, length: int) -> None:
    """XLA's two ways and the Pallas kernel, with segments, against heads that are repeated and a mask that is whole."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, 8)).astype(np.float32)
    segments = np.sort(rng.integers(0, 4, (2, length)), axis=1).astype(np.int32)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    causal = length > 1
    whole = [np.repeat(x, 4 // kv_heads, axis=2) for x in (k, v)]
    wanted = jax.nn.dot_product_attention(q, *whole, mask=jnp.asarray(same), is_causal=causal)
    for impl in ("xla", *(("flash",) if length == 130 and kv_heads == 2 else ())):
        got = attend(q, k, v, segments_BxT=jnp.asarray(segments), causal=causal, impl=impl)
        np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=impl)
    if length == 1:
        np.testing.assert_allclose(attend(q, k, v, mask=jnp.ones((2, 1, 1, 1), bool)), wanted, atol=1e-5)


# Parameters of the released checkpoints.
COUNTS = {
    "Llama-2-7B": 6_738_415_616,
    "Vicuna-13B": 13_015_864_320,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Gemma-2B": 2_506_172_416,
}


@pytest.mark.parametrize("name", COUNTS)
def test_named_sizes_have_the_released_number_of_parameters(name: str) -> None:
    shapes = unbox(jax.eval_shape(Decoder(DECODERS[name]).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_flops_are_those_of_the_jaxpr() -> None:
    shapes = unbox(jax.eval_shape(DECODER.init, jax.random.key(0), ids()))["params"]

    def logits(params: Any, tokens: Any) -> Any:
        hidden = DECODER.apply({"params": params}, tokens)
        return DECODER.apply({"params": params}, hidden, method="logits")

    assert CONFIG.forward_flops(12) == count_dot_flops(logits, shapes, jax.ShapeDtypeStruct((1, 12), jnp.int32))


def test_unrolled_and_rematerialised_blocks_are_the_same(params: Any) -> None:
    wanted = run(params, ids(), None, None, None)
    for changes in ({"scan": False}, {"remat": "full"}):
        other = Decoder(dataclasses.replace(CONFIG, **changes))
        np.testing.assert_allclose(jax.jit(other.apply)({"params": params}, ids()), wanted, atol=1e-6)


def test_weights_are_split_over_both_axes() -> None:
    """By their logical names, on a mesh of 2 x 2: no matrix is whole on a device."""
    mesh = tiny.mesh(1, 2, 2)
    boxed = jax.eval_shape(lambda: Decoder(dataclasses.replace(CONFIG, extra_tokens=0)).init(jax.random.key(0), ids()))
    for path, sharding in flatten_dict(shardings(boxed, mesh)["params"], sep="/").items():
        if path.endswith(("kernel", "token_embed")):
            assert set(sharding.spec) >= {"fsdp", "tensor"}, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, r"kv_heads = 3 does not divide heads = 4"),
        ({"head_dim": 7}, r"head_dim = 7 must be even"),
        ({"extra_tokens": -1}, r"extra_tokens = -1 must be at least 0"),
        ({"rope.theta": 0.5}, r"rope\.theta = 0\.5 must be more than 1"),
    ],
)
def test_what_can_not_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(CONFIG, changes))
