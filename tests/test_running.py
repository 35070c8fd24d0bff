"""Running maxima: of the past of one document, exact, and out of every ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close

from attnlab.core import MASK
from attnlab.engines import running

SEG = np.array([[-1, 0, 0, -1, 0, 2, 2, -1, 2, 3, -1, -1]], np.int32)
LOG = np.random.default_rng(0).standard_normal((1, 12, 3), np.float32) * 100


def expected():
    """Row by row: the maximum over full slots of the same document so far."""
    top, best, document = [], np.full(3, MASK), -1
    for log, seg in zip(LOG[0], SEG[0]):
        if seg >= 0 and seg != document:
            best, document = np.full(3, MASK), seg
        best = np.maximum(best, log) if seg >= 0 else best
        top.append(best)
    return np.stack(top)[None].astype(np.float32)


def test_the_maximum_is_of_the_past_of_the_same_document():
    weight, decay, top, last = running.rescale(LOG, SEG)
    np.testing.assert_array_equal(top, expected())
    np.testing.assert_array_equal(last.top, top[:, -1])
    assert last.seg == 3
    full = SEG[..., None] >= 0
    assert_close(weight, np.where(full, np.exp(np.where(full, LOG - top, 0)), 0))
    assert np.all(np.asarray(decay) <= 0)
    assert np.all(np.asarray(weight).max(-1)[SEG >= 0] <= 1)


def test_pieces_hand_on_the_maximum():
    state, tops = running.initial_top(1, 3), []
    for a, b in ((0, 1), (1, 5), (5, 8), (8, 12)):
        *_, top, state = running.rescale(LOG[:, a:b], SEG[:, a:b], state)
        tops.append(top)
    np.testing.assert_array_equal(np.concatenate(tops, 1), expected())


@pytest.mark.slow
def test_both_ways_the_maximum_is_that_of_the_document():
    _, top = running.rescale_both_ways(LOG, SEG)
    for document in (0, 2, 3):
        here = SEG[0] == document
        wanted = np.broadcast_to(LOG[0, here].max(0), (here.sum(), 3))
        np.testing.assert_array_equal(np.asarray(top)[0, here], wanted)


def test_a_masked_weight_writes_nothing_and_a_maximum_has_no_gradient():
    log = np.where(np.arange(12)[:, None] % 2 == 0, np.float32(MASK), LOG)
    weight, _, top, _ = running.rescale(log, SEG)
    assert not np.any(np.asarray(weight)[0, ::2])
    assert np.all(np.isfinite(top))
    gradient = jax.grad(lambda z: jnp.sum(running.rescale(z, SEG)[2]))(jnp.asarray(LOG))
    assert not np.any(gradient)
