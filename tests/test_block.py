"""Block-local attention: blocks of positions, independent of each other, in a small state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import DIMS, Case, documents, draw
from battery.continuation import extend, step

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.block import Block, Same
from attnlab.positions.none import NoPosition


def case_of(block, offset=0, causal=True):
    return Case(Block(block, offset), NoPosition(), causal)


@pytest.mark.parametrize(("block", "offset"), [(8, 0), (6, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_does_not_notice_another(block, offset, causal):
    """Every token of one block replaced: all other outputs are bitwise the same."""
    case = case_of(block, offset, causal)
    inputs, noise = draw(case), draw(case, seed=5)
    number = (np.arange(32) + offset) // block
    before = np.asarray(outputs(case, inputs))
    for changed in set(number):
        here = (number == changed)[None, :, None, None]
        mixed = inputs._replace(
            **{n: np.where(here, getattr(noise, n), getattr(inputs, n)) for n in "qkv"}
        )
        after = np.asarray(outputs(case, mixed))
        np.testing.assert_array_equal(after[:, number != changed], before[:, number != changed])
        assert np.any(after[:, number == changed] != before[:, number == changed])


def test_offsets_in_turn_let_blocks_meet_and_one_offset_never_does():
    """Reach of the last of 16 tokens through layers of block 4, as a product of dense masks."""
    i, j = np.indices((16, 16))
    even, odd = (Same(4, offset).visible(i, j) & (j <= i) for offset in (0, 2))
    reached = np.eye(16, dtype=bool)[-1]
    for _ in range(5):
        reached = reached @ even
    assert np.flatnonzero(reached).tolist() == [12, 13, 14, 15]
    for layer in (odd, even, odd):
        reached = reached @ layer
    assert np.flatnonzero(reached).tolist() == [6, 7, *range(8, 16)]


@pytest.mark.parametrize(("block", "offset"), [(1, 0), (4, 0), (5, 3)])
def test_the_state_holds_a_block_less_one_and_decoding_agrees(block, offset):
    case = case_of(block, offset)
    state = case.mechanism.initial_state(DIMS, 2)
    assert state.pos.shape[1] == block - 1
    new = draw(case)
    _, after = step(case, new, new.keys(), state)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    inputs = documents(new, (9, 23), (1, 2, 29))
    wanted = outputs(case, inputs, "reference")
    for pieces in ((1,) * 32, (3, 7, 1, 12, 9)):
        assert_close(extend(case, inputs, pieces), wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block", "offset"), [(1, 0), (5, 0), (7, 3), (64, 2)])
@pytest.mark.parametrize("length", [1, 2, 6, 7, 24])
def test_flops_count_every_visible_pair_once(block, offset, length, causal):
    i, j = np.indices((length, length))
    seen = Same(block, offset).visible(i, j) & ((j <= i) | (not causal))
    per_pair = 2 * DIMS.heads * (DIMS.key_dim + DIMS.value_dim)
    assert Block(block, offset).flops(DIMS, length, causal) == per_pair * np.sum(seen)


def test_gradients_stay_inside_the_block():
    case = case_of(4)
    inputs = draw(case, length=20)

    def last(v):
        keys = inputs.keys()._replace(v=v)
        return jnp.sum(case.mechanism({}, inputs.queries(), keys, Rule()).out[:, 10])

    moved = jax.jit(jax.grad(last))(inputs.v)
    assert np.flatnonzero(np.any(np.asarray(moved) != 0, (0, 2, 3))).tolist() == [8, 9, 10]


@pytest.mark.parametrize("fields", [{"block": 0}, {"block": 4, "offset": 4}, {"offset": -1}])
def test_a_block_without_tokens_or_an_offset_beyond_it_is_refused(fields):
    with pytest.raises(UserError, match="block"):
        Block(**fields)
