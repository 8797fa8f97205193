"""Where the time of a train step goes: processor time by part of the model, and the dearest operations.

python benchmarks/step_profile.py --config=configs/clip_b32.py:tiny [--steps=4] [--top=0] [--json=FILE]
                                  [--config.KEY=VALUE ...]

XLA's profiler times every operation of the compiled step, and the program's text says what it was in the model. A
share bounds what a change could give: what takes 4 % of the step can't make it 5 % faster. Times on a busy machine
include waiting, so compare profiles of the same machine under the same load. For CPUs; on accelerators TensorBoard
shows the steps that `--config.train.profile_start` and `profile_steps` name.
"""

import argparse
import collections
import glob
import json
import re
import sys
import tempfile
from collections.abc import Iterator

import jax
from step import random_batch

from vlm_jax import assemble
from vlm_jax.config import Config, load_config
from vlm_jax.main import split_overrides
from vlm_jax.mesh import batch_sharding
from vlm_jax.plan.hlo import Instruction, Module, parse_hlo
from vlm_jax.schema import ConfigError

# (part, what the name of an operation in the traced program looks like); the first that fits
PARTS = (
    ("attention, products with keys and values", r"/attn/B(THD|HTS)"),
    ("attention, projections", r"/attn/.*(query|key|value|out)"),
    ("attention, softmax", r"/attn\b"),
    ("MLP, maps", r"/mlp/.*dot_general"),
    ("MLP, activation function and biases", r"/mlp\b"),
    ("norms", r"/ln(_\w+)?\b"),
    ("patch embedding", r"patch_embed"),
    ("token embedding and its gradient", r"/(text|image)\._embed/"),
    ("stacking of layers' weights and gradients", r"dynamic_(update_)?slice|while/body/(closed_call/)?broadcast"),
    ("towers, the rest", r"TwoTower"),
)
REST = "loss, clipping, optimiser"
BUFFERS = "zeros and copies that XLA added"


def part_of(operation: str) -> str:
    """The part of the step that an operation belongs to, by its name in the traced program, if it has one."""
    if not operation:
        return BUFFERS
    return next((name for name, pattern in PARTS if re.search(pattern, operation)), REST)


def operation_names(module: Module) -> dict[str, str]:
    """Instruction -> what it was in the traced program; of a fusion without a name, what most of it was."""
    return {
        instruction.name: instruction.operation or _inside(module, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
    }


def _inside(module: Module, instruction: Instruction) -> str:
    names = collections.Counter(
        inner.operation
        for called in instruction.called
        for inner in module.computations[called].instructions.values()
        if inner.operation
    )
    return names.most_common(1)[0][0] if names else ""


def events(folder: str) -> Iterator[tuple[str, float]]:
    """(name, seconds) of every event in the trace of a folder."""
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                for event in line.events:
                    yield event.name, event.duration_ns / 1e9


def profile(config: Config, steps: int) -> dict[tuple[str, str], float]:
    """Processor seconds of a step by (operation in the traced program, instruction), dearest first."""
    program = assemble.build_program(config)
    with jax.set_mesh(program.mesh), tempfile.TemporaryDirectory() as folder:
        sharding = batch_sharding(program.mesh)
        batch = {name: jax.device_put(value, sharding) for name, value in random_batch(config).items()}
        compiled = program.trace(0).lower().compile()
        state, metrics = compiled(program.setup.init(), batch)
        jax.block_until_ready(metrics)
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
        names = operation_names(parse_hlo(compiled.as_text()))
        containers = re.compile(r"(while|call|conditional)[.\d]*")  # their time is that of what they run
        seconds: collections.Counter[tuple[str, str]] = collections.Counter()
        for name, duration in events(folder):
            if name in names and not containers.fullmatch(name):
                seconds[names[name], name] += duration / steps
    return dict(seconds.most_common())


def by_part(seconds: dict[tuple[str, str], float]) -> dict[str, float]:
    """Sums over the operations of each part, largest first."""
    parts: collections.Counter[str] = collections.Counter()
    for (operation, _), value in seconds.items():
        parts[part_of(operation)] += value
    return dict(parts.most_common())


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Processor time of a train step by part.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="path.py or path.py:variant")
    parser.add_argument("--steps", type=int, default=4, help="steps that are profiled")
    parser.add_argument("--top", type=int, default=0, help="how many of the dearest operations to list too")
    parser.add_argument("--json", default="", help="file for the seconds")
    overrides, rest = split_overrides(arguments)
    flags = parser.parse_args(rest)
    try:
        seconds = profile(load_config(flags.config, overrides), flags.steps)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts, total = by_part(seconds), sum(seconds.values())
    print(f"{total:.3f} processor seconds a step in operations that the profiler saw")
    for name, value in parts.items():
        print(f"  {value / total:6.1%}  {name}")
    for (operation, name), value in list(seconds.items())[: flags.top]:
        print(f"  {value / total:6.1%}  {name}: {operation or 'unnamed'}")
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump({"total": total, "parts": parts}, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
