"""Linear attention is a recurrence over a matrix, and a weighted mean of values."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.linear import Linear
from attnlab.positions.none import NoPosition


def test_it_is_the_recurrence_of_its_paper():
    """Every token adds φ(k) [v, 1]ᵀ to one matrix and is answered by φ(q)."""
    inputs = draw(Case(Linear(), NoPosition()), batch=1)
    got = outputs(Case(Linear(chunk=8), NoPosition()), inputs)
    q, k = (np.where(z > 0, z + 1, np.exp(z)) for z in (inputs.q[0], inputs.k[0]))
    for h in range(DIMS.heads):
        g = h * DIMS.kv_heads // DIMS.heads
        memory, total = np.zeros((DIMS.key_dim, DIMS.value_dim)), np.zeros(DIMS.key_dim)
        for t in range(q.shape[0]):
            memory += np.outer(k[t, g], inputs.v[0, t, g])
            total += k[t, g]
            assert_close(got[0, t, h], q[t, h] @ memory / (q[t, h] @ total))


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_are_means(causal):
    """Values that are all 1 come out as 1."""
    case = Case(Linear(chunk=8), NoPosition(), causal)
    inputs = draw(case)
    assert_close(outputs(case, inputs._replace(v=np.ones_like(inputs.v))), np.ones(inputs.q.shape))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(UserError, match="linear"):
        Linear(chunk=0)
