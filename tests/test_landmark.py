"""Landmarks: the grouped softmax is that of its equation, in training and in retrieval."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs, outputs_and_gradients
from battery.cases import Case, draw

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.landmark import Landmark
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition


def case_of(block, chosen):
    return Case(Landmark(block, chosen), NoPosition())


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def weights(inputs, block, chosen, i, h):
    """The equation for one query of one head: how much of every token it takes."""
    q, k = inputs.q[0, i, h], inputs.k[0, :, h // 2]
    z, past, own = k @ q / 8**0.5, i // block, np.arange(i // block * block, i + 1)
    blocks = [np.arange(J * block, (J + 1) * block) for J in range(past)]
    pooled = [softmax(k[b] @ inputs.params[0]["landmark"][h // 2]) @ k[b] for b in blocks]
    marks = np.array([mark @ q / 8**0.5 for mark in pooled])
    best = np.sort(np.argsort(marks)[::-1][:chosen])
    p = softmax(np.concatenate([z[own], marks[best]]))
    row = np.zeros(32)
    row[own] = p[: len(own)]
    for share, J in zip(p[len(own) :], best):
        row[blocks[J]] = share * softmax(z[blocks[J]])
    return row


@pytest.mark.parametrize("chosen", [2, 8])
def test_blocks_share_out_the_weight_of_their_landmark(chosen):
    """All 8 blocks, which is how the paper trains, and fewer, which is how it retrieves; values
    that tell tokens apart show the weights."""
    case = case_of(4, chosen)
    inputs = draw(case, batch=1)
    v = np.zeros((1, 32, 2, 32), np.float32)
    v[0, np.arange(32), :, np.arange(32)] = 1
    got = np.asarray(outputs(case, inputs._replace(v=v)))[0]
    for (i, h), _ in np.ndenumerate(np.zeros((32, 4))):
        assert_close(got[i, h], weights(inputs, 4, chosen, i, h))


@pytest.mark.slow
def test_blocks_of_one_token_are_softmax_with_its_gradients():
    """The landmark of a lone token is its key."""
    case = case_of(1, 32)
    inputs = draw(case)
    out, (_, *gradient) = outputs_and_gradients(case, inputs)
    everything = replace(case, mechanism=Softmax())
    plain = inputs._replace(params=({}, inputs.params[1]))
    wanted, (_, *wanted_gradient) = outputs_and_gradients(everything, plain)
    assert_close((out, *gradient), (wanted, *wanted_gradient))


def test_a_landmark_learns_from_later_blocks_only():
    inputs = draw(case_of(4, 2), batch=1)

    @jax.jit
    def gradient(landmark, low, high):
        def loss(landmark):
            params = {"landmark": landmark}
            out = Landmark(4, 2)(params, inputs.queries(), inputs.keys(), Rule()).out
            there = (inputs.pos[0] >= low) & (inputs.pos[0] < high)
            return jnp.sum(jnp.where(there[:, None, None], jnp.sin(out[0]), 0))

        return jax.grad(loss)(landmark)

    landmark = inputs.params[0]["landmark"]
    np.testing.assert_array_equal(gradient(landmark, 0, 4), 0)
    assert np.all(gradient(landmark, 4, 8) != 0)


@pytest.mark.parametrize("fields", [{"block": 0}, {"chosen": 0}])
def test_sizes_that_choose_nothing_are_refused(fields):
    with pytest.raises(UserError, match="landmark"):
        Landmark(**fields)
