"""The experiment as data: sections, defaults, what they build, and what may not be.

A config is a locked `ml_collections.ConfigDict`. Its `attention`, `position` and `normaliser`
sections are the fields of the chosen dataclasses, so a mechanism declares its options once, in its
own file. What else the name of an attention may say is in `attnlab.patterns`.
"""

import itertools
import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from attnlab import patterns
from attnlab.combination import options
from attnlab.core import Mechanism, Normaliser, Position, mechanisms, normalisers, positions
from attnlab.errors import UserError, did_you_mean
from attnlab.literals import kind_of, parse, text_of
from attnlab.registry import Registry
from attnlab.tasks import COMMON, recipes

if TYPE_CHECKING:
    from attnlab.data.tokenizers import Tokenizer
    from attnlab.model import Architecture, Classifier, Regressor, Transformer
    from attnlab.pointer import Outputs, PointerNetwork


def base(
    attention: str = "softmax",
    position: str = "rope",
    normaliser: str = "softmax",
    task: str = "text",
) -> ConfigDict:
    """The defaults that every config file starts from, and the whole schema."""
    config = ConfigDict(
        {
            "seed": 0,
            "model": {
                "width": 256,
                "layers": 6,
                "heads": 4,
                "kv_heads": 4,  # fewer than heads: each serves heads / kv_heads query heads
                "head_dim": 0,  # 0 = width / heads
                "mlp": "swiglu",
                "mlp_width": 0,  # 0 = the customary multiple of width
                "dropout": 0.0,
                "qk_norm": True,
                "tied": True,  # the output projection is the embedding, transposed
                "remat": False,  # recompute each layer in the backward pass: less memory
                "dtype": "float32",  # of the activations; parameters are float32
                "causal": True,
                "kernels": "xla",  # pallas: our own for GPU and TPU; their speed is unmeasured
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "warmup": 100,  # steps
                "final_fraction": 0.1,  # learning rate at the last step / at the peak
                "weight_decay": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "clip": 1.0,  # global gradient norm; 0 = off
                "accumulate": 1,  # parts that a batch is computed in: less memory
                "ema": 0.0,  # decay of the averaged parameters that evaluation uses; 0 = off
            },
            "train": {
                "steps": 1000,
                "log_every": 10,
                "eval_every": 200,  # 0 = only at the end; the same for save_every
                "save_every": 200,
                "dilution_every": 0,  # entropy, sinks, ... of every head into the metrics; 0 = off
                "keep": 3,  # newest checkpoints
                "on_nan": "abort",
                "tensorboard": True,
                "wandb": "",  # a project name turns it on
                "profile_start": 0,
                "profile_steps": 0,  # 0 = off
            },
            "evaluate": {
                "length": 0,  # 0 = task.length
                "stride": 0,  # tokens scored per window; 0 = all of them, windows side by side
                "batch": 16,
                "tokens": 0,  # at most so many; 0 = the whole split
            },
            "sample": {
                "prompt": "",
                "tokens": 256,
                "temperature": 1.0,  # 0 = always the likeliest token
                "top_k": 0,  # 0 = off
                "top_p": 1.0,  # 1 = off
            },
            # AXIS:SIZE, comma separated: data and fsdp split rows, fsdp parameters too, seq tokens,
            # tensor heads and hidden units; -1 = the devices left
            "mesh": "data:-1",
        }
    )
    config.attention = section(mechanisms, attention)
    config.position = section(positions, position)
    config.normaliser = section(normalisers, normaliser)
    config.task = section(recipes, task)
    if "packing" in config.task and any(m.carries for m in mechanisms_of(config)):
        config.task.packing = "stream"
    return config.lock()


REGISTRIES: dict[str, Registry] = {
    "attention": mechanisms,
    "position": positions,
    "normaliser": normalisers,
    "task": recipes,
}
"""The sections that hold the fields of one registered dataclass, chosen by ``name``."""

