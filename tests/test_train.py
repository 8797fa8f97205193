"""The loop: a broken run ends with the bits of an unbroken one; bad numbers, other configs and finished runs."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

import vlm_jax
from vlm_jax.checkpoint import CheckpointConfig, Checkpointer
from vlm_jax.goodput import is_ledger_record
from vlm_jax.preemption import EXIT_PREEMPTED, StopRequest
from vlm_jax.schema import ConfigError
from vlm_jax.train import TrainingError, train

TIMES = ("time", "time/seconds_per_step", "time/data_wait", "time/examples_per_second")


def train_tiny(workdir: Path, **overrides: Any) -> int:
    return train(tiny.config(mesh__data=2, mesh__fsdp=4, **overrides), str(workdir))


def metrics(workdir: Path) -> list[dict[str, float]]:
    """What the numbers of a run are: every record but the ledger's, without times."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records if not is_ledger_record(r)]


def final_params(workdir: Path) -> Any:
    return tiny.host(vlm_jax.load(workdir).params)


class StopAt(StopRequest):
    """A stop request that comes before a chosen step."""

    step = 0

    def now(self, step: int) -> bool:
        return step == self.step


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    assert train_tiny(workdir, train__eval_every=3) == 0
    return workdir


def test_a_run_leaves_what_it_promises(unbroken: Path) -> None:
    lines = metrics(unbroken)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert all(math.isfinite(loss) for loss in losses)
    evaluation = json.loads((unbroken / "eval.json").read_text())
    assert evaluation["step"] == 8
    assert 0 <= evaluation["zero_shot/digits/top1"] <= 1
    assert [line["step"] for line in lines if "zero_shot/digits/top1" in line] == [3, 6, 8]
    assert list((unbroken / "tensorboard").iterdir())
    assert json.loads((unbroken / "config.json").read_text())["name"] == "tiny"


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_goes_on_bit_for_bit(
    stop: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "step", stop)
        patch.setattr("vlm_jax.train.StopRequest", StopAt)
        assert train_tiny(tmp_path, train__eval_every=3) == EXIT_PREEMPTED
    assert len([line for line in metrics(tmp_path) if "loss" in line]) == stop
    assert train_tiny(tmp_path, train__eval_every=3) == 0
    assert metrics(tmp_path) == metrics(unbroken)
    tiny.assert_trees_equal(final_params(tmp_path), final_params(unbroken))


