"""Damaged checkpoints: what is found, named, moved aside, and what is no damage."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_runs import (
    abstract,
    assert_same,
    damaged_copy,
    data_file,
    files_of,
    flip,
    make,
    make_mesh,
    make_state,
    save,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.checkpoint import (
    CheckpointError,
    DamagedStepError,
    read_params,
)

# Orbax abandons what it was doing when it meets damage; pytest drops the filter that the package installs.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'Store", "ignore:Exception ignored in")


def test_a_damaged_newest_step_is_named_moved_and_its_elder_used(two_steps, tmp_path, caplog):
    root = damaged_copy(two_steps, tmp_path, "run")
    os.truncate(data_file(root / "checkpoints" / "2"), 10)
    checkpointer = make(root)
    restored = checkpointer.restore(abstract(make_state()))
    assert restored is not None
    assert_same(restored[0], make_state(step=1))
    assert restored[1]["step"] == 1
    assert "step 2 is damaged" in caplog.text
    assert str(root / "checkpoints" / "2") in caplog.text
    assert files_of(root / "damaged-checkpoints" / "2-0")
    # The run repeats step 2 and saves it again; damaged again, it is moved beside the first.
    assert checkpointer.latest_step() == 1
    assert save(checkpointer, 2)
    checkpointer.wait()
    shutil.rmtree(root / "checkpoints" / "2" / "state")
    assert checkpointer.restore(abstract(make_state())) is not None
    assert (root / "damaged-checkpoints" / "2-1").is_dir()
    checkpointer.close()


def test_a_flipped_bit_names_the_array(two_steps, tmp_path, caplog):
    """The arrays are found in the file by their bytes, so that the flip's victim is known."""
    root = tmp_path / "run"
    checkpointer = make(root)
    values = np.random.default_rng(0).integers(0, 2**32, size=(2, 4096), dtype=np.uint32)
    good = {"params": {"left": jnp.asarray(values[0]), "right": jnp.asarray(values[1])}}
    for step in (1, 2):
        save(checkpointer, step, good)
    checkpointer.wait()
    path = data_file(root / "checkpoints" / "2")
    # Random words don't compress, so zstd stores them as they are.
    place = path.read_bytes().find(values[1].tobytes()[:64])
    assert place > 0
    flip(path, 8 * (place + 40) + 3)
    restored = checkpointer.restore(abstract(good))
    assert restored is not None
    assert restored[1]["step"] == 1
    assert "damaged arrays: params/right" in caplog.text
    assert "params/left" not in caplog.text
    checkpointer.close()


@pytest.mark.parametrize("way", ["flip", "truncate", "delete", "empty"])
def test_no_damage_to_any_file_is_silent(two_steps, tmp_path, way):
    """Whatever is done to a file of the newest step: the result is that step or, said aloud, its elder; never else."""
    expected = {step: make_state(step=step) for step in (1, 2)}
    count = len(files_of(two_steps / "checkpoints" / "2"))
    fallbacks = 0
    for index in range(count):
        root = damaged_copy(two_steps, tmp_path, f"run{index}")
        path = files_of(root / "checkpoints" / "2")[index]
        size = path.stat().st_size
        if not size and way != "delete":
            continue
        if way == "flip":
            flip(path, int(np.random.default_rng(index).integers(8 * size)))
        elif way == "truncate":
            os.truncate(path, size // 2)
        elif way == "empty":
            os.truncate(path, 0)
        else:
            path.unlink()
        checkpointer = make(root)
        restored = checkpointer.restore(abstract(make_state()))
        checkpointer.close()
        assert restored is not None
        state, meta = restored
        assert_same(state, expected[meta["step"]])
        assert (root / "damaged-checkpoints").exists() == (meta["step"] == 1)
        fallbacks += meta["step"] == 1
    assert fallbacks > 0


def test_a_thousand_flips_in_the_arrays_file_none_silent(two_steps, tmp_path):
    root = damaged_copy(two_steps, tmp_path, "run")
    step = root / "checkpoints" / "2"
    path = data_file(step)
    raw = path.read_bytes()
    expected, caught = make_state(step=2)["params"], 0
    for bit in np.random.default_rng(0).choice(8 * len(raw), size=1000, replace=False):
        flip(path, int(bit))
        try:
            params, _ = read_params(step)
            assert_same(params, expected)  # the bit belongs to another array, or to none
        except DamagedStepError:
            caught += 1
        path.write_bytes(raw)
    assert caught > 100


def test_all_steps_damaged_is_an_error_that_repeats(two_steps, tmp_path):
    root = damaged_copy(two_steps, tmp_path, "run")
    for step in (1, 2):
        (root / "checkpoints" / str(step) / "meta" / "metadata").write_text('{"step": 9}')
    for _ in range(2):
        checkpointer = make(root)
        with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* usable.*step 2: .*sha256.*step 1: "):
            checkpointer.restore(abstract(make_state()))
        checkpointer.close()
    assert not (root / "damaged-checkpoints").exists()


def test_another_models_state_lists_every_difference_and_moves_nothing(two_steps, tmp_path):
    root = damaged_copy(two_steps, tmp_path, "run")
    target = abstract(make_state())
    target["params"] = {
        "image": {
            "kernel": jax.ShapeDtypeStruct((32, 4), jnp.float32),
            "scale": jax.ShapeDtypeStruct((4,), jnp.float32),
        },
    }
    target["step"] = jax.ShapeDtypeStruct((), jnp.uint32)
    checkpointer = make(root)
    with pytest.raises(CheckpointError) as error:
        checkpointer.restore(target)
    lines = str(error.value).splitlines()
    assert "init_from" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "params/image/scale: not in the checkpoint",
        "params/text/bias: in the checkpoint, but not in this model",
        "params/image/kernel: float32[16, 4] in the checkpoint, float32[32, 4] in this model",
        "step: int32[] in the checkpoint, uint32[] in this model",
    ]
    checkpointer.close()
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == ["1", "2"]


def test_a_sharding_that_does_not_fit_is_no_damage(two_steps, tmp_path):
    root = damaged_copy(two_steps, tmp_path, "run")
    target = abstract(make_state())
    sharding = NamedSharding(make_mesh(8), P(None, "data"))
    target["params"]["image"]["kernel"] = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)
    checkpointer = make(root)
    with pytest.raises(ValueError, match="divi"):
        checkpointer.restore(target)
    checkpointer.close()
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == ["1", "2"]