CHOICES = {
    "task.packing": ("packed", "stream"),
    "model.mlp": ("swiglu", "gelu", "none"),
    "model.dtype": ("float32", "bfloat16"),
    "model.kernels": ("xla", "pallas"),
    "optimizer.name": ("adamw", "muon"),
    "train.on_nan": ("abort", "skip", "rewind"),
}
"""The fields that are one of a few names."""


def section(registry: Registry, name: str) -> ConfigDict:
    """The config section of a registered dataclass: ``name`` and its fields at their defaults; of
    a task, also what all tasks have.

    Parts and patterns have sub-sections, see `attnlab.patterns`. Raises `UserError` for an unknown
    name.
    """
    result = {"name": name}
    for key, cls in _classes(registry, name).items():
        fields = patterns.defaults(cls)
        result |= {key: fields} if key else fields
    return ConfigDict(result | (COMMON if registry is recipes else {})).lock()


def kinds(config: ConfigDict) -> dict[str, Any]:
    """The type of every field by dotted path: ``{"model.width": int, ...}``.

    Types come from the annotations of the chosen dataclasses, else from the value.
    """
    found = {path: kind_of(value) for path, value in flat(config).items()}
    for path, registry in REGISTRIES.items():
        for key, cls in _classes(registry, config[path].name).items():
            hints, prefix = typing.get_type_hints(cls), f"{path}.{key}" if key else path
            found |= {f"{prefix}.{field.name}": hints[field.name] for field in options(cls)}
    return found


def mechanisms_of(config: ConfigDict) -> tuple[Mechanism, ...]:
    """One mechanism per layer, the pattern of `config.attention` cycled from the first layer."""
    fields = config.attention.to_dict()
    cycle = itertools.cycle(patterns.build(fields.pop("name"), fields))
    return tuple(itertools.islice(cycle, config.model.layers))


def position_of(config: ConfigDict) -> Position:
    """The position module that `config.position` describes."""
    fields = config.position.to_dict()
    return positions.get(fields.pop("name"))(**fields)


def normaliser_of(config: ConfigDict) -> Normaliser:
    """The normaliser that `config.normaliser` describes."""
    fields = config.normaliser.to_dict()
    return normalisers.get(fields.pop("name"))(**fields)


