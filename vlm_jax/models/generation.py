"""Writing text with a decoder: the prompts once, then token after token from a cache of keys and values.

`generate` is one program of static shapes, to be called under `jax.jit`; its loop ends as soon as every row has.
`begin` and `extend` are its two halves for who wants each token when it is there. Rows may be filled up at either end,
and give what each gives alone. Nothing here knows images: prompts may be embeddings.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.mesh import constrain
from vlm_jax.models.attention import KeyValues
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.stochastic import fold_in

NEVER = -1e9  # score of what may not be chosen


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How a text is written. The likeliest token each time, unless `generate` is given keys or there are beams."""

    max_new_tokens: int = 128  # at most so many tokens, an end token included
    eos_ids: tuple[int, ...] = ()  # tokens that end a text; none: every text has max_new_tokens
    pad_id: int = 0  # what follows the end
    temperature: float = 1.0  # of sampling: above 1 evens the chances out, towards 0 takes the likeliest
    top_k: int = 0  # samples among so many of the likeliest tokens; 0: among all
    top_p: float = 1.0  # samples among the likeliest whose chances add up to this (Holtzman et al. 2020)
    beams: int = 1  # hypotheses of a beam search
    length_penalty: float = 1.0  # a finished hypothesis has its log-likelihood over its length to this power

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        for key, value, least in (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("beams", self.beams, 1),
            ("top_k", self.top_k, 0),
        ):
            if value < least:
                yield key, f"= {value} must be at least {least}"
        if self.temperature <= 0:
            yield "temperature", f"= {self.temperature} must be positive; without keys the likeliest token is taken"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"= {self.top_p} must lie in (0, 1]"


class Generated(NamedTuple):
    """What was written.

    Attributes:
        ids: int32 [B, max_new_tokens], the end token included, then `pad_id`.
        lengths: int32 [B], tokens of each text, the end token included.
        steps: () int32, tokens that were computed for the slowest row.
    """

    ids: jax.Array
    lengths: jax.Array
    steps: jax.Array


class _Prompt(NamedTuple):
    """Prompts read: logits of the first new token, and what it takes to go on.

    Attributes:
        logits: fp32 [B, V].
        cache: [L, B, S, K, D] with room for the new tokens after the prompts.
        seen: bool [B, S], the prompts' places.
        count: int32 [B], tokens of each prompt.
        length: () int32, places that the prompts take.
    """

    logits: jax.Array
    cache: KeyValues
    seen: jax.Array
    count: jax.Array
    length: jax.Array


class Writing(NamedTuple):
    """Texts in the making, by `begin` and `extend`.

    Attributes:
        index: () int32, new tokens so far.
        token: int32 [B], the newest of each; `pad_id` where a text had ended before.
        ended: bool [B], whether the newest or an earlier one is an end token.
        prompt: what it takes to go on.
    """

    index: jax.Array
    token: jax.Array
    ended: jax.Array
    prompt: _Prompt


def generate(
    decoder: Decoder,
    params: Any,
    tokens: jax.Array,
    valid_BxT: jax.Array,
    config: GenerationConfig,
    *,
    prefix_BxT: jax.Array | None = None,
    keys: jax.Array | None = None,
) -> Generated:
    """Continues prompts.

    Args:
        decoder: the model.
        params: its own parameters (the subtree `decoder`).
        tokens: int32 ids [B, T], or embeddings [B, T, D] as `Decoder.embed` makes them.
        valid_BxT: bool, False for what fills a row up, at its beginning, its end, or both.
        config: how; with beams, keys are not used.
        prefix_BxT: bool, see `Decoder.__call__`.
        keys: [B] typed keys, one a row: tokens are sampled. None takes the likeliest.
    """
    if config.beams == 1:
        return _one_by_one(decoder, params, begin(decoder, params, tokens, valid_BxT, config, prefix_BxT), config, keys)
    model = _Model(decoder, params)
    return _beam_search(model, model.read(tokens, valid_BxT, prefix_BxT, config.max_new_tokens), config)


