"""Part rules: order, coverage, unused rules, splitting and factors."""

import dataclasses

import numpy as np
import pytest

from vlm_jax.parts import EVERYTHING, Part, Parts, merge
from vlm_jax.schema import ConfigError

PARAMS = {
    "image": {
        "patch_embed": {"kernel": np.ones((2, 2, 3, 4))},
        "pos_embed": np.ones((5, 4)),
        "class_token": np.ones(4),
        "blocks": {"ln_1": {"scale": np.ones((3, 4))}, "mlp": {"kernel": np.ones((3, 4, 8)), "bias": np.ones((3, 8))}},
        "ln_post": {"scale": np.ones(4)},
    },
    "text": {"token_embed": np.ones((7, 4))},
    "logit_scale": np.ones(()),
}


def paths(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    flat = {}
    for key, value in tree.items():
        flat |= paths(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def resolve(*rules: Part) -> Parts:
    flat = paths(PARAMS)
    names = {p: ("layers",) + (None,) * (x.ndim - 1) if "blocks" in p else (None,) * x.ndim for p, x in flat.items()}
    return Parts(rules, names, {p: x.shape for p, x in flat.items()})


def test_first_match_wins_and_counts_add_up() -> None:
    parts = resolve(Part("norms", r".*ln_\w+/.*"), Part("image", "image/.*"), Part("rest", ".*"))
    assert parts.part_of["image/ln_post/scale"].name == "norms"
    assert parts.part_of["image/pos_embed"].name == "image"
    assert parts.counts() == {"image": 48 + 20 + 4 + 96 + 24, "norms": 12 + 4, "rest": 28 + 1}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((Part("image", "image/.*"),), ["no rule", "text/token_embed"]),
        ((Part("a", ".*"), Part("b", "text/.*")), ["config.parts.b.pattern", "decides for no parameter"]),
        ((Part("typo", "imag/.*"), Part("rest", ".*")), ["config.parts.typo.pattern"]),
        ((Part("a", "image/.*"), Part("a", ".*")), ["two rules named 'a'"]),
        ((Part("a", ".*", frozen=True),), ["freezes every parameter"]),
        ((Part("image", "image/"), Part("rest", "text/.*|logit_scale")), ["no rule", "image/"]),  # a prefix is no match
    ],
)
def test_rules_that_cannot_be_meant(rules: tuple[Part, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(*rules)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_gets_no_gradient_must_be_frozen() -> None:
    flat = paths(PARAMS)
    names, shapes = {p: (None,) * x.ndim for p, x in flat.items()}, {p: x.shape for p, x in flat.items()}
    text, rest = Part("text", "text/.*"), Part("rest", ".*")
    Parts((dataclasses.replace(text, frozen=True), rest), names, shapes, ("text/.*",))
    with pytest.raises(
        ConfigError, match=r"config\.parts\.text trains .* text/token_embed, .*parts\.text\.frozen = true"
    ):
        Parts((text, rest), names, shapes, ("text/.*",))
    with pytest.raises(
        ConfigError, match=r"parts\.rest trains .* text/token_embed, .*a rule for 'text/\.\*' with frozen"
    ):
        Parts((rest,), names, shapes, ("text/.*",))


def test_split_and_merge() -> None:
    parts = resolve(Part("image", "image/.*", frozen=True), Part("rest", ".*"))
    live, frozen = parts.split(PARAMS)
    assert set(paths_of(live)) == {"text/token_embed", "logit_scale"}
    assert merge(live, frozen)["image"]["pos_embed"] is PARAMS["image"]["pos_embed"]
    assert set(paths_of(merge(live, frozen))) == set(paths(PARAMS))


def paths_of(tree: dict) -> list[str]:
    return [path for path, value in paths(tree).items() if value is not None]


def test_gains_and_biases_do_not_decay_even_when_stacked() -> None:
    factors = paths(resolve(*EVERYTHING).decay_factors(PARAMS))
    decayed = {path for path, factor in factors.items() if factor}
    assert decayed == {"image/patch_embed/kernel", "image/pos_embed", "image/blocks/mlp/kernel", "text/token_embed"}


def test_layer_wise_decay() -> None:
    """BEiT's rule: layer 0 is what stands before the blocks, the head and last norm are layer depth + 1."""
    parts = resolve(Part("image", "image/.*", layer_decay=0.5, lr=2.0), Part("rest", ".*"))
    factors = paths(parts.learning_rate_factors(PARAMS))
    assert factors["image/patch_embed/kernel"] == 2 * 0.5**4
    assert factors["image/class_token"] == 2 * 0.5**4
    np.testing.assert_allclose(factors["image/blocks/mlp/bias"].ravel(), 2 * 0.5 ** np.array([3, 2, 1]))
    assert factors["image/blocks/mlp/kernel"].shape == (3, 1, 1)
    assert factors["image/ln_post/scale"] == 2.0
    assert factors["text/token_embed"] == 1.0
