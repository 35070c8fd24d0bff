"""Attention of packages in jax. Each function builds it for the sizes asked for and returns a
function of q, k, v [B H N D]."""

import importlib
from collections.abc import Callable
from typing import Any

from attnlab.bench.sizes import Sizes


def timed_call(attend: Callable, sizes: Sizes, backward: bool) -> Callable[[], Any]:
    """A call of ``attend`` on random inputs, or of its gradient, compiled."""
    import jax

    shape = sizes.batch, sizes.heads, sizes.length, sizes.head_dim
    *inputs, cotangent = jax.random.normal(jax.random.key(0), (4, *shape))

    def gradient(inputs, cotangent):
        return jax.vjp(attend, *inputs)[1](cotangent)

    if backward:
        program = jax.jit(gradient)
        return lambda: jax.block_until_ready(program(inputs, cotangent))
    program = jax.jit(attend)
    return lambda: jax.block_until_ready(program(*inputs))


def attention(sizes: Sizes) -> Callable:
    attend = importlib.import_module("jax").nn.dot_product_attention
    return _turned(lambda *inputs: attend(*inputs, is_causal=sizes.causal))


def tokamax(sizes: Sizes) -> Callable:
    """In the way that it chooses for the device."""
    attend = importlib.import_module("tokamax").dot_product_attention
    return _turned(lambda *inputs: attend(*inputs, is_causal=sizes.causal))


def tokamax_chunked(sizes: Sizes) -> Callable:
    attend = importlib.import_module("tokamax").dot_product_attention
    options = {"is_causal": sizes.causal, "implementation": "xla_chunked"}
    return _turned(lambda *inputs: attend(*inputs, **options))


def _turned(attend: Callable) -> Callable:
    """A function of [B N H D], given [B H N D]."""
    return lambda *inputs: attend(*(z.swapaxes(1, 2) for z in inputs)).swapaxes(1, 2)


def attnax(sizes: Sizes) -> Callable:
    attend = importlib.import_module("attnax").linear_attention
    return lambda q, k, v: attend(q, k, v, causal=sizes.causal)
