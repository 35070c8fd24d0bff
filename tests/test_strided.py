"""Strided attention: a window and every l-th key, both exact, none twice."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, documents, draw
from test_blockwise import reached, tokens, visible_tiles

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.strided import Apart, Comb, Strided
from attnlab.positions.none import NoPosition


def mask(stride, length, causal=True):
    """The equation, a pair at a time."""
    i, j = np.indices((length, length))
    seen = (abs(i - j) < stride) | ((i - j) % stride == 0)
    return seen & ((j <= i) | (not causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_what_is_seen_is_the_window_and_the_comb(stride, causal):
    inputs = draw(Case(Strided(stride), NoPosition()), batch=1)
    rule = Rule(causal=causal).restrict(Comb(stride))
    seen = rule.allowed(inputs.queries(), inputs.keys())[0]
    np.testing.assert_array_equal(seen, mask(stride, 32, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_the_key_in_both_parts_counts_once(causal):
    """All logits equal: the output is the plain mean of the visible values."""
    case = Case(Strided(5), NoPosition(), causal)
    inputs = draw(case, batch=1)
    inputs = inputs._replace(q=inputs.q * 0)
    seen = mask(5, 32, causal).astype(np.float64)
    mean = np.einsum("nm,mge->nge", seen / seen.sum(1, keepdims=True), inputs.v[0])
    assert_close(outputs(case, inputs)[0], np.repeat(mean, DIMS.heads // DIMS.kv_heads, 1))


def test_columns_are_those_of_each_document_wherever_it_begins():
    """Documents that begin at any position and lie in any order of slots."""
    case = Case(Strided(3), NoPosition())
    inputs = documents(draw(case), (9, 23), (1, 2, 29))
    inputs = inputs._replace(pos=inputs.pos + 7 * inputs.seg)
    assert_close(outputs(case, inputs), outputs(case, inputs, "reference"))


def test_documents_of_a_long_stream_have_large_numbers():
    """Millions of documents on, a column is still a column."""
    case = Case(Strided(16), NoPosition())
    inputs = documents(draw(case), (13, 14), (20,))
    later = np.where(inputs.seg >= 0, inputs.seg + 2**27 + 5, -1).astype(np.int32)
    assert_close(outputs(case, inputs._replace(seg=later)), outputs(case, inputs))


def test_two_layers_reach_every_earlier_token():
    seen = mask(6, 36)
    np.testing.assert_array_equal(seen @ seen, np.tri(36, dtype=bool))
    assert not np.all(seen[-1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [1, 3, 8, 40])
@pytest.mark.parametrize("length", [1, 2, 7, 24])
def test_flops_count_every_visible_pair_once(stride, length, causal):
    per_pair = 2 * DIMS.heads * (DIMS.key_dim + DIMS.value_dim)
    pairs = np.sum(mask(stride, length, causal))
    assert Strided(stride).flops(DIMS, length, causal) == per_pair * pairs


@pytest.mark.parametrize("pattern", [Comb(3), Comb(20), Apart()], ids=str)
def test_reach_never_misses_a_visible_pair(pattern):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        queries, keys = tokens(N=24, M=24, B=1)
        where = {
            "pos": rng.integers(0, 40, (1, 24), np.int32),
            "seg": rng.integers(-1, 2, (1, 24), np.int32),
        }
        queries, keys = queries._replace(**where), keys._replace(**where)
        rule = Rule().restrict(pattern)
        assert not np.any(visible_tiles(rule, queries, keys, 4) & ~reached(rule, queries, keys, 4))


def test_a_stride_below_one_is_refused():
    with pytest.raises(UserError, match="strided"):
        Strided(0)
