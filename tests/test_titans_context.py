"""Segments beside what a memory recalls; as published, a token sees what comes after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.core import positions
from attnlab.engines import momentum
from attnlab.errors import UserError
from attnlab.mechanisms.titans_context import TitansContext
from attnlab.mechanisms.titans_gate import gated

SEGMENT, SLOTS, LENGTH = 8, 2, 24
CASE = Case(TitansContext(segment=SEGMENT, persistent=SLOTS, chunk=4), positions.get("none")())


def unit(z):
    return z / jnp.sqrt(jnp.sum(z * z, -1, keepdims=True))


def heads(z):
    """[... G X] -> [... H X]."""
    return jnp.repeat(z, DIMS.heads // DIMS.kv_heads, -2)


def answer(memory, q):
    return jnp.einsum("bhde,bnhd->bnhe", jnp.repeat(memory, 2, 1), unit(q))


def by_segments(inputs, every_h: bool, reads_after: bool):
    """The equations of the paper, a segment at a time, in one document. As published with both."""
    params, titans = inputs.params[0], CASE.mechanism.titans
    tri = np.tri(SEGMENT, dtype=bool)

    def of(name, z):
        return jnp.einsum("bnhe,hegx->bngx", z, params[name[0]][name[1]])

    state, outs = momentum.initial_state(inputs.q.shape[0], 2, 8, 8), []
    for begin in range(0, LENGTH, SEGMENT):
        q, k, v = (z[:, begin : begin + SEGMENT] for z in (inputs.q, inputs.k, inputs.v))
        h = answer(state.memory, q)
        slots = params["persistent"]
        seen = [(heads(slots["key"])[None], heads(slots["value"])[None], np.ones((SEGMENT, SLOTS)))]
        if begin:
            k_h, v_h = of(("recalled", "key"), h), of(("recalled", "value"), h)
            seen.append((heads(k_h), heads(v_h), np.ones_like(tri) if every_h else tri))
        seen.append((heads(k), heads(v), tri))
        ks, vs = (
            jnp.concatenate([jnp.broadcast_to(z[a], (len(q), *z[a].shape[1:])) for z in seen], 1)
            for a in range(2)
        )
        mask = np.concatenate([z[2] for z in seen], 1) > 0
        z = jnp.einsum("bnhd,bmhd->bhnm", q, ks) * 8**-0.5
        y = jnp.einsum("bhnm,bmhe->bnhe", jax.nn.softmax(jnp.where(mask, z, -1e30)), vs)
        q, k, v = (of(("attended", name), y) for name in ("query", "key", "value"))
        gates = titans._gates(params["memory"], y.reshape(*y.shape[:2], -1))
        seg = np.zeros(y.shape[:2], np.int32)
        m, state = momentum.attend_by_token(q, k, v, gates, seg, state)
        m = answer(state.memory, q) if reads_after else m
        outs.append(gated(params["norm"], y, m))
    return jnp.concatenate(outs, 1)


def test_it_is_a_loop_over_segments():
    inputs = draw(CASE, length=LENGTH)
    assert_close(outputs(CASE, inputs), by_segments(inputs, every_h=False, reads_after=False))


@pytest.mark.parametrize(
    ("every_h", "reads_after", "leaks"),
    [
        (True, False, [True, False]),
        (False, True, [True, True]),
        (False, False, [False, False]),
    ],
)
def test_as_published_a_segment_sees_its_own_future_twice(every_h, reads_after, leaks):
    """A later token of the second segment changes earlier outputs of it: by its query, since all
    see the h that it asks for, and by all it is, since all read the memory that has learned it."""
    inputs, noise = draw(CASE, length=LENGTH), draw(CASE, length=LENGTH, seed=5)
    t = SEGMENT + 5
    late = (np.arange(LENGTH) == t)[:, None, None]
    run = jax.jit(lambda z: by_segments(z, every_h, reads_after))
    before = run(inputs)
    for name, leak in zip(("q", "v"), leaks):
        other = np.where(late, getattr(noise, name), getattr(inputs, name))
        moved = np.abs(run(inputs._replace(**{name: other})) - before)
        assert not np.any(moved[:, :SEGMENT])
        assert (np.max(moved[:, SEGMENT:t]) > 1e-3) == leak
        assert np.any(moved[:, :t]) == leak


def test_every_later_token_knows_the_first_of_all_segments():
    inputs = draw(CASE, batch=1, length=LENGTH)
    before = outputs(CASE, inputs)
    for j in (0, SEGMENT + 1):
        v = inputs.v.copy()
        v[:, j] += 1
        moved = np.any(outputs(CASE, inputs._replace(v=v)) != before, (0, 2, 3))
        assert moved.tolist() == [i >= j for i in range(LENGTH)]


def test_segments_count_from_the_first_token_that_was_seen():
    inputs = draw(CASE)
    later = inputs._replace(pos=inputs.pos + 3)
    assert_close(outputs(CASE, later), outputs(CASE, inputs))


@pytest.mark.parametrize("fields", [{"segment": 0}, {"persistent": -1}, {"rate": 3}, {"chunk": 0}])
def test_sizes_that_make_no_sense_are_refused(fields):
    with pytest.raises(UserError, match="titans_context"):
        TitansContext(**fields)
