"""A sequence that lies on several devices: which mesh is in use, and what a device holds of it.

The only file with `jax.shard_map`. What runs inside `across` is the program of one device: arrays
are its own rows, tokens and heads, and other devices are reached by the collectives of `jax.lax`
along the axis ``seq``. Outside, a mesh is in use inside ``jax.set_mesh``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnlab.core import Array, Keys, Queries, Rule

ROWS, SEQUENCE, HEADS = ("data", "fsdp"), "seq", "tensor"
"""The axes of a mesh that split the rows of a batch, its tokens, and heads."""


def count(length: int) -> int:
    """How many devices share the tokens of a sequence: 1 without a mesh, where they do not divide
    the length, and inside `across`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    size = mesh.shape.get(SEQUENCE, 1)
    return size if types.get(SEQUENCE) == AxisType.Auto and length % size == 0 else 1


class Layout(NamedTuple):
    """The mesh axes that split rows and heads, None where these are whole on every device."""

    rows: tuple[str, ...] | None
    heads: str | None

    def of_tokens(self, tokens: Any) -> Any:
        """Specs of arrays [B N] and [B N heads ...]."""
        short, long = P(self.rows, SEQUENCE), P(self.rows, SEQUENCE, self.heads)
        return jax.tree.map(lambda z: long if z.ndim > 2 else short, tokens)

    def own(self, heads: int) -> int:
        """How many of so many heads a device has."""
        return heads // jax.sharding.get_abstract_mesh().shape[self.heads] if self.heads else heads


def layout(batch: int, *heads: int) -> Layout:
    """How the mesh in use splits so many rows, and all of these numbers of heads or none."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in ROWS if axis in mesh.shape)
    if batch % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    split = bool(heads) and HEADS in mesh.shape
    split = split and all(number % mesh.shape[HEADS] == 0 for number in heads)
    return Layout(rows or None, HEADS if split else None)


def across(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """``function`` as the program of each device of the mesh in use."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def attend(
    form: Callable[[Queries, Keys, Rule], tuple[Array, Array]],
    queries: Queries,
    keys: Keys,
    rule: Rule,
) -> tuple[Array, Array]:
    """``out`` [B N H E] and ``lse`` [B H N], of which ``form`` computes on each device what belongs
    to its own queries. Parameters of the rule may be of heads: then every device has all heads."""
    numbers = () if has_parameters(rule) else (queries.q.shape[2], keys.k.shape[2])
    at = layout(queries.q.shape[0], *numbers)
    specs = at.of_tokens(queries), at.of_tokens(keys), P()
    outs = P(at.rows, SEQUENCE, at.heads), P(at.rows, at.heads, SEQUENCE)
    spread = across(form, specs, outs)
    out, lse = spread(queries, keys, dataclasses.replace(rule, taps=()))
    return rule.tap("heads", out), lse


def has_parameters(rule: Rule) -> bool:
    """Whether how a query meets a key may depend on the head."""
    return rule.position.biased or bool(jax.tree.leaves((rule.params, rule.normaliser_params)))
