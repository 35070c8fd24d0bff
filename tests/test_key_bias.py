"""A learned key without a value: what is left of a row, and where it goes."""

import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, attend, outputs
from battery.cases import DIMS, Case, draw

from attnlab.errors import UserError
from attnlab.mechanisms.key_bias import KeyBias
from attnlab.mechanisms.softmax import Softmax
from attnlab.normalisers.entmax import Entmax
from attnlab.normalisers.softmax_plus_one import SoftmaxPlusOne
from attnlab.positions.none import NoPosition
from attnlab.positions.rope import Rope


def with_key(inputs, key):
    """The same inputs, with ``key`` [H D] in place of the learned one."""
    return inputs._replace(params=({"key": jnp.asarray(key, jnp.float32)}, inputs.params[1]))


@pytest.mark.parametrize("position", [NoPosition(), Rope()])
def test_a_key_of_0_adds_1_to_the_sum(position):
    case = Case(KeyBias(), position)
    inputs = with_key(draw(case), np.zeros((DIMS.heads, DIMS.key_dim)))
    wanted = outputs(Case(Softmax(), position, normaliser=SoftmaxPlusOne()), inputs)
    assert_close(outputs(case, inputs), wanted)


def test_it_is_one_more_token_without_a_value():
    """One that every query sees: it stands at the first position of the document."""
    case = Case(KeyBias(), NoPosition())
    inputs = draw(case)
    k = inputs.k.repeat(DIMS.heads // DIMS.kv_heads, 2)
    v = inputs.v.repeat(DIMS.heads // DIMS.kv_heads, 2)
    key = np.random.default_rng(0).normal(size=(DIMS.heads, DIMS.key_dim))
    found = outputs(case, with_key(inputs, key))

    z = np.einsum("bnhd,bmhd->bhnm", inputs.q, k) / DIMS.key_dim**0.5
    same = inputs.seg[:, :, None] == inputs.seg[:, None]
    seen = same & (inputs.pos[:, None] <= inputs.pos[:, :, None])
    weight = np.where(seen[:, None], np.exp(z), 0)
    spare = np.exp(np.einsum("bnhd,hd->bhn", inputs.q, key) / DIMS.key_dim**0.5)
    probs = weight / (weight.sum(-1) + spare)[..., None]
    assert_close(found, np.einsum("bhnm,bmhe->bnhe", probs, v))


def test_a_key_that_no_query_likes_leaves_softmax():
    case = Case(KeyBias(), NoPosition())
    inputs = draw(case)
    inputs = inputs._replace(q=abs(inputs.q) + 1)
    wanted = outputs(Case(Softmax(), NoPosition()), inputs)
    liked = with_key(inputs, np.full((DIMS.heads, DIMS.key_dim), 100.0))
    assert_close(outputs(case, with_key(inputs, -liked.params[0]["key"])), wanted)
    assert np.abs(outputs(case, liked)).max() < 1e-6


def test_rows_leave_a_part_unspent():
    case = Case(KeyBias(), NoPosition())
    inputs = draw(case)
    probs = attend(case, inputs, "reference").aux["probs"].sum(-1)
    assert probs.min() > 0
    assert probs.max() < 0.999


def test_a_normaliser_of_whole_rows_is_refused():
    case = Case(KeyBias(), NoPosition(), normaliser=Entmax())
    with pytest.raises(UserError, match=r"key_bias.*entmax"):
        attend(case, draw(case))
