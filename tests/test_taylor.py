"""Taylor attention is softmax with a series cut off, and a recurrence."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.taylor import Taylor, count_features, features
from attnlab.positions.none import NoPosition
from attnlab.positions.rope import Rope


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_features_multiply_to_the_series(dim):
    a, b = np.random.default_rng(0).standard_normal((2, 7, dim), np.float32)
    s = a @ b.T
    assert features(a).shape == (7, count_features(dim))
    assert_close(features(a) @ features(b).T, 1 + s + s**2 / 2)


def test_it_departs_from_softmax_by_the_cube_of_the_logits():
    """Logits halved: an eighth of the error, and a few higher orders."""
    case, softmax = Case(Taylor(chunk=8), Rope()), Case(Softmax(), Rope())
    inputs, errors = draw(case), []
    for scale in (0.05, 0.025):
        small = inputs._replace(q=inputs.q * np.float32(scale))
        difference = np.asarray(outputs(case, small)) - outputs(softmax, small)
        errors.append(np.sqrt(np.mean(difference**2)))
    assert errors[0] < 1e-3
    assert 7 < errors[0] / errors[1] < 9


def test_no_key_has_a_negative_weight():
    """At s = -1, where the series of first order is 0, a key still weighs half of one at s = 0."""
    case = Case(Taylor(chunk=8), NoPosition())
    inputs = draw(case, batch=1, length=2)
    q, k = np.ones_like(inputs.q), np.zeros_like(inputs.k)
    k[:, 0] = -(DIMS.key_dim**-0.5)
    out = outputs(case, inputs._replace(q=q, k=k))[0, 1]
    v = np.repeat(inputs.v[0], DIMS.heads // DIMS.kv_heads, 1)
    assert_close(out, v[0] / 3 + v[1] * 2 / 3)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(UserError, match="taylor"):
        Taylor(chunk=0)
