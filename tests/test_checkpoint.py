"""Checkpoints: round trips, other meshes, retention, interrupted and failing saves, parameters alone."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_runs import (
    META,
    abstract,
    assert_same,
    damaged_copy,
    data_file,
    make,
    make_mesh,
    make_state,
    save,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    DamagedStepError,
    read_params,
    save_params,
)

# Orbax abandons what it was doing when it meets damage; pytest drops the filter that the package installs.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'Store", "ignore:Exception ignored in")


def test_round_trip_of_state_and_meta(tmp_path):
    checkpointer = make(tmp_path)
    assert checkpointer.restore(abstract(make_state())) is None
    state = make_state(step=3)
    assert save(checkpointer, 3, state, extra_meta={"note": "hello"})
    assert not save(checkpointer, 3, state)
    restored = checkpointer.restore(abstract(state))
    assert restored is not None
    assert_same(restored[0], state)
    for a, b in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding
    meta = restored[1]
    assert {key: meta[key] for key in META} == META
    assert (meta["step"], meta["data_position"], meta["note"]) == (3, 96, "hello")
    assert meta["manifest"]["opt_state/0/mu/image/kernel"]["dtype"] == "bfloat16"
    checkpointer.close()


def test_restores_on_other_device_counts(tmp_path):
    checkpointer = make(tmp_path)
    state = make_state(8, step=1)
    save(checkpointer, 1, state)
    for devices in (2, 1, 4):
        target = make_state(devices, step=2)
        restored = checkpointer.restore(abstract(target))
        assert restored is not None
        assert_same(restored[0], state)
        assert len(restored[0]["params"]["image"]["kernel"].sharding.device_set) == devices
    checkpointer.close()


def test_buffers_may_be_donated_right_after_save(tmp_path):
    checkpointer = make(tmp_path)
    state = make_state(step=1)
    expected = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    save(checkpointer, 1, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(state))
    restored = checkpointer.restore(abstract(make_state()))
    assert restored is not None
    assert_same(restored[0], expected)
    checkpointer.close()


def test_retention_keeps_newest_and_every_nth(tmp_path):
    checkpointer = make(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        save(checkpointer, step)
    checkpointer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]


def test_schedule_and_refusals(tmp_path):
    checkpointer = make(tmp_path, every=5)
    assert [step for step in range(11) if checkpointer.due(step)] == [5, 10]
    assert not save(checkpointer, 3)
    assert checkpointer.latest_step() is None
    assert save(checkpointer, 7, force=True)
    with pytest.raises(CheckpointError, match="older than the newest"):
        save(checkpointer, 5)
    with pytest.raises(CheckpointError, match="only arrays can be saved, not lr"):
        save(checkpointer, 10, {"lr": 0.1})
    with pytest.raises(CheckpointError, match="plain JSON data"):
        save(checkpointer, 10, config={"dtype": jnp.float32})
    problems = CheckpointConfig(every=0, keep=0, keep_every=-1).problems()
    assert [key for key, _ in problems] == ["every", "keep", "keep_every"]
    assert not list(CheckpointConfig().problems())
    checkpointer.close()


@pytest.fixture
def file_size_limit():
    """Sets the size beyond which writing to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_wait(checkpointer: Checkpointer, step: int, state) -> None:
    save(checkpointer, step, state)
    checkpointer.wait()


def save_both(checkpointer: Checkpointer, state) -> None:
    """The failure of step 1 may show at its own call or, as it is written in the background, at the next."""
    save(checkpointer, 1, state)
    save(checkpointer, 2, state)


def test_a_failed_save_is_reported_and_the_run_can_go_on(tmp_path, file_size_limit):
    checkpointer = make(tmp_path, keep=1)
    big = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**18))}}
    assert save(checkpointer, 1, big)
    checkpointer.wait()
    file_size_limit(2**19)
    with pytest.raises(CheckpointError, match=r"(?s)step 2 to .* failed; the checkpoint of step 1 is still good.*room"):
        save_and_wait(checkpointer, 2, big)
    file_size_limit(resource.RLIM_INFINITY)
    assert checkpointer.latest_step() == 1
    restored = checkpointer.restore(abstract(big))
    assert restored is not None
    assert_same(restored[0], big)
    assert save(checkpointer, 2, big)
    checkpointer.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_failed_save_surfaces_at_the_next_one(tmp_path, file_size_limit):
    checkpointer = make(tmp_path)
    file_size_limit(2**16)
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**18))}
    with pytest.raises(CheckpointError, match=r"step 1 .* failed; there is no earlier one"):
        save_both(checkpointer, big)
    file_size_limit(resource.RLIM_INFINITY)
    checkpointer.close()


