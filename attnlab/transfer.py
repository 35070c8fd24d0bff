"""Parameters that leave a run in a file of their own, and begin another one.

A file holds the parameters that a run evaluates, each under its dotted path, and in its metadata
the config, the step and the versions that made them. An import makes a workdir whose checkpoint 0
has them, with a fresh optimizer: training goes on from it as from any other, with whatever
mechanism its config names.
"""

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from attnlab import __version__, tasks
from attnlab.checkpoint import Checkpoints
from attnlab.config import REGISTRIES, from_json, to_json
from attnlab.errors import AttnlabError, DataError, UserError
from attnlab.files import write_json
from attnlab.kinds import kind_of
from attnlab.leaves import SHOWN, Leaf, describe_difference, finite, flatten_state
from attnlab.leaves import name_non_finite as name_bad
from attnlab.optimizer import make_optimizer
from attnlab.provenance import find_versions
from attnlab.runs import open_run
from attnlab.signals import Signals
from attnlab.statistics import split
from attnlab.step import State, init_params, init_state
from attnlab.tensors import NAME, SUFFIX, TensorFile, write_tensors
from attnlab.train import storing
from attnlab.workdir import Workdir

TOKENIZER = "tokenizer.json"
WIDEST = 1 << 20
"""Sizes of a model above this are not taken from a file."""
CONFIG = 1 << 16  # characters of one in a file, at most


class Fit(NamedTuple):
    """Dotted paths: in the file and the model, in the model alone, in the file alone."""

    matched: list[str]
    missing: list[str]
    left_over: list[str]


def export_run(workdir: str | Path, to: str | Path, step: int | None = None) -> None:
    """Writes the parameters of a run, the averaged ones where it keeps an average, to ``to``.

    Raises `UserError` for another suffix, a directory that is not there or what `open_run` refuses,
    `DataError` where no checkpoint is sound or the disk is full.
    """
    file = Path(to).expanduser()
    if file.suffix != SUFFIX:
        raise UserError(f"--to={to}: must end in {SUFFIX}")
    if not file.parent.is_dir():
        raise UserError(f"--to={to}: there is no directory {file.parent}")
    if file.is_dir():
        raise UserError(f"--to={to}: is a directory")
    run = open_run(workdir, step)
    arrays = {path: np.asarray(leaf.value) for path, leaf in flatten_state(run.params).items()}
    metadata = {
        "attnlab": __version__,
        "config": to_json(run.config),
        "step": str(run.step),
        "versions": json.dumps({"python": platform.python_version(), **find_versions()}),
        **_tokenizer(run.path),
    }
    with storing(file.parent):
        write_tensors(file, arrays, metadata)
    values = sum(array.size for array in arrays.values())
    print(f"written: {file}: step {run.step}, {len(arrays)} arrays of {values:,} values")


def config_of(source: TensorFile) -> ConfigDict:
    """The config in the metadata of a file, which names nothing but what attnlab itself has.

    Raises `UserError` for a file without a config or one that names files of code, `DataError` for
    one that is no config or asks for sizes that the file cannot have.
    """
    if "config" not in source.metadata:
        raise UserError(f"{source.path} holds no config of attnlab; give --config=FILE")
    where = f"{source.path}: its config"
    try:
        if len(source.metadata["config"]) > CONFIG:
            raise ValueError("it is too long")
        stored = json.loads(source.metadata["config"])
        named = [str(stored[path]["name"]) for path in REGISTRIES]
        if code := [name for name in named if ".py" in name or len(name) > NAME]:
            raise UserError(f"{where} names {code[0][:80]!r}, no part of attnlab; give --config")
        sizes = [n for n in stored["model"].values() if isinstance(n, int | float)]
        layers = stored["model"]["layers"]
        if not all(n <= WIDEST for n in sizes) or layers > len(source.specs):
            raise DataError(f"{where} asks for sizes that are not those of its arrays")
        return from_json(source.metadata["config"], where)
    except AttnlabError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {reason}") from None