def test_a_finished_run_is_left_as_it_is(unbroken: Path) -> None:
    before = {p: p.read_bytes() for p in unbroken.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl")}
    assert train_tiny(unbroken, train__eval_every=3) == 0
    assert {p: p.read_bytes() for p in before} == before


def test_a_workdir_of_another_config_is_refused_with_the_difference(unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.optimizer\.learning_rate: 0\.001 -> 0\.5"):
        train_tiny(unbroken, train__eval_every=3, optimizer__learning_rate=0.5)


def test_a_start_that_failed_does_not_claim_the_workdir(tmp_path: Path) -> None:
    """A wrong path, then the right one: there was no run yet that could be another one."""
    with pytest.raises(ConfigError, match="nowhere"):
        train_tiny(tmp_path, data__path="/nowhere/pairs.csv")
    assert train_tiny(tmp_path, train__steps=1, evals="()") == 0


def test_another_shape_is_reported_as_another_config(unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.objective\.model\.embed_dim: 16 -> 8"):
        train_tiny(unbroken, train__eval_every=3, objective__model__embed_dim=8)


def test_what_only_decides_speed_may_change(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mesh and other threads go on with the same examples and the same numbers to rounding."""
    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "step", 4)
        patch.setattr("vlm_jax.train.StopRequest", StopAt)
        assert train_tiny(tmp_path, train__eval_every=3) == EXIT_PREEMPTED
    faster = {f"objective__model__{tower}__remat": "full" for tower in ("image", "text")}
    faster |= {f"objective__model__{tower}__scan": "false" for tower in ("image", "text")}
    faster |= {"objective__model__image__attention_impl": "xla", "train__accum_steps": 2, "data__threads": 3}
    assert train(tiny.config(mesh__data=8, train__eval_every=3, **faster), str(tmp_path)) == 0
    for got, want in zip(metrics(tmp_path), metrics(unbroken), strict=True):
        assert got.get("loss", 0) == pytest.approx(want.get("loss", 0), rel=1e-4)


def test_a_diverging_run_stops_and_its_checkpoints_stay_finite(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 steps in a row.*config\.optimizer\.clip_norm"):
        train_tiny(tmp_path, optimizer__learning_rate=1e38, train__max_nonfinite=3, checkpoint__every=1)
    for leaf in jax.tree.leaves(final_params(tmp_path)):
        assert np.isfinite(leaf).all()


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "step", 6)
        patch.setattr("vlm_jax.train.StopRequest", StopAt)
        assert train_tiny(tmp_path, train__eval_every=3) == EXIT_PREEMPTED
    assert Checkpointer(tmp_path / "checkpoints", CheckpointConfig()).latest_step() == 6
    for path in (tmp_path / "checkpoints" / "6" / "state" / "d").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    assert train_tiny(tmp_path, train__eval_every=3) == 0
    assert "checkpoint of step 6 is damaged" in caplog.text
    tiny.assert_trees_equal(final_params(tmp_path), final_params(unbroken))
    assert metrics(tmp_path) == metrics(unbroken)


def test_warm_start_takes_parameters_and_nothing_else(unbroken: Path, tmp_path: Path) -> None:
    assert train_tiny(tmp_path, init_from__path=str(unbroken), optimizer__learning_rate=0.0, train__steps=2) == 0
    tiny.assert_trees_equal(final_params(tmp_path), final_params(unbroken))
    assert metrics(tmp_path)[0]["step"] == 1


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_slots_of_any_form_come_back(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factored and partitioned slots, stacks mapped layer by layer, bf16 moments: saved, restored, gone on with."""
    settings = {"optimizer": optimizer, "optimizer__learning_rate": 1e-2, "evals": "()", "train__steps": 4}
    assert train_tiny(tmp_path / "unbroken", **settings) == 0
    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "step", 2)
        patch.setattr("vlm_jax.train.StopRequest", StopAt)
        assert train_tiny(tmp_path / "stopped", **settings) == EXIT_PREEMPTED
    assert train_tiny(tmp_path / "stopped", **settings) == 0
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    tiny.assert_trees_equal(final_params(tmp_path / "stopped"), final_params(tmp_path / "unbroken"))


def test_one_compile_for_a_run_and_one_for_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(StopAt, "step", 3)
    with monkeypatch.context() as patch, jax.log_compiles():
        patch.setattr("vlm_jax.train.StopRequest", StopAt)
        assert train_tiny(tmp_path, train__eval_every=2, train__ema_decay=0.9, train__accum_steps=2) == EXIT_PREEMPTED
    assert len(compiles_of_the_step(caplog)) == 1
    caplog.clear()
    with jax.log_compiles():
        assert train_tiny(tmp_path, train__eval_every=2, train__ema_decay=0.9, train__accum_steps=2) == 0
    assert len(compiles_of_the_step(caplog)) == 1


def compiles_of_the_step(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [m for m in caplog.messages if m.startswith("Finished XLA compilation of jit(step)")]


def test_a_profile_of_chosen_steps(tmp_path: Path) -> None:
    for name, count in (("inside", 2), ("beyond_the_last_step", 9)):
        profile = {"train__profile_start": 1, "train__profile_steps": count}
        assert train_tiny(tmp_path / name, train__steps=4, evals="()", **profile) == 0
        assert list((tmp_path / name / "tensorboard").rglob("*.xplane.pb"))