def begin(
    decoder: Decoder,
    params: Any,
    tokens: jax.Array,
    valid_BxT: jax.Array,
    config: GenerationConfig,
    prefix_BxT: jax.Array | None = None,
) -> Writing:
    """Reads prompts, to which `extend` then adds token after token; arguments as of `generate`, without beams."""
    prompt = _Model(decoder, params).read(tokens, valid_BxT, prefix_BxT, config.max_new_tokens)
    none_B = jnp.full(tokens.shape[:1], config.pad_id, jnp.int32)
    return Writing(jnp.zeros((), jnp.int32), none_B, jnp.zeros(tokens.shape[:1], bool), prompt)


def extend(
    decoder: Decoder, params: Any, writing: Writing, config: GenerationConfig, keys: jax.Array | None = None
) -> Writing:
    """One more token of every text; at most `max_new_tokens` times."""
    index, prompt = writing.index, writing.prompt
    token_B = choose(prompt.logits, config, fold_in(keys, index))
    token_B = jnp.where(writing.ended, config.pad_id, token_B)
    ended_B = writing.ended | _ends(token_B, config.eos_ids)
    # The token that ends the last text needs no pass of the model after it.
    goes_on = (index + 1 < config.max_new_tokens) & ~jnp.all(ended_B)
    step = _Model(decoder, params).step
    prompt = jax.lax.cond(goes_on, lambda prompt: step(token_B, index, prompt), lambda prompt: prompt, prompt)
    return Writing(index + 1, token_B, ended_B, prompt)


class _Model:
    """The decoder with its parameters: prompts to a cache, and one token more."""

    def __init__(self, decoder: Decoder, params: Any):
        self._decoder, self._params = decoder, params

    def _apply(self, *arguments: Any, method: str) -> Any:
        return self._decoder.apply({"params": self._params}, *arguments, method=method)

    def read(self, tokens: jax.Array, valid_BxT: jax.Array, prefix_BxT: jax.Array | None, room: int) -> _Prompt:
        """The prompts, and a cache with room for more tokens."""
        length = tokens.shape[1]
        segments_BxT = valid_BxT.astype(jnp.int32)
        positions_BxT = jnp.maximum(jnp.cumsum(segments_BxT, axis=1) - 1, 0)
        hidden, own = self._apply(tokens, None, segments_BxT, positions_BxT, prefix_BxT, method="with_keys")
        last_B = length - 1 - jnp.argmax(valid_BxT[:, ::-1], axis=1)
        last_Bx1xD = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)
        logits_BxV = self._apply(last_Bx1xD, method="logits")[:, 0]
        cache = KeyValues(*(_pinned(jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)])) for x in own))
        seen_BxS = jnp.pad(valid_BxT, ((0, 0), (0, room)))
        count_B = segments_BxT.sum(axis=1)
        return _Prompt(logits_BxV, cache, seen_BxS, count_B, jnp.asarray(length, jnp.int32))

    def step(self, token_B: jax.Array, index: jax.Array, prompt: _Prompt) -> _Prompt:
        """After new token number `index` () of each row, counted from 0."""
        slot = prompt.length + index
        seen_BxS = jax.lax.dynamic_update_slice_in_dim(prompt.seen, jnp.ones_like(prompt.seen[:, :1]), slot, axis=1)
        hidden, own = self._apply(token_B[:, None], prompt.count + index, prompt.cache, slot, seen_BxS, method="step")
        cache = KeyValues(
            *(
                _pinned(jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2))
                for old, new in zip(prompt.cache, own, strict=True)
            )
        )
        logits_BxV = self._apply(hidden, method="logits")[:, 0]
        return prompt._replace(logits=logits_BxV, cache=cache, seen=seen_BxS)


def _pinned(x_LxBxSxKxD: jax.Array) -> jax.Array:
    return constrain(x_LxBxSxKxD, None, "batch", None, "heads", "kv")


