"""The training loop: restore or start, step, log, evaluate, save, stop. It knows no method.

A workdir holds one run. The same command on the same workdir continues it, and ends with the bits that the unbroken
run would have had on the same devices.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.assemble import Program, build_evaluators, build_program, build_run_tokenizer, index_directory
from vlm_jax.checkpoint import Checkpointer, CheckpointError
from vlm_jax.clock import Clock
from vlm_jax.compiled import check_same_everywhere, compile_step
from vlm_jax.config import Config, check_same_run, to_json
from vlm_jax.console import Console
from vlm_jax.data.pipeline import Batch, TrainLoader
from vlm_jax.data.text import Tokenizer
from vlm_jax.evaluate import evaluate
from vlm_jax.flops import mfu, peak_flops
from vlm_jax.goodput import Ledger, render, slow_processes
from vlm_jax.mesh import host_values
from vlm_jax.metrics import MetricWriter, WorkdirError, mean, read_json, write_json
from vlm_jax.model_flops import step_flops
from vlm_jax.parts import merge
from vlm_jax.preemption import EXIT_PREEMPTED, StopRequest
from vlm_jax.schema import ConfigError, to_dict
from vlm_jax.step import StepFunction, TrainState
from vlm_jax.warm_start import warm_extra, warm_start

# Logs between two comparisons of the processes, each of which waits for the step in flight.
_LOGS_BETWEEN_LOOKS = 10


class TrainingError(RuntimeError):
    """Training can't go on; the sentence says why and what to do."""


def train(
    config: Config,
    workdir: str,
    started: float | None = None,
    stop: StopRequest | None = None,
    compiled_file: str = "",
) -> int:
    """Runs or continues a run to its last step.

    Args:
        config: the resolved config.
        workdir: its folder; made when absent.
        started: `time.time()` at the start of the process, for the time to the first step.
        stop: what asks for an early end; None listens to SIGTERM and SIGINT while training runs.
        compiled_file: steps that were compiled ahead of time (`vlm_jax.compiled`); "" compiles them here.

    Returns:
        The exit code: 0 when the last step is done, 75 when a signal stopped it after a save.

    Raises:
        ConfigError: the config does not fit the devices, the data, or the run in this workdir.
        TrainingError: too many steps in a row were not finite.
        CheckpointError, BadRecordBudgetExceeded, EvalError, WorkdirError: see there.
    """
    if "://" in workdir:
        raise ConfigError(f"--workdir={workdir} must lie in a file system; mount the bucket (docs/launching.md)")
    workdir = os.path.abspath(os.path.expanduser(workdir))
    with stop or StopRequest() as stop:
        check_same_everywhere(to_json(config), "config")
        program = build_program(config)
        flops = [step_flops(program, phase) for phase in range(len(program.steps))]
        with jax.set_mesh(program.mesh):
            run = _Run(program, flops, workdir, started or time.time(), compiled_file)
            try:
                code = run.loop(stop)
            except BaseException:
                with contextlib.suppress(CheckpointError, WorkdirError):  # what ended the loop is to be told, not this
                    run.close()
                raise
            run.close()
            return code


