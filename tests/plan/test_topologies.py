"""Names of topologies, and what is said of wrong ones before libtpu is asked."""

import importlib.util

import pytest

from vlm_jax.mesh import MeshConfig, make_mesh
from vlm_jax.plan import topologies
from vlm_jax.plan.__main__ import main
from vlm_jax.schema import ConfigError


@pytest.mark.parametrize(
    ("text", "slices", "chips", "devices"),
    [
        ("v5e:16x16", 1, 256, 256),
        ("v5e:16x16", 2, 512, 512),
        ("v4:4x8x8", 1, 256, 256),
        ("tpu7x:2x2x1", 1, 4, 8),
        ("v6e:1x1", 1, 1, 1),
    ],
)
def test_counts(text: str, slices: int, chips: int, devices: int) -> None:
    topology = topologies.parse_topology(text, slices)
    assert (topology.chips, topology.device_count) == (chips, devices)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:16x15"], ["no slice of shape '16x15'", "v5e:8x16 or v5e:16x16"]),
        (["--topology=v4:8x4x8"], ["the nearest: v4:4x8x8 ("]),
        (["--topology=v5e"], ["v5e:1x1"]),
        (["--topology=v7x:2x2x1"], ["no TPU 'v7x'", "tpu7x"]),
        (["--topology=tpu7:4x4x4"], ["did you mean tpu7x:4x4x4?"]),
        (["--topology=v5e:2x2", "--slices=0"], ["--slices=0", "at least 1"]),
        ([], ["--topology is missing", "--topology=list"]),
    ],
)
def test_wrong_names_are_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config=configs/clip_digits.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_the_list_names_every_chip_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology=list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and shape in printed for name, chip in topologies.CHIPS.items() for shape in chip.shapes)


def test_without_libtpu_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu.*pip install -e '\.\[tpu\]'"):
        topologies.require_libtpu()


def test_a_mesh_may_split_an_axis_of_the_torus() -> None:
    """16 is no product of whole axes of 4 x 8 x 8."""
    mesh = make_mesh(
        MeshConfig(data=1, fsdp=-1, fsdp_most=16), topologies.abstract_devices(topologies.parse_topology("v4:4x8x8"))
    )
    assert dict(mesh.shape) == {"data": 16, "fsdp": 16, "tensor": 1, "sequence": 1}
    assert len({device.id for device in mesh.devices.flat}) == 256
