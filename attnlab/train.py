"""The training loop: restore; take steps to the next rest; evaluate and save there; go on.

A rest is where the state is evaluated, looked into or saved: the loss and gradient of every step
before it have then been seen to be finite. Between rests the numbers are read one step late, so
that the device never waits for the host.
"""

import errno
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from attnlab import hosts, tasks
from attnlab.checkpoint import Checkpoints
from attnlab.config import mechanisms_of
from attnlab.errors import DataError, UserError
from attnlab.evaluate import Stopped
from attnlab.files import replace_file
from attnlab.kinds import kind_of
from attnlab.metrics import Writer
from attnlab.optimizer import make_optimizer, make_schedule
from attnlab.progress import Progress, peak_memory
from attnlab.scores import headline_of
from attnlab.sharding import (
    batch_sharding,
    check_length,
    gathered,
    make_mesh,
    put,
    readers,
    state_shardings,
)
from attnlab.signals import Signals
from attnlab.step import State, init_state, make_step
from attnlab.watchdog import Watchdog
from attnlab.workdir import HARMLESS, Workdir

log = logging.getLogger(__name__)

SKIPS = 20  # bad batches in a row after which skipping is no remedy
REWINDS = 5  # in one run


def train(
    config: ConfigDict,
    workdir: str | Path,
    command: Sequence[str] = ("attnlab",),
    patience: float = 0,
) -> int:
    """Trains the run in ``workdir`` to ``config.train.steps``, from wherever it stands, then
    scores, samples, plots and reports it. Returns the exit code: 0, or 143 / 130 after a signal.
    ``patience``: seconds that a step may take, after which the process exits; 0 = any.

    Raises `UserError` for a workdir of another config or a diverged run, `DataError` for data or
    checkpoints that cannot be used or a disk that is full, `PeerError` where other processes of the
    run are gone.
    """
    process = jax.process_index()
    with (
        Signals() as signals,
        Workdir(workdir, process=process) as run,
        storing(run.path),
        hosts.meeting(saved := Checkpoints(run.checkpoints).describe),
    ):
        together = hosts.Together(signals)
        # What saved nothing yet binds nobody: a wrong corpus or learning rate may be corrected.
        bound = Checkpoints(run.checkpoints).found()
        run.begin(config.to_dict(), command, harmless=HARMLESS if bound else ("*",))
        hosts.need_shared(run.path / "run.json")
        hosts.agree("the config", config.to_dict())
        if done := run.finished():
            if process == 0:
                print(f"{run.path}: finished at step {done['step']}; nothing to do")
            return 0
        mesh = make_mesh(config.mesh)
        check_length(mesh, config.task.length)
        batch_sharding(mesh, config.task.batch)
        task: Any = hosts.in_turn(lambda: tasks.build(config.task, seed=config.seed))
        hosts.agree("the data", task.info())
        if process == 0:
            kind_of(config).begin(config, task, run.path)
        announce(config, mesh)
        if not together.stop():
            trainer, watchdog = Trainer(config, task, mesh, run), Watchdog(patience, saved)
            run.stays()
            with (
                trainer.checkpoints,
                trainer.writer,
                trainer.progress,
                jax.set_mesh(mesh),
                watchdog,
            ):
                trainer.loop(watchdog.watching(together.stop))
            # Only now is the last step known to be on the disk.
            trainer.finish(together)
        return signals.exit_code


