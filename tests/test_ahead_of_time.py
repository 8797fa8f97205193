"""Steps compiled ahead of time: what is planned is what runs; a file that does not fit is a sentence."""

import json
import zipfile
from pathlib import Path
from typing import Any

import command
import jax
import pytest
import tiny

from vlm_jax import compiled
from vlm_jax.assemble import Program, build_program
from vlm_jax.config import load_config
from vlm_jax.mesh import make_mesh
from vlm_jax.plan.compile import trace_steps
from vlm_jax.train import train


def test_what_is_planned_is_what_runs() -> None:
    """The loop's first compile and the planner's lower to one and the same StableHLO."""
    config = load_config(str(command.ROOT / "configs/clip_l14.py:smoke"), {"mesh.data": 2, "mesh.fsdp": 4})
    trained, planned = build_program(config), build_program(config, make_mesh(config.mesh, jax.devices()))
    with jax.set_mesh(planned.mesh):
        (traced,) = trace_steps(planned)
        plan_hash = compiled.program_hash(traced.traced.lower())
    assert compiled.program_hash(compiled.lower(trained, 0)) == plan_hash
    # what a running step would compile for the arrays that it is given, without anybody's help
    state, batch = trained.setup.abstract, trained.batch_shapes(0)
    step: Any = trained.step
    with jax.set_mesh(trained.mesh):
        assert compiled.program_hash(step.lower(state, batch)) == plan_hash
    other = build_program(load_config(str(command.ROOT / "configs/clip_l14.py:smoke"), {"mesh.data": 8}))
    assert compiled.program_hash(compiled.lower(other, 0)) != plan_hash


def compile_step(program: Program, path: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    return compiled.compile_step(program, 0, str(path), said.append), said


def run(program: Program, step: Any) -> Any:
    with jax.set_mesh(program.mesh):
        state, _ = step(program.setup.init(), tiny.batch(program.mesh))
    return state.params


def test_a_saved_step_is_loaded_and_gives_the_bits_of_the_compiled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, file = tiny.program(tiny.mesh(data=8)), tmp_path / "step"
    compiled.save(str(file), program)
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled again"))
        step, said = compile_step(tiny.program(tiny.mesh(data=8)), file)
    assert said == []
    tiny.assert_trees_equal(run(program, step), run(program, program.step))


def test_a_file_that_does_not_fit_is_named_and_the_step_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, program = tmp_path / "step", tiny.program()
    compiled.save(str(file), program)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: "compiled here")
    step, (said,) = compile_step(tiny.program(optimizer__weight_decay=0.2), file)
    assert step == "compiled here"
    assert f"--compiled={file} is not used" in said and "another program's" in said and "program: " in said
    with zipfile.ZipFile(file) as saved:
        facts, payload = json.loads(saved.read("0/facts.json")), saved.read("0/step")
    with zipfile.ZipFile(file, "w") as changed:
        changed.writestr("0/facts.json", json.dumps(facts | {"jax": "0.0.1"}))
        changed.writestr("0/step", payload)
    step, (said,) = compile_step(program, file)
    assert step == "compiled here" and f"jax: '0.0.1' -> '{jax.__version__}'" in said
    file.write_bytes(b"no archive")
    step, (said,) = compile_step(program, file)
    assert step == "compiled here" and "can't be read" in said


def test_a_run_with_a_compiled_step_ends_as_one_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.config(train__steps=2, evals="()", mesh__data=8)
    compiled.save(str(tmp_path / "step"), build_program(config))
    with jax.log_compiles():
        assert train(config, str(tmp_path / "loaded"), compiled_file=str(tmp_path / "step")) == 0
    assert not [m for m in caplog.messages if m.startswith("Finished XLA compilation of jit(step)")]
    assert train(config, str(tmp_path / "made")) == 0
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("loaded", "made")
    ]
    assert losses[0] == losses[1]
