"""LiT: through a real run a frozen image tower from another checkpoint keeps its bits and owns no slots."""

from pathlib import Path

import jax
import numpy as np
import tiny

import vlm_jax
from vlm_jax.checkpoint import save_params
from vlm_jax.checkpoint_format import find_step, read_meta
from vlm_jax.config import to_json
from vlm_jax.parts import Part
from vlm_jax.train import train
from vlm_jax.warm_start import InitFrom

LOCKED = (Part("image", "image/.*", frozen=True), Part("text", "text/.*"), Part("scale", "logit_scale"))


def test_a_locked_tower_keeps_its_bits_and_owns_no_slots(tmp_path: Path) -> None:
    other = tiny.program(seed=5, objective__model__text__depth=1)  # its text tower doesn't fit and isn't wanted
    rng = np.random.default_rng(0)
    pretrained = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), other.setup.abstract.params)
    save_params(tmp_path / "pretrained", pretrained, config=to_json(other.config), tokenizer=None, preprocess={})
    init_from = InitFrom(path=str(tmp_path / "pretrained"), skip=("text/.*",), ignore=("text/.*",))
    config = tiny.config(
        parts=LOCKED, init_from=init_from, train__ema_decay=0.9, train__steps=4, mesh__data=2, mesh__fsdp=4, evals=()
    )
    workdir = tmp_path / "run"
    assert train(config, str(workdir)) == 0
    tuned = vlm_jax.load(workdir).params
    tiny.assert_trees_equal(tuned["image"], pretrained["image"])
    assert tuned["logit_scale"] != pretrained["logit_scale"]
    stored = read_meta(find_step(workdir))["manifest"]
    for group in ("params/", "opt_state/", "ema/"):
        paths = [path for path in stored if path.startswith(group)]
        assert any("text/" in path for path in paths)
        assert any("image/" in path for path in paths) == (group == "params/")
    # a text tower that had not moved would be its own average
    assert stored["params/text/token_embed"]["digest"] != stored["ema/text/token_embed"]["digest"]
