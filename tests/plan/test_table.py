"""The nightly table: its rows can be planned, and it goes on where it was stopped."""

from pathlib import Path
from typing import Any

import command
import pytest
from fake_compiler import FakeCompiler

from vlm_jax.config import load_config
from vlm_jax.plan import table
from vlm_jax.plan.cache import PlanCache
from vlm_jax.plan.checks import config_on
from vlm_jax.plan.topologies import parse_topology


@pytest.mark.parametrize("row", table.PLANS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_every_row_fits_its_topology(row: tuple[str, str, int, dict[str, str]]) -> None:
    name, shape, slices, overrides = row
    topology = parse_topology(shape, slices)
    config = config_on(load_config(str(command.ROOT / "configs" / name), overrides), topology)
    assert config.mesh.dcn_data == slices


def test_rows_are_written_as_they_are_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, cache, file = FakeCompiler("none"), tmp_path / "cache.jsonl", tmp_path / "plans.md"
    monkeypatch.setattr(table, "to_json", compiler.plan_json)

    def stop_at(count: int) -> None:
        def make_plan(*arguments: Any) -> Any:
            if len(compiler.compiled) == count:
                raise KeyboardInterrupt
            return compiler.make_plan(*arguments)

        monkeypatch.setattr(table, "make_plan", make_plan)

    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        table.write(PlanCache(cache), file, command.ROOT / "configs")
    assert file.read_text().count("\n| `") == 2
    stop_at(len(table.PLANS))
    table.write(PlanCache(cache), file, command.ROOT / "configs")
    assert len(compiler.compiled) == len(table.PLANS)
    assert file.read_text().count("\n| `") == len(table.PLANS)
    assert "| `clip_l14.py` --config.data.batch_size=65536 |" in file.read_text()
    # Planned anew, as by another version: what is not planned yet keeps the row that it has.
    written = file.read_text()
    row = next(line for line in written.splitlines() if "v6e:16x16" in line)
    changed = written.replace(row, row.rsplit(" | ", 1)[0] + " | of before |")
    file.write_text(changed)
    compiler.compiled.clear()
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        table.write(PlanCache(tmp_path / "other.jsonl"), file, command.ROOT / "configs")
    assert file.read_text() == changed
