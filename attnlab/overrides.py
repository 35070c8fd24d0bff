"""From what the user typed to a config: ``--config=FILE[:ARG]`` and ``--config.a.b=value``.

Every mistake ends in one line that names the place, the nearest right thing, and the legal values.
"""

import difflib
import importlib.util
import inspect
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.config import CHOICES, REGISTRIES, base, flat, from_json, kinds, put, section
from attnlab.errors import AttnlabError, UserError, did_you_mean
from attnlab.literals import parse
from attnlab.tasks import COMMON

ALIASES = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "grad_clip": "optimizer.clip",
    "warmup_steps": "optimizer.warmup",
    "grad_accum": "optimizer.accumulate",
    "d_model": "model.width",
    "dim": "model.width",
    "hidden_size": "model.width",
    "depth": "model.layers",
    "n_layers": "model.layers",
    "num_layers": "model.layers",
    "n_heads": "model.heads",
    "num_heads": "model.heads",
    "n_kv_heads": "model.kv_heads",
    "num_kv_heads": "model.kv_heads",
    "d_ff": "model.mlp_width",
    "seq_len": "task.length",
    "sequence_length": "task.length",
    "context": "task.length",
    "block_size": "task.length",
    "batch_size": "task.batch",
    "dataset": "task.corpus",
    "num_steps": "train.steps",
    "max_steps": "train.steps",
    "mechanism": "attention.name",
}
"""What other trainers call our fields; only ever used to suggest."""


def load(spec: str) -> ConfigDict:
    """The config of ``FILE.py[:ARG]`` (what its ``get_config(ARG)`` returns) or ``FILE.json``.

    Raises `UserError` if the file is missing, cannot be parsed, has no ``get_config``, fails inside
    it, or returns something that is not a config of this version.
    """
    found, path = _find(spec)
    if isinstance(found, list | tuple):
        raise UserError(f"{path} is a sweep of {len(found)} configs; attnlab sweep runs it")
    return _checked(found, path)


def load_sweep(spec: str) -> list[ConfigDict]:
    """The configs of a sweep: a file as for `load`, whose ``get_config`` returns a list of them."""
    found, path = _find(spec)
    if not isinstance(found, list | tuple):
        raise UserError(
            f"{path} is no sweep: its get_config must return a list of configs; "
            "attnlab train runs a single one"
        )
    return [_checked(config, path) for config in found]


def _find(spec: str) -> tuple[Any, str]:
    """What a file gives, unchecked, and its path as it was typed."""
    match = re.fullmatch(r"(.+?\.(?:py|json))(?::(.*))?", spec, re.DOTALL)
    path, arg = match.groups() if match else (spec, None)
    file = Path(path).expanduser()
    if not match or not file.is_file():
        raise UserError(f"no config file {path!r}; {did_you_mean(path, _nearby(file))}")
    if file.suffix == ".json":
        return from_json(file.read_text(encoding="utf-8"), path), path
    return _get_config(file, path, arg), path


def _checked(config: Any, path: str) -> ConfigDict:
    """A config that has all fields of this version and no others."""
    if not isinstance(config, ConfigDict) or not REGISTRIES.keys() <= set(config):
        kind = type(config).__name__
        raise UserError(f"{path}: get_config returned {kind}, not a config made from base()")
    schema = base(*(config[path].name for path in REGISTRIES))
    if strange := [p for p in flat(config) if p not in flat(schema)]:
        raise UserError(f"{path}: {unknown(schema, strange[0])}")
    if missing := [p for p in flat(schema) if p not in flat(config)]:
        raise UserError(f"{path}: the config lost {', '.join(missing)}; begin with base()")
    return config


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the field at a dotted path to what `text` says, read by the field's type, in place.

    A new ``attention``, ``position``, ``normaliser`` or ``task`` name replaces its section by that
    dataclass's defaults; length and batch of a task stay.
    Raises `UserError` for an unknown path, a value of the wrong type, or an illegal choice.
    """
    for key, registry in REGISTRIES.items():
        if path in (key, f"{key}.name"):
            new = section(registry, text)
            if key == "task":
                new.update({field: config.task[field] for field in COMMON})
            with config.unlocked():
                config[key] = new
            return
    known = kinds(config)
    if path not in known:
        raise UserError(unknown(config, path))
    value = parse(text, known[path], f"--config.{path}")
    choices = CHOICES.get(path)
    if choices and value not in choices:
        raise UserError(f"--config.{path}={text}: not one of {', '.join(choices)}")
    put(config, path, value)


def unknown(config: ConfigDict, path: str) -> str:
    """The error line for a path that no field has: the section's fields, or the nearest three."""
    known = list(flat(config))
    if inside := [p for p in known if p.startswith(f"{path}.")]:
        return f"config.{path} is a section; set one of its fields: {', '.join(inside)}"
    leaf = path.rpartition(".")[2]
    near = [ALIASES[leaf]] if ALIASES.get(leaf) in known else []
    near += [p for p in known if p.rpartition(".")[2] == leaf]
    if not near:
        near = difflib.get_close_matches(path, known, n=3, cutoff=0.7)
        leaves = {p.rpartition(".")[2]: p for p in reversed(known)}
        near += [leaves[l] for l in difflib.get_close_matches(leaf, leaves, n=3, cutoff=0.6)]
        near += difflib.get_close_matches(path, known, n=3, cutoff=0.4)
    near = list(dict.fromkeys(near))[:3]
    if near:
        return f"unknown config field {path!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown config field {path!r}; sections: {', '.join(sorted(config))}"


def _nearby(file: Path) -> list[str]:
    folders = dict.fromkeys([file.parent, Path("configs")])
    return [str(f) for folder in folders if folder.is_dir() for f in sorted(folder.glob("*.py"))]


def _get_config(file: Path, path: str, arg: str | None) -> Any:
    """Runs the file and its ``get_config``; whatever it raises becomes one line with its place."""
    spec = importlib.util.spec_from_file_location(f"attnlab_config_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"{path}: defines no get_config(arg)")
        if arg and not inspect.signature(get_config).parameters:
            raise UserError(
                f"{path}: get_config takes no argument, so nothing may follow the colon"
            )
        return get_config(arg) if inspect.signature(get_config).parameters else get_config()
    except AttnlabError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if Path(frame.filename) == file.absolute()]
        place = f"{path}:{line[-1]}" if line else path
        reason = (str(error).splitlines() or [""])[0].partition(". Other fields present")[0]
        raise UserError(f"{place}: {type(error).__name__}: {reason}") from error
