"""Anchor attention: the right stripes, softmax where all fit, the leak of the published form."""

import dataclasses
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs, outputs_and_gradients
from battery.cases import DIMS, Case, documents, draw
from battery.causality import replaced
from battery.continuation import extend
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core import MASK, Keys, Queries, Rule, positions
from attnlab.engines import dense
from attnlab.engines.highest import highest
from attnlab.engines.stripes import Region
from attnlab.errors import UserError
from attnlab.mechanisms.anchor import Anchor
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Near
from attnlab.positions.alibi import Alibi
from attnlab.positions.none import NoPosition
from attnlab.positions.rope import Rope

SMALL = Anchor(block=2, step=3, stripes=3, threshold=0.3)

SLOW_SIZES = [pytest.param(*z, marks=pytest.mark.slow) for z in ((2, 3), (5, 8), (1, 1))]


@dataclass(frozen=True)
class Published(Anchor):
    """Stripes of a group chosen by its own queries."""

    ago: ClassVar[int] = 0


def weights(mechanism, inputs):
    """What each query gives every key [B N H M], of the fast form: values tell tokens apart."""
    (B, N), G = inputs.pos.shape, inputs.k.shape[2]
    v = np.broadcast_to(np.eye(N, dtype=np.float32)[:, None], (B, N, G, N))
    call = jax.jit(lambda queries, keys: mechanism({}, queries, keys, Rule()).out)
    return np.asarray(call(inputs.queries(), inputs.keys()._replace(v=v)))


@pytest.mark.parametrize(("block", "step"), [(4, 2), *SLOW_SIZES])
def test_with_room_for_every_key_it_is_softmax_with_its_gradients(block, step):
    limit = Anchor(block, step).limit(37)
    assert isinstance(limit, Anchor)
    assert (limit.block, limit.step) == (block, step)
    case = Case(limit, Rope())
    inputs = documents(draw(case, length=37), (37,), (9, 23))
    wanted = outputs_and_gradients(replace(case, mechanism=Softmax()), inputs)
    assert_close(outputs_and_gradients(case, inputs), wanted)


def test_without_stripes_it_is_the_first_block_and_the_own_group():
    case = Case(replace(SMALL, threshold=-math.inf), Rope())
    inputs = documents(draw(case), (13, 19), (20,))
    rule = case.rule(inputs.params[1]).restrict(Region(2, 6))
    wanted, _, probs = dense.attend(inputs.queries(), inputs.keys(), rule)
    assert_close(outputs(case, inputs), wanted)
    i, j = 12, (0, 1, 12)  # the first of its group
    assert np.flatnonzero(probs[0, 0, i]).tolist() == list(j)


