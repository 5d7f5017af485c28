"""A training run from start or restart to its result: the loop, its records and checkpoints."""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jaxlib
import numpy as np

from parscale import config_io, data, flops, restart, workdir
from parscale.checkpoints import Checkpoints
from parscale.config import Config
from parscale.finish import DivergedError, finish, read_result
from parscale.host_data import held_out_loss, train_batches
from parscale.metrics import MetricsWriter, NoMetrics
from parscale.progress import Progress
from parscale.quiet import quiet_late_writes
from parscale.restart import Record
from parscale.training import Training, TrainState
from sharding import agreement, hosts
from sharding.mesh import make_mesh
from sharding.settings import InputError


@quiet_late_writes()
def train(
    config: Config,
    folder: str | Path,
    *,
    grow_streams: bool = False,
    profile_steps: tuple[int, int] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    devices: Sequence[jax.Device] | None = None,
    log: TextIO | None = None,
) -> dict[str, Any] | None:
    """Trains, or goes on with, the run in a workdir.

    After `hosts.start` on several processes, all of them call this with the same arguments; the
    workdir is on storage that they share, and process 0 alone writes to it, but for checkpoints.

    Args:
      config: the run.
      folder: its workdir; made if it is not there.
      grow_streams: let a run go on with more streams than it has.
      profile_steps: first and last step of a profiler trace, written to `profile/`; those of them
        that were done earlier are left out.
      should_stop: asked after every step; the run then saves and ends early, on all processes if
        it is said on one.
      devices: those of the mesh; all by default.
      log: where process 0 shows progress; standard error by default.

    Returns:
      what `result.json` holds, or None if the run was stopped early.

    Raises:
      InputError: the configuration, corpus, weights or workdir do not fit, or are not the same on
        all processes; no step was done.
      DivergedError: `train.max_bad_steps` steps in a row were not finite.
      SaveError: a checkpoint could not be written.
    """
    folder = Path(folder)
    run = workdir.run_folder(folder, config)
    agreement.check_same("the run", what_must_agree(config, grow_streams, profile_steps))
    agreement.check_shared(folder)
    saved = restart.saved_config(run)
    if saved is not None:
        config_io.check_resumable(saved, config, grow=grow_streams)
    training = Training(config, make_mesh(config.mesh, devices))
    log = sys.stderr if log is None else log
    say = functools.partial(print_once, file=log)
    text = data.open_data(config.data, config.model.vocab_size)
    agreement.check_same("what is read", {f"corpus {config.data.corpus}": text.corpus_hash})
    batches = train_batches(training, text)
    given = restart.starting_params(config, folder, run)
    with Checkpoints(run / workdir.CHECKPOINTS, config.train.keep) as checkpoints:
        state, record = restart.start(training, checkpoints, given, text.corpus_hash)
        step = int(state.step)
        if step > config.train.steps:
            raise InputError(
                f"train.steps={config.train.steps}: the run in {run} has done {step} steps; "
                "give as many or more, or another --workdir"
            )
        if record.data is not None:
            batches.set_state(record.data)
        result = agreement.from_process_0(lambda: read_result(run))
        if jax.process_index() == 0:
            config_io.to_json(config, run / workdir.CONFIG)
        if step == config.train.steps and result is not None:
            say(f"all {step} steps were done before; results in {run / workdir.RESULT}")
            return result
        with contextlib.ExitStack() as open_:
            if jax.process_index() == 0:
                metrics = open_.enter_context(MetricsWriter(run, step))
                (run / workdir.RESULT).unlink(missing_ok=True)
            else:
                metrics, log = NoMetrics(), open_.enter_context(open(os.devnull, "w"))
            describe(config, training, text, step, say)
            loop = Loop(training, text, checkpoints, metrics, batches, record, should_stop, log)
            with profiled(run, profile_steps) as at_step:
                state = loop.run(state, at_step)
            if int(state.step) < config.train.steps:
                return None
            loss = loop.final_loss
            if loss is None:  # the run was killed between its last checkpoint and here
                loss = held_out_loss(training, text, state)
            return finish(training, text, state, record, loss, run, say)


def what_must_agree(
    config: Config, grow_streams: bool, profile_steps: tuple[int, int] | None
) -> dict[str, Any]:
    """What has to be the same on all hosts for their collectives to be, by name."""
    return {
        **{f"--config.{name}": value for name, value in config_io.flatten(config).items()},
        "--grow_streams": grow_streams,
        "--profile_steps": profile_steps,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "the number of devices of a host": jax.local_device_count(),
    }


def describe(
    config: Config, training: Training, text: data.Data, step: int, say: Callable[[str], None]
) -> None:
    """Says what is about to be done."""
    counts = flops.parameter_counts(config.model)
    say(
        f"model: {counts['total']:,} parameters, N = {counts['non_embedding']:,} without "
        f"embeddings, P = {config.model.streams} streams; "
        f"training {sum(leaf.size for leaf in jax.tree.leaves(training.abstract.trainable)):,}"
    )
    say(
        f"data: {config.data.corpus}, {text.train_documents:,} documents with "
        f"{text.train_tokens:,} tokens, {text.held_out_documents:,} documents held out"
    )
    say(f"devices: {training.mesh.size} x {jax.devices()[0].device_kind}")
    if step:
        say(f"resuming from step {step}")


def print_once(text: str, file: TextIO) -> None:
    """Prints a line, from process 0 alone."""
    if jax.process_index() == 0:
        print(text, file=file, flush=True)