def import_file(
    source: TensorFile,
    workdir: str | Path,
    config: ConfigDict,
    *,
    allow_partial: bool = False,
    command: Sequence[str] = ("attnlab", "import"),
) -> None:
    """Makes the run ``workdir`` of a config, at step 0 with the parameters of a file, and says what
    matched. It appears whole or not at all; a signal ends the process with 130 or 143.

    Raises `UserError` for a workdir that is not empty, for parameters of another shape or type
    (nothing is ever cast), for other tokens, and, unless ``allow_partial``, for names that only one
    side has; `DataError` for a file that is damaged or holds NaN or Inf.
    """
    path = Path(os.path.realpath(os.path.expanduser(workdir)))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"workdir {path} is not empty; choose a new one")
    task: Any = tasks.build(config.task, seed=config.seed)
    kind = kind_of(config)
    model = kind.make_model(config, task)
    wanted = flatten_state(jax.eval_shape(lambda: init_params(model, config.seed)))
    fit = match(source, wanted)
    if not allow_partial:
        _need_all(source, fit)
    source.check()
    arrays = _read(source, fit)
    with (
        Signals() as signals,
        _staged(path) as folder,
        Workdir(folder) as run,
        storing(path.parent),
    ):
        kind.begin(config, task, folder)
        _same_tokens(source, folder)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = jax.jit(lambda: init_state(model, optimizer, config))()
        state = _fill(state, arrays, optimizer)
        with Checkpoints(run.checkpoints, keep=config.train.keep) as checkpoints:
            checkpoints.save(0, state, {"shift": 0, "rewinds": 0})
        run.begin(config.to_dict(), command)
        write_json(folder / "imported.json", _record(source, fit))
        if signals.received:
            raise SystemExit(signals.exit_code)
    print(describe(source, fit, wanted))
    print(f"written: {path}; attnlab train --workdir={path} trains it")


def match(source: TensorFile, wanted: Mapping[str, Leaf]) -> Fit:
    """Compares the names, shapes and types of a file with those of a model, by its headers alone.

    Raises `UserError` where a name has another shape or type, or none of the names is shared.
    """
    fit = Fit(
        [path for path in wanted if path in source.specs],
        [path for path in wanted if path not in source.specs],
        [path for path in source.specs if path not in wanted],
    )
    if not fit.matched:
        names = ", ".join(fit.left_over[:SHOWN]) or "nothing"
        raise UserError(f"{source.path} has no parameter of the model; it holds {names}")
    saved = {
        path: {"shape": list(source.specs[path].shape), "dtype": str(source.specs[path].dtype)}
        for path in fit.matched
    }
    if difference := describe_difference(saved, {path: wanted[path] for path in fit.matched}):
        raise UserError(
            f"{source.path} does not fit the model: {difference}; nothing is cast or cut: "
            "change the config, or convert the file"
        )
    return fit


def describe(source: TensorFile, fit: Fit, wanted: Mapping[str, Leaf]) -> str:
    """What an import took and what not, a line each."""
    values = sum(int(np.prod(source.specs[path].shape)) for path in fit.matched)
    lines = [f"matched: {len(fit.matched)} of {len(wanted)} parameters, {values:,} values"]
    lines += [f"missing: {path}, which is as initialised" for path in fit.missing]
    lines += [f"left over: {path}, which the model does not have" for path in fit.left_over]
    return "\n".join(lines)


def _need_all(source: TensorFile, fit: Fit) -> None:
    sides = {"missing": fit.missing, "left over": fit.left_over}
    found = []
    for side, paths in sides.items():
        more = f" and {len(paths) - SHOWN} more" * (len(paths) > SHOWN)
        found += [f"{side} {', '.join(paths[:SHOWN])}{more}"] if paths else []
    if found:
        raise UserError(
            f"{source.path} is not all that the model is: {'; '.join(found)}; --allow_partial "
            "takes what matches and leaves the rest as initialised"
        )


def _read(source: TensorFile, fit: Fit) -> dict[str, jax.Array]:
    arrays = {path: jnp.asarray(source.read(path)) for path in fit.matched}
    if not finite(arrays):
        raise DataError(f"{source.path}: {name_bad(arrays)} holds NaN or Inf; nothing is imported")
    return arrays


def _fill(state: State, arrays: dict[str, jax.Array], optimizer: Any) -> State:
    """The state with these parameters, its average and optimizer begun anew from them."""
    leaves = {path: leaf.value for path, leaf in flatten_state(state.params).items()} | arrays
    params = jax.tree.unflatten(jax.tree.structure(state.params), list(leaves.values()))
    average = jax.tree.map(jnp.copy, params) if state.average != () else ()
    return state._replace(
        params=params, average=average, optimizer=optimizer.init(split(params)[0])
    )


def _tokenizer(path: Path) -> dict[str, str]:
    """The SHA-256 of the tokenizer of a run, if it has one."""
    file = path / TOKENIZER
    return {"tokenizer": hashlib.sha256(file.read_bytes()).hexdigest()} if file.exists() else {}


def _same_tokens(source: TensorFile, folder: Path) -> None:
    """Raises `UserError` where the tokens of a file mean something else in the new run."""
    theirs, ours = source.metadata.get("tokenizer"), _tokenizer(folder).get("tokenizer")
    if theirs and ours and theirs != ours:
        raise UserError(
            f"{source.path} was trained with another tokenizer, so its tokens mean something else; "
            "use its task.tokenizer and task.corpus"
        )


def _record(source: TensorFile, fit: Fit) -> dict[str, Any]:
    known = {key: source.metadata.get(key) for key in ("attnlab", "step", "versions", "sha256")}
    return {"file": str(source.path), **known, **fit._asdict()}


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A directory beside ``path`` that becomes it when the block ends without an error."""
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield stage
        os.rename(stage, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
