"""What a config will cost, before anything is compiled: parameters, FLOPs, memory, epochs.

Everything is counted on abstract arrays: parameters, optimizer and decoding memory from the shapes
that training and sampling would make, activations from those the backward pass would keep.
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.carry import nothing_read, resume
from attnlab.errors import MissingError, UserError
from attnlab.kinds import kind_of
from attnlab.limits import validate
from attnlab.model import Transformer, initial_memory
from attnlab.optimizer import make_optimizer
from attnlab.pointer import PointerNetwork, Trainable
from attnlab.sharding import (
    batch_sharding,
    check_length,
    gathered,
    make_mesh,
    tensor_axis,
)
from attnlab.statistics import merge, split
from attnlab.step import blank, init_state, losses_of


class Layers(NamedTuple):
    """``count`` layers of one mechanism, and of each of them ``flops`` of training per token, its
    projections apart, and bytes of ``decoding`` memory per sequence of the training length."""

    count: int
    flops: float
    decoding: int


class Estimate(NamedTuple):
    """Learned ``parameters`` by part ("embedding", "layer_0", ..., whatever else the model has);
    numbers ``measured`` in training (see `attnlab.statistics`);
    ``matmul_flops`` and ``attention_flops`` of training per token (forward, and twice that for the
    backward pass), bytes of ``decoding`` memory per sequence of the training length, and both for
    the ``layers`` of each mechanism, by its name in the config; bytes on each device that are
    ``fixed`` (parameters, gradients, optimizer, carried memory) and of ``activations``."""

    parameters: dict[str, int]
    measured: int
    matmul_flops: float
    attention_flops: float
    decoding: int
    layers: dict[str, Layers]
    fixed: int
    activations: int


def plan(config: ConfigDict) -> None:
    """Prints the plan of a training run; data that are missing are said to be.

    Raises `UserError` for a config that cannot run or whose parameters, gradients and optimizer
    alone exceed the memory of a device, `DataError` for data that are damaged or too small.
    Prepares the corpus.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    batch_sharding(mesh, config.task.batch)
    check_length(mesh, config.task.length)
    task, missing = None, ""
    try:
        task = tasks.build(config.task, seed=config.seed)
    except MissingError as error:
        missing = str(error)
    model = kind_of(config).make_model(config, task)
    tensor = mesh.shape["tensor"]
    estimate = estimate_cost(config, model, mesh.size // tensor, mesh.shape["fsdp"], tensor)
    splits = {} if task is None else task.info().get("splits", {})
    tokens, available = splits.get("train", {}).get("tokens"), device_memory()
    print(describe(config, estimate, tokens, available, missing))
    for name in gathered(mesh, config.attention.name, model.mechanisms):
        what = f"{name} has no sequence-parallel form: every device gathers its whole sequence"
        print(f"{'warning':<12}{what}, which activations leave out")
    if estimate.fixed > available:
        raise UserError(
            f"parameters, gradients and optimizer need {_bytes(estimate.fixed)} on each device, "
            f"which has {_bytes(available)}; lower model.width or model.layers, or raise fsdp "
            "in mesh"
        )


def estimate_cost(
    config: ConfigDict, model: Trainable, devices: int = 1, fsdp: int = 1, tensor: int = 1
) -> Estimate:
    """Counts parameters, FLOPs and bytes of a config and its model, which it traces in a second.

    Tokens are split among so many ``devices``, by rows or along the sequence; ``tensor`` of them
    share their heads and hidden units. Activations are what autodiff keeps of one part of the
    batch, before XLA fuses any of it away, and as if ``tensor`` split none of it.
    """
    length = config.task.length
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config))
    learned, measured = split(state.params)
    parts = {name: _count(part) for name, part in learned["backbone"].items()}
    parts |= {name: _count(part) for name, part in learned.items() if name != "backbone"}
    layers = _layers(model, config.attention.name.split("+"), length)
    whole = partial(_size, tensor=tensor, head_dim=model.architecture.head_dim)
    gradients = whole(learned) * (2 if config.optimizer.accumulate > 1 else 1)
    rows = config.task.batch // config.optimizer.accumulate
    return Estimate(
        parameters=parts,
        measured=_count(measured),
        matmul_flops=6.0 * _multiplied(model, parts, length),
        attention_flops=sum(each.count * each.flops for each in layers.values()),
        decoding=sum(each.count * each.decoding for each in layers.values()),
        layers=layers,
        fixed=(whole(state._replace(memory=())) + gradients) // fsdp
        + _size(state.memory) // devices,
        activations=_residuals(model, state.params, rows, length) // devices,
    )


