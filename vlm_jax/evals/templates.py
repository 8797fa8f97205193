"""Prompt templates for zero-shot classification by name; `{}` stands for the class name."""

import difflib
import functools
from collections.abc import Sequence
from importlib import resources

# The subset that OpenAI's notebook "Prompt Engineering for ImageNet" picks out of the 80 by forward selection.
_IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
_DIGITS = (
    "a photo of the digit {}.",
    "a scan of the digit {}.",
    "the handwritten digit {}.",
    "a handwritten {}.",
)
SET_NAMES = ("imagenet80", "imagenet7", "photo", "digits")


@functools.cache
def template_set(name: str) -> tuple[str, ...]:
    """The templates of one set.

    `imagenet80` are the 80 of CLIP (arXiv:2103.00020, section 3.1.4 and the authors' notebook), `imagenet7` is their
    published subset, `photo` the single "a photo of a {}.".

    Raises:
        ValueError: no set has that name.
    """
    sets = {"imagenet80": _read_imagenet_80, "imagenet7": lambda: _IMAGENET_7, "digits": lambda: _DIGITS}
    sets["photo"] = lambda: ("a photo of a {}.",)
    if name not in sets:
        near = difflib.get_close_matches(name, SET_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SET_NAMES)}"
        raise ValueError(f"{name!r} is no set of templates, nor a template with {{}} for the class name; {hint}")
    return sets[name]()


def expand(entries: Sequence[str]) -> tuple[str, ...]:
    """Templates of a config: each entry is a template itself, when it holds `{}`, or the name of a set.

    Raises:
        ValueError: an entry is neither.
    """
    return tuple(t for entry in entries for t in ((entry,) if "{}" in entry else template_set(entry)))


def prompts(templates: Sequence[str], class_name: str) -> list[str]:
    """One prompt a template; other braces in a template stay as they are."""
    return [template.replace("{}", class_name) for template in templates]


def _read_imagenet_80() -> tuple[str, ...]:
    text = resources.files("vlm_jax.evals").joinpath("data/imagenet_templates.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
