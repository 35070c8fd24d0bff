"""What is timed: one call, compiled and warm, of a mechanism or of the model around it."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from attnlab.config import architecture_of, mechanisms_of, model_of, normaliser_of, position_of
from attnlab.core import Dims, Keys, Queries, Rule
from attnlab.decode import extend
from attnlab.errors import UserError
from attnlab.model import initial_memory
from attnlab.optimizer import make_optimizer
from attnlab.statistics import merge, split
from attnlab.step import init_params, init_state, make_step

DRAWN = 16  # tokens of one call in decoding
BYTES = 257  # the vocabulary of the byte tokenizer


class Subject(NamedTuple):
    """``call()`` does the work once and waits for its end.

    ``tokens`` of one call; analytic ``flops`` of one call, 0 where they are not counted;
    ``state`` bytes of a sequence in decoding; ``compiling`` seconds, tracing included.
    """

    call: Callable[[], Any]
    tokens: int
    flops: float
    state: int
    compiling: float


def build(config: ConfigDict, mode: str, length: int) -> Subject:
    """The subject of a mode of `MODES`. Raises `UserError` for another, and whatever the mechanism
    refuses."""
    if mode not in MODES:
        raise UserError(f"mode={mode}: one of {', '.join(MODES)}")
    return MODES[mode](config, length)


class Inputs(NamedTuple):
    """q [B N H D], k, v [B N G D] and x [B N width] of unit variance."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    x: jax.Array


def draw(dims: Dims, batch: int, length: int, dtype: Any) -> Inputs:
    """Seeded by the sizes alone."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads, size = (dims.heads, dims.kv_heads, dims.kv_heads), dims.key_dim
    shapes = [(batch, length, each, size) for each in heads] + [(batch, length, dims.width)]
    return Inputs(*(jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes)))


def _attention(config: ConfigDict, length: int, backward: bool) -> Subject:
    """One layer's mechanism with its position module, projections apart."""
    model = architecture_of(config)
    mechanisms, position = mechanisms_of(config), position_of(config)
    if len(set(mechanisms)) > 1:
        raise UserError(
            f"attention={config.attention.name} is a pattern over layers, which only whole models "
            "have: use --mode=train or decode"
        )
    mechanism, dims, batch = mechanisms[0], model.dims, config.task.batch
    params = mechanism.init(jax.random.key(1), dims)
    place = position.init(jax.random.key(2), dims)
    weighing = normaliser_of(config)
    learned, measured = split(params)
    inputs = draw(dims, batch, length, jnp.dtype(model.dtype))
    pos = jnp.broadcast_to(jnp.arange(length), (batch, length))

    def forward(learned, place, inputs):
        rule = Rule(
            place,
            position,
            model.causal,
            normaliser=weighing,
            normaliser_params=weighing.init(jax.random.key(3), dims),
            kernels=model.kernels,
        )
        queries, keys = Queries(inputs.q, pos, pos * 0), Keys(inputs.k, inputs.v, pos, pos * 0)
        if mechanism.marked:
            keys = keys._replace(unit=jnp.zeros_like(pos))
        whole, drawing = merge(learned, measured), jax.random.key(4)
        return mechanism(whole, queries, keys, rule, x=inputs.x, key=drawing).out

    def gradient(learned, place, inputs, cotangent):
        return jax.vjp(forward, learned, place, inputs)[1](cotangent)

    arguments: tuple = (learned, place, inputs)
    if backward:
        out = jax.eval_shape(forward, *arguments)
        arguments += (jax.random.normal(jax.random.key(5), out.shape, out.dtype),)
    flops = batch * mechanism.flops(dims, length, model.causal) * (3 if backward else 1)
    return _compiled(gradient if backward else forward, arguments, batch * length, flops)


def _compiled(function: Callable, arguments: tuple, tokens: int, flops: float) -> Subject:
    begun = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    compiling = time.perf_counter() - begun
    return Subject(lambda: jax.block_until_ready(program(*arguments)), tokens, flops, 0, compiling)


def _training(config: ConfigDict, length: int) -> Subject:
    """An optimizer step of the whole model on the same random tokens again and again."""
    model = model_of(config, BYTES)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    batch = config.task.batch
    tokens = np.random.default_rng(0).integers(BYTES, size=(batch, length), dtype=np.int32)
    pos = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    rows = {"tokens": tokens, "targets": tokens, "pos": pos, "seg": pos * 0}
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    begun = time.perf_counter()
    program = step.lower(state, rows).compile()
    compiling = time.perf_counter() - begun
    kept = [state]

    def call() -> None:
        kept[0], metrics = program(kept[0], rows)
        jax.block_until_ready((kept[0], metrics))

    a = model.architecture
    attention = sum(m.flops(a.dims, length, a.causal) for m in model.mechanisms)
    sizes = {name: _count(part) for name, part in split(state.params)[0].items()}
    multiplied = sum(sizes.values())
    flops = batch * (3.0 * attention + 6.0 * multiplied * length)
    return Subject(call, batch * length, flops, 0, compiling)


def _decoding(config: ConfigDict, length: int) -> Subject:
    """`DRAWN` tokens, one a call of the model, after ``length`` tokens that were read before."""
    model, batch = model_of(config, BYTES), config.task.batch
    params = init_params(model, config.seed)
    memory = initial_memory(model.architecture, model.mechanisms, batch, length + DRAWN)
    state = sum(z.size * z.dtype.itemsize for z in jax.tree.leaves(memory)) // batch
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, BYTES)
    _, memory = extend(model, params, tokens, memory)
    one = tokens[:, :1]
    begun = time.perf_counter()
    program = extend.lower(model, params, one, memory).compile()
    compiling = time.perf_counter() - begun
    read = [jax.block_until_ready(memory)]

    def call() -> None:
        for _ in range(DRAWN):
            _, read[0] = program(params, one, read[0])
        # Every call goes on from the same length.
        read[0] = tuple(past._replace(used=jnp.int32(length)) for past in read[0])
        jax.block_until_ready(read[0])

    return Subject(call, batch * DRAWN, 0.0, state, compiling)


def _product(config: ConfigDict, length: int) -> Subject:
    """[length length] x [length length] of the model's type: what the device can do at best."""
    shape, dtype = (2, length, length), jnp.dtype(config.model.dtype)
    a, b = jax.random.normal(jax.random.key(0), shape, dtype)
    return _compiled(jnp.matmul, (a, b), length, 2.0 * length**3)


def _count(tree: Any) -> int:
    return sum(z.size for z in jax.tree.leaves(tree))


MODES: dict[str, Callable[[ConfigDict, int], Subject]] = {
    "fwd": partial(_attention, backward=False),
    "fwdbwd": partial(_attention, backward=True),
    "train": _training,
    "decode": _decoding,
    "product": _product,
}
