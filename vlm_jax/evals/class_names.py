"""Lists of class names that ship with the code, by name."""

import functools
from collections.abc import Sequence
from importlib import resources

SET_NAMES = ("imagenet",)


def expand(entries: Sequence[str]) -> tuple[str, ...]:
    """Class names of a config: the names themselves, or the one name of a list.

    `imagenet` are the 1,000 of ILSVRC 2012 as CLIP's authors curated them, in the order of the labels (sorted synset
    ids). Two pairs of them are equal (missile, sunglasses), as published.
    """
    return _imagenet() if tuple(entries) == ("imagenet",) else tuple(entries)


@functools.cache
def _imagenet() -> tuple[str, ...]:
    text = resources.files("vlm_jax.evals").joinpath("data/imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
