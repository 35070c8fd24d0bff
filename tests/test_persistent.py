"""Learned keys and values that every query sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close
from battery.cases import DIMS, Case, documents, draw

from attnlab.core import Keys, Rule, mechanisms, positions
from attnlab.engines import dense, persistent

CASE = Case(mechanisms.get("softmax")(), positions.get("none")())
SLOTS = 3


@pytest.fixture
def slots():
    return persistent.init(jax.random.key(0), DIMS, SLOTS)


def gradients(attend, slots, inputs):
    """``(out, lse)`` and what flows back into slots, queries, keys and values."""
    weight = np.random.default_rng(0).standard_normal(inputs.q.shape, np.float32)

    def loss(slots, q, k, v):
        keys = inputs.keys()._replace(k=k, v=v)
        out, lse = attend(slots, inputs.queries()._replace(q=q), keys)
        full = inputs.seg[:, None] >= 0  # an empty slot has no lse to speak of
        return jnp.sum(out * weight) + jnp.sum(jnp.where(full, lse, 0)), out

    arguments = slots, inputs.q, inputs.k, inputs.v
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arguments)


def in_front(slots, queries, keys):
    """The slots as the first tokens of every row, all of one document."""
    B = keys.pos.shape[0]
    k, v = (jnp.broadcast_to(slots[z], (B, *slots[z].shape)) for z in ("key", "value"))
    place = jnp.zeros((B, SLOTS), jnp.int32)
    return dense.attend(queries, Keys(k, v, place, place).extended(keys), Rule())[:2]


def test_they_are_tokens_before_all_others(slots):
    inputs = draw(CASE)
    wanted = gradients(in_front, slots, inputs)
    for form in (persistent.attend, persistent.attend_densely):
        assert_close(gradients(partial(form, rule=Rule()), slots, inputs), wanted)


def test_every_document_sees_them_and_empty_slots_see_nothing(slots):
    inputs = documents(draw(CASE), (13, 19), (20,))
    got = gradients(partial(persistent.attend, rule=Rule()), slots, inputs)
    densely = partial(persistent.attend_densely, rule=Rule())
    assert_close(got, gradients(densely, slots, inputs))
    out = got[0][1]
    assert not np.any(out[1, 20:])
    alone = inputs.tokens(lambda z: z[:1, 13:])
    alone = alone._replace(seg=np.zeros_like(alone.seg))
    assert_close(out[:1, 13:], in_front(slots, alone.queries(), alone.keys())[0])


@pytest.mark.parametrize("place", ["rope", "alibi"])
def test_no_position_reaches_them(slots, place):
    """Without a token, what is seen and how much is the same at every position."""
    position = positions.get(place)()
    rule = Rule(position.init(jax.random.key(1), DIMS), position)
    inputs = draw(CASE)
    hidden = inputs.keys()._replace(seg=np.full_like(inputs.seg, -1))
    out, lse = persistent.attend(slots, inputs.queries(), hidden, rule)
    k, v = (np.repeat(slots[z], DIMS.heads // DIMS.kv_heads, 1) for z in ("key", "value"))
    z = np.einsum("bnhd,phd->bhnp", inputs.q, k) * DIMS.key_dim**-0.5
    assert_close(lse, np.log(np.sum(np.exp(z), -1)))
    probs = np.exp(z) / np.sum(np.exp(z), -1, keepdims=True)
    assert_close(out, np.einsum("bhnp,phe->bnhe", probs, v))