SAVING = """
    import sys
    import jax.numpy as jnp
    from vlm_jax.checkpoint import CheckpointConfig, Checkpointer

    checkpointer = Checkpointer(sys.argv[1], CheckpointConfig(every=1, keep=2))
    start = (checkpointer.latest_step() or 0) + 1
    print("ready", flush=True)
    for step in range(start, 1000):
        state = {"w": jnp.full((64, 1024), step, jnp.float32), "v": jnp.arange(9.0)}
        checkpointer.save(step, state, data_position=step, config={}, tokenizer=None, preprocess={})
"""


def test_kill_while_saving_leaves_a_good_checkpoint(tmp_path):
    target = {"w": jax.ShapeDtypeStruct((64, 1024), jnp.float32), "v": jax.ShapeDtypeStruct((9,), jnp.float32)}
    directory, previous = tmp_path / "checkpoints", 0
    for delay in (0.3, 0.41, 0.57):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVING), str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # Waiting for a first commit keeps the moment of the kill inside the saves on a slow machine.
        deadline = time.monotonic() + 60
        while not any(p.name.isdecimal() and int(p.name) > previous for p in directory.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        checkpointer = Checkpointer(directory, CheckpointConfig(every=1, keep=2))
        restored = checkpointer.restore(target)
        checkpointer.close()
        assert restored is not None
        state, meta = restored
        assert meta["step"] > previous
        previous = meta["step"]
        assert (np.asarray(state["w"]) == previous).all()
        assert not (tmp_path / "damaged-checkpoints").exists()


def test_read_params_prefers_the_average_and_takes_any_path(tmp_path):
    checkpointer = make(tmp_path)
    for step in (1, 2):
        save(checkpointer, step, make_state(step=step, ema=True))
    checkpointer.close()
    new, old = make_state(step=2, ema=True), make_state(step=1, ema=True)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        params, meta = read_params(path)
        assert_same(params, new["ema"])
        assert meta["config"] == META["config"]
    assert_same(read_params(tmp_path, prefer="params")[0], new["params"])
    assert_same(read_params(tmp_path / "checkpoints" / "1")[0], old["ema"])
    assert len(params["image"]["kernel"].sharding.device_set) == 1


def test_read_params_onto_a_mesh(two_steps):
    sharding = NamedSharding(make_mesh(4), P("data"))
    for shardings in (sharding, {"image": {"kernel": sharding}, "text": {"bias": sharding}}):
        params, _ = read_params(two_steps, shardings=shardings)
        assert_same(params, make_state(step=2)["params"])
        assert params["image"]["kernel"].sharding == sharding
    with pytest.raises(CheckpointError, match=r"no sharding is given .*: text/bias"):
        read_params(two_steps, shardings={"image": {"kernel": sharding}})


def test_read_params_refuses_damage_and_absence(two_steps, tmp_path):
    root = damaged_copy(two_steps, tmp_path, "run")
    os.truncate(data_file(root / "checkpoints" / "2"), 10)
    with pytest.raises(DamagedStepError, match=r"can't be read.*; give another step of"):
        read_params(root)
    read_params(root / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*doesn't exist"):
        read_params(tmp_path / "nothing")
    checkpointer = make(tmp_path / "bare")
    save(checkpointer, 1, {"step": jnp.int32(1)})
    checkpointer.close()
    with pytest.raises(CheckpointError, match="no parameters, only: step"):
        read_params(tmp_path / "bare")


def test_save_params_loads_like_a_run(tmp_path):
    params = jax.tree.map(np.asarray, make_state()["params"])
    save_params(tmp_path / "imported", params, **META)
    restored, meta = read_params(tmp_path / "imported")
    assert_same(restored, params)
    assert {key: meta[key] for key in META} == META
    with pytest.raises(CheckpointError, match="holds step 0 already"):
        save_params(tmp_path / "imported", params, **META)
