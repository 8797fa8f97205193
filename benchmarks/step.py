"""Examples/s and model FLOP/s of a config's train step, and of the same model in another library, alternating.

python benchmarks/step.py --config=configs/clip_b32.py:tiny [--peer=open_clip|transformers|none] [--compile]
                          [--rounds=5] [--steps=4] [--device=cpu|gpu] [--json=FILE] [--config.KEY=VALUE ...]

Both train on random batches that lie on the device already: forward, loss, backward, AdamW, clamp of the scale. The
two take turns in one process, so that whatever else the machine does falls on both. Two measures: wall time, and on a
CPU the processor time of this process (user and system), which other processes disturb less. Wall time also tells
how well a step fills the cores. On a GPU: `--config=configs/clip_l14.py --device=gpu --compile
--config.data.batch_size=64 --config.objective.model.image.remat=none --config.objective.model.text.remat=none`, and so
on by batch, with the peak memory of each.
Not for the input pipeline (`benchmarks/input.py`) or for TPU plans (`python -m vlm_jax.plan`).
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Threads of OpenMP that spin while they wait would count as work, and take the cores in the other's turn.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
# Else JAX takes three quarters of a GPU's memory at once, and the peer has the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from vlm_jax import platforms

# As `vlm_jax.main` does; KEEP_FREED_MEMORY=0 tells what it is worth.
if os.environ.get("KEEP_FREED_MEMORY") != "0":
    platforms.keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
import peers

from vlm_jax import assemble, flops
from vlm_jax.config import Config, load_config
from vlm_jax.main import split_overrides
from vlm_jax.mesh import batch_sharding
from vlm_jax.schema import ConfigError

Steps = Callable[[int], None]


class Turn(NamedTuple):
    """Seconds a step of one turn.

    Attributes:
        wall: on the clock.
        cpu: of the processors, user and system, all threads of this process.
    """

    wall: float
    cpu: float


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of the config."""
    parser = argparse.ArgumentParser(description="Speed of a train step, beside a peer's.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="path.py or path.py:variant")
    parser.add_argument("--peer", choices=("open_clip", "transformers", "none"), default=None, help="default: what is")
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--device", choices=("cpu", "gpu"), default=None, help="refuse to run on any other")
    parser.add_argument("--json", default="", help="file for the numbers")
    overrides, rest = split_overrides(arguments)
    return parser.parse_args(rest), overrides


def random_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A global batch as the config's method takes it: random pixels, random ids that end with the largest."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name, shape in config.objective.batch_shapes(config.data.batch_size).items():
        if name == "image":
            batch[name] = rng.integers(0, 256, shape.shape, dtype=np.uint8)
        elif name == "text":
            tower = config.objective.model.text  # pyright: ignore[reportAttributeAccessIssue]
            batch[name] = rng.integers(3, tower.vocab_size - 1, shape.shape).astype(np.int32)
            batch[name][:, -1] = tower.eos_id
        else:
            raise ConfigError(f"this benchmark makes images and texts, and {config.name} also wants {name!r}")
    return batch


def our_steps(config: Config, batch: dict[str, np.ndarray]) -> Steps:
    """A function that runs n steps of the config's own train step and waits for them."""
    program = assemble.build_program(config)
    with jax.set_mesh(program.mesh):
        sharded = {name: jax.device_put(value, batch_sharding(program.mesh)) for name, value in batch.items()}
        holder = [program.setup.init()]

    def run(count: int) -> None:
        with jax.set_mesh(program.mesh):
            for _ in range(count):
                holder[0], metrics = program.step(holder[0], sharded)
            jax.block_until_ready(metrics)

    return run


def cpu_seconds() -> float:
    """Processor time of this process so far, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(runners: dict[str, Steps], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """One entry a round for each, after one round that is not counted."""
    turns: dict[str, list[Turn]] = {name: [] for name in runners}
    for index in range(rounds + 1):
        for name, run in runners.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            run(steps)
            if index:
                turns[name].append(Turn((time.perf_counter() - wall) / steps, (cpu_seconds() - cpu) / steps))
    return turns


def report(config: Config, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Prints and returns the figures."""
    batch, step_flops = config.data.batch_size, config.objective.train_flops() * config.data.batch_size
    device = jax.devices()[0]
    result: dict[str, Any] = {"config": config.name, "device": device.device_kind, "batch_size": batch}
    print(f"{config.name}, batch {batch}, {jax.device_count()} x {device.device_kind}, JAX {jax.__version__}")
    for name, own in turns.items():
        values, cpu = [turn.wall for turn in own], statistics.median(turn.cpu for turn in own)
        median = statistics.median(values)
        rate, speed = batch / median, step_flops / median
        used = flops.mfu(step_flops, median, jax.device_count(), flops.peak_flops(device))
        result[name] = {
            "examples_per_second": rate,
            "model_flops_per_second": speed,
            "seconds_per_step": values,
            "cpu_seconds_per_step": [turn.cpu for turn in own],
            "mfu": used,
        }
        spread = f"{batch / max(values):.4g} to {batch / min(values):.4g}"
        share = "" if used is None else f", MFU {used:.1%}"
        print(
            f"  {name:13} {rate:9.4g} examples/s ({spread}), {speed / 1e9:9.4g} model GFLOP/s{share}, "
            f"{cpu:.3f} CPU s a step"
        )
    if len(turns) == 2:
        (name, ours), (peer, theirs) = turns.items()
        result["ratio"] = compare(f"{name} / {peer}, wall", [t.wall for t in ours], [t.wall for t in theirs])
        if device.platform == "cpu":
            result["cpu_ratio"] = compare(f"{name} / {peer}, CPU time", [t.cpu for t in ours], [t.cpu for t in theirs])
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    what = "of the device, by JAX" if "peak_bytes_in_use" in stats else "resident in this process"
    result["peak_bytes"] = peak
    print(f"  peak memory {peak / 2**30:.2f} GiB {what}")
    result["peer_peak_bytes"] = peers.peak_bytes() if len(turns) == 2 else None
    if result["peer_peak_bytes"] is not None:
        print(f"  peak memory {result['peer_peak_bytes'] / 2**30:.2f} GiB of the device, by torch")
    return result


def compare(what: str, ours: list[float], theirs: list[float]) -> float:
    """Prints and returns our speed over theirs, the median over the rounds."""
    each = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    ratio = statistics.median(each)
    print(f"  {what}: {ratio:.3f} (rounds {each[0]:.3f} to {each[-1]:.3f})")
    return ratio


def check_device(wanted: str | None) -> None:
    """Raises `ConfigError` when JAX runs on something else than what was asked for."""
    found = jax.default_backend()
    if wanted is not None and found != wanted:
        remedy = "install the cuda12 extra on a machine with one" if wanted == "gpu" else "set JAX_PLATFORMS=cpu"
        raise ConfigError(f"--device={wanted}, but JAX runs on {found}; {remedy}")


def main(arguments: list[str]) -> int:
    """The program."""
    flags, overrides = parse(arguments)
    try:
        check_device(flags.device)
        config = load_config(flags.config, overrides)
        batch = random_batch(config)
        runners = {"vlm_jax": our_steps(config, batch)}
        peer = peers.installed() if flags.peer is None else flags.peer
        if peer != "none":
            bfloat16 = config.compute_dtype() == jnp.bfloat16
            model = peers.build(peer, config)
            runners[peer] = peers.train_steps(peer, model, config, batch, bfloat16=bfloat16, compiled=flags.compile)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = report(config, measure(runners, flags.rounds, flags.steps))
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(result, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
