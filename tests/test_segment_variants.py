"""Segments joined by a second attention, and by a pooled mean: what reaches them from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs_and_gradients, quick_outputs
from battery.cases import DIMS, Case, draw, initial

from attnlab.core import Keys, Queries, Rule
from attnlab.engines import blockwise, dense
from attnlab.errors import UserError
from attnlab.mechanisms.block import Block
from attnlab.mechanisms.segment_pool import SegmentPool
from attnlab.mechanisms.segment_second import SegmentSecond
from attnlab.positions.none import NoPosition

SIZE = 8
VARIANTS = (SegmentSecond(SIZE), SegmentPool(SIZE))


def with_params(mechanism, params, **changes):
    case = Case(mechanism, NoPosition())
    inputs = draw(case)
    return case, inputs._replace(params=(params, inputs.params[1]), **changes)


@pytest.mark.parametrize("mechanism", VARIANTS, ids=lambda m: type(m).__name__)
def test_at_first_segments_are_alone(mechanism):
    case, inputs = with_params(mechanism, initial(Case(mechanism, NoPosition()))[0])
    alone = Case(Block(SIZE), NoPosition())
    assert_close(
        quick_outputs(case, inputs),
        quick_outputs(alone, inputs._replace(params=({}, inputs.params[1]))),
    )


def means_of_values(inputs):
    """For every token of every row and kv head, the mean value in its own segment up to itself, and
    the mean value in all segments before it (0 without one)."""
    own, before = np.zeros_like(inputs.v), np.zeros_like(inputs.v)
    for i in range(inputs.v.shape[1]):
        start = i // SIZE * SIZE
        own[:, i] = inputs.v[:, start : i + 1].mean(1)
        if start:
            before[:, i] = inputs.v[:, :start].mean(1)
    repeats = DIMS.heads // DIMS.kv_heads
    return np.repeat(own, repeats, 2), np.repeat(before, repeats, 2)


def test_the_second_attention_adds_its_gate_times_what_is_outside():
    gate = np.linspace(-1, 1, DIMS.heads, dtype=np.float32)
    case, inputs = with_params(VARIANTS[0], {"gate": gate})
    inputs = inputs._replace(q=np.zeros_like(inputs.q))
    own, before = means_of_values(inputs)
    assert_close(quick_outputs(case, inputs), own + np.tanh(gate)[:, None] * before)


def test_the_pooled_mean_is_projected_and_added():
    out = np.random.default_rng(2).standard_normal((DIMS.heads, 8, 8), np.float32)
    case, inputs = with_params(VARIANTS[1], {"out": out})
    inputs = inputs._replace(q=np.zeros_like(inputs.q))
    own, before = means_of_values(inputs)
    wanted = own + np.einsum("bnhe,hef->bnhf", before, out)
    assert_close(quick_outputs(case, inputs), wanted)


def test_a_slot_that_stands_for_several_weighs_as_much_as_they_do():
    """Outputs, lse and gradients: one slot of count c == the same token c times."""
    inputs = draw(Case(Block(), NoPosition()), batch=1, length=6)
    counts = np.array([1, 3, 1, 2, 4, 1])
    queries = Queries(inputs.q, inputs.pos, inputs.seg)
    repeated = np.repeat(np.arange(6), counts)

    def attend(engine, k, v, several):
        if several:
            keys = Keys(k, v, inputs.pos, inputs.seg, jnp.asarray(counts, jnp.float32)[None])
        else:
            places = (z[:, repeated] for z in (k, v, inputs.pos, inputs.seg))
            keys = Keys(*places)
        return engine.attend(queries, keys, Rule({}, NoPosition(), True))[:2]

    def total(k, v, engine, several):
        out, lse = attend(engine, k, v, several)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse))

    for engine in (blockwise, dense):
        for wanted, got in zip(*(attend(engine, inputs.k, inputs.v, z) for z in (False, True))):
            assert_close(got, wanted)
        slopes = [jax.grad(total, (0, 1))(inputs.k, inputs.v, engine, z) for z in (False, True)]
        assert_close(slopes[1], slopes[0])


@pytest.mark.parametrize("mechanism", VARIANTS, ids=lambda m: type(m).__name__)
def test_the_gate_learns_from_where_it_starts(mechanism):
    case, inputs = with_params(mechanism, initial(Case(mechanism, NoPosition()))[0])
    _, gradient = outputs_and_gradients(case, inputs)
    assert all(np.all(np.isfinite(z)) and np.any(z) for z in jax.tree.leaves(gradient[0][0]))


@pytest.mark.parametrize("kind", [SegmentSecond, SegmentPool])
def test_a_segment_has_tokens(kind):
    with pytest.raises(UserError, match="segment=0"):
        kind(0)
