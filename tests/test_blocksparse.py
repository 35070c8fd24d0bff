"""The blocksparse engine: every tile of queries sees the blocks that its list names, once each."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blockwise import FORWARD_AND_BACK, assert_same, avals, tokens

from attnlab.core import MASK, Position, Rule, positions
from attnlab.engines import blocksparse, dense

TILE, BLOCK = 8, 6
N, M = 40, 56


@dataclass(frozen=True)
class Learned(Position):
    """A bias with a parameter for each head and a part that depends on the query."""

    biased: ClassVar[bool] = True

    def bias(self, params, q, q_pos, k_pos):
        near = jnp.cos(q_pos[:, None, :, None] - k_pos[:, None, None, :])
        return params["head"][:, None, None] * near + jnp.sum(q, -1, keepdims=True) * 0.1


def both(attend, queries, keys, rule):
    """out, lse and the gradients of a function of the two, those of the rule's parameters last."""

    def loss(q, k, v, rule):
        out, lse, *_ = attend(queries._replace(q=q), keys._replace(k=k, v=v), rule)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        seen = jnp.where(lse > MASK, jnp.cos(lse), 0)
        return jnp.sum(out * weight) + jnp.sum(seen), (out, lse)

    gradient, values = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(queries.q, keys.k, keys.v, rule)
    return dict(zip((*FORWARD_AND_BACK, "d_rule"), (*values, *gradient[:3], gradient[3].params)))


@jax.jit
def run(queries, keys, rule, table):
    attend = partial(blocksparse.attend, table=table, tile=TILE, block=BLOCK)
    return both(attend, queries, keys, rule)


@jax.jit
def oracle(queries, keys, rule, among):
    return both(partial(dense.attend, among=among), queries, keys, rule)


def mask_of(table, heads=4, rows=2):
    """The table as a mask [B H N M], a pair at a time."""
    table = np.broadcast_to(table, (rows, heads, -(-N // TILE), table.shape[-1]))
    among = np.zeros((rows, heads, N, M), bool)
    for (b, h, tile, _), block in np.ndenumerate(table):
        if block >= 0:
            slots = slice(block * BLOCK, (block + 1) * BLOCK)
            among[b, h, tile * TILE : (tile + 1) * TILE, slots] = True
    return among


def random_table(*shape, seed=0):
    """Lists with blocks named twice and with empty entries."""
    return np.random.default_rng(seed).integers(-2, -(-M // BLOCK), shape).astype(np.int32)


def compare(queries, keys, rule, table):
    got, wanted = run(queries, keys, rule, table), oracle(queries, keys, rule, mask_of(table))
    for name, leaf in wanted.pop("d_rule").items():
        np.testing.assert_allclose(got["d_rule"][name], leaf, atol=2e-5, err_msg=name)
    assert_same(got, wanted)


@pytest.mark.parametrize("shape", [(5, 7), (1, 4, 5, 7), (2, 1, 5, 3), (2, 4, 5, 20)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_any_table_gives_out_lse_and_their_gradients(shape, causal):
    """One list for all, one per head, one per row, one for each of both; 20 entries for 10 blocks
    name most of them more than once. Tokens are those of two documents."""
    queries, keys = tokens(N, M)
    compare(queries, keys, Rule(causal=causal), random_table(*shape))


def test_parameters_of_the_position_module_receive_their_gradient():
    queries, keys = tokens(N, M)
    learned = {"head": jnp.asarray([0.5, -1.0, 2.0, 0.1])}
    rule = Rule(learned, Learned(), soft_cap=2.0)
    compare(queries, keys, rule, random_table(2, 4, 5, 6))


@pytest.mark.parametrize("place", ["rope", "alibi"])
def test_positions_are_those_of_the_tokens_and_not_of_the_slots(place):
    queries, keys = tokens(N, M)
    turn = np.random.default_rng(1).permutation(M)
    keys = jax.tree.map(lambda z: z[:, turn], keys)
    rule = Rule(position=positions.get(place)())
    compare(queries, keys, rule, random_table(2, 4, 5, 6))


@pytest.mark.parametrize("groups", [1, 4])
def test_any_number_of_kv_heads(groups):
    queries, keys = tokens(N, M, G=groups)
    compare(queries, keys, Rule(), random_table(2, 4, 5, 4))


def test_a_row_without_a_key_is_zero_with_the_lse_of_nothing():
    queries, keys = tokens(N, M)
    nothing = np.full((5, 3), -1, np.int32)
    other = queries._replace(seg=queries.seg + 7)
    for got in (run(queries, keys, Rule(), nothing), run(other, keys, Rule(), nothing + 2)):
        np.testing.assert_array_equal(got["lse"], np.float32(MASK))
        for name in ("out", "dq", "dk", "dv"):
            np.testing.assert_array_equal(got[name], 0)


def test_no_array_is_quadratic_in_the_length():
    """Doubling N and M doubles the largest array at most, for lists of a fixed length."""

    def largest(N):
        queries, keys = tokens(N=N, M=N, B=1)
        table = np.zeros((N // 64, 3), np.int32)
        attend = partial(blocksparse.attend, table=table, tile=64, block=64)
        jaxpr = jax.make_jaxpr(lambda *z: both(attend, *z, Rule()))(queries, keys)
        return max(np.prod(z.shape) for z in avals(jaxpr.jaxpr))

    N = 2**16
    assert largest(N) >= N * 4 * 6  # the walk does see into the loops
    assert largest(2 * N) <= 2 * largest(N)


@pytest.mark.parametrize("rows", [((56,),), ((13, 17, 26),), ((5, 2, 3, 30, 16),), ((1,) * 9,)])
def test_every_whole_block_of_positions_is_laid_out_once(rows):
    """Documents of any lengths: what is laid out is every block of 6 positions that is complete,
    and nothing else."""
    _, keys = tokens(N, M, B=1)
    lengths = rows[0]
    pos = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(M - sum(lengths))])
    seg = np.repeat(np.arange(len(lengths) + 1), [*lengths, M - sum(lengths)])
    seg = np.where(seg < len(lengths), seg, -1)
    keys = keys._replace(pos=pos[None].astype(np.int32), seg=seg[None].astype(np.int32))
    keys = jax.tree.map(jnp.asarray, keys)
    laid = jax.tree.map(np.asarray, blocksparse.by_position(keys, BLOCK))
    got = []
    for start in range(0, laid.pos.shape[1], BLOCK):
        here = slice(start, start + BLOCK)
        assert len(set(laid.seg[0, here])) == 1
        if laid.seg[0, start] >= 0:
            first = laid.pos[0, start]
            assert first % BLOCK == 0
            np.testing.assert_array_equal(laid.pos[0, here], first + np.arange(BLOCK))
            for i in range(start, start + BLOCK):
                slot = np.flatnonzero((seg == laid.seg[0, i]) & (pos == laid.pos[0, i]))[0]
                np.testing.assert_array_equal(laid.k[0, i], keys.k[0, slot])
            got.append((laid.seg[0, start], first))
    wanted = [(s, J * BLOCK) for s, n in enumerate(lengths) for J in range(n // BLOCK)]
    assert sorted(got) == wanted