def architecture_of(config: ConfigDict) -> "Architecture":
    """`config.model` with its zeros resolved.

    ``head_dim`` = width / heads; ``mlp_width`` = 4 width for gelu and, for swiglu, which has three
    matrices in place of two, 8/3 width rounded up to a multiple of 64.
    """
    from attnlab.model import Architecture

    fields = config.model.to_dict()
    width = fields["width"]
    fields["head_dim"] = fields["head_dim"] or width // fields["heads"]
    rule = 4 * width if fields["mlp"] == "gelu" else -(-8 * width // (3 * 64)) * 64
    fields["mlp_width"] = fields["mlp_width"] or rule
    return Architecture(**fields)


def model_of(
    config: ConfigDict, vocab_size: int, tokenizer: "Tokenizer | None" = None
) -> "Transformer":
    """The language model of a config, for a tokenizer of ``vocab_size`` ids, which is asked where
    units of text end if a mechanism wants to know."""
    from attnlab.model import Transformer

    mechanisms, marks = mechanisms_of(config), b""
    if tokenizer is not None and any(mechanism.marked for mechanism in mechanisms):
        from attnlab.data.tokenizers import marks_of

        marks = marks_of(tokenizer)
    return Transformer(
        architecture_of(config),
        vocab_size,
        mechanisms,
        position_of(config),
        normaliser_of(config),
        marks,
    )


def classifier_of(
    config: ConfigDict, vocab_size: int, classes: int, form: "type[Classifier]"
) -> "Classifier":
    """The encoder of a config with a head of so many ``classes``, of that form."""
    return form(
        architecture_of(config),
        vocab_size,
        mechanisms_of(config),
        position_of(config),
        classes,
        normaliser_of(config),
    )


def pointer_of(config: ConfigDict, outputs: "Outputs") -> "PointerNetwork":
    """A pointer network whose encoder is that of a config; ``outputs``: what it may name."""
    from attnlab.encoders import TransformerEncoder
    from attnlab.pointer import PointerNetwork

    encoder = TransformerEncoder(
        architecture_of(config),
        mechanisms_of(config),
        position_of(config),
        normaliser_of(config),
    )
    return PointerNetwork(encoder, outputs)


def regressor_of(config: ConfigDict, features: int) -> "Regressor":
    """The model of a config for tokens of so many real numbers."""
    from attnlab.model import Regressor

    return Regressor(
        architecture_of(config),
        features,
        mechanisms_of(config),
        position_of(config),
        normaliser_of(config),
    )


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """The part after the colon of ``--config=FILE:key=value,...`` over typed defaults.

    Raises `UserError` for an unknown key or a value that is not of its default's type.
    """
    result = ConfigDict(defaults)
    for item in (arg or "").split(","):
        key, equals, text = item.partition("=")
        if not item:
            continue
        if not equals:
            raise UserError(f"config argument {item!r} is not of the form key=value")
        if key not in defaults:
            raise UserError(f"unknown config argument {key!r}; {did_you_mean(key, defaults)}")
        result[key] = parse(text, kind_of(defaults[key]), f"config argument {key}")
    return result


def pick(key: str, name: str, known: Mapping[str, Any]) -> Any:
    """What a config argument ``key=name`` stands for. Raises `UserError` with the nearest names."""
    if name not in known:
        raise UserError(f"config argument {key}={name}: {did_you_mean(name, known)}")
    return known[name]


def flat(config: ConfigDict) -> dict[str, Any]:
    """Leaves by dotted path, in order: ``{"seed": 0, "task.name": "text", ...}``."""
    result = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            result |= {f"{key}.{path}": leaf for path, leaf in flat(value).items()}
        else:
            result[key] = value
    return result


def diff(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Dotted changes, ``model.width: 256 -> 512``; a field that only one side has is ``absent``."""
    before, after = flat(old), flat(new)
    paths = dict.fromkeys([*before, *after])
    shown = [{p: repr(v) for p, v in side.items()} for side in (before, after)]
    pairs = [(p, *(side.get(p, "absent") for side in shown)) for p in paths]
    return [f"{path}: {a} -> {b}" for path, a, b in pairs if a != b]


def to_json(config: ConfigDict) -> str:
    """The resolved config as a JSON object, for the workdir."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> ConfigDict:
    """The config that `to_json` wrote, checked against today's schema.

    One without a `normaliser` section, written when softmax was the only one, means softmax, and
    one without `model.kernels` means XLA.
    Raises `UserError` if it is no JSON object or its fields are not those of this version.
    """
    try:
        stored = ConfigDict(json.loads(text))
        stored.normaliser = stored.get("normaliser", {"name": "softmax"})
        stored.task = stored.get("task", {"name": "text"})
        config = base(*(getattr(stored, path).name for path in REGISTRIES))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{where}: {error}") from error
        raise UserError(f"{where} is not a config written by attnlab: {error}") from error
    if isinstance(stored.get("model"), ConfigDict):
        stored.model.kernels = stored.model.get("kernels", "xla")
    known, given = flat(config), flat(stored)
    wrong = [f"unknown {p}" for p in given if p not in known]
    wrong += [f"missing {p} (now {value!r})" for p, value in known.items() if p not in given]
    if wrong:
        raise UserError(
            f"{where} was written by another version of attnlab: {', '.join(wrong)}; "
            "correct that file, or run the version named in run.json"
        )
    types = kinds(config)
    for path, value in given.items():
        put(config, path, parse(text_of(value), types[path], f"{where}: {path}"))
    return config


def put(config: ConfigDict, path: str, value: Any) -> None:
    """Sets a field whose value `parse` has already checked against its declared type."""
    with config.ignore_type():
        config.update_from_flattened_dict({path: value})


def _classes(registry: Registry, name: str) -> dict[str, type]:
    """Key of the (sub-)section, "" for the section itself -> the class whose options it holds."""
    if registry is mechanisms:
        return {**patterns.classes_of(name)}
    if "+" in name:
        raise UserError(f"{registry.kind}={name}: only attention may be a pattern over the layers")
    return {patterns.ALONE: registry.get(name)}
