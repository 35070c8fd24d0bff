"""Kernels for lists of blocks: interpreted they are the XLA form, and both devices take them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blocksparse import Learned, both, random_table
from test_blockwise import tokens
from test_kernels import CALLS, asking

from attnlab.core import MASK, Keys, Queries, Rule, mechanisms
from attnlab.engines import blocksparse, kernels
from attnlab.mechanisms.window import Near


@partial(jax.jit, static_argnums=(4, 5))
def run(queries, keys, rule, table, tile, block):
    attend = partial(blocksparse.attend, table=table, tile=tile, block=block)
    return both(attend, queries, keys, rule)


def compare(queries, keys, rule, table, module, tile=8, block=6, tolerance=2e-5):
    """Outputs, lse and all gradients are those of the XLA form; returns the former."""
    text = run.trace(queries, keys, asking(rule, module), table, tile, block).jaxpr
    assert "pallas_call" in text.pretty_print()
    got = run(queries, keys, asking(rule, module), table, tile, block)
    wanted = run(queries, keys, rule, table, tile, block)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert got[name].dtype == wanted[name].dtype
        a, b = (np.asarray(z[name], np.float32) for z in (got, wanted))
        np.testing.assert_allclose(a, b, atol=tolerance, err_msg=name)
    return got


TABLES = {
    "one list for all": (True, (5, 7), {}),
    "a list a head, 20 entries for 10 blocks": (False, (2, 4, 5, 20), {}),
    "a list a row, one kv head": (True, (2, 1, 5, 3), {"G": 1}),
    "as many kv heads as heads": (False, (1, 4, 5, 4), {"G": 4}),
}


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("name", TABLES)
def test_interpreted_kernels_are_the_xla_form(name, module):
    """Blocks are listed twice and not at all; tokens are those of two documents."""
    causal, shape, sizes = TABLES[name]
    compare(*tokens(40, 56, **sizes), Rule(causal=causal), random_table(*shape), module)


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize(
    ("N", "M", "tile", "block"), [(1, 1, 1, 1), (37, 53, 7, 11), (29, 31, 5, 3)]
)
def test_ragged_lengths(N, M, tile, block, module):
    n, m = -(-N // tile), -(-M // block)
    table = np.random.default_rng(0).integers(-1, m, (2, 4, n, 4)).astype(np.int32)
    compare(*tokens(N, M, B=2), Rule(causal=False), table, module, tile, block)


@pytest.mark.parametrize("module", CALLS)
def test_tiles_and_blocks_that_are_larger_than_those_of_a_kernel(module):
    """A tile of queries is several, which share its list, and so is a block."""
    queries, keys = tokens(1200, 1300, B=1, H=2, G=1)
    table = np.array([[[[1, 0]], [[-1, 0]]]], np.int32).swapaxes(2, 3).reshape(1, 2, 2, 1)
    form = kernels.choose_lists(
        asking(Rule(), module),
        blocksparse.Tiled(np.zeros((1, 2, 2, 600, 8), np.float32), queries.pos, queries.seg),
        blocksparse.blocks_of(keys, Rule(), 650),
        1,
    )
    assert (form.n, form.m) < (600, 650)
    compare(queries, keys, Rule(soft_cap=2.0), table, module, 600, 650)


@pytest.mark.parametrize("module", CALLS)
def test_empty_lists_and_empty_slots_are_as_nothing(module):
    """Whatever the slots hold; the lse of nothing is `MASK`, its gradients are 0."""
    queries, keys = tokens(40, 56)
    empty = np.arange(56) % 3 == 0
    k, v = (np.where(empty[:, None, None], np.nan, z) for z in (keys.k, keys.v))
    keys = keys._replace(k=k, v=v, seg=np.where(empty, -1, keys.seg))
    table = random_table(2, 4, 5, 6)
    table[:, :, 0], table[1, 2] = -1, -5
    got = compare(queries, keys, Rule(causal=False), table, module)
    np.testing.assert_array_equal(got["out"][:, :8], 0)
    np.testing.assert_array_equal(got["lse"][1, 2], np.float32(MASK))
    np.testing.assert_array_equal(got["dq"][1, :, 2], 0)
    np.testing.assert_array_equal(got["dk"][:, empty], 0)


@pytest.mark.parametrize("module", CALLS)
def test_no_list_at_all_is_nothing(module):
    queries, keys = tokens(40, 56)
    got = compare(queries, keys, Rule(), np.full((5, 3), -1, np.int32), module)
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(got[name], 0)


@pytest.mark.parametrize("module", CALLS)
def test_bfloat16_differs_by_its_rounding(module):
    queries, keys = tokens(16, 18, B=1, H=2, G=1)
    half = partial(jnp.asarray, dtype=jnp.bfloat16)
    queries = queries._replace(q=half(queries.q))
    keys = keys._replace(k=half(keys.k), v=half(keys.v))
    table = np.array([[0, 2, 2], [1, 2, -1]], np.int32)
    got = compare(queries, keys, Rule(), table, module, tolerance=0.06)
    np.testing.assert_allclose(
        got["lse"], run(queries, keys, Rule(), table, 8, 6)["lse"], atol=1e-4
    )


@pytest.mark.parametrize("module", CALLS)
def test_later_tokens_change_no_bit_of_earlier_outputs(module):
    queries, keys = tokens(40, 40, B=1)
    table = np.tile(np.arange(7, dtype=np.int32), (5, 1))
    attend = jax.jit(
        lambda *z: blocksparse.attend(*z, asking(Rule(), module), table, tile=8, block=6)
    )
    noise = np.random.default_rng(5).standard_normal
    before = attend(queries, keys)[0]
    for cut in (1, 13, 30):
        k, v, q = (np.copy(z) for z in (keys.k, keys.v, queries.q))
        for z in (k, v, q):
            z[:, cut:] = noise(z[:, cut:].shape)
        after = attend(queries._replace(q=q), keys._replace(k=k, v=v))[0]
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])


@pytest.mark.parametrize("module", CALLS)
def test_a_router_reaches_the_kernels(module):
    """The whole of `block_topk` with every gradient: blocks that nobody chose, ragged tiles."""
    mechanism = mechanisms.get("block_topk")(block=5, chosen=2)
    queries, keys = tokens(43, 43)

    def attend(queries, keys, rule):
        result = mechanism({}, queries, keys, rule)
        return result.out, result.aux["lse"]

    whole = jax.jit(partial(both, attend))
    got, wanted = whole(queries, keys, asking(Rule(), module)), whole(queries, keys, Rule())
    for name in ("out", "lse", "dq", "dk", "dv"):
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.bfloat16, 64), (jnp.float32, 128)])
@pytest.mark.parametrize("module", CALLS)
def test_both_devices_lowerings_take_every_kernel(module, dtype, size):
    platform, call = CALLS[module]
    rule = Rule(kernels=module, soft_cap=5.0).restrict(Near(2000, 4))
    shape = jax.ShapeDtypeStruct
    place = shape((2, 1024), jnp.int32)
    q, k = (shape((2, 1024, heads, size), dtype) for heads in (8, 2))
    lowered = run.trace(
        Queries(q, place, place),
        Keys(k, k, place, place),
        rule,
        shape((2, 8, 8, 3), jnp.int32),
        128,
        64,
    ).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(call) == 3  # forward, dq, dk with dv


OBSTACLES = {
    "position Learned": (Rule(position=Learned()), {}),
    "the type is float16": (Rule(), {"dtype": jnp.float16}),
    "are wider than": (Rule(), {"D": 2048}),
    "pairs of tiles are listed": (Rule(), {"n": 2**14, "L": 2**12}),
    "2^31 elements": (Rule(), {"m": 2**24}),
    "than an int32 counts": (Rule(), {"n": 2**16, "m": 2**16}),
    "is empty": (Rule(), {"L": 0}),
}


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_a_kernel_cannot_serve_is_left_to_xla_with_the_reason(reason, module):
    rule, sizes = OBSTACLES[reason]
    sizes = {"n": 4, "m": 4, "L": 2, "D": 64, "dtype": jnp.bfloat16, **sizes}
    n, m, D, dtype = (sizes[z] for z in ("n", "m", "D", "dtype"))
    shape = jax.ShapeDtypeStruct
    asks, answers = shape((1, 1, n, 64), jnp.int32), shape((1, m, 64), jnp.int32)
    z = shape((1, 1, m, 64, D), dtype)
    form = kernels.choose_lists(
        dataclasses.replace(rule, kernels=module),
        blocksparse.Tiled(shape((1, 1, n, 64, D), dtype), asks, asks),
        blocksparse.Blocks(z, z, answers, answers),
        sizes["L"],
    )
    assert not form.module
    assert reason in str(form)


def test_a_block_that_all_list_makes_no_other_list_longer():
    """Every tile lists the first block: what is listed are the entries, and one for every block
    that nobody lists."""
    from attnlab.engines.kernels.visits import NONE, Listed

    table = jnp.full((1, 9, 4), NONE).at[:, :8, 0].set(0)  # the last tile is the empty one
    listed = Listed(table).of_keys(9, 6)
    assert listed.start.tolist() == [0, 8, 9, 10, 11, 12, 13]
    assert (listed.pair[:13] % 9).tolist() == [*range(8), *[8] * 5]
