"""BigBird: near, first and random blocks, each key once, the same table everywhere."""

import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, draw
from test_blockwise import reached, tokens, visible_tiles

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.bigbird import BigBird, Scattered
from attnlab.positions.none import NoPosition

FIELDS = [(3, 2, 1, 2, 0), (4, 1, 0, 1, 3), (2, 3, 2, 3, 1), (1, 1, 1, 0, 0)]


def mask(fields, length, causal=True):
    """The equation, a pair of blocks at a time."""
    block, window, first, random, _ = fields
    pattern, blocks = Scattered(*fields), -(-length // block)
    seen = np.zeros((blocks, blocks), bool)
    for I in range(blocks):
        drawn = [int(pattern.drawn(np.asarray([I], np.int32), t, np)[0]) for t in range(random)]
        for J in range(I + 1):
            near = window > I - J or first > J or J in drawn
            seen[I, J] = seen[J, I] = near
    i, j = np.indices((length, length))
    return seen[i // block, j // block] & ((j <= i) | (not causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_what_is_seen_is_the_union_of_three_tables(fields, causal):
    inputs = draw(Case(BigBird(*fields), NoPosition()), batch=1)
    rule = Rule(causal=causal).restrict(Scattered(*fields))
    seen = rule.allowed(inputs.queries(), inputs.keys())[0]
    np.testing.assert_array_equal(seen, mask(fields, 32, causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_no_key_counts_twice(fields, causal):
    """All logits equal: the output is the plain mean of the visible values."""
    case = Case(BigBird(*fields), NoPosition(), causal)
    inputs = draw(case, batch=1)
    inputs = inputs._replace(q=inputs.q * 0)
    seen = mask(fields, 32, causal).astype(np.float64)
    mean = np.einsum("nm,mge->nge", seen / seen.sum(1, keepdims=True), inputs.v[0])
    assert_close(outputs(case, inputs)[0], np.repeat(mean, DIMS.heads // DIMS.kv_heads, 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_blocks_are_distinct_past_and_outside_window_and_first(seed):
    pattern = Scattered(block=1, window=3, first=2, random=4, seed=seed)
    I = np.arange(500, dtype=np.int32)
    drawn = np.stack([pattern.drawn(I, part, np) for part in range(4)])
    for i, row in zip(I, drawn.T):
        blocks = row[row >= 0].tolist()
        assert len(blocks) == len(set(blocks)) == min(4, max(0, i - 3 + 1 - 2))
        assert all(2 <= block <= i - 3 for block in blocks)


def test_random_blocks_cover_the_past_evenly():
    """Of 20 000 draws each tenth of the past gets a tenth, within five standard deviations."""
    pattern = Scattered(block=1, window=1, first=0, random=2, seed=0)
    I = np.arange(10_000, 20_000, dtype=np.int32)
    share = np.concatenate([pattern.drawn(I, part, np) / I for part in range(2)])
    tally = np.histogram(share, 10, (0, 1))[0]
    assert np.all(np.abs(tally - 2000) < 5 * np.sqrt(2000))


def test_the_table_is_the_seed_s_and_the_same_in_numpy_and_on_the_device():
    I = np.arange(300, dtype=np.int32)
    tables = []
    for seed in (0, 1):
        pattern = Scattered(4, 2, 1, 3, seed)
        table = np.stack([pattern.drawn(I, part, np) for part in range(3)])
        traced = [np.asarray(pattern.drawn(jnp.asarray(I), part, jnp)) for part in range(3)]
        np.testing.assert_array_equal(traced, table)
        tables.append(table)
    assert np.mean(tables[0] != tables[1]) > 0.8


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("length", [1, 5, 24])
def test_flops_count_every_visible_pair_once(fields, length, causal):
    per_pair = 2 * DIMS.heads * (DIMS.key_dim + DIMS.value_dim)
    pairs = np.sum(mask(fields, length, causal))
    assert BigBird(*fields).flops(DIMS, length, causal) == per_pair * pairs


@pytest.mark.slow
def test_reach_never_misses_a_visible_pair_and_skips_most_tiles():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        queries, keys = tokens(N=24, M=24, B=1)
        where = {
            "pos": rng.integers(0, 60, (1, 24), np.int32),
            "seg": rng.integers(-1, 2, (1, 24), np.int32),
        }
        queries, keys = queries._replace(**where), keys._replace(**where)
        rule = Rule(causal=False).restrict(Scattered(4, 1, 0, 1, seed))
        assert not np.any(visible_tiles(rule, queries, keys, 4) & ~reached(rule, queries, keys, 4))

    queries, keys = tokens(N=512, M=512, B=1)
    queries, keys = (z._replace(seg=np.zeros_like(z.seg)) for z in (queries, keys))
    rule = Rule().restrict(Scattered(8, 2, 1, 3, 0))
    visited = reached(rule, queries, keys, 8)
    np.testing.assert_array_equal(visited, visible_tiles(rule, queries, keys, 8))
    assert visited.sum(1).max() <= 6


@pytest.mark.parametrize("fields", [{"block": 0}, {"window": 0}, {"first": -1}, {"random": -1}])
def test_sizes_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="bigbird"):
        BigBird(**fields)