def _one_by_one(
    decoder: Decoder, params: Any, first: Writing, config: GenerationConfig, keys: jax.Array | None
) -> Generated:
    def unfinished(carry: tuple[Writing, jax.Array]) -> jax.Array:
        return (carry[0].index < config.max_new_tokens) & ~jnp.all(carry[0].ended)

    def add(carry: tuple[Writing, jax.Array]) -> tuple[Writing, jax.Array]:
        writing, ids_BxN = carry
        longer = extend(decoder, params, writing, config, keys)
        return longer, jax.lax.dynamic_update_slice_in_dim(ids_BxN, longer.token[:, None], writing.index, axis=1)

    ids_BxN = jnp.full((first.token.shape[0], config.max_new_tokens), config.pad_id, jnp.int32)
    last, ids_BxN = jax.lax.while_loop(unfinished, add, (first, ids_BxN))
    return Generated(ids_BxN, _lengths(ids_BxN, config.eos_ids, last.index), last.index)


def _ends(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Whether each token is an end token."""
    ends = jnp.zeros(tokens.shape, bool)
    for eos_id in eos_ids:
        ends = ends | (tokens == eos_id)
    return ends


def _lengths(ids_BxN: jax.Array, eos_ids: tuple[int, ...], steps: jax.Array) -> jax.Array:
    ends_BxN = _ends(ids_BxN, eos_ids)
    return jnp.where(ends_BxN.any(axis=1), jnp.argmax(ends_BxN, axis=1) + 1, steps).astype(jnp.int32)


def choose(logits_BxV: jax.Array, config: GenerationConfig, keys: jax.Array | None) -> jax.Array:
    """The next token of each row, int32 [B]: the likeliest, or with [B] typed keys a sample."""
    if keys is None:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, allowed_logits(logits_BxV, config)).astype(jnp.int32)


def allowed_logits(logits_BxV: jax.Array, config: GenerationConfig) -> jax.Array:
    """Logits over the temperature, -inf where `top_k` or then `top_p` leave a token out; fp32 [B, V]."""
    logits_BxV = logits_BxV / config.temperature
    if config.top_k:
        least_Bx1 = jax.lax.top_k(logits_BxV, min(config.top_k, logits_BxV.shape[-1]))[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < jnp.broadcast_to(least_Bx1, logits_BxV.shape), -jnp.inf, logits_BxV)
    if config.top_p < 1:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        chances_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
        before_BxV = jnp.cumsum(chances_BxV, axis=-1) - chances_BxV
        # A token stays whose better ones don't add up to top_p: the likeliest always does.
        least_Bx1 = jnp.min(jnp.where(before_BxV < config.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < jnp.broadcast_to(least_Bx1, logits_BxV.shape), -jnp.inf, logits_BxV)
    return logits_BxV


class _Beams(NamedTuple):
    """State of a beam search; R running hypotheses and F finished ones of each row, both `beams`, best first.

    Attributes:
        index: () int32, new tokens so far.
        running: int32 [B, R, N].
        running_scores: fp32 [B, R], sums of log-likelihoods.
        finished: int32 [B, F, N].
        finished_scores: fp32 [B, F], with the length penalty; `NEVER` where there is none yet.
        improvable: bool [B], whether a running hypothesis could still become one of the finished.
        prompt: the cache of the running ones, [B R] rows.
    """

    index: jax.Array
    running: jax.Array
    running_scores: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    improvable: jax.Array
    prompt: tuple[jax.Array, KeyValues, jax.Array, jax.Array]


def _beam_search(model: _Model, prompt: _Prompt, config: GenerationConfig) -> Generated:
    """As transformers' without early stopping: a row goes on while a running hypothesis could become a result."""
    rows, beams, most = prompt.logits.shape[0], config.beams, config.max_new_tokens
    state = (
        jnp.repeat(prompt.logits, beams, axis=0),
        KeyValues(*(_pinned(jnp.repeat(x, beams, axis=1)) for x in prompt.cache)),
        jnp.repeat(prompt.seen, beams, axis=0),
        jnp.repeat(prompt.count, beams, axis=0),
    )
    empty = jnp.full((rows, beams, most), config.pad_id, jnp.int32)
    # All hypotheses begin alike: only the first may be continued, or they would stay alike.
    scores = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER)[None], (rows, beams))
    never = jnp.full((rows, beams), NEVER, jnp.float32)
    first = _Beams(jnp.zeros((), jnp.int32), empty, scores, empty, never, jnp.ones((rows,), bool), state)

    def unfinished(carry: _Beams) -> jax.Array:
        return (carry.index < most) & jnp.any(carry.improvable)

    def add(carry: _Beams) -> _Beams:
        chosen, parents_BxR = _extended(carry, config)

        def go_on(state: Any) -> Any:
            rows_BR = (jnp.arange(rows)[:, None] * beams + parents_BxR).reshape(-1)
            _, cache, seen, count = state
            cache = KeyValues(*(_pinned(jnp.take(x, rows_BR, axis=1)) for x in cache))
            token_BR = chosen.running[:, :, carry.index].reshape(-1)
            taken = _Prompt(state[0], cache, seen, count, prompt.length)
            return tuple(model.step(token_BR, carry.index, taken)[:-1])

        return chosen._replace(prompt=jax.lax.cond(unfinished(chosen), go_on, lambda state: state, carry.prompt))

    last = jax.lax.while_loop(unfinished, add, first)
    best_BxN = last.finished[:, 0]
    return Generated(best_BxN, _lengths(best_BxN, config.eos_ids, jnp.asarray(most)), last.index)


