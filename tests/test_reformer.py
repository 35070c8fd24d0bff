"""The published chunk rule leaks where time has an order; what is sold here is bidirectional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.cases import Case, draw

from attnlab.core import Rule
from attnlab.engines import bucketed
from attnlab.errors import UserError
from attnlab.mechanisms.lsh import Lsh, hash_directions, shared_pair
from attnlab.mechanisms.reformer import Reformer, plan_chunks
from attnlab.positions.none import NoPosition

N, T = 64, 40


@jax.jit
def published(q, k, v, pos, seg):
    """The causal form, which no configuration reaches."""
    case = Case(Reformer(), NoPosition())
    inputs = draw(case, length=N)._replace(q=q, k=k, v=v, pos=pos, seg=seg)
    queries, keys, u = shared_pair(inputs.queries(), inputs.keys())
    buckets = hash_directions(u, 2, 8, jax.random.key(0))
    plan, reach = plan_chunks(buckets, 4, queries, causal=True)
    return bucketed.attend(queries, keys, Rule(), plan, reach)[0]


@jax.jit
def strict(q, k, v, pos, seg):
    inputs = draw(Case(Lsh(), NoPosition()), length=N)
    inputs = inputs._replace(q=q, k=k, v=v, pos=pos, seg=seg)
    return Lsh(2, 8, 4)({}, inputs.queries(), inputs.keys(), Rule()).out


def moved_rows(form) -> int:
    """How many outputs before T change when the tokens from T on are replaced."""
    case = Case(Lsh(), NoPosition())
    old, new = draw(case, length=N), draw(case, length=N, seed=1)
    late = (np.arange(N) >= T)[:, None, None]
    mixed = old._replace(**{f: np.where(late, getattr(new, f), getattr(old, f)) for f in "qkv"})
    before, after = (form(z.q, z.k, z.v, z.pos, z.seg)[:, :T] for z in (old, mixed))
    return int(np.sum(np.max(np.abs(before - after), (0, 2, 3)) > 1e-4))


def test_the_published_causal_rule_leaks_and_the_strict_rule_does_not():
    assert moved_rows(published) > T // 4
    assert moved_rows(strict) == 0


def test_no_gradient_shows_the_leak():
    z = draw(Case(Lsh(), NoPosition()), length=N)

    def early(*features):
        return jnp.sum(jnp.sin(published(*features, z.pos, z.seg)[:, :T]))

    gradients = jax.jit(jax.grad(early, (0, 1, 2)))(z.q, z.k, z.v)
    for gradient in gradients:
        assert np.any(gradient[:, :T])
        assert not np.any(gradient[:, T:])


def test_a_causal_rule_is_refused_with_the_name_of_the_one_that_can():
    z = draw(Case(Lsh(), NoPosition()), length=8)
    with pytest.raises(UserError, match=r"reformer cannot be causal: .*lsh"):
        Reformer()({}, z.queries(), z.keys(), Rule(causal=True))


@pytest.mark.parametrize("fields", [{"rounds": 0}, {"buckets": 5}, {"chunk": 0}])
def test_sizes_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match="reformer: rounds="):
        Reformer(**fields)
