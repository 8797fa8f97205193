"""The table of plans in docs/plans.md: every published recipe on the chips that it is meant for."""

import sys
from pathlib import Path

from vlm_jax.config import load_config
from vlm_jax.plan.cache import PlanCache
from vlm_jax.plan.plan import make_plan, to_json
from vlm_jax.plan.report import TABLE_HEAD, flags_text, table_row
from vlm_jax.plan.topologies import parse_topology

# All weights, gradients and slots in as many shards as there are chips, and nothing kept but the blocks' inputs.
_FRUGAL = {
    "mesh.fsdp_most": "0",
    "objective.model.image.remat": "full",
    "objective.model.text.remat": "full",
}

# (config, topology, slices, overrides)
PLANS: tuple[tuple[str, str, int, dict[str, str]], ...] = (
    ("clip_l14.py", "v5e:16x16", 1, {}),
    ("clip_l14.py", "v6e:16x16", 1, {}),
    ("clip_l14.py", "v5e:16x16", 1, _FRUGAL),
    ("clip_l14.py", "v6e:16x16", 1, _FRUGAL),
    ("clip_l14.py", "v5p:4x4x4", 1, {}),
    ("clip_l14.py", "v4:4x8x8", 1, {}),
    ("clip_l14.py", "v5e:16x16", 2, {"data.batch_size": "65536"}),
    ("clip_l14.py", "v5e:8x8", 1, {"train.accum_steps": "4"}),
    ("aim_7b.py", "v5e:16x16", 1, {}),
    ("aim_3b.py", "v5e:16x16", 1, {}),
    ("aim_1b.py", "v5e:8x16", 1, {}),
    ("aim_600m.py", "v5e:8x8", 1, {}),
    ("aimv2_l14.py", "v5e:16x16", 1, {}),
    ("mae_b16.py", "v5e:8x8", 1, {}),
    ("mae_l16.py", "v5e:8x8", 1, {}),
    ("mae_h14.py", "v5e:8x8", 1, {}),
    ("beit_b16.py", "v5e:8x8", 1, {}),
    ("beit_l16.py", "v5e:8x8", 1, {}),
    ("simmim_vit_b16.py", "v5e:8x8", 1, {}),
    ("simmim_swin_b.py", "v5e:8x8", 1, {}),
    ("simmim_swin_l.py", "v5e:8x8", 1, {}),
    ("dinov2_vits14.py", "v5e:8x8", 1, {}),
    ("dinov2_vitl14.py", "v5e:16x16", 1, {}),
    ("siglip_b16.py", "v5e:16x16", 1, {}),
    ("coca_l14.py", "v5e:16x16", 1, {}),
    ("clip_l14_336.py", "v5e:16x16", 1, {}),
    ("clip_b16.py", "v5e:8x8", 1, {}),
    ("clip_b32.py", "v5e:8x8", 1, {}),
    ("clip_h14.py", "v5e:16x16", 1, {}),
    ("clip_rn50.py", "v5e:16x16", 1, {}),
    ("siglip_so400m.py", "v5e:16x16", 1, {}),
    ("flip_l16.py", "v5e:16x16", 1, {}),
    ("lit_b16.py", "v5e:8x8", 1, {}),
    ("datacomp_xl_l14.py", "v5e:16x16", 1, {}),
    ("lm_135m.py", "v5e:8x8", 1, {}),
    ("lm_1b7.py", "v5e:16x16", 1, {}),
    ("mlm_bert_base.py", "v5e:8x8", 1, {}),
    ("llava15_7b_stage1.py", "v5e:8x8", 1, {}),
    ("llava15_7b_stage2.py", "v5e:8x8", 1, {}),
    ("llava15_7b_lora.py", "v5e:8x8", 1, {}),
    ("llava15_13b_stage2.py", "v5e:8x16", 1, {}),
    ("nanovlm_222m.py", "v5e:4x4", 1, {}),
    ("nanovlm_460m.py", "v5e:8x8", 1, {}),
    ("paligemma_3b_224.py", "v5e:16x16", 1, {}),
    ("paligemma_3b_448.py", "v5e:16x16", 1, {}),
    ("albef_4m.py", "v5e:4x4", 1, {}),
    ("albef_14m.py", "v5e:8x8", 1, {}),
)

_HEADER = """# Plans

What the compiler says of every recipe on the chips that it is meant for, made by `python -m vlm_jax.plan --table`.
HBM, FLOPs and communication are those of the compiled step on each device; the roofline is a lower bound of its time by
data sheet and no measurement. A ratio of FLOPs above 1 is a ResNet's: what a convolution multiplies with its padding is
a model FLOP by the field's custom, and no compiled one. A roofline of – is to be planned anew, since the count of HBM
traffic was mended. How to read them: [planning.md](planning.md).
"""


def write(cache: PlanCache, path: Path, configs: Path) -> None:
    """Plans every row, from the cache where it was planned before, and writes the table after each.

    A row that the file has already stays until it is planned again, so that a night that ends early loses none.

    Args:
        cache: of plans.
        path: of the Markdown file.
        configs: folder of the config files.
    """
    rows = _rows_of(path)
    keys = [
        (f"`{name}` {flags_text(overrides)}".strip(), str(parse_topology(shape, slices)))
        for name, shape, slices, overrides in PLANS
    ]
    for key, (name, shape, slices, overrides) in zip(keys, PLANS, strict=True):
        topology, config = parse_topology(shape, slices), load_config(str(configs / name), overrides)
        plan = cache.get(config, topology)
        if plan is None:
            print(f"planning {name} on {topology}", file=sys.stderr, flush=True)
            plan = to_json(make_plan(config, topology))
            cache.put(config, topology, plan)
        rows[key] = (*key, *table_row(plan)[2:])
        lines = [TABLE_HEAD, ("---",) * len(TABLE_HEAD), *(rows[key] for key in keys if key in rows)]
        path.write_text(_HEADER + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def _rows_of(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """The rows of a table that was written before, by config and topology."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines if line.startswith("| `")]
    return {(row[0], row[1]): row for row in cells if len(row) == len(TABLE_HEAD)}
