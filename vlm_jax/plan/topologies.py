"""TPU chips and slice shapes that a plan can be made for, and the abstract devices that the compiler compiles for.

Nothing here needs a TPU: libtpu, the compiler, runs on any machine. Bandwidths serve the roofline only.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.schema import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation, per JAX device: a whole chip, but one of a chip's two cores on tpu7x.

    Attributes:
        hbm_bytes: what the compiler allows a program, from its own out-of-memory message (libtpu 0.0.42.1).
        hbm_bandwidth: bytes/s between HBM and the core.
        ici_bandwidth: bytes/s that a device can send over all of its links to neighbours in the slice.
        dcn_bandwidth: bytes/s that a device can send to another slice.
        shapes: of the slices that the vendor offers, in chips.
        devices_per_chip: JAX devices of a chip.
        options: what `jax.experimental.topologies` needs beside the name.
    """

    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    shapes: tuple[str, ...]
    devices_per_chip: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16")

# HBM and ICI bandwidth: Google Cloud's pages of the generations ("System architecture"); ICI is half of the figure that
# they call bidirectional, for v4 its all-reduce bandwidth of a pod by chips. DCN: Austin et al. 2025, How to Scale Your
# Model, "TPUs". tpu7x: half a chip each.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        hbm_bytes=int(30.75 * GIB),
        hbm_bandwidth=1.2e12,
        ici_bandwidth=270e9,
        dcn_bandwidth=6.25e9,
        shapes=(*_CUBES, "12x16x16"),
        # both cores of a chip as one device, as JAX runs on v4
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(
        hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819e9, ici_bandwidth=200e9, dcn_bandwidth=3.125e9, shapes=_FLAT
    ),
    "v5p": Chip(
        hbm_bytes=int(95.74 * GIB),
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        dcn_bandwidth=6.25e9,
        shapes=(*_CUBES, "16x16x16", "16x16x24"),
    ),
    "v6e": Chip(
        hbm_bytes=int(31.25 * GIB), hbm_bandwidth=1638e9, ici_bandwidth=400e9, dcn_bandwidth=12.5e9, shapes=_FLAT
    ),
    "tpu7x": Chip(
        hbm_bytes=int(94.75 * GIB),
        hbm_bandwidth=7380e9 / 2,
        ici_bandwidth=600e9 / 2,
        dcn_bandwidth=12.5e9 / 2,
        shapes=(*_CUBES, "16x16x16"),
        devices_per_chip=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of one shape.

    Attributes:
        chip_name: a key of `CHIPS`.
        shape: of a slice, in chips: "16x16".
        slices: how many, joined by the data-centre network.
    """

    chip_name: str
    shape: str
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The generation."""
        return CHIPS[self.chip_name]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(map(int, self.shape.split("x")))

    @property
    def device_count(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices_per_chip

    def __str__(self) -> str:
        """As on the command line, with the slices: `2 x v5e:16x16`."""
        return ("" if self.slices == 1 else f"{self.slices} x ") + f"{self.chip_name}:{self.shape}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5e:16x16` as a topology.

    Raises:
        ConfigError: no such chip or shape; names the nearest.
    """
    chip_name, _, shape = text.partition(":")
    if chip_name not in CHIPS:
        near = difflib.get_close_matches(chip_name.lower(), CHIPS, n=1)
        hint = f"; did you mean {near[0]}:{shape or CHIPS[near[0]].shapes[0]}?" if near else ""
        raise ConfigError(f"--topology={text}: there is no TPU {chip_name!r}; known are {', '.join(CHIPS)}{hint}")
    shapes = CHIPS[chip_name].shapes
    if shape not in shapes:
        near = " or ".join(f"{chip_name}:{name}" for name in _nearest_shapes(shape, shapes))
        raise ConfigError(
            f"--topology={text}: {chip_name} has no slice of shape {shape!r}; the nearest: {near} "
            "(--topology=list shows all)"
        )
    if slices < 1:
        raise ConfigError(f"--slices={slices} must be at least 1")
    return Topology(chip_name, shape, slices)


def _nearest_shapes(shape: str, shapes: tuple[str, ...]) -> list[str]:
    """The same sizes in another order, else the next smaller and larger number of chips, in the table's order."""
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    same = [name for name in shapes if sorted(map(int, name.split("x"))) == sorted(sizes)]
    if same:
        return same
    chips = {name: math.prod(map(int, name.split("x"))) for name in shapes}
    wanted = math.prod(sizes) if sizes else 1
    below = [name for name in shapes if chips[name] <= wanted]
    above = [name for name in shapes if chips[name] > wanted]
    return below[-1:] + above[:1]


def describe_topologies() -> str:
    """Every chip with its shapes, as `--topology=list` prints them."""
    lines = ["--topology=CHIP:SHAPE, shapes in chips; --slices=N for several of them"]
    for name, chip in CHIPS.items():
        cores = "" if chip.devices_per_chip == 1 else f", {chip.devices_per_chip} devices a chip"
        lines.append(
            f"{name:6s} {chip.hbm_bytes / GIB:6.2f} GiB a device for a program, HBM {chip.hbm_bandwidth / 1e9:.0f} "
            f"GB/s, ICI {chip.ici_bandwidth / 1e9:.0f} GB/s sent{cores}"
        )
        lines.append("       " + "  ".join(chip.shapes))
    return "\n".join(lines)


def set_environment() -> None:
    """Sets what JAX and libtpu must find in the environment, before they are loaded, on a machine without TPU."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # There is no metadata server to ask for a host's TPU, and no chip that two processes could fight for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these libtpu complains on stderr about the pod that this machine is no part of; programs are the same.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def require_libtpu() -> None:
    """Raises `ConfigError` when the compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "planning for a TPU needs its compiler, libtpu, which runs on any Linux machine: pip install -e '.[tpu]'"
        )


def abstract_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, of which no array can be made, but for which programs compile.

    Raises:
        ConfigError: libtpu is missing, or does not know the shape.
    """
    require_libtpu()
    set_environment()
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.chip_name}:{topology.shape}"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (JaxRuntimeError, RuntimeError) as error:
        raise ConfigError(f"--topology={name}: the installed libtpu can't make it: {error}") from error
    if len(devices) != topology.device_count:
        raise ConfigError(
            f"--topology={name}: libtpu makes {len(devices)} devices of it and not the {topology.device_count} of "
            "topologies.py; the table there must be brought up to this libtpu"
        )
    return list(devices)
