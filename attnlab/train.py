"""The training loop: restore; then evaluate and save with the old state, next batch, step."""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.checkpoint import Checkpoints
from attnlab.config import model_of
from attnlab.errors import UserError
from attnlab.evaluate import describe_scores, score
from attnlab.metrics import Writer
from attnlab.optimizer import make_optimizer, make_schedule
from attnlab.progress import Progress
from attnlab.sharding import batch_sharding, make_mesh, put, state_shardings
from attnlab.signals import Signals
from attnlab.step import State, init_state, make_step
from attnlab.workdir import Workdir

log = logging.getLogger(__name__)

SKIPS = 20  # bad batches in a row after which skipping is no remedy
REWINDS = 5  # in one run


def train(config: ConfigDict, workdir: str | Path, command: Sequence[str] = ("attnlab",)) -> int:
    """Trains the run in ``workdir`` to ``config.train.steps``, from wherever it stands, then
    scores, samples, plots and reports it. Returns the exit code: 0, or 143 / 130 after a signal.

    Raises `UserError` for a workdir of another config or a diverged run, `DataError` for data or
    checkpoints that cannot be used.
    """
    process, processes = jax.process_index(), jax.process_count()
    with Signals() as signals, Workdir(workdir, process=process) as run:
        run.begin(config.to_dict(), command)
        if done := run.finished():
            print(f"{run.path}: finished at step {done['step']}; nothing to do")
            return 0
        mesh = make_mesh(config.mesh)
        task = tasks.build(config.task, seed=config.seed)
        rows = tasks.process_rows(config.task.batch, process, processes)
        task.tokenizer.save(run.path)
        trainer = Trainer(config, task, mesh, run)
        if not signals.received:
            with trainer.checkpoints, trainer.writer, trainer.progress, jax.set_mesh(mesh):
                trainer.loop(rows, signals)
        if not signals.received and process == 0:
            from attnlab.report import finish

            finish(run, config, task, trainer.model, trainer.state)
        return signals.exit_code


class Trainer:
    """What the loop holds: model, state, checkpoints, metrics. Built restored."""

    def __init__(self, config: ConfigDict, task: Any, mesh: Any, run: Workdir):
        self.config, self.task, self.run = config, task, run
        self.model = model_of(config, task.vocab_size)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        self.rows = batch_sharding(mesh, config.task.batch)
        start = partial(init_state, self.model, optimizer, config)
        self.shardings = state_shardings(mesh, jax.eval_shape(start))
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
        self.state, self.shift = self.restored()
        sinks = ["tensorboard"] * config.train.tensorboard + ["wandb"] * bool(config.train.wandb)
        begun = int(self.state.step)
        self.writer = Writer(run.path, begun, sinks, config.to_dict(), jax.process_index())
        self.progress = Progress(config.train.steps, begun)
        self.skipped = 0

    def restored(self) -> tuple[State, int]:
        """The newest sound state, or a fresh one; and by how many batches the data run ahead of
        the steps, because a rewind passed over some."""
        state = self.start()
        if not self.checkpoints.found():
            return state, 0
        step, state, extra = self.checkpoints.restore(state)
        log.info("resuming at step %d", step)
        return state, extra["shift"]

    def loop(self, rows: slice, signals: Signals) -> None:
        """Until the last step or a signal; the state is saved either way."""
        config, total = self.config.train, self.config.train.steps
        step = begun = int(self.state.step)
        batches = self.task.batches(step + self.shift, rows)
        pending, clock = None, time.monotonic()
        try:
            while step < total and not signals.received:
                if step > begun and config.eval_every and step % config.eval_every == 0:
                    self.evaluate(step)
                if step > begun and self.checkpoints.due(step):
                    self.save(step)
                self.profile(step)
                batch = put(next(batches), self.rows)
                self.state, metrics = self.step(self.state, batch)
                step += 1
                # One step late, so that the device never waits for the host to read a number.
                rewound = pending is not None and self.record(*pending)
                pending = (step, metrics)
                if rewound:
                    batches.close()
                    pending, step = None, int(self.state.step)
                    batches = self.task.batches(step + self.shift, rows)
            if pending is not None and self.record(*pending):
                return self.loop(rows, signals)
        finally:
            batches.close()
            jax.profiler.stop_trace() if self._profiling else None
        if step > begun:
            self.save(step)
        self.writer.write(step, **{"train/seconds": time.monotonic() - clock})

    def record(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Shows and writes the metrics of a step. True if the run was rewound because of them."""
        loss = float(metrics["loss"])
        bits = loss / math.log(2) / self.task.bytes_per_token
        tokens = self.config.task.length * self.config.task.batch
        self.progress.update(step, tokens * (step - self.progress.start), bits_per_byte=bits)
        if not bool(metrics["finite"]):
            return self.mend(step, loss, float(metrics["grad_norm"]))
        self.skipped = 0
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self.writer.write(
                step,
                **{
                    "train/loss": loss,
                    "train/bits_per_byte": bits,
                    "train/grad_norm": metrics["grad_norm"],
                    "train/learning_rate": float(self.schedule(step - 1)),
                    "train/tokens_per_second": self.progress.tokens_per_second,
                },
            )
        return False

    def mend(self, step: int, loss: float, norm: float) -> bool:
        """A loss or gradient was not finite: the update was not applied; act by ``on_nan``."""
        policy, bad = self.config.train.on_nan, step - 1 + self.shift
        file = self.run.path / "bad_batches" / f"batch-{bad}.npz"
        file.parent.mkdir(exist_ok=True)
        np.savez(file, step=step, loss=loss, grad_norm=norm, **self.task.batch(bad))
        what = f"step {step}: loss {loss}, gradient norm {norm}; batch kept in {file}"
        self.writer.write(step, **{"train/bad_loss": loss, "train/bad_grad_norm": norm})
        if policy == "skip" and self.skipped < SKIPS:
            self.skipped += 1
            self.progress.note(f"{what}; skipped")
            return False
        if policy == "rewind" and self.shift < step and self.skipped < REWINDS:
            self.skipped += 1
            self.checkpoints.wait()
            self.state, _ = self.restored()
            self.shift = bad + 1 - int(self.state.step)
            self.progress.note(f"{what}; back to step {int(self.state.step)}, past that batch")
            return True
        raise UserError(
            f"{what}; the last good state is kept; lower optimizer.learning_rate or choose "
            "train.on_nan=skip or rewind"
        )

    def evaluate(self, step: int) -> None:
        """Scores the validation split with the state as it is."""
        settings = self.config.evaluate
        length = settings.length or self.config.task.length
        stride = min(settings.stride or length, length)
        scores = score(
            self.model,
            self.state.evaluated,
            self.task,
            "validation",
            length=length,
            stride=stride,
            batch=settings.batch,
            tokens=settings.tokens,
        )
        result = describe_scores(scores, self.task, self.config, "validation", stride, step)
        bits = result["bits_per_byte"]
        self.writer.write(step, **{"validation/bits_per_byte": bits})
        self.progress.note(f"step {step}: validation {bits:.4f} bits per byte")

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.state, {"shift": self.shift})

    _profiling = False

    def profile(self, step: int) -> None:
        """Writes a trace of the steps in the window that the config names, for xprof to show."""
        start, count = self.config.train.profile_start, self.config.train.profile_steps
        if count and step == start:
            jax.profiler.start_trace(str(self.run.path / "profile"))
            self._profiling = True
        elif self._profiling and step == start + count:
            jax.profiler.stop_trace()
            self._profiling = False
