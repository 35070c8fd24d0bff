"""Mechanisms with one fault each, of the kind that published code has: what the checks must catch.

A fault is a function (queries, keys, rule) -> out around dense softmax attention, whose literal
form stays right.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Exponential, Keys, Result
from attnlab.engines import dense
from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Window


def sound(queries, keys, rule) -> Array:
    """No fault: the control."""
    return dense.attend(queries, keys, rule)[0]


def looks_ahead(queries, keys, rule) -> Array:
    """The mask is off by one."""
    return sound(queries._replace(pos=queries.pos + 1), keys, rule)


def normalises_over_all(queries, keys, rule) -> Array:
    """Divides by a norm in which later keys count."""
    norm = jnp.sqrt(jnp.mean(jnp.square(keys.k), (1, 2, 3)))
    return sound(queries, keys, rule) / norm[:, None, None, None]


def adds_global_mean(queries, keys, rule) -> Array:
    """A trace of the mean of all values."""
    return sound(queries, keys, rule) + 1e-6 * jnp.mean(keys.v, (1, 2, 3), keepdims=True)


def ranks_among_all(queries, keys, rule) -> Array:
    """A token's rank in the sorted sequence depends on later ones; the gradient does not show."""
    norms = jnp.sum(jnp.square(keys.k), (2, 3))
    rank = jnp.argsort(jnp.argsort(norms, 1), 1).astype(jnp.float32)
    return sound(queries, keys, rule) + rank[:, : queries.q.shape[1], None, None]


def halves_gradient(queries, keys, rule) -> Array:
    """The right output, half the gradient of the values."""
    v = 0.5 * keys.v + jax.lax.stop_gradient(0.5 * keys.v)
    return sound(queries, keys._replace(v=v), rule)


def forgets_own_input(queries, keys, rule) -> Array:
    """The right output, no gradient at all."""
    return jax.lax.stop_gradient(sound(queries, keys, rule))


def rounds_off(queries, keys, rule) -> Array:
    """Accumulates as if f32 had 8 bits."""
    return sound(queries, keys, rule).astype(jnp.bfloat16).astype(queries.q.dtype)


def widens(queries, keys, rule) -> Array:
    """Answers in f32 whatever it was asked in."""
    return sound(queries, keys, rule).astype(jnp.float32)


def drops_remainder(queries, keys, rule) -> Array:
    """Whole chunks of eight tokens; the rest of the sequence is forgotten."""
    N = queries.q.shape[1]
    kept = jnp.arange(N) < max(8, N // 8 * 8)
    return jnp.where(kept[:, None, None], sound(queries, keys, rule), 0)


def tiles_heads(queries, keys, rule) -> Array:
    """Query head h served by kv head h mod G in place of h // (H / G)."""
    times = queries.q.shape[2] // keys.k.shape[2]
    k, v = (jnp.tile(z, (1, 1, times, 1)) for z in (keys.k, keys.v))
    return sound(queries, keys._replace(k=k, v=v), rule)


def merges_documents(queries, keys, rule) -> Array:
    """Every full slot belongs to one document."""
    q_seg, k_seg = (jnp.minimum(z.seg, 0) for z in (queries, keys))
    return sound(queries._replace(seg=q_seg), keys._replace(seg=k_seg), rule)


def touches_empty_slots(queries, keys, rule) -> Array:
    """Zero times whatever is in an empty slot."""
    empty = (keys.seg < 0)[..., None, None]
    return sound(queries, keys, rule) + jnp.sum(jnp.where(empty, 0 * keys.v, 0))


def averages_when_blind(queries, keys, rule) -> Array:
    """softmax of a row that is all mask: the mean of what may not be seen."""
    blind = ~jnp.any(rule.allowed(queries, keys), -1)[..., None, None]
    return jnp.where(blind, jnp.mean(keys.v), sound(queries, keys, rule))


def centres_batch(queries, keys, rule) -> Array:
    """Batch statistics in the output."""
    out = sound(queries, keys, rule)
    return out - jnp.mean(out, 0, keepdims=True)


def divides_by_batch(queries, keys, rule) -> Array:
    """Depends on how many rows came along."""
    return sound(queries, keys, rule) / queries.q.shape[0]


def ignores_taps(queries, keys, rule) -> Array:
    """An ablation that ablates nothing."""
    return sound(queries, keys, replace(rule, taps=()))


def ignores_normaliser(queries, keys, rule) -> Array:
    """Softmax whatever the rule says."""
    return sound(queries, keys, replace(rule, normaliser=Exponential()))


def counts_from_start(queries, keys, rule) -> Array:
    """Depends on the position itself while declared relative."""
    return sound(queries, keys, rule) * jnp.sin(1.0 + queries.pos)[..., None, None]


def refuses_without_a_name(queries, keys, rule) -> Array:
    raise UserError("not supported")


def refuses_everything(queries, keys, rule) -> Array:
    place = type(rule.position).__module__.rpartition(".")[2]
    raise UserError(f"faults cannot be combined with {place}; choose another")


def refuses_bias(queries, keys, rule) -> Array:
    """Not a fault: a form without logits says so, by name."""
    if rule.position.biased:
        place = type(rule.position).__module__.rpartition(".")[2]
        raise UserError(f"attention=faults has no logits for position={place}; use rope")
    return sound(queries, keys, rule)


@dataclass(frozen=True)
class Faulty(Softmax):
    """Softmax attention whose fast form has a fault."""

    fault: Callable[..., Array] = sound

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return Result(self.fault(queries, keys, rule), state, {})


@dataclass(frozen=True)
class Deaf(Softmax):
    """Accepts any normaliser and is softmax in both forms."""

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return Result(ignores_normaliser(queries, keys, rule), state, {})

    reference = __call__


@dataclass(frozen=True)
class Refusing(Faulty):
    """Both forms refuse alike."""

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self(params, queries, keys, rule, state)


@dataclass(frozen=True)
class Forgetful(Window):
    """The decoding state is one token short."""

    def initial_state(self, dims, batch, dtype=jnp.float32):
        return Keys.empty(dims, batch, self.window - 2, dtype)


@dataclass(frozen=True)
class Absolutist(Softmax):
    """Declared to count from the start, which it does not."""

    relative = False


@dataclass(frozen=True)
class Narrow(Window):
    """Its limit is not softmax."""

    def limit(self, length: int):
        return replace(self, window=length - 1)


@dataclass(frozen=True)
class Boastful(Softmax):
    """Quadratic, declared linear."""

    cost = Cost(time=1, memory=1, state=1)


@dataclass(eq=False, frozen=True)
class Unequal(Softmax):
    """Equal fields, unequal values: jit traces every instance anew."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__
