"""Model FLOPs of phases and of frozen parts, against the towers' own forward passes."""

import pytest
import tiny

from vlm_jax.flops import text_flops, vit_flops
from vlm_jax.model_flops import counted_flops, step_flops
from vlm_jax.parts import Part

IMAGE = vit_flops(width=32, depth=2, mlp_dim=64, patches=4, patch_size=4, embed_dim=16)
TEXT = text_flops(width=32, depth=2, mlp_dim=64, tokens=16, embed_dim=16)
ROWS = 16


def locked(name: str) -> tuple[Part, ...]:
    return (Part("locked", f"{name}/.*", frozen=True), Part("rest", ".*"))


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ((), 3 * IMAGE + 3 * TEXT),
        (locked("image"), IMAGE + 3 * TEXT),
        (locked("text"), 3 * IMAGE + TEXT),
    ],
    ids=["everything", "image_frozen", "text_frozen"],
)
def test_a_frozen_tower_costs_its_forward_pass(frozen: tuple[Part, ...], expected: int) -> None:
    program = tiny.program(**({"parts": frozen} if frozen else {}))
    flops = step_flops(program, 0)
    assert flops == pytest.approx(expected * ROWS, rel=0.03)
    counted, _ = counted_flops(program, 0)
    assert flops == pytest.approx(counted, rel=0.03)
