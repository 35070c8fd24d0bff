"""A prefix kept as two sums: attention behind keys and values that are no longer there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, quick_outputs
from battery.cases import DIMS, Case, draw, initial

from attnlab.core import Rule
from attnlab.mechanisms.ntk import Ntk, features, of_prefix
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition
from attnlab.positions.rope import Rope

CASE = Case(Ntk(), NoPosition())
LONG = 500  # tokens of a prefix


def prefix(size: float = 1.0, length: int = LONG):
    """Random keys and values [P H D] of as many heads as there are queries', keys of that size."""
    keys = jax.random.split(jax.random.key(3))
    shape = (length, DIMS.heads, DIMS.key_dim)
    k, v = (np.asarray(jax.random.normal(key, shape)) for key in keys)
    return size * k, v


def behind(case: Case, inputs, k, v):
    """``case`` on ``inputs``, with what a prefix leaves of itself as parameters."""
    return quick_outputs(case, inputs._replace(params=(of_prefix(k, v), inputs.params[1])))


@pytest.mark.parametrize("place", [NoPosition(), Rope()], ids=["none", "rope"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_softmax_over_tokens_beside_linear_attention_over_the_prefix(causal, place):
    """Token by token, with the prefix there: e^z for tokens, φ(q)·φ(k) for the prefix, which no
    rotation reaches."""
    case = replace(CASE, causal=causal, position=place)
    inputs, (pk, pv) = draw(case, batch=1), prefix()
    got = behind(case, inputs, pk, pv)
    rule, D = Rule({}, place, causal), DIMS.key_dim
    turned = {s: rule.rotate(z, inputs.pos, s) for s, z in (("query", inputs.q), ("key", inputs.k))}
    q, k = (np.asarray(z, np.float64)[0] for z in turned.values())
    for h in range(DIMS.heads):
        g = h * DIMS.kv_heads // DIMS.heads
        for i in range(len(q)):
            seen = slice(i + 1) if causal else slice(None)
            token = np.exp(k[seen, g] @ q[i, h] / D**0.5)
            before = np.asarray(features(pk[:, h]) @ features(inputs.q[0, i, h]), np.float64)
            sums = token @ inputs.v[0, seen, g] + before @ pv[:, h]
            assert_close(got[0, i, h], sums / (token.sum() + before.sum()))


def test_small_logits_make_it_attention_with_the_prefix_written_out():
    """φ(q)·φ(k) is e^(q·k / √D) to first order: a tenth of the size, a tenth of the error; and a
    prefix of this length is not what softmax over the tokens alone gives."""
    inputs, errors = draw(CASE, batch=1, dims=DIMS._replace(kv_heads=DIMS.heads)), []
    for size in (0.1, 0.01, 0.001):
        pk, pv = prefix(size)
        small = inputs._replace(q=size * inputs.q, k=size * inputs.k)
        longer = {
            name: np.concatenate([a[None], getattr(small, name)], 1)
            for name, a in (("k", pk), ("v", pv))
        }
        nothing = np.zeros((1, LONG, DIMS.heads, DIMS.key_dim), np.float32)
        longer["q"] = np.concatenate([nothing, small.q], 1)
        pos = np.arange(LONG + small.q.shape[1], dtype=np.int32)[None]
        x = np.zeros((1, pos.size, DIMS.width), np.float32)
        written = small._replace(**longer, x=x, pos=pos, seg=0 * pos, params=({}, ({}, {})))
        wanted = quick_outputs(replace(CASE, mechanism=Softmax()), written)[:, LONG:]
        errors.append(np.max(np.abs(behind(CASE, small, pk, pv) - wanted)))
        alone = small._replace(params=({}, ({}, {})))
        without = quick_outputs(replace(CASE, mechanism=Softmax()), alone)
        assert np.max(np.abs(without - wanted)) > 20 * errors[-1]
    assert 5 < errors[0] / errors[1] < 20, errors
    assert 5 < errors[1] / errors[2] < 20, errors


def test_learning_begins_at_softmax_and_moves_every_number():
    """At 0 the output is that of softmax, and neither Z nor κ lies where its gradient vanishes."""
    inputs = draw(CASE)._replace(params=initial(CASE))

    def loss(params):
        out = CASE.mechanism(params, inputs.queries(), inputs.keys(), Rule()).out
        return jnp.sum(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape))

    slopes = jax.grad(loss)(inputs.params[0])
    assert all(np.all(z != 0) for z in jax.tree.leaves(slopes))
    plain = quick_outputs(
        replace(CASE, mechanism=Softmax()), inputs._replace(params=({}, ({}, {})))
    )
    assert_close(quick_outputs(CASE, inputs), plain)


@pytest.mark.parametrize("size", [60.0, -60.0])
def test_large_logits_stay_finite_and_take_over(size):
    """Keys that all say the same 60: e^60 of tokens leaves nothing of the prefix, e^-60 nothing of
    the tokens."""
    inputs, (pk, pv) = draw(CASE), prefix()
    alike = np.zeros_like(inputs.k)
    alike[..., 0] = size * DIMS.key_dim**0.5
    told = np.zeros_like(inputs.q)
    told[..., 0] = 1.0
    inputs = inputs._replace(q=told, k=alike)
    got = behind(CASE, inputs, pk, pv)
    phi = features(told)[0, 0, 0]
    sums = of_prefix(pk, pv)
    only = np.einsum("d,hde->he", phi, sums["values"]) / (phi @ sums["weights"].T)[:, None]
    mean = np.cumsum(inputs.v, 1) / np.arange(1, 33).reshape(1, -1, 1, 1)
    wanted = np.repeat(mean, 2, 2) if size > 0 else np.broadcast_to(only, got.shape)
    assert_close(got, wanted)
