"""Examples/s and model FLOP/s of a config's train step, and of the same model in another library, alternating.

python benchmarks/step.py --config=configs/clip_b32.py:tiny [--peer=open_clip|transformers|none] [--compile]
                          [--rounds=5] [--steps=4] [--json=FILE] [--config.KEY=VALUE ...]

Both train on random batches that lie on the device already: forward, loss, backward, AdamW, clamp of the scale. The
two take turns in one process, so that whatever else the machine does falls on both; the ratio is that of the medians.
Not for the input pipeline (`benchmarks/input.py`) or for TPU plans (`python -m vlm_jax.plan`).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

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


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags and the overrides of the config."""
    parser = argparse.ArgumentParser(description="Speed of a train step, beside a peer's.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="path.py or path.py:variant")
    parser.add_argument("--peer", choices=("open_clip", "transformers", "none"), default=None, help="default: what is")
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
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


def measure(runners: dict[str, Steps], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each, one entry a round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(rounds + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run(steps)
            if index:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def report(config: Config, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints and returns the figures."""
    batch, step_flops = config.data.batch_size, config.objective.train_flops() * config.data.batch_size
    device = jax.devices()[0]
    result: dict[str, Any] = {"config": config.name, "device": device.device_kind, "batch_size": batch}
    print(f"{config.name}, batch {batch}, {jax.device_count()} x {device.device_kind}, JAX {jax.__version__}")
    for name, values in seconds.items():
        median = statistics.median(values)
        rate, speed = batch / median, step_flops / median
        used = flops.mfu(step_flops, median, jax.device_count(), flops.peak_flops(device))
        result[name] = {
            "examples_per_second": rate,
            "model_flops_per_second": speed,
            "seconds_per_step": values,
            "mfu": used,
        }
        spread = f"{batch / max(values):.4g} to {batch / min(values):.4g}"
        share = "" if used is None else f", MFU {used:.1%}"
        print(f"  {name:13} {rate:9.4g} examples/s ({spread}), {speed / 1e9:9.4g} model GFLOP/s{share}")
    names = list(seconds)
    if len(names) == 2:
        ours, theirs = (seconds[name] for name in names)
        result["ratio"] = statistics.median(theirs) / statistics.median(ours)
        each = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"  {names[0]} / {names[1]} = {result['ratio']:.3f} (per round {each[0]:.3f} to {each[-1]:.3f})")
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    what = "of the device, by JAX" if "peak_bytes_in_use" in stats else "resident in this process"
    result["peak_bytes"] = peak
    print(f"  peak memory {peak / 2**30:.2f} GiB {what}")
    return result


def main(arguments: list[str]) -> int:
    """The program."""
    flags, overrides = parse(arguments)
    try:
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
