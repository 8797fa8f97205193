"""Command line of the planner: flags and dispatch."""

import argparse
import json
import sys
from pathlib import Path

from vlm_jax import platforms
from vlm_jax.main import EXIT_CONFIG, split_overrides
from vlm_jax.plan.topologies import describe_topologies, parse_topology, require_libtpu, set_environment
from vlm_jax.schema import ConfigError


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """(flags, overrides); `--config.a.b=value` becomes {"a.b": "value"}."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_jax.plan",
        description="Compiles the train step of a config for TPUs that need not be there, and reports memory, FLOPs, "
        "communication and the shortest possible step time.",
        epilog="Any key of the config: --config.KEY=VALUE, as in training. Exit codes: 0 planned (whether it fits "
        "stands in the report), 2 bad config or topology, 1 any other error.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="config file, with its variant: configs/clip_l14.py")
    parser.add_argument("--topology", help="CHIP:SHAPE, such as v5e:16x16; `list` shows all")
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape, joined by the data-centre network")
    parser.add_argument("--json", metavar="FILE", help="write the plan (or the search's plans) there")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")
    parser.add_argument(
        "--compiled",
        metavar="FILE",
        help="write the compiled step there, for vlm_jax.main; without --topology it is for this machine's devices",
    )
    parser.add_argument("--shardings", action="store_true", help="list every array with its partition")
    parser.add_argument("--search", action="store_true", help="try meshes, remat, microbatches, optimiser dtypes")
    parser.add_argument("--compiles", type=int, default=12, help="for --search: programs to compile at most")
    parser.add_argument("--cache", default="runs/plan_cache.jsonl", help="for --search and --table: plans made before")
    parser.add_argument("--table", action="store_true", help="plan every config of the table and write docs/plans.md")
    overrides, rest = split_overrides(arguments)
    return parser.parse_args(rest), overrides


def run(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Dispatches; returns the exit code."""
    if flags.topology == "list":
        print(describe_topologies())
        return 0
    if flags.compiled:
        return _write_compiled(flags, overrides)
    if not flags.table and (flags.config is None or flags.topology is None):
        missing = "--config" if flags.config is None else "--topology"
        raise ConfigError(
            f"{missing} is missing; give both, such as --config=configs/clip_l14.py --topology=v5e:16x16 "
            "(--topology=list shows all)"
        )
    topology = None if flags.table else parse_topology(flags.topology, flags.slices)
    require_libtpu()
    from vlm_jax.config import load_config
    from vlm_jax.plan import plan, report, search, table
    from vlm_jax.plan.cache import PlanCache

    if flags.table:
        table.write(PlanCache(Path(flags.cache)), Path("docs/plans.md"), Path("configs"))
        return 0
    assert topology is not None
    config = load_config(flags.config, overrides)
    if flags.search:
        found = search.search(config, topology, PlanCache(Path(flags.cache)), flags.compiles)
        print(search.render(found))
        data = search.to_json(found)
    else:
        made = plan.make_plan(config, topology, hlo=Path(flags.hlo) if flags.hlo else None)
        print(report.render(made))
        if flags.shardings:
            print(report.render_shardings(made))
        data = plan.to_json(made)
    if flags.json:
        Path(flags.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _write_compiled(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Writes the compiled steps of a config, for a topology or for the devices of this machine."""
    if flags.config is None:
        raise ConfigError("--compiled needs the config whose step it shall hold: --config=configs/clip_l14.py")
    from vlm_jax import compiled, distributed
    from vlm_jax.assemble import build_program
    from vlm_jax.config import load_config

    if flags.topology is None:
        distributed.start("off")
        program = build_program(load_config(flags.config, overrides))
    else:
        topology = parse_topology(flags.topology, flags.slices)
        require_libtpu()
        from vlm_jax.plan.compile import program_on

        program = program_on(load_config(flags.config, overrides), topology)
    compiled.save(flags.compiled, program)
    print(f"wrote {flags.compiled}; run it with python -m vlm_jax.main --compiled={flags.compiled} and the same flags")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The program; errors that a user can mend are one sentence, without a traceback."""
    flags, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    # before anything below loads JAX
    if flags.compiled and flags.topology is None:
        platforms.pass_over_missing_tpu()
    else:
        set_environment()
    from jax.errors import JaxRuntimeError

    from vlm_jax.metrics import WorkdirError
    from vlm_jax.plan.hlo import HloError

    try:
        return run(flags, overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except WorkdirError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except HloError as error:
        print(f"error: the compiled program can't be accounted for: {error}", file=sys.stderr)
        return 1
    except JaxRuntimeError as error:
        print(f"error: the compiler failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