class _Run:
    """One process's share of a run: everything that the loop holds beside the train state."""

    def __init__(
        self, program: Program, flops: Sequence[float | None], workdir: str, started: float, compiled_file: str
    ):
        config, self.flops = program.config, flops  # by phase
        self.config, self.program, self.workdir, self.started = config, program, workdir, started
        self.ledger = Ledger(started)
        self.compiled_file = compiled_file
        self.compiled: dict[int, StepFunction] = {}  # by phase
        self.is_primary = jax.process_index() == 0
        self.profiling, self.reports = False, 0
        self.console = Console(config.train.steps, is_primary=self.is_primary)
        self.checkpointer = Checkpointer(os.path.join(workdir, "checkpoints"), config.checkpoint)
        self._check_same_run()
        self.source = config.data.build_source(index_directory(workdir))
        config.objective.check_source(self.source)
        with self.ledger.spend("restore"):
            restored = self.checkpointer.restore(program.setup.abstract)
        meta: Mapping[str, Any] = {} if restored is None else restored[1]
        if restored is not None:
            check_same_run(meta["config"], config, workdir)
        self.tokenizer: Tokenizer | None = build_run_tokenizer(config, self.source, meta.get("tokenizer"))
        self.state: TrainState = self._first_state() if restored is None else restored[0]
        self.step = int(meta.get("step", 0))
        self.loader = TrainLoader(
            config.objective.arrange(self.source, self.tokenizer, config.data, index_directory(workdir)),
            config.objective.make_example(self.tokenizer, config.data),
            config.data.batch_size,
            config.seed,
            program.mesh,
            int(meta.get("data_position", 0)),
            config.data,
            index_directory(workdir),
        )
        self.writer = MetricWriter(workdir, is_primary=self.is_primary)
        self.ledger.carry_over(self.writer.truncate_after(self.step), self.step)
        self.clock = Clock()
        # Opened now and not when they are first due: a wrong path must not cost the steps until then.
        self.evaluators = build_evaluators(
            config, program.objective, self.tokenizer, program.mesh, index_directory(workdir)
        )
        if self.is_primary:
            write_json(os.path.join(workdir, "config.json"), to_json(config))
        self._announce(restored is not None)

    def _check_same_run(self) -> None:
        """Refuses a workdir whose checkpoints are another config's; one without checkpoints has nothing to lose.

        By WORKDIR/config.json, before anything is restored: arrays of other shapes would hide the difference.
        """
        path = os.path.join(self.workdir, "config.json")
        if self.checkpointer.latest_step() is not None and os.path.exists(path):
            check_same_run(read_json(path), self.config, self.workdir)

    def _first_state(self) -> TrainState:
        state = self.program.setup.init()
        if not self.config.init_from.sources:
            return state
        saved = to_json(self.config)
        params = warm_start(state.params, self.config.init_from, saved)
        live, _ = self.program.setup.parts.split(params)
        # a copy, since the step donates both
        ema = jax.tree.map(lambda x: x.copy(), live) if state.ema else {}
        begin = jax.jit(self.program.objective.begin, out_shardings=jax.tree.map(lambda x: x.sharding, state.extra))
        extra = begin(state.extra, params)
        if self.config.init_from.extra:
            extra = warm_extra(extra, self.config.init_from, saved)
        return dataclasses.replace(state, params=params, ema=ema, extra=extra)

    def _announce(self, resumed: bool) -> None:
        config, say = self.config, self.console.message
        counts = self.program.setup.parts.counts()
        shape = " x ".join(f"{name}={size}" for name, size in self.program.mesh.shape.items() if size > 1) or "1 device"
        per_part = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        say(f"{config.name}: {sum(counts.values()):,} parameters ({per_part})")
        say(f"mesh {shape} ({jax.devices()[0].device_kind})")
        say(f"{len(self.source):,} records, batch {config.data.batch_size}")
        if self.config.init_from.random_start and not resumed:
            say(self.config.init_from.random_start)
        say(f"workdir {self.workdir}" + (f", continued at step {self.step}" if resumed else ""))

    def loop(self, stop: StopRequest) -> int:
        """All steps that are left."""
        total = self.config.train.steps
        pending: tuple[int, Any] | None = None
        if self.step < total:
            self._record_goodput()
            self.ledger.turn_to("step")
        while self.step < total:
            if stop.now(self.step):
                self._log(pending)
                return self._leave_early()
            step = self._step()
            self.clock.begin()
            with self._phase("data", unless=functools.partial(_at_work, pending)):
                batch: Batch = next(self.loader)
            self._profile()
            with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                self.state, metrics = step(self.state, batch)
            self.step += 1
            # The metrics of the step before are read only now: the device never waits for the host.
            self._log(pending)
            pending = (self.step, metrics)
            evaluate_now, save_now = self._eval_due(self.step), self.checkpointer.due(self.step)
            if evaluate_now or save_now or self.step == total:
                self._log(pending)
                pending = None
                self._pause(evaluate_now, save_now)
        return self._finish()

    def _step(self) -> StepFunction:
        """The compiled step that is next; compiled when its phase begins."""
        phase = self.program.phase_at(self.step)
        if phase not in self.compiled:
            with self._phase("compile"):
                self.compiled[phase] = compile_step(self.program, phase, self.compiled_file, self.console.message)
            self._record_goodput()
        return self.compiled[phase]

    def _pause(self, evaluate_now: bool, save_now: bool) -> None:
        """Evaluation and checkpoint between two steps; neither counts as time of a step.

        In this order: a run that is killed between the two goes on from before both, and evaluates again.
        """
        if self.step == self.config.train.steps:
            return
        if evaluate_now:
            with self._phase("evaluation"):
                self._evaluate()
        with self._phase("save"):
            if save_now:
                self._save()
            self.checkpointer.check_error()
            self._record_goodput()

    @contextlib.contextmanager
    def _phase(self, name: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """A phase for the rates of the log and for the ledger of the whole run."""
        with self.clock.phase(name), self.ledger.spend(name, unless):
            yield

    def _record_goodput(self) -> None:
        self.writer.scalars(self.step, self.ledger.record())

    def _eval_due(self, step: int) -> bool:
        intervals = [entry.every or self.config.train.eval_every for entry in self.config.evals]
        return any(every and step % every == 0 for every in intervals)

    def _log(self, pending: tuple[int, Any] | None) -> None:
        """Waits for a step's metrics and writes them if they are due."""
        if pending is None:
            return
        step, metrics = pending
        was_ready = metrics["loss"][0].is_ready()
        values = {name: mean(pair) for name, pair in host_values(metrics).items()}
        first = self.clock.first_step()
        if first:
            self.console.message(f"first step after {time.time() - self.started:.1f} s")
        if values["nonfinite_in_a_row"] >= self.config.train.max_nonfinite:
            raise TrainingError(
                f"loss or gradients were not finite in {int(values['nonfinite_in_a_row'])} steps in a row, the last "
                f"one step {step - 1} (examples {(step - 1) * self.config.data.batch_size} to "
                f"{step * self.config.data.batch_size - 1} of the run); parameters are those before them. Lower the "
                "learning rate, clip gradients (config.optimizer.clip_norm), or look at these examples"
            )
        if values["nonfinite_in_a_row"]:
            self.console.message(f"step {step - 1}: loss or gradients are not finite; the step changed nothing")
        self.clock.step_done(was_ready, self.flops[self.program.phase_at(step - 1)] or 0.0)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self._report(step, values)

    def _report(self, step: int, values: dict[str, float]) -> None:
        timing = self.clock.summary()
        if timing:
            seconds, batch_size = timing["seconds_per_step"], self.config.data.batch_size
            timing["examples_per_second"] = batch_size / seconds
            flops = timing.pop("flops_per_step")
            used = mfu(flops, seconds, jax.device_count(), peak_flops(jax.devices()[0]))
            timing |= {} if used is None or not flops else {"mfu": used}
        values["bad_records"] = float(self.loader.bad_records)
        self.writer.scalars(step, values | {f"time/{name}": value for name, value in timing.items()})
        self.console.update(step, values | timing)
        self.reports += 1
        if jax.process_count() > 1 and self.reports % _LOGS_BETWEEN_LOOKS == 0:
            seconds, interval = self.ledger.own_parts()
            for sentence in slow_processes(multihost_utils.process_allgather(seconds), interval):
                self.console.message(sentence)

    def _save(self) -> bool:
        """Whether there was anything to save."""
        return self.checkpointer.save(
            self.step,
            self.state,
            data_position=self.loader.position,
            config=to_json(self.config),
            tokenizer=None if self.tokenizer is None else self.tokenizer.state(),
            preprocess=to_dict(self.config.data.preprocess),
            extra_meta={"teacher": self.program.objective.teacher},
            force=True,
        )

    def _leave_early(self) -> int:
        self.console.message(f"stopped by a signal after step {self.step}; saving")
        with self._phase("save"):
            if self.step:
                self._save()
            self.checkpointer.wait()
        self.console.message("saved; the same command goes on from here")
        self._sum_up()
        return EXIT_PREEMPTED

    def _finish(self) -> int:
        """The last checkpoint, then the last evaluation: a crash in it loses no training."""
        with self._phase("save"):
            saved = self._save()
            self.checkpointer.wait()
        evaluate_now = bool(self.evaluators) and not self._evaluated()
        if evaluate_now:
            with self._phase("evaluation"):
                self._evaluate()
        self.console.message(f"done: {self.step} steps; {self.loader.bad_records} unusable records replaced")
        if saved or evaluate_now:
            self._sum_up()
        return 0

    def _sum_up(self) -> None:
        """Where the time of all starts so far went: the last record, `goodput.json` and a line."""
        self._record_goodput()
        summary = self.ledger.summary()
        if self.is_primary:
            write_json(os.path.join(self.workdir, "goodput.json"), {"step": self.step, **summary})
        self.console.message(render(summary))

    def _evaluated(self) -> bool:
        """Whether the last evaluation stands in eval.json: the command of a finished run was given again.

        The primary process looks and tells the others, which may not see its workdir.
        """
        path = os.path.join(self.workdir, "eval.json")
        found = self.is_primary and os.path.exists(path) and read_json(path).get("step") == self.step
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(found))) if jax.process_count() > 1 else found

    def _evaluate(self) -> None:
        last = self.step == self.config.train.steps
        due = [
            evaluator
            for every, evaluator in self.evaluators
            if last or self.step % (every or self.config.train.eval_every or self.step) == 0
        ]
        metrics = evaluate(due, self._eval_params(), self.step, self.writer)
        if self.is_primary:
            write_json(os.path.join(self.workdir, "eval.json"), {"step": self.step, **metrics})
        for name, value in metrics.items():
            self.console.message(f"step {self.step}  {name} {value:.4f}")

    def _eval_params(self) -> Any:
        """The teacher of a method that has one, else the averaged parameters where a run keeps them."""
        params = self.state.params
        if jax.tree.leaves(self.state.ema):
            _, frozen = self.program.setup.parts.split(params)
            params = merge(self.state.ema, frozen)
        return self.program.objective.judged(params, self.state.extra)

    def _profile(self) -> None:
        start, count = self.config.train.profile_start, self.config.train.profile_steps
        if count and self.step == start:
            jax.profiler.start_trace(os.path.join(self.workdir, "tensorboard"))
            self.profiling = True
        elif self.step >= start + count:
            self._stop_profile()

    def _stop_profile(self) -> None:
        """Ends a profile that is being taken: after its steps, or with the run when that ends before them."""
        if self.profiling:
            self.profiling = False
            jax.block_until_ready(self.state.step)
            jax.profiler.stop_trace()

    def close(self) -> None:
        """Stops what runs beside the loop, whatever ended it."""
        with contextlib.ExitStack() as stack:  # one that fails keeps no other from closing
            for part in (self.checkpointer, self.console, self.writer, self.loader):
                stack.callback(part.close)
            stack.callback(self._stop_profile)


def _at_work(pending: tuple[int, Any] | None) -> bool:
    """Whether the chips still do the step before, so that they wait for no data yet."""
    return pending is not None and not pending[1]["loss"][0].is_ready()
