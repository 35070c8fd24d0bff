"""Tokens that may not meet do not meet: packed documents, rows of a batch, empty slots."""

import jax
import jax.numpy as jnp
import numpy as np

from battery.calls import (
    DRAWING,
    assert_close,
    assert_finite,
    cotangent_of,
    outputs,
    outputs_and_gradients,
)
from battery.cases import BATCH, DIMS, Case, bidirectional, documents, draw
from battery.refusal import verify

FIRST, SECOND = 13, 14
"""Lengths of the two packed documents; the slots behind them are empty."""


def check_packing(case: Case) -> None:
    """Two documents in one row == each in a row of its own: outputs, and every gradient."""
    drawn, end = draw(case), FIRST + SECOND
    packed = documents(drawn, (FIRST, SECOND), ())
    apart = documents(drawn.tokens(_apart), (FIRST,), (SECOND,))
    cotangent = cotangent_of(drawn)
    out, (d_params, *d_tokens) = outputs_and_gradients(case, packed, cotangent=cotangent)
    wanted, (wanted_params, *wanted_tokens) = outputs_and_gradients(
        case, apart, cotangent=_apart(cotangent)
    )
    assert_close(d_params, wanted_params, what="parameters")
    for got, want in zip((out, *d_tokens), (wanted, *wanted_tokens)):
        assert_close(got[0, :FIRST], want[0, :FIRST], what="first document")
        assert_close(got[0, FIRST:end], want[1, :SECOND], what="second document")


def check_bidirectional_packing(case: Case) -> None:
    """The same for an encoder, where the mask of time does not hide a mistake."""
    verify(check_packing, bidirectional(case))


def _apart(z: np.ndarray) -> np.ndarray:
    """Row 0 as it is; row 1 begins with the tokens of row 0's second document."""
    return np.stack([z[0], np.roll(z[0], -FIRST, axis=0)])


def check_empty_slots(case: Case) -> None:
    """Whatever is in a slot with ``seg`` < 0, NaN and infinity too: the rest does not change by
    a bit, no gradient is NaN, and the slot itself gives and receives exactly 0."""
    clean = documents(draw(case), (FIRST, SECOND), (20,))
    empty, noise = clean.seg < 0, draw(case, seed=6)

    def filled(value: float):
        def spoil(z):
            return np.where(empty[..., None, None], np.float32(value), z)

        other_x = np.where(empty[..., None], noise.x, clean.x)
        q, k, v = spoil(clean.q), spoil(clean.k), spoil(clean.v)
        return clean._replace(q=q, k=k, v=v, x=other_x)

    before = outputs_and_gradients(case, clean)
    for value in (np.nan, np.inf, -1e30):
        out, gradient = outputs_and_gradients(case, filled(value))
        assert_finite((out, gradient), f"with {value} in empty slots: ")
        jax.tree.map(np.testing.assert_array_equal, (out, gradient), before)
        for z in (out, *gradient[1:]):
            assert not np.any(np.asarray(z)[empty]), "an empty slot is not 0"


def check_keys_all_hidden(case: Case) -> None:
    """Queries whose every key is hidden give 0, and gradients that are exactly 0 (not NaN)."""
    inputs = draw(case)
    keys = inputs.keys()._replace(seg=np.full_like(inputs.seg, -1))
    if case.mechanism.initial_state(DIMS, BATCH) == ():  # a buffer with nothing in it yet
        keys = jax.tree.map(lambda z: z[:, :20], keys)
    else:  # queries bring their own keys, so both are empty
        inputs = inputs._replace(seg=keys.seg)

    def loss(q, k, v):
        (params, place), hidden = inputs.params, keys._replace(k=k, v=v)
        rule, key = case.rule(place), jax.random.key(DRAWING)
        queries = inputs.queries()._replace(q=q)
        out = case.mechanism(params, queries, hidden, rule, x=inputs.x, key=key).out
        return jnp.sum(out * cotangent_of(inputs)), out

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    gradient, out = grad(inputs.q, keys.k, keys.v)
    for z in (out, *gradient):
        np.testing.assert_array_equal(z, 0)


def check_batch_rows(case: Case) -> None:
    """A row of the batch does not see another."""
    inputs, other = draw(case), draw(case, seed=9)
    rows = jax.tree.map(lambda a, b: np.stack([a[0], b[1]]), inputs[1:], other[1:])
    mixed = type(inputs)(inputs.params, *rows)
    np.testing.assert_array_equal(outputs(case, mixed)[0], outputs(case, inputs)[0])
