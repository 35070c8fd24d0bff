"""Fixed sparse attention: the own block and the summary columns, none twice."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, documents, draw
from test_blockwise import reached, tokens, visible_tiles

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.fixed import Columns, Fixed, SameOrColumns
from attnlab.positions.none import NoPosition


def mask(block, columns, length, causal=True):
    """The equation, a pair at a time."""
    i, j = np.indices((length, length))
    seen = (i // block == j // block) | (j % block >= block - columns)
    return seen & ((j <= i) | (not causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block", "columns"), [(1, 1), (6, 2), (6, 6), (40, 3)])
def test_what_is_seen_is_the_block_and_the_columns(block, columns, causal):
    inputs = draw(Case(Fixed(block, columns), NoPosition()), batch=1)
    rule = Rule(causal=causal).restrict(SameOrColumns(block, columns))
    seen = rule.allowed(inputs.queries(), inputs.keys())[0]
    np.testing.assert_array_equal(seen, mask(block, columns, 32, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_a_column_of_the_own_block_counts_once(causal):
    """All logits equal: the output is the plain mean of the visible values."""
    case = Case(Fixed(5, 2), NoPosition(), causal)
    inputs = draw(case, batch=1)
    inputs = inputs._replace(q=inputs.q * 0)
    seen = mask(5, 2, 32, causal).astype(np.float64)
    mean = np.einsum("nm,mge->nge", seen / seen.sum(1, keepdims=True), inputs.v[0])
    assert_close(outputs(case, inputs)[0], np.repeat(mean, DIMS.heads // DIMS.kv_heads, 1))


def test_blocks_are_those_of_each_document_wherever_it_begins():
    case = Case(Fixed(4, 1), NoPosition())
    inputs = documents(draw(case), (9, 23), (1, 2, 29))
    inputs = inputs._replace(pos=inputs.pos + 7 * inputs.seg)
    assert_close(outputs(case, inputs), outputs(case, inputs, "reference"))


def test_two_layers_reach_every_earlier_block_through_its_columns():
    seen = mask(6, 1, 36)
    np.testing.assert_array_equal(seen @ seen, np.tri(36, dtype=bool))
    assert not np.all(seen[-1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block", "columns"), [(1, 1), (5, 2), (6, 6), (40, 3)])
@pytest.mark.parametrize("length", [1, 2, 9, 24])
def test_flops_count_every_visible_pair_once(block, columns, length, causal):
    per_pair = 2 * DIMS.heads * (DIMS.key_dim + DIMS.value_dim)
    pairs = np.sum(mask(block, columns, length, causal))
    assert Fixed(block, columns).flops(DIMS, length, causal) == per_pair * pairs


@pytest.mark.parametrize("pattern", [Columns(5, 2), SameOrColumns(7, 1)], ids=str)
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


@pytest.mark.parametrize("fields", [{"columns": 0}, {"block": 4, "columns": 5}, {"block": 0}])
def test_columns_outside_the_block_are_refused(fields):
    with pytest.raises(UserError, match="fixed"):
        Fixed(**fields)