def test_stripes_are_the_keys_that_the_group_before_found_near_its_anchors():
    """Every weight of the fast form, by loops over blocks, from the equations."""
    inputs = draw(Case(SMALL, NoPosition()), batch=1)
    seen, numbers = weights(SMALL, inputs)[0] > 0, set()
    b, G = SMALL.block, SMALL.chosen.group
    z = np.einsum("nhd,mhd->hnm", inputs.q[0], np.repeat(inputs.k[0], 2, 1)) / 8**0.5
    near = np.fromfunction(lambda i, j: (j <= i) & ((j < b) | (i // G == j // G)), (32, 32))
    x = np.where(near, z, -np.inf).max(-1)
    for (i, h), _ in np.ndenumerate(np.zeros((32, 4))):
        wanted = set(np.flatnonzero(near[i]).tolist())
        if i >= G:
            first = (i // G - 1) * G
            blocks = [slice(t, t + b) for t in range(first, first + G, b)]
            m = np.max([z[h, t].mean(0) - x[h, t].mean() for t in blocks], 0)
            kept = [j for j in range(b, i // G * G) if m[j] >= -SMALL.threshold]
            wanted |= set(sorted(kept, key=lambda j: -m[j])[: SMALL.stripes])
            numbers.add(len(kept))
        assert np.flatnonzero(seen[i, h]).tolist() == sorted(wanted)
    assert min(numbers) < SMALL.stripes < max(numbers)  # θ and S both decide somewhere


@pytest.mark.parametrize(
    "mechanism", [SMALL, pytest.param(Published(2, 3, 3, 0.3), marks=pytest.mark.slow)]
)
def test_any_documents_are_as_in_the_literal_form(mechanism):
    """Packed documents that begin in the middle of a block or a group, which chooses nothing."""
    case = Case(mechanism, Alibi())
    inputs = documents(draw(case), (13, 19), (1, 2, 29))
    inputs = inputs._replace(pos=inputs.pos + 3 * (inputs.seg - 1))
    wanted = outputs_and_gradients(case, inputs, "reference")
    assert_close(outputs_and_gradients(case, inputs), wanted)
    bare = replace(case, mechanism=replace(mechanism, threshold=-math.inf))
    moved = np.any(np.abs(outputs(case, inputs) - outputs(bare, inputs)) > 1e-3, (2, 3))
    offset = 0 if mechanism == SMALL else -6
    # The second of row 0 begins at 3: its group 0 is not whole, its group 1 is.
    assert not moved[0, 13 : 13 + 9 + offset].any()
    assert moved[0, 13 + 9 + offset + 3 :].any()
    assert moved[0, 6:12].any()


def test_as_published_later_queries_of_a_group_reach_earlier_outputs():
    """Whose queries choose decides; both forms see the same keys at no group's expense."""
    for mechanism, leaks in ((Published(4, 2, 3, 9.0), True), (Anchor(4, 2, 3, 9.0), False)):
        case = Case(mechanism, NoPosition())
        inputs, noise = draw(case), draw(case, seed=5)
        before = np.asarray(outputs(case, inputs))
        after = np.asarray(outputs(case, replaced(inputs, noise, 28, 1.0)))
        moved = np.any(before != after, (0, 2, 3))
        assert not moved[:24].any()
        assert moved[24:28].any() == leaks
        assert moved[28:].all()


@pytest.mark.slow
@pytest.mark.parametrize("cut", range(1, 32))
def test_a_sequence_may_be_cut_anywhere(cut):
    case = Case(SMALL, Rope())
    inputs = documents(draw(case), (32,), (3, 25))
    whole = outputs(case, inputs)
    assert_close(extend(case, inputs, (cut, 32 - cut)), whole)


def test_decoding_remembers_the_stripes_of_its_group():
    """A call in the middle of a group reads places that were found before it."""
    case = Case(SMALL, NoPosition())
    inputs = draw(case, batch=1)
    state = case.mechanism.initial_state(DIMS, 1)

    @partial(jax.jit, static_argnums=(0, 1))
    def call(first, last, state):
        part = inputs.tokens(lambda z: z[:, first:last])
        known = np.where(inputs.pos < last, inputs.seg, -1)
        keys = inputs.keys()._replace(seg=known)
        return case.mechanism({}, part.queries(), keys, Rule(), state)

    first = call(0, 20, state)
    assert np.all(first.state.stripes[0, :, 0] >= 2)
    assert np.all(first.state.stripes < 18)
    whole = outputs(case, inputs)
    assert_close(call(20, 24, first.state).out, whole[:, 20:24])
    forgotten = first.state._replace(stripes=jnp.full_like(first.state.stripes, -1))
    assert np.any(np.abs(call(20, 24, forgotten).out - whole[:, 20:24]) > 1e-3)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), low=st.floats(0, 6), more=st.floats(0, 6))
def test_a_larger_threshold_sees_no_key_less(seed, low, more):
    inputs = draw(Case(SMALL, NoPosition()), batch=1, seed=seed)
    few, many = (
        weights(replace(SMALL, stripes=32, threshold=θ), inputs) > 0 for θ in (low, low + more)
    )
    assert np.all(many | ~few)


def test_a_constant_added_to_all_logits_changes_nothing():
    """Keys that all have 5 √8 more in a direction in which every query is 1."""
    case = Case(SMALL, NoPosition())
    inputs = draw(case)
    q, k = inputs.q.copy(), inputs.k.copy()
    q[..., 0], k[..., 0] = 1, 0
    plain = inputs._replace(q=q, k=k)
    k = k.copy()
    k[..., 0] = 5 * 8**0.5
    assert_close(outputs(case, plain._replace(k=k)), outputs(case, plain))


def test_keys_receive_a_gradient_only_through_attention():
    inputs = draw(Case(SMALL, NoPosition()), batch=1)

    def last(k):
        keys = inputs.keys()._replace(k=k)
        return jnp.sum(jnp.sin(SMALL({}, inputs.queries(), keys, Rule()).out[:, -1]))

    moved = np.any(np.asarray(jax.jit(jax.grad(last))(inputs.k))[0] != 0, -1)  # [M G]
    seen = weights(SMALL, inputs)[0, -1] > 0  # [H M]
    np.testing.assert_array_equal(moved, seen.reshape(2, 2, 32).any(1).T)


def test_what_does_not_fit_is_counted():
    """Groups of 8: the second wants the 4 keys behind the first block, the third 12; one fits."""
    mechanism = Anchor(block=4, step=2, stripes=1, threshold=math.inf)
    inputs = draw(Case(mechanism, NoPosition()), length=24)
    short = inputs.tokens(lambda z: z[:, :7])
    for tokens, fitting, left_out in ((inputs, 1, 14 / 16), (inputs, 4, 8 / 16), (short, 1, 0)):
        whole = replace(mechanism, stripes=fitting)
        call = jax.jit(lambda z, m=whole: m({}, z.queries(), z.keys(), Rule()).aux["stats"])
        np.testing.assert_allclose(call(tokens)["stripes_left_out"], left_out)


@pytest.mark.parametrize(
    "place", ["alibi", *(pytest.param(z, marks=pytest.mark.slow) for z in ("none", "rope"))]
)
def test_the_highest_logit_is_that_of_the_dense_rows(place):
    """In any order of slots, packed, behind a pattern; small tiles and large ones."""
    case = Case(SMALL, positions.get(place)())
    inputs = documents(draw(case, length=37), (15, 22), (30,))
    order = np.random.default_rng(0).permutation(37)
    asking = Queries(inputs.q[:, order], inputs.pos[:, order], inputs.seg[:, order])
    keys = Keys(inputs.k, inputs.v, inputs.pos, inputs.seg)
    for pattern in (Near(4, 2), Region(2, 6)):
        rule = case.rule(inputs.params[1]).restrict(pattern)
        wanted = np.max(rule.logits(asking, keys), -1)
        empty = asking.seg < 0
        assert np.all(wanted[empty[:, None].repeat(4, 1)] == MASK)
        for tile in (4, 64):
            assert_close(highest(asking, keys, rule, tile), wanted)


@pytest.mark.parametrize(
    "fields", [{"block": 0}, {"step": 0}, {"stripes": 0}, {"threshold": math.nan}]
)
def test_sizes_that_choose_nothing_are_refused(fields):
    with pytest.raises(UserError, match="anchor"):
        dataclasses.replace(Anchor(), **fields)