def _extended(carry: _Beams, config: GenerationConfig) -> tuple[_Beams, jax.Array]:
    """The hypotheses with one token more, and which of the old ones each running one continues [B, R]."""
    rows, beams, most = carry.running.shape
    words = carry.prompt[0].shape[-1]
    log_p = jax.nn.log_softmax(carry.prompt[0], axis=-1).reshape(rows, beams, words)
    sums_BxRV = (log_p + carry.running_scores[:, :, None]).reshape(rows, beams * words)
    # So many that as many as there are beams go on even if each of those ended.
    kept = max(2, 1 + len(config.eos_ids)) * beams
    scores_BxK, places_BxK = jax.lax.top_k(sums_BxRV, kept)
    parents_BxK, tokens_BxK = places_BxK // words, (places_BxK % words).astype(jnp.int32)
    texts_BxKxN = jnp.take_along_axis(carry.running, parents_BxK[:, :, None], axis=1)
    texts_BxKxN = jax.lax.dynamic_update_slice_in_dim(texts_BxKxN, tokens_BxK[:, :, None], carry.index, axis=2)
    index = carry.index + 1
    ended_BxK = _ends(tokens_BxK, config.eos_ids) | (index >= most)

    running_scores, best_BxR = jax.lax.top_k(jnp.where(ended_BxK, scores_BxK + NEVER, scores_BxK), beams)
    running = jnp.take_along_axis(texts_BxKxN, best_BxR[:, :, None], axis=1)
    parents_BxR = jnp.take_along_axis(parents_BxK, best_BxR, axis=1)

    penalty = index.astype(jnp.float32) ** config.length_penalty
    # Only what ended among the best `beams` is a result; the others were kept in reserve.
    counts_BxK = ended_BxK & (jnp.arange(kept) < beams)[None, :] & carry.improvable[:, None]
    new_scores = jnp.where(counts_BxK, scores_BxK / penalty, NEVER)
    all_scores = jnp.concatenate([carry.finished_scores, new_scores], axis=1)
    finished_scores, kept_BxF = jax.lax.top_k(all_scores, beams)
    finished = jnp.take_along_axis(jnp.concatenate([carry.finished, texts_BxKxN], axis=1), kept_BxF[:, :, None], axis=1)
    improvable = carry.improvable & (running_scores[:, 0] / penalty > finished_scores[:, -1])
    return _Beams(index, running, running_scores, finished, finished_scores, improvable, carry.prompt), parents_BxR


__all__ = ["Generated", "GenerationConfig", "Writing", "allowed_logits", "begin", "choose", "extend", "generate"]