def _multiplied(model: Trainable, parts: dict[str, int], length: int) -> float:
    """How many parameters a token is multiplied with."""
    if isinstance(model, PointerNetwork):
        layers = sum(count for name, count in parts.items() if name.startswith("layer_"))
        return layers + parts["embedding"] + model.count_products(length) / length
    read_out = model.architecture.tied and isinstance(model, Transformer)
    return sum(parts.values()) - (0 if read_out else parts["embedding"])


def _layers(model: Trainable, names: Sequence[str], length: int) -> dict[str, Layers]:
    """The layers of each mechanism; ``names`` are those of one cycle."""
    a, layers = model.architecture, {}
    for name, mechanism in zip(itertools.cycle(names), model.mechanisms):
        flops = 3.0 * mechanism.flops(a.dims, length, a.causal) / length
        memory = jax.eval_shape(partial(initial_memory, a, (mechanism,), 1, length))
        count = layers[name].count if name in layers else 0
        layers[name] = Layers(count + 1, flops, _size(memory))
    return layers


def describe(
    config: ConfigDict, e: Estimate, tokens: int | None, available: int, missing: str = ""
) -> str:
    """The plan as text; `tokens` of the training split, if it is finite, `available` bytes, and
    why data are `missing`."""
    task, model, steps = config.task, config.model, config.train.steps
    layers = [n for name, n in e.parameters.items() if name.startswith("layer_")]
    per_layer = f"{min(layers):,}" + (f" to {max(layers):,}" * (min(layers) != max(layers)))
    flops, step = e.matmul_flops + e.attention_flops, task.batch * task.length
    need = e.fixed + e.activations
    rows = [
        ("config", f"attention {config.attention.name}, position {config.position.name}, "
         f"normaliser {config.normaliser.name}, {model.layers} layers of width {model.width}"),
        ("parameters", f"{sum(e.parameters.values()):,}: embedding "
         f"{e.parameters['embedding']:,}, each layer {per_layer}"
         + (f"; {e.measured:,} more are measured" if e.measured else "")),
        ("FLOPs", f"{_si(flops)} per training token (attention {e.attention_flops / flops:.1%}), "
         f"{_si(flops * step * steps)} for the run"),
        *(("", f"{name} ({each.count} x): {_si(each.flops)} per training token, "
           f"{_bytes(each.decoding)} to decode") for name, each in e.layers.items()),
        ("decoding", f"{_bytes(e.decoding)} per sequence of {task.length:,} tokens"),
        ("memory", f"about {_bytes(need)} to train: parameters, gradients, optimizer "
         f"{_bytes(e.fixed)}, activations {_bytes(e.activations)}; a device has "
         f"{_bytes(available)}"),
        ("steps", f"{steps:,} of {task.batch} x {task.length:,} = {step:,} tokens"),
    ]  # fmt: skip
    if tokens:
        rows.append(("data", f"{tokens:,} training tokens: {steps * step / tokens:.2f} epochs"))
    if missing:
        rows.append(("data", f"missing: {missing}"))
    if need > available:
        advice = "raise optimizer.accumulate, set model.remat=true or lower task.batch"
        rows.append(("warning", f"this may run out of memory; {advice}"))
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def device_memory() -> int:
    """Bytes that one device has; on a CPU, its share of the memory of the machine."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def _residuals(model: Trainable, params: Any, rows: int, length: int) -> int:
    """Bytes between the forward and the backward pass of the loss, parameters themselves apart.

    With `remat`, one layer more, which the backward pass has open at a time.
    """

    learned, measured = split(params)

    def backward(learned, measured):
        batch = blank(model, rows, length)
        rngs = {"dropout": jax.random.key(0), "attention": jax.random.key(0)}
        read = nothing_read(model, rows)

        def loss(learned):
            params, past = merge(learned, measured), resume(model, read, batch)
            losses = losses_of(model, params, batch, past, train=True, rngs=rngs)
            return jnp.mean(losses.nll) + losses.balance

        return jax.vjp(loss, learned)[1]

    kept = _size(jax.eval_shape(backward, learned, measured)) - _size(params)
    a = model.architecture
    if a.remat:
        plain = model.clone(architecture=dataclasses.replace(a, remat=False))
        kept += _residuals(plain, params, rows, length) // a.layers
    return max(kept, 0)


def _size(tree: Any, tensor: int = 1, head_dim: int = 1) -> int:
    """Bytes on each of ``tensor`` devices that share what can be shared."""

    def of(path: Sequence[Any], x: Any) -> int:
        split = tensor_axis(tensor, path, x.shape, head_dim) is not None
        return x.size * x.dtype.itemsize // (tensor if split else 1)

    return sum(of(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _bytes(number: float) -> str:
    return f"{_si(number)}B"


def _si(number: float) -> str:
    """Three digits and a decimal prefix: 29.5 M."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    for prefix in prefixes:
        if abs(number) < 999.5 or prefix == prefixes[-1]:
            break
        number /= 1000
    return f"{number:.3g} {prefix}"
