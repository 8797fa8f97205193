"""The list of ImageNet's classes against the published one."""

import hashlib

from vlm_jax.evals import class_names

# Of "\n".join(open_clip.IMAGENET_CLASSNAMES) in open_clip_torch 3.3.0.
SHA256 = "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"


def test_imagenet_letter_for_letter():
    names = class_names.expand(("imagenet",))
    assert len(names) == 1000
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == SHA256


def test_other_names_stay():
    assert class_names.expand(("cat", "imagenet")) == ("cat", "imagenet")
    assert class_names.expand(()) == ()