@contextmanager
def storing(place: Path) -> Iterator[None]:
    """A disk that is full or broken becomes a `DataError` that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise DataError(
            f"cannot write in {place}: {error.strerror}; free some space and run the same command"
        ) from error


def announce(config: ConfigDict, mesh: Any) -> None:
    """Says on the log what is about to run, and where."""
    devices = mesh.devices.flat
    kind = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    log.info("devices: %s; mesh: %s; processes: %d", kind, sizes, jax.process_count())
    layers = list(dict.fromkeys(map(repr, mechanisms_of(config))))
    names = " + ".join(layers), config.position.name, config.normaliser.name
    log.info("attention: %s; position: %s; normaliser: %s", *names)
    for name in gathered(mesh, config.attention.name, mechanisms_of(config)):
        what = "has no sequence-parallel form: its sequence is gathered on every device"
        log.info("attention %s %s", name, what)


class Trainer:
    """What the loop holds: model, state, checkpoints, metrics. Built restored.

    ``shift`` says by how many batches the data run ahead of the steps, and ``rewinds`` how often
    the run was rewound past some; both are saved with the state.
    """

    def __init__(self, config: ConfigDict, task: Any, mesh: Any, run: Workdir):
        self.config, self.task, self.mesh, self.run = config, task, mesh, run
        self.kind = kind_of(config)
        self.model = self.kind.make_model(config, task)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        self.rows = batch_sharding(mesh, config.task.batch)
        start = partial(init_state, self.model, optimizer, config)
        self.shapes = jax.eval_shape(start)
        rows = jax.tree.map(lambda _: self.rows, self.shapes.memory)
        shardings = state_shardings(mesh, self.shapes, self.model.architecture.head_dim)
        self.shardings = shardings._replace(memory=rows)
        self.start = jax.jit(start, out_shardings=self.shardings)
        self.step = jax.jit(
            make_step(self.model, optimizer, config),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )
        self.checkpoints = Checkpoints(
            run.checkpoints, keep=config.train.keep, every=config.train.save_every
        )
        self.checkpoints.clean()
        self.stored: int | None = None  # the step that the newest checkpoint holds
        self.skipped = self.rewinds = self.shift = 0
        self.restore()
        sinks = ["tensorboard"] * config.train.tensorboard + ["wandb"] * bool(config.train.wandb)
        begun = int(self.state.step)
        self.writer = Writer(run.path, begun, sinks, config.to_dict(), jax.process_index())
        self.progress = Progress(config.train.steps, begun, process=jax.process_index())
        self.profiling = False

    def restore(self) -> None:
        """Takes up the newest sound checkpoint, or a fresh state where nothing was saved."""
        self.checkpoints.wait()  # a save in progress is not found yet
        if not self.checkpoints.found():
            self.state: State = self.start()
            return
        like = jax.tree.map(
            lambda z, place: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=place),
            self.shapes,
            self.shardings,
        )
        self.stored, self.state, extra = self.checkpoints.restore(like)
        self.shift, self.rewinds = extra["shift"], extra["rewinds"]
        log.info("resuming at step %d", self.stored)

    def save(self) -> None:
        """Saves the state unless it is what the newest checkpoint holds."""
        step = int(self.state.step)
        if step != self.stored:
            extra = {"shift": self.shift, "rewinds": self.rewinds}
            self.checkpoints.save(step, self.state, extra)
            self.stored = step

    def loop(self, stop: Callable[[], bool]) -> None:
        """Until the last step, or ``stop()``; the state is saved either way."""
        clock, step, batches = time.monotonic(), int(self.state.step), None
        try:
            while step < self.config.train.steps and not stop():
                batches = batches or self.batches(step)
                if self.advance(step, batches, stop):
                    batches.close()
                    batches = None  # they went on from another step
                    step = int(self.state.step)
                    continue
                step = int(self.state.step)
                if self.evaluates(step):
                    self.evaluate(step, stop)
                if self.observes(step):
                    self.observe(step)
                if self.checkpoints.due(step):
                    self.save()
        finally:
            if batches is not None:
                batches.close()
            self.profile(None)
        self.save()
        numbers = {"train/seconds": time.monotonic() - clock, "train/peak_bytes": peak_memory()}
        self.writer.write(step, **numbers)

    def batches(self, step: int) -> Any:
        """This process's rows of the batches from a step on."""
        rows = tasks.process_rows(self.config.task.batch, *readers(self.rows))
        return self.task.batches(step + self.shift, rows)

    def advance(self, step: int, batches: Any, stop: Callable[[], bool]) -> bool:
        """Takes steps to the next rest. True if the run was rewound to an earlier state."""
        late = None
        while True:
            self.profile(step)
            self.state, metrics = self.step(self.state, put(next(batches), self.rows))
            step += 1
            if late is not None and self.record(*late):
                return True
            late = step, metrics
            if step >= self.config.train.steps or stop():
                break
            if self.evaluates(step) or self.observes(step) or self.checkpoints.due(step):
                break
        return self.record(*late)

    def evaluates(self, step: int) -> bool:
        """Whether the validation split is scored at a step; the last one is left to `finish`."""
        every = self.config.train.eval_every
        return every > 0 and step % every == 0 and step < self.config.train.steps

    def record(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Shows and writes the metrics of a step. True if the run was rewound because of them."""
        loss = float(metrics["loss"])
        shown = self.kind.describe_loss(self.task, loss)
        tokens = self.config.task.length * self.config.task.batch
        self.progress.update(step, tokens * (step - self.progress.start), **shown)
        if not bool(metrics["finite"]):
            return self.mend(step, loss, float(metrics["grad_norm"]))
        self.skipped = 0
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self.writer.write(
                step,
                **{
                    "train/loss": loss,
                    **{f"train/{name}": value for name, value in shown.items()},
                    "train/grad_norm": metrics["grad_norm"],
                    "train/learning_rate": float(np.asarray(self.schedule(step - 1))),
                    "train/tokens_per_second": self.progress.tokens_per_second,
                },
            )
        return False

    def mend(self, step: int, loss: float, norm: float) -> bool:
        """A loss or gradient was not finite and its update was not applied: acts by ``on_nan``.

        ``skip`` goes on; ``rewind`` goes back to the newest checkpoint and on with the batches
        after the bad one. A restart repeats both, so it does not change where a run ends. True if
        the run was rewound; raises `UserError` where the policy is to give up.
        """
        policy, bad = self.config.train.on_nan, step - 1 + self.shift
        file = self.keep_batch(bad)
        what = f"step {step}: loss {loss}, gradient norm {norm}"
        if math.isfinite(loss) and math.isfinite(norm):
            what += ", but what the attention keeps is not finite"
        what += f"; batch kept in {file}"
        numbers = {"train/bad_loss": loss, "train/bad_grad_norm": norm}
        self.skipped += 1
        if policy == "skip" and self.skipped <= SKIPS:
            self.writer.write(step, **numbers)
            self.progress.note(f"{what}; skipped")
            return False
        if policy == "rewind" and self.rewinds < REWINDS:
            rewinds = self.rewinds + 1
            self.shift = 0
            self.restore()
            back = int(self.state.step)
            self.shift, self.rewinds = bad + 1 - back, rewinds
            self.writer.rewind(back)
            self.writer.write(back, **numbers)
            self.progress.note(f"{what}; back to step {back}, past that batch")
            return True
        self.writer.write(step, **numbers)
        tried = {
            "abort": "",
            "skip": f" after {SKIPS} skipped",
            "rewind": f" after {REWINDS} rewinds",
        }
        raise UserError(
            f"{what}; stopped{tried[policy]}, checkpoints are sound; go on with train.on_nan=skip "
            "or rewind, or start a new workdir with a lower optimizer.learning_rate"
        )

    def keep_batch(self, number: int) -> Path:
        """Writes a batch of the whole run where it can be looked at: ``np.load`` reads it."""
        file = self.run.path / "bad_batches" / f"batch-{number}.npz"
        if jax.process_index() == 0:
            content = io.BytesIO()
            np.savez(content, **self.task.batch(number))
            file.parent.mkdir(exist_ok=True)
            replace_file(file, content.getvalue())
        return file

    def evaluate(self, step: int, stop: Callable[[], bool]) -> None:
        """Scores the validation split with the state as it is, or as far as ``stop()`` lets it."""
        with suppress(Stopped):
            result = self.kind.score(
                self.model,
                self.state.evaluated,
                self.task,
                self.config,
                "validation",
                step,
                tokens=self.config.evaluate.tokens,
                sharding=self.rows,
                stop=stop,
            )
            headline = headline_of(result)
            value = result[headline.key]
            self.writer.write(step, **{f"validation/{headline.key}": value})
            self.progress.note(f"step {step}: validation {value:.4f} {headline.title}")

    def observes(self, step: int) -> bool:
        """Whether it is measured at a step how the attention spreads."""
        every = self.config.train.dilution_every
        return every > 0 and step % every == 0

    def observe(self, step: int) -> None:
        """Writes how the attention of every layer and head spreads, on held-out text."""
        from attnlab.analysis.logged import measure_spread

        params = self.state.evaluated
        spread = measure_spread(self.model, params, self.task, self.config, self.rows)
        self.writer.write(step, **spread)

    def finish(self, together: hosts.Together) -> None:
        """The scores, sample, plots and report of the last step, by process 0, unless stopped."""
        if together.stop():
            return
        params, sharding, step = self.state.evaluated, self.rows, int(self.state.step)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            params, sharding = multihost_utils.process_allgather(params, tiled=True), None
        # Sequences are split where a mesh is in use, which takes all processes.
        splits = sharding is not None and self.mesh.shape["seq"] > 1

        def work(stop: Callable[[], bool]) -> None:
            about = self.run, self.config, self.task, self.model, params, step
            with jax.set_mesh(self.mesh) if splits else nullcontext(), suppress(Stopped):
                self.kind.finish(*about, stop=stop, sharding=sharding)

        together.alone(work)

    def profile(self, step: int | None) -> None:
        """Writes a trace of the steps in the window that the config names, for xprof to show; None
        ends it early."""
        start, count = self.config.train.profile_start, self.config.train.profile_steps
        if count and step == start and jax.process_index() == 0:
            jax.profiler.start_trace(str(self.run.path / "profile"))
            self.profiling = True
        elif self.profiling and (step is None or step >= start + count):
            jax.profiler.stop_trace()
            self.profiling = False
