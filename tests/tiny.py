"""A run so small that a test can train it, and what several test files ask about such a run."""

import atexit
import functools
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnlab.checkpoint import Checkpoints
from attnlab.config import base, model_of
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state
from attnlab.train import train

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps")
SIZES = (
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=2",
    "task.length=32",
    "task.batch=8",
    "optimizer.ema=0.9",
    "optimizer.warmup=2",
    "optimizer.learning_rate=0.01",
    "train.steps=12",
    "train.save_every=4",
    "train.eval_every=6",
    "train.log_every=1",
    "train.tensorboard=false",
    "evaluate.batch=8",
    "evaluate.tokens=128",
    "sample.tokens=8",
)


@functools.cache
def home() -> Path:
    """A directory that lives as long as the tests, also where prepared data go."""
    path = Path(tempfile.mkdtemp(prefix="attnlab-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    os.environ["ATTNLAB_DATA"] = str(path / "data")
    return path


@functools.cache
def corpus() -> str:
    """``text:GLOB`` of six short documents."""
    folder = home() / "corpus"
    folder.mkdir()
    for number in range(6):
        draw = random.Random(number)
        text = " ".join(draw.choice(WORDS) for _ in range(150))
        (folder / f"{number}.txt").write_text(text)
    return f"text:{folder}/*.txt"


@functools.cache
def labelled() -> str:
    """``text:GLOB`` of 120 short documents in two directories, with words of their own in each."""
    folder = home() / "labelled"
    for label, words in enumerate((WORDS[:5], WORDS[5:])):
        (folder / str(label)).mkdir(parents=True)
        for number in range(label, 120, 2):
            draw = random.Random(number)
            text = " ".join(draw.choice(words) for _ in range(draw.randrange(3, 9)))
            (folder / str(label) / f"{number}.txt").write_text(f"{number:03d} {text}")
    return f"text:{folder}/*/*.txt"


@functools.cache
def pictures() -> str:
    """``text:GLOB`` of 120 images of 8 x 8 pixels, dark in one directory and bright in another."""
    folder = home() / "pictures"
    for label in (0, 1):
        (folder / str(label)).mkdir(parents=True)
        for number in range(label, 120, 2):
            pixels = random.Random(number).choices(range(128 * label, 128 * label + 128), k=64)
            (folder / str(label) / f"{number}.raw").write_bytes(bytes(pixels))
    return f"text:{folder}/*/*.raw"


def tiny(*changes: str, attention: str = "softmax", position: str = "rope") -> Any:
    """The config of a run of seconds, with ``path=value`` changes."""
    config = base(attention, position)
    for change in (*SIZES, f"task.corpus={corpus()}", *changes):
        override(config, *change.split("=", 1))
    return config


def tiny_on(task: str, *changes: str, attention: str = "softmax") -> Any:
    """The same on another task."""
    config = base(attention, "rope", task=task)
    for change in (*SIZES, *changes):
        override(config, *change.split("=", 1))
    return config


@functools.cache
def trained(attention: str = "softmax") -> Path:
    """The workdir of a finished run. Not to be changed."""
    path = home() / f"trained-{attention}"
    # A window shorter than the length, so that no two mechanisms give the same numbers.
    changes = ["attention.window=4"] if attention == "window" else []
    assert train(tiny(*changes, attention=attention), path, ["attnlab", "train"]) == 0
    return path


def saved_state(workdir: Path, config: Any) -> dict[str, bytes]:
    """The newest checkpoint, leaf by leaf: everything that training goes on from."""
    model = model_of(config, 257)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=here),
        jax.eval_shape(lambda: init_state(model, optimizer, config)),
    )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step, state, extra = checkpoints.read(like)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return found | {"step": str(step).encode(), "extra": repr(sorted(extra.items())).encode()}
