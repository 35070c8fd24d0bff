"""Memorizing attention: the nearest keys of the past, and no others."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw

from attnlab.core import MASK
from attnlab.engines.ranks import kth_largest
from attnlab.errors import UserError
from attnlab.mechanisms.knn_memory import KnnMemory
from attnlab.positions.none import NoPosition

GROUP = DIMS.heads // DIMS.kv_heads


def unit(z):
    return z / np.sqrt(np.sum(z * z, -1, keepdims=True))


def case_of(**fields) -> Case:
    return Case(KnnMemory(**fields), NoPosition())


def opened(inputs, gate: float = np.inf, scale: float = 20.0):
    heads = DIMS.heads
    params = {"gate": np.full(heads, gate, np.float32), "scale": np.full(heads, scale, np.float32)}
    return inputs._replace(params=(params, *inputs.params[1:]))


def test_as_many_neighbours_as_the_store_holds_is_attention_over_the_store():
    """T7, for the gated form: cosine logits times the scale, over all of the last 8 tokens before
    the segment."""
    case = case_of(segment=4, memory=8, neighbours=8)
    inputs = opened(draw(case), scale=3.0)
    got = np.asarray(outputs(case, inputs))
    k, v = (np.repeat(z, GROUP, 2) for z in (unit(inputs.k), inputs.v))
    for i in range(4, 32):
        start = i // 4 * 4
        span = slice(max(0, start - 8), start)
        z = 3 * np.einsum("bhd,bmhd->bhm", unit(inputs.q[:, i]), k[:, span])
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        assert_close(got[:, i], np.einsum("bhm,bmhe->bhe", p, v[:, span]), what=f"token {i}")


def test_one_neighbour_is_the_value_of_the_nearest_key():
    """Each query is a key of the past in another length; 40 tokens are more than a store of 24."""
    case = case_of(segment=4, memory=24, neighbours=1)
    inputs = opened(draw(case, length=40))
    rng = np.random.default_rng(0)
    chosen = [rng.integers(max(0, i // 4 * 4 - 24), i // 4 * 4) for i in range(4, 40)]
    q = inputs.q.copy()
    q[:, 4:] = 2.5 * np.repeat(inputs.k[:, chosen], GROUP, 2)
    got = np.asarray(outputs(case, inputs._replace(q=q)))[:, 4:]
    assert_close(got, np.repeat(inputs.v[:, chosen], GROUP, 2))


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_the_kth_largest_is_that_of_a_sort(k):
    """Of both signs, of zeros, of masked logits and of very different sizes."""
    z = np.random.default_rng(k).standard_normal((3, 40)).astype(np.float32)
    z[0] *= np.float32(10.0) ** np.arange(-30, 10)
    z[1, 5:20], z[1, 20:] = 0, MASK
    np.testing.assert_array_equal(kth_largest(z, k)[:, 0], np.sort(z, 1)[:, -k])


def test_keys_that_tie_with_the_last_neighbour_count_too():
    case = case_of(segment=4, memory=8, neighbours=1)
    inputs = opened(draw(case, length=5))
    k = np.broadcast_to(inputs.k[:, :1], inputs.k.shape)
    got = np.asarray(outputs(case, inputs._replace(k=k)))[:, 4]
    assert_close(got, np.repeat(inputs.v[:, :4].mean(1), GROUP, 1))


def test_the_first_segment_is_local_whatever_the_gate():
    case = case_of(segment=6, memory=12, neighbours=2)
    inputs = draw(case)
    a, b = (np.asarray(outputs(case, opened(inputs, gate))) for gate in (np.inf, -np.inf))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.all(np.any(a[:, 6:] != b[:, 6:], (2, 3)))


@pytest.mark.parametrize("field", ["segment", "memory", "neighbours"])
def test_sizes_without_meaning_are_refused(field):
    with pytest.raises(UserError, match=f"knn_memory: .*{field}=0"):
        KnnMemory(**{field: 0})