@contextlib.contextmanager
def profiled(
    run: Path, steps: tuple[int, int] | None
) -> Iterator[Callable[[int, TrainState], None]]:
    """A function to call with the number and the state before each step; traces those asked for."""
    tracing = False

    def at_step(step: int, state: TrainState) -> None:
        nonlocal tracing
        if steps and not tracing and steps[0] <= step <= steps[1]:
            jax.profiler.start_trace(str(run / "profile"))
            tracing = True
        elif tracing and step > steps[1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False

    try:
        yield at_step
    finally:
        if tracing:
            jax.profiler.stop_trace()


class Loop:
    """The steps of a run. Metrics are read one step late, so that the device never waits."""

    def __init__(
        self,
        training: Training,
        text: data.Data,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | NoMetrics,
        batches: Any,
        record: Record,
        should_stop: Callable[[], bool],
        log: TextIO,
    ):
        self.training = training
        self.text = text
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.batches = batches
        self.record = record
        self.should_stop = should_stop
        self.log = log
        config = training.config
        row_tokens = config.data.batch * config.data.length
        self._step_flops = flops.train_flops(config.model, config.data.length, config.data.batch)
        self._row_tokens = row_tokens
        self._last_save = time.monotonic()
        self._last_report = None
        self._meetings = agreement.Meetings()
        self.final_loss: float | None = None

    def run(self, state: TrainState, at_step: Callable[[int, TrainState], None]) -> TrainState:
        """Steps until the last one or until told to stop, then saves."""
        train = self.training.config.train
        step = int(state.step)
        pending = None
        with Progress(
            train.steps,
            first=step,
            elapsed=self.record.seconds,
            every=train.log_every,
            file=self.log,
        ) as progress:
            while step < train.steps and not agreement.stop_at(step, self.should_stop):
                at_step(step + 1, state)
                batch = next(self.batches)
                state, metrics = self.training.step(state, batch)
                step += 1
                if pending:
                    self._report(progress, *pending)
                pending = step, metrics, batch["row"]
                self.record.seconds = progress.elapsed()
                evaluation, save = self._evaluation_due(step), self._save_due(step, progress)
                if evaluation or save:
                    # No checkpoint may be ahead of the rows that a kill leaves in metrics.csv.
                    self._report(progress, *pending)
                    pending = None
                if evaluation:
                    self._evaluate(state, step, progress)
                if save:
                    self.save(state, step)
            if pending:
                self._report(progress, *pending)
            self.record.seconds = progress.elapsed()
        self.save(state, step, wait=True)
        return state

    def save(self, state: TrainState, step: int, wait: bool = False) -> None:
        """Begins a checkpoint of a state."""
        self.record.data = self.batches.get_state()
        self.checkpoints.save(
            step,
            restart.saved_items(state, self.training.config.train.trainable),
            dataclasses.asdict(self.record),
            wait,
        )
        self._last_save = time.monotonic()

    def _save_due(self, step: int, progress: Progress) -> bool:
        train = self.training.config.train
        if step == train.steps:
            return False
        by_time = False
        # Clocks differ: process 0 decides, and says so where all meet.
        if not hosts.several() or step % train.log_every == 0:
            by_time, slow = self._meetings.meet(step, self._minutes_are_over)
            if slow is not None:
                progress.print(f"step {step}: {slow.describe()}")
        return by_time or bool(train.checkpoint_every and step % train.checkpoint_every == 0)

    def _minutes_are_over(self) -> bool:
        minutes = self.training.config.train.checkpoint_minutes
        return bool(minutes) and (time.monotonic() - self._last_save) / 60 >= minutes

    def _evaluation_due(self, step: int) -> bool:
        train = self.training.config.train
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    def _evaluate(self, state: TrainState, step: int, progress: Progress) -> None:
        loss = held_out_loss(self.training, self.text, state)
        bits = self.text.bits_per_byte(loss)
        self.metrics.write(step, held_out_loss=loss, bits_per_byte=bits)
        if step == self.training.config.train.steps:
            self.final_loss = loss
        else:
            progress.print(f"step {step}  held-out loss {loss:.4f}  {bits:.4f} bits per byte")

    def _report(
        self, progress: Progress, step: int, metrics: dict[str, jax.Array], rows: np.ndarray
    ) -> None:
        """Reads the metrics of a step that was dispatched, and waits for it if it must."""
        train = self.training.config.train
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        # The tokens of all hosts, which no host has read alone.
        self.record.consume(rows, int(values["tokens"]))
        progress.update(step, values["loss"], int(values["tokens"]))
        if values["bad_streak"]:
            progress.print(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: skipped "
                f"({values['bad_streak']} in a row, {values['skipped']} in all)"
            )
        if values["bad_streak"] >= train.max_bad_steps:
            raise DivergedError(
                f"{values['bad_streak']} steps in a row up to step {step} had a loss or gradient "
                "that is not finite; the weights are those before them. Try a lower "
                "train.learning_rate or a longer train.warmup_steps"
            )
        if step % train.log_every == 0 or step == train.steps:
            now = time.monotonic()
            speed = None
            if self._last_report is not None:
                before, then = self._last_report
                speed = (step - before) / (now - then)
            self._last_report = step, now
            self.metrics.write(
                step,
                tokens=self.record.tokens,
                loss=values["loss"],
                learning_rate=values["learning_rate"],
                grad_norm=values["grad_norm"],
                skipped=values["skipped"],
                tokens_per_second=speed and speed * self._row_tokens,
                tflops_per_second=speed and speed * self._step_flops / 1e12,
                seconds=self.record.seconds,
            )
