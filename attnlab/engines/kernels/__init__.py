"""Which arithmetic serves an engine: XLA, or Pallas kernels of our own, as `Rule.kernels` asks.

    xla                     the default
    pallas                  Triton on a GPU, Mosaic on a TPU
    triton, mosaic          that one on any device: to compile for one that is not here
    triton interpreted, mosaic interpreted      that one, step by step in XLA: a check

``config.model.kernels`` is one of the first two. Where a kernel cannot serve a call, XLA does, and
the log says why. Their speed is not measured, so no kernel is chosen unless it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import Array, Keys, Queries, Rule

if TYPE_CHECKING:
    from attnlab.engines.blocksparse import Blocks, Tiled

MODULES = {"gpu": "triton", "tpu": "mosaic"}
FEW = 16
"""Queries of a call below which XLA serves it: decoding, token by token."""

TOO_LARGE = "an array has 2^31 elements, more than an int32 counts"


class Form(NamedTuple):
    """The module of kernels that serves a call, and its tokens per tile of queries and of keys; or
    no module, and why. Hashable."""

    module: str = ""
    n: int = 0
    m: int = 0
    interpret: bool = False
    obstacle: str = ""

    def __str__(self) -> str:
        if not self.module:
            return f"XLA, not Pallas: {self.obstacle}" if self.obstacle else "XLA"
        return f"Pallas {self.module}" + (", interpreted" if self.interpret else "")

    @property
    def kernels(self) -> Any:
        """The module itself, imported when first asked for."""
        return importlib.import_module(f"attnlab.engines.kernels.{self.module}")


def choose(rule: Rule, queries: Queries, keys: Keys, tile: int | None = None) -> Form:
    """What serves a call of `blockwise.attend` with these shapes and types. Raises `ValueError` for
    an unknown ``rule.kernels``."""
    (B, N, H, D), (M, E) = queries.q.shape, (keys.v.shape[1], keys.v.shape[-1])
    dtype = jnp.result_type(queries.q, keys.k, keys.v)
    size = max(D, E)
    form = _able(_asked(rule.kernels, N), dtype, (B, N, M, D, E))
    form = _ruled(form, rule, size, dtype)
    if not form.module:
        return form
    n, m = form.kernels.tile_sizes(N, M, size, dtype, tile)
    pairs = B * -(-N // n) * -(-M // m)
    return _counted(form._replace(n=n, m=m), size, B * max(N, M) * H, pairs, pairs)


def choose_lists(rule: Rule, queries: Tiled, blocks: Blocks, entries: int) -> Form:
    """What serves a call of `blocksparse.visit` with these shapes and types and lists of
    ``entries``. Raises `ValueError` for an unknown ``rule.kernels``."""
    B, H, n, T, D = queries.q.shape
    G, m, C, E = blocks.v.shape[1:]
    dtype = jnp.result_type(queries.q, blocks.k, blocks.v)
    size = max(D, E)
    form = _able(_asked(rule.kernels, n * T), dtype, (B, n, T, m, C, D, E, entries))
    form = _ruled(form, rule, size, dtype)
    if not form.module:
        return form
    form = form._replace(**dict(zip("nm", form.kernels.tile_sizes(T, C, size, dtype, None))))
    asking, answering = B * H * n * -(-T // form.n), B * G * m * -(-C // form.m)
    listed = asking * entries * -(-C // form.m) + answering + 2 * B * G
    pairs = (asking + B * G) * (answering // (B * G) + 1)
    rows = max((asking + B * G) * form.n, (answering + B * G) * form.m)
    return _counted(form, size, rows, listed, pairs)


def choose_chunks(kernels: str, mean: bool, *tokens: Array | None) -> Form:
    """What serves a call of `recurrent.attend` with ``tokens`` q [B N H D], k [B N G D],
    v [B N G E] and two decays, of which one may be None; a ``mean`` sums a column more. Raises
    `ValueError` for unknown ``kernels``."""
    given = [z for z in tokens if z is not None]
    (B, N, H, D), (G, E) = given[0].shape, given[2].shape[2:]
    form = _asked(kernels, N)
    for z in given:
        form = _able(form, z.dtype, z.shape)
    if not form.module:
        return form
    n, D, E = form.kernels.chunk_size(N), *map(form.kernels.padded, (D, E + mean))
    if D * E > form.kernels.LARGEST_STATE:
        return Form(obstacle=f"a state of {D} by {E} is more than {form.kernels.LARGEST_STATE}")
    chunks = -(-N // n)
    if B * max(H * chunks * n * max(D, E), G * chunks * D * E) >= 2**31:
        return Form(obstacle=TOO_LARGE)
    return form._replace(n=n)


def _asked(kernels: str, queries: int) -> Form:
    """The module that ``kernels`` means for a call of so many ``queries`` a row."""
    asked, _, interpreted = kernels.partition(" ")
    if kernels == "xla":
        return Form()
    if asked == "pallas":
        device, count = jax.default_backend(), jax.device_count()
        asked = MODULES.get(device, "")
        if not asked:
            return Form(obstacle=f"the device is a {device}")
        if count > 1:
            return Form(obstacle=f"{count} devices share the work")
        if queries < FEW:
            return Form(obstacle=f"a call of fewer than {FEW} queries leaves most of a tile empty")
    elif asked not in MODULES.values() or interpreted not in ("", "interpreted"):
        raise ValueError(f"rule.kernels={kernels!r}")
    return Form(asked, interpret=bool(interpreted))


def _able(form: Form, dtype: Any, sizes: tuple[int, ...]) -> Form:
    """The form, or why it cannot serve arrays of this type and ``sizes``."""
    if not form.module:
        return form
    if dtype not in (jnp.float32, jnp.bfloat16):
        return Form(obstacle=f"the type is {dtype}")
    if min(sizes) < 1:
        return Form(obstacle="an array is empty")
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
    if precision is not None and precision not in form.kernels.PRECISIONS:
        return Form(obstacle=f"the precision of products is {precision}")
    return form


def _ruled(form: Form, rule: Rule, size: int, dtype: Any) -> Form:
    """The form, or why it cannot serve a rule on heads of ``size``."""
    if not form.module:
        return form
    if size * jnp.dtype(dtype).itemsize > form.kernels.WIDEST:
        return Form(obstacle=f"heads of {size} {dtype} are wider than {form.kernels.WIDEST} bytes")
    if rule.position.biased:
        return Form(obstacle=f"position {type(rule.position).__name__} adds to the logits")
    if _holds_arrays(rule):
        return Form(obstacle="a pattern looks up an array")
    return form


def _counted(form: Form, size: int, rows: int, listed: int, pairs: int) -> Form:
    """The form, or why it cannot serve arrays of ``rows`` heads of tokens of ``size`` and so many
    ``listed`` of all ``pairs`` of tiles."""
    if rows * form.kernels.padded(size) >= 2**31:
        return Form(obstacle=TOO_LARGE)
    if pairs >= 2**31:
        return Form(obstacle=f"{pairs} pairs of tiles are more than an int32 counts")
    if listed > form.kernels.LARGEST_TABLE:
        most = form.kernels.LARGEST_TABLE
        return Form(obstacle=f"{listed} pairs of tiles are listed, more than {most}")
    return form


def _holds_arrays(rule: Rule) -> bool:
    """A kernel is handed tiles and computes the rest: it cannot hold an array of its own."""
    rows, columns = jnp.zeros((3, 1), jnp.int32), jnp.zeros((1, 5), jnp.int32)
    traced = jax.make_jaxpr(rule.sees)(rows, rows, columns, columns)
    return any(np.ndim(constant) > 0 for constant in traced.consts)
