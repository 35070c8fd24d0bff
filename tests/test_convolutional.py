"""Convolutional attention: each token sees those before it in q, k and v, wherever it is cut."""

import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, LENGTH, Case, documents, draw
from battery.continuation import extend, step

from attnlab.errors import UserError
from attnlab.mechanisms.convolutional import Convolutional, convolve, shifted
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.transformer_xl import TransformerXl

CASE = Case(Convolutional(), TransformerXl())


def convolved(w, z):
    """Σ_r w_r ∘ z_(t−r) of one document [N heads D], token by token."""
    out = np.zeros_like(z)
    for t in range(len(z)):
        for back in range(min(len(w), t + 1)):
            out[t] += w[back] * z[t - back]
    return out


def test_it_is_relative_attention_of_convolved_tokens():
    inputs = draw(CASE, batch=1)
    params, rule = inputs.params
    named = (("query", inputs.q), ("key", inputs.k), ("value", inputs.v))
    q, k, v = (convolved(params[name], z[0])[None] for name, z in named)
    wanted = outputs(
        Case(Softmax(), TransformerXl()), inputs._replace(params=({}, rule), q=q, k=k, v=v)
    )
    assert_close(outputs(CASE, inputs), wanted)


@pytest.mark.parametrize("taps", [1, 3, 5])
def test_a_token_reaches_itself_and_those_next_to_come(taps):
    """Of its own document."""
    inputs = documents(draw(CASE), (13, 19), (20, 12))
    drawn = np.random.default_rng(1).standard_normal((taps, DIMS.key_dim), np.float32)
    w = jnp.asarray(drawn)
    for t in (0, 6, 12, 31):
        other = inputs.q.copy()
        other[:, t] += 1
        one, two = (convolve(shifted, w, z, inputs.pos, inputs.seg) for z in (inputs.q, other))
        changed = np.any(np.asarray(one) != two, (2, 3))
        same = (inputs.seg == inputs.seg[:, t : t + 1]) & (np.arange(LENGTH) >= t)
        np.testing.assert_array_equal(changed, same & (np.arange(LENGTH) < t + taps))


def test_as_published_the_first_queries_of_a_segment_depend_on_the_cut():
    """Published: queries of a segment are convolved by themselves, keys with the cache before them.
    All tokens but the first two of the second segment then agree with the whole sequence, and all
    do where the queries before it are kept."""
    inputs = draw(CASE)
    whole = np.asarray(outputs(CASE, inputs))
    assert_close(extend(CASE, inputs, (16, 16)), whole)
    second = inputs.tokens(lambda z: z[:, 16:])
    nothing = CASE.mechanism.initial_state(DIMS, len(inputs.q))
    published, _ = step(CASE, second, inputs.keys(), nothing)
    assert_close(published[:, 2:], whole[:, 18:])
    assert np.all(np.max(np.abs(published - whole[:, 16:]), (2, 3))[:, :2] > 0.01)


def test_a_position_that_is_missing_counts_as_nothing():
    """Its slot stands empty, whatever it holds; the literal form looks positions up."""
    inputs = draw(CASE)
    seg = np.where(np.arange(LENGTH) % 7 == 3, -1, inputs.seg)
    v = np.where((seg < 0)[..., None, None], np.float32(np.nan), inputs.v)
    holed = inputs._replace(seg=seg, v=v)
    got = outputs(CASE, holed)
    assert_close(got, outputs(CASE, holed, "reference"))
    filled = np.asarray(outputs(CASE, inputs))
    assert np.max(np.abs(np.asarray(got) - filled)[:, 4]) > 0.01


def test_no_taps_are_refused():
    with pytest.raises(UserError, match="convolutional"):
        Convolutional(taps=0)
