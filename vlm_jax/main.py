"""Command line of training and evaluation: flags, the start of several processes, dispatch. Kept short on purpose."""

import argparse
import logging
import os
import sys
import time

from vlm_jax import platforms

EXIT_CONFIG = 2


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """(flags, overrides); `--config.a.b=value` becomes {"a.b": "value"}."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_jax.main",
        description="Trains or evaluates. The same command on the same workdir goes on where it stopped.",
        epilog="Any key of the config: --config.KEY=VALUE, e.g. --config.data.batch_size=64 "
        "--config.data.source=tar --config.data.source.path='shards/{000..009}.tar'; --print_config shows the keys. "
        "Exit codes: 0 done, 2 bad config, 75 stopped by a signal and saved, 1 any other error.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="config file, with its variant: configs/clip_digits.py:smoke")
    parser.add_argument("--workdir", help="folder of the run (default: runs/NAME, NAME from the config)")
    parser.add_argument("--mode", choices=("train", "eval"), default="train", help="eval: evaluate a checkpoint alone")
    parser.add_argument("--checkpoint", help="for --mode=eval: workdir, step directory or imported checkpoint")
    parser.add_argument("--print_config", action="store_true", help="print every key with its value and stop")
    parser.add_argument("--compiled", default="", metavar="FILE", help="the step, from `vlm_jax.plan --compiled=FILE`")
    parser.add_argument(
        "--compilation_cache",
        metavar="FOLDER",
        help="keeps compiled programs for the next start; `off` keeps none (default: WORKDIR/compilation_cache on "
        "accelerators, off on CPUs)",
    )
    parser.add_argument("--distributed", default="auto", help="auto, on, off, or HOST:PORT,COUNT,INDEX")
    overrides, rest = split_overrides(arguments)
    return parser.parse_args(rest), overrides


def split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """({dotted key: value} of every `--config.KEY=VALUE`, the other arguments)."""
    overrides, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.startswith("--config.") and equals:
            overrides[key.removeprefix("--config.")] = value
        else:
            rest.append(argument)
    return overrides, rest


def keep_compiled_programs(folder: str) -> None:
    """Lets JAX keep what it compiles in a folder and take it from there. Of several processes the first one writes.

    A folder that can't be written, or holds what can't be read, costs a warning and the compilation.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.path.expanduser(folder)))
    compilation_cache.reset_cache()  # it remembers the folder of its first use


def run(flags: argparse.Namespace, overrides: dict[str, str], started: float) -> int:
    """Dispatches; returns the exit code."""
    from vlm_jax import distributed
    from vlm_jax.config import load_config
    from vlm_jax.schema import ConfigError, leaves

    if flags.config is None and not (flags.mode == "eval" and (flags.checkpoint or flags.workdir)):
        raise ConfigError("--config is missing; give a config file, such as --config=configs/clip_digits.py")
    config = load_config(flags.config, overrides if flags.mode == "train" else {}) if flags.config else None
    if flags.print_config and config is not None:
        print("\n".join(f"{key} = {value!r}" for key, value in leaves(config)))
        return 0
    distributed.start(flags.distributed)
    if flags.mode == "eval":
        from vlm_jax.evaluate import evaluate_checkpoint

        checkpoint = flags.checkpoint or flags.workdir
        metrics = evaluate_checkpoint(checkpoint, flags.workdir or checkpoint, dict(overrides), config)
        print("\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return 0
    from vlm_jax.preemption import StopRequest
    from vlm_jax.train import train

    assert config is not None
    workdir = flags.workdir or os.path.join("runs", config.name)
    cache = flags.compilation_cache or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    # What XLA:CPU reads back from a file has crashed a process that resumed; there it must be asked for.
    default = "off" if platforms.computes_on_cpu() else os.path.join(workdir, "compilation_cache")
    cache = cache or default
    if cache != "off" and "://" not in workdir:
        keep_compiled_programs(cache)
    return train(config, workdir, started, StopRequest(process_ends=__name__ == "__main__"), flags.compiled)


def main(arguments: list[str] | None = None) -> int:
    """The program; errors that a user can mend are one sentence, without a traceback."""
    started = time.time()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    flags, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    platforms.pass_over_missing_tpu()
    if platforms.computes_on_cpu():
        platforms.keep_freed_memory()
    from vlm_jax.checkpoint_format import CheckpointError
    from vlm_jax.data.bad_records import BadRecordBudgetExceeded
    from vlm_jax.data.pipeline import DataWorkerError
    from vlm_jax.evals.base import EvalError
    from vlm_jax.metrics import WorkdirError
    from vlm_jax.schema import ConfigError
    from vlm_jax.train import TrainingError

    try:
        return run(flags, overrides, started)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except (CheckpointError, BadRecordBudgetExceeded, DataWorkerError, EvalError, TrainingError, WorkdirError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
