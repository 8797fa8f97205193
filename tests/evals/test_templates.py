"""Prompt templates against CLIP's published list."""

import hashlib

import pytest

from vlm_jax.evals import templates

# Of "\n".join(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES) in open_clip_torch 3.3.0.
OPENAI_80_SHA256 = "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
# Likewise of SIMPLE_IMAGENET_TEMPLATES.
OPENAI_7_SHA256 = "6ef3883987d224b7949da69fe0b615af152e1560eaac4c5c38555e50c882d415"


@pytest.mark.parametrize(("name", "digest"), [("imagenet80", OPENAI_80_SHA256), ("imagenet7", OPENAI_7_SHA256)])
def test_published_sets_letter_for_letter(name, digest):
    text = "\n".join(templates.template_set(name))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_every_set_has_one_place_for_the_class():
    for name in templates.SET_NAMES:
        assert all(template.count("{}") == 1 for template in templates.template_set(name)), name


def test_sets_and_templates_combine_in_order():
    combined = templates.expand(("imagenet7", "a sketch of {}"))
    assert len(combined) == 8
    assert templates.prompts(combined, "cat")[0] == "itap of a cat."
    assert templates.prompts(combined, "cat")[-1] == "a sketch of cat"


def test_other_braces_stay():
    assert templates.prompts(("{0} {} {x}",), "a{b}") == ["{0} a{b} {x}"]


def test_unknown_set_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'imagenet80'"):
        templates.expand(("imagenet8",))
