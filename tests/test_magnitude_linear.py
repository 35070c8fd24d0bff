"""Linear attention that heeds the magnitude of its queries: rows sum to 1 and sharpen."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.linear import Linear
from attnlab.mechanisms.magnitude_linear import MagnitudeLinear
from attnlab.positions.none import NoPosition


def case_of(mechanism=None, causal=True):
    return Case(mechanism or MagnitudeLinear(chunk=8), NoPosition(), causal)


def features(z):
    return np.where(z > 0, z + 1, np.exp(np.minimum(z, 0))).astype(np.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_sum_to_one(causal):
    """Values that are all 1 come out as 1."""
    case = case_of(causal=causal)
    inputs = draw(case)
    assert_close(outputs(case, inputs._replace(v=np.ones_like(inputs.v))), np.ones(inputs.q.shape))


def test_it_is_the_recurrence_of_sums_over_the_past():
    """Σ φ(k) vᵀ, Σ φ(k), Σ v and the count answer every query; a lone key has weight 1."""
    inputs = draw(case_of(), batch=1)
    got = outputs(case_of(), inputs)
    q, k = features(inputs.q[0]), features(inputs.k[0])
    for h in range(DIMS.heads):
        g = h * DIMS.kv_heads // DIMS.heads
        memory, total = np.zeros((DIMS.key_dim, DIMS.value_dim)), np.zeros(DIMS.key_dim)
        for t, v in enumerate(inputs.v[0, :, g]):
            memory += np.outer(k[t, g], v)
            total += k[t, g]
            share = DIMS.key_dim**-0.5 / (t + 1)
            size = share * q[t, h] @ total
            everything = np.sum(inputs.v[0, : t + 1, g], 0)
            wanted = (1 + 1 / size) * share * (q[t, h] @ memory) - size / (t + 1) * everything
            assert_close(got[0, t, h], wanted)
    assert_close(got[0, 0], np.repeat(inputs.v[0, 0], 2, 0))


def test_weights_move_away_from_linear_attention_as_the_query_grows():
    """With features s φ(q) the row is linear attention's plus s times one contrast; that of linear
    attention does not change. Values that tell tokens apart show the weights."""
    inputs = draw(case_of(), batch=1)
    v = np.zeros((1, 32, 2, 32), np.float32)
    v[0, np.arange(32), :, np.arange(32)] = 1
    inputs = inputs._replace(v=v, q=np.abs(inputs.q))

    def weights(mechanism, size):
        scaled = size * (inputs.q + 1) - 1
        return np.asarray(outputs(case_of(mechanism), inputs._replace(q=scaled)), np.float64)

    one, two, four = (weights(None, size) for size in (1, 2, 4))
    plain = weights(Linear(chunk=8), 1)
    assert_close(weights(Linear(chunk=8), 4), plain)
    contrast = one - plain
    assert np.max(np.abs(contrast)) > 0.01
    assert_close(two, plain + 2 * contrast)
    assert_close(four, plain + 4 * contrast)
    assert np.all(np.max(four, -1)[0, 1:] > np.max(one, -1)[0, 1:])
    assert np.any(four < 0)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(UserError, match="magnitude_linear"):
        MagnitudeLinear(chunk=0)
