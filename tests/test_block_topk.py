"""Routed blocks: the right blocks, all of their tokens, once; the whole past where it is few."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs, outputs_and_gradients
from battery.cases import Case, documents, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core import Keys, Queries, Rule
from attnlab.engines.gathered import group
from attnlab.errors import UserError
from attnlab.mechanisms.block_topk import BlockTopK
from attnlab.mechanisms.softmax import Softmax
from attnlab.positions.none import NoPosition


def case_of(block, chosen):
    return Case(BlockTopK(block, chosen), NoPosition())


@pytest.mark.parametrize(("block", "chosen"), [(4, 7), (32, 1), (5, 50)])
def test_with_every_past_block_chosen_it_is_softmax_with_its_gradients(block, chosen):
    case = case_of(block, chosen)
    inputs = draw(case)
    wanted = outputs_and_gradients(replace(case, mechanism=Softmax()), inputs)
    assert_close(outputs_and_gradients(case, inputs), wanted)


@pytest.mark.slow
def test_the_choice_is_the_highest_mean_logit_a_query_and_a_head_at_a_time():
    """Values that tell tokens apart show which ones a query saw: its own block, and those two past
    blocks of 4 whose mean key has the largest product with it."""
    inputs = draw(case_of(4, 2), batch=1)
    v = np.zeros((1, 32, 2, 32), np.float32)
    v[0, np.arange(32), :, np.arange(32)] = 1.0
    keys = inputs.keys()._replace(v=v)
    out = BlockTopK(4, 2)({}, inputs.queries(), keys, Rule()).out  # the weights themselves
    means = inputs.k[0].reshape(8, 4, 2, 8).mean(1)
    for (i, h), _ in np.ndenumerate(np.zeros((32, 4))):
        score = [inputs.q[0, i, h] @ means[J, h // 2] for J in range(i // 4)]
        blocks = np.argsort(score)[::-1][:2].tolist()
        wanted = [j for J in blocks for j in range(4 * J, 4 * J + 4)]
        wanted += range(i // 4 * 4, i + 1)
        assert np.flatnonzero(out[0, i, h]).tolist() == sorted(wanted)
    np.testing.assert_allclose(np.sum(out, -1), 1.0, atol=1e-5)


@pytest.mark.slow
def test_a_needle_in_a_coherent_block_is_found_at_any_distance():
    """One past block whose keys all point at the query takes nearly all of the weight."""
    rng = np.random.default_rng(0)
    N, b, D = 256, 16, 16
    q = rng.standard_normal((1, N, 1, D)).astype(np.float32)
    pos = np.arange(N, dtype=np.int32)[None]
    for planted in (0, 5, 14):
        k = rng.standard_normal((1, N, 1, D)).astype(np.float32)
        k[0, planted * b : (planted + 1) * b] = 4 * q[0, -1]
        v = np.zeros((1, N, 1, 1), np.float32)
        v[0, planted * b : (planted + 1) * b] = 1
        keys = Keys(k, v, pos, pos * 0)
        result = BlockTopK(b, 1)({}, Queries(q, pos, pos * 0), keys, Rule())
        assert result.out[0, -1, 0, 0] > 0.99


@pytest.mark.slow
def test_a_block_with_a_token_missing_is_seen_from_inside_only():
    """Documents that begin in the middle of a block: fast and literal form agree, packed too."""
    case = case_of(4, 3)
    inputs = documents(draw(case), (9, 23), (1, 2, 29))
    inputs = inputs._replace(pos=inputs.pos + 7 * inputs.seg)
    wanted = outputs_and_gradients(case, inputs, "reference")
    assert_close(outputs_and_gradients(case, inputs), wanted)
    assert np.any(
        np.abs(outputs(case, inputs) - outputs(replace(case, mechanism=Softmax()), inputs))
    )


def test_keys_receive_a_gradient_only_through_attention():
    """That of the last query reaches the keys of its block and of the chosen one; no score that
    lost, or won, carries any."""
    case = case_of(4, 1)
    inputs = draw(case, batch=1)

    def last(k):
        keys = inputs.keys()._replace(k=k)
        return jnp.sum(jnp.sin(case.mechanism({}, inputs.queries(), keys, Rule()).out[:, -1]))

    gradient = jax.jit(jax.grad(last))(inputs.k)
    moved = np.any(np.asarray(gradient)[0] != 0, -1)  # [M G]
    seen = case.mechanism._seen(inputs.queries(), inputs.keys(), Rule())[0, :, -1]
    seen = np.asarray(seen).reshape(2, 2, 32).any(1).T  # of heads that share keys, either
    np.testing.assert_array_equal(moved, seen)
    assert 8 <= moved.sum(0).max() <= 12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), tile=st.sampled_from([1, 3, 8]), even=st.booleans())
def test_grouping_gives_every_pair_a_slot_in_a_tile_of_its_block(seed, tile, even):
    rng = np.random.default_rng(seed)
    top = 6 if even else 1  # all pairs want one block, or many, or none
    block = rng.integers(-1, top, 29).astype(np.int32)
    pair, table, slot = (np.asarray(z) for z in _group(block, tile))
    assert pair.shape == (table.shape[0], tile)
    wanted = np.flatnonzero(block >= 0)
    assert sorted(pair[pair >= 0]) == wanted.tolist()
    for p in wanted:
        assert pair.reshape(-1)[slot[p]] == p
        assert table[slot[p] // tile] == block[p]
    for row, J in zip(pair, table):
        held = row[row >= 0].tolist()
        assert held == sorted(held)  # later tokens never move earlier ones
        assert all(block[p] == J for p in held)


_group = jax.jit(lambda block, tile: group(block, 6, tile), static_argnums=1)


@pytest.mark.parametrize("fields", [{"block": 0}, {"chosen": 0}])
def test_sizes_that_choose_nothing_are_refused(fields):
    with pytest.raises(UserError, match="block_topk"):
        BlockTopK(**fields)
