"""SEA: rows of cells, convolutions that look back, and the keys that an estimate points at."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, cotangent_of, evaluate, quick_outputs
from battery.cases import DIMS, Case, documents, draw

from attnlab.core import Rule
from attnlab.engines import cells, lookback
from attnlab.errors import UserError
from attnlab.mechanisms.sea import Sea
from attnlab.positions.none import NoPosition

CASE = Case(Sea(cells=8, kept=6, channels=2, chunk=8), NoPosition())


@pytest.mark.parametrize("length", [1, 5, 8, 13, 40])
def test_cells_hold_every_visible_position_once(length):
    T, pos = 8, np.arange(length)
    starts = np.asarray(cells.start_of(np.arange(T + 1), length, T))
    held = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    assert [p for inside in held for p in inside] == pos.tolist()
    assert max(map(len, held)) == -(-length // T)
    for m, inside in enumerate(held):
        assert all(cells.cell_of(np.asarray(inside, int), length, T) == m)


@pytest.mark.parametrize(("T", "kept"), [(8, 3), (8, 8), (8, 40), (16, 6), (3, 5), (1, 4)])
def test_the_keys_listed_are_those_of_the_best_cells(T, kept):
    """Against the literal rule for every length up to 40, equal scores among them; each key once,
    never more than asked for, and exactly as many where no cell holds two."""
    pos = np.arange(40)[None]
    score = np.round(np.random.default_rng(0).standard_normal((1, 2, 40, T)), 1).astype(np.float32)
    found, of_cell = cells.best(jnp.asarray(score), jnp.asarray(pos), kept)
    wide, mask = cells.spread(jnp.asarray(score), jnp.asarray(pos), jnp.asarray(pos), kept)
    for i in range(40):
        for h in range(2):
            listed = np.asarray(found[0, i, h])
            listed, values = listed[listed >= 0], np.asarray(of_cell[0, i, h])[listed >= 0]
            assert len(set(listed.tolist())) == len(listed) <= kept
            wanted = np.flatnonzero(mask[0, h, i] & (pos[0] <= i))
            assert sorted(listed.tolist()) == wanted.tolist()
            np.testing.assert_array_equal(values, wide[0, h, i][listed])
            if i < T:
                assert len(listed) == min(i + 1, kept)
            assert not cells.complete(jnp.asarray(i), T, kept) or len(listed) == i + 1


def test_convolutions_are_those_of_the_library_where_there_is_one_document():
    draws = np.random.default_rng(1).standard_normal
    z, kernel = draws((2, 9, 7, 3)).astype(np.float32), draws((3, 3, 3, 4)).astype(np.float32)
    pos = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    got, past = lookback.convolve(kernel, z, pos, 0 * pos, lookback.initial_past(2, 7, 3))
    wanted = jax.lax.conv_general_dilated(
        z, kernel[::-1], (1, 1), ((4, 0), (2, 2)), None, (2, 2), ("NHWC", "HWIO", "NHWC")
    )
    assert_close(got, wanted)
    np.testing.assert_array_equal(past.z, z[:, -4:])


def test_rows_of_another_document_and_beyond_a_gap_are_not_looked_at():
    draws = np.random.default_rng(2).standard_normal
    z, kernel = draws((1, 9, 5, 2)).astype(np.float32), draws((3, 3, 2, 2)).astype(np.float32)
    pos = np.asarray([[0, 1, 2, 3, 0, 1, 2, 7, 8]], np.int32)
    seg = np.asarray([[0, 0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
    got, _ = lookback.convolve(kernel, z, pos, seg, lookback.initial_past(1, 5, 2))
    for start, stop in ((0, 4), (4, 7), (7, 9)):
        alone = (a[:, start:stop] for a in (z, pos, seg))
        part, _ = lookback.convolve(kernel, *alone, lookback.initial_past(1, 5, 2))
        assert_close(got[:, start:stop], part)


def test_the_estimate_learns_from_its_own_loss_alone():
    """The choice of keys has no gradient: without the loss, what only scores cells has none."""
    inputs = draw(CASE)
    for weight in (0.0, 0.1):
        case = replace(CASE, mechanism=replace(CASE.mechanism, weight=weight))
        _, ((slopes, _), *_) = jax.jit(evaluate, static_argnums=0)(
            case, inputs, cotangent_of(inputs)
        )
        for name in ("decode", "first", "second", "score"):
            assert np.any(slopes[name]) == bool(weight), name
        assert np.any(slopes["gate"])
        assert np.any(slopes["encode"])


def test_the_loss_falls_until_the_ranking_is_that_of_attention():
    """Trained on nothing but its own loss, the scores of what is kept come to order keys as their
    weights do: the loss falls by more than half of what lies above the entropy of the weights."""
    inputs = draw(CASE, length=16)
    case = replace(CASE, mechanism=replace(CASE.mechanism, cells=16, kept=16, weight=1.0))
    inputs = inputs._replace(params=draw(case, length=16).params)

    def loss(params):
        tokens = inputs.queries(), inputs.keys()
        aux = case.mechanism(params, *tokens, Rule()).aux
        return aux["loss"]

    probs = case.mechanism.reference(inputs.params[0], inputs.queries(), inputs.keys(), Rule()).aux[
        "probs"
    ]
    floor = float(-jnp.sum(probs * jnp.log(jnp.where(probs > 0, probs, 1))) / probs[..., 0].size)
    params, slope = inputs.params[0], jax.jit(jax.value_and_grad(loss))
    first, moment = None, jax.tree.map(jnp.zeros_like, params)
    for _ in range(150):
        value, grads = slope(params)
        first = float(value) if first is None else first
        moment = jax.tree.map(lambda m, g: 0.9 * m + g, moment, grads)
        params = jax.tree.map(lambda p, m: p - 0.05 * m, params, moment)
    assert floor - 1e-4 < float(value) < floor + 0.5 * (first - floor)


def test_a_closed_gate_leaves_the_mean_of_values_where_keys_were_left_out():
    inputs = documents(draw(CASE), (13, 19), (32,))
    params = dict(inputs.params[0])
    params["offsets"] = params["offsets"] | {"gate": np.full(2, -1e9, np.float32)}
    got = quick_outputs(CASE, inputs._replace(params=(params, inputs.params[1])))
    seen = (inputs.seg[:, :, None] == inputs.seg[:, None]) & np.tri(32, dtype=bool)
    mean = np.einsum("bnm,bmge->bnge", seen, inputs.v) / seen.sum(-1)[..., None, None]
    left_out = inputs.pos >= CASE.mechanism.kept
    wanted = np.repeat(mean, DIMS.heads // DIMS.kv_heads, 2)
    assert_close(got[left_out], wanted[left_out])
    assert np.max(np.abs(got[~left_out] - wanted[~left_out])) > 0.1


@pytest.mark.parametrize(
    "fields", [{"cells": 0}, {"kept": 0}, {"channels": 0}, {"chunk": 0}, {"weight": -1.0}]
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match="sea"):
        Sea(**fields)
