"""Segments by position, and what holds for every mechanism that carries something across them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, attend, quick_outputs
from battery.cases import DIMS, Case, Inputs, documents, draw
from battery.continuation import step

from attnlab.core import Keys
from attnlab.engines import segments
from attnlab.engines.segments import Span
from attnlab.mechanisms.compressive import Compressive
from attnlab.mechanisms.infini import Infini
from attnlab.mechanisms.infini_delta import InfiniDelta
from attnlab.mechanisms.knn_memory import KnnMemory
from attnlab.mechanisms.recurrent_memory import RecurrentMemory
from attnlab.mechanisms.transformer_xl import TransformerXL
from attnlab.positions.rope import Rope

MEMORIES = (
    TransformerXL(segment=5, memory=7),
    Compressive(segment=4, memory=6, compressed=3, rate=2),
    Infini(segment=70, gate=0.0),
    Infini(segment=5, gate=0.0),
    Infini(segment=5, update="delta", gate=0.0),
    InfiniDelta(segment=5, gate=0.0),
    KnnMemory(segment=5, memory=9, neighbours=3),
    RecurrentMemory(segment=5, slots=3),
)


def case_of(mechanism) -> Case:
    return Case(mechanism, Rope())


def packed(case: Case, length: int = 150) -> Inputs:
    """Two rows of documents of all sizes, some a token long."""
    rows = (1, 1, 2, 77, 5, 3, 40, 21), (90, 1, 20, 10, 4, 6, 19)
    assert all(sum(row) == length for row in rows)
    return documents(draw(case, length=length), *rows)


def with_holes(z, fill):
    """Two empty slots in front of every third token, and one behind the last."""
    parts = [z[:, i : i + 3] for i in range(0, z.shape[1], 3)]
    hole = np.full_like(z[:, :2], fill)
    return np.concatenate([*itertools.chain(*((hole, part) for part in parts)), hole[:, :1]], 1)


@pytest.mark.parametrize("mechanism", MEMORIES, ids=repr)
def test_many_documents_in_long_rows_agree_with_the_literal_form(mechanism):
    """More tokens than any chunk has, so that segments begin and end in the middle of chunks."""
    case = case_of(mechanism)
    inputs = packed(case)
    assert_close(quick_outputs(case, inputs), quick_outputs(case, inputs, "reference"))


@pytest.mark.parametrize("mechanism", MEMORIES, ids=repr)
@pytest.mark.slow
def test_empty_slots_between_tokens_change_nothing(mechanism):
    case = case_of(mechanism)
    inputs = packed(case)
    spread = inputs.tokens(lambda z: with_holes(z, np.nan if z.dtype == np.float32 else 0))
    spread = spread._replace(seg=with_holes(inputs.seg, -1))
    got = np.asarray(quick_outputs(case, spread))
    kept = with_holes(np.ones_like(inputs.seg), 0)[0] == 1
    assert not got[:, ~kept].any()
    assert_close(got[:, kept], quick_outputs(case, inputs))


@pytest.mark.parametrize("mechanism", MEMORIES, ids=repr)
def test_a_new_document_starts_fresh_to_the_bit(mechanism):
    """Whatever the state holds of another, in either row and in the middle of a segment."""
    case = case_of(mechanism)
    old, new = draw(case, length=18), draw(case, length=18, seed=1)
    new = new._replace(seg=new.seg + 1)
    state = case.mechanism.initial_state(DIMS, 2)
    fresh, _ = step(case, new, new.keys(), state)
    _, used = step(case, old, old.keys(), state)
    after, _ = step(case, new, new.keys(), used)
    np.testing.assert_array_equal(after, fresh)


@pytest.mark.parametrize("mechanism", MEMORIES, ids=repr)
@pytest.mark.slow
def test_the_state_after_a_call_serves_one_that_is_longer_than_it(mechanism):
    """75 tokens and then 75 more == 150 at once; documents go on across the cut."""
    case = case_of(mechanism)
    inputs = packed(case)
    state, outs = case.mechanism.initial_state(DIMS, 2), []
    for half in (slice(0, 75), slice(75, 150)):
        new = inputs.tokens(lambda z, half=half: z[:, half])
        out, state = step(case, new, new.keys(), state)
        outs.append(np.asarray(out))
    assert_close(np.concatenate(outs, 1), quick_outputs(case, inputs))


def test_a_span_reaches_all_that_it_shows():
    pattern, places = Span(4, -6, 2), np.arange(24)
    seen = pattern.visible(places[:, None], places[None])
    for (a, b), (c, d) in itertools.product(itertools.combinations(range(0, 25, 3), 2), repeat=2):
        if seen[a:b, c:d].any():
            assert pattern.reaches(a, b - 1, c, d - 1)
    assert not pattern.reaches(16, 19, 0, 9)
    assert not pattern.reaches(16, 19, 18, 23)


@pytest.mark.parametrize(("segment", "memory"), [(1, 0), (4, 0), (4, 3), (5, 12), (8, 8), (3, 40)])
def test_pairs_are_counted_as_they_are_seen(segment, memory):
    for length in (1, 3, 4, 17, 30):
        i, j = np.indices((length, length))
        seen = Span(segment, -memory, segment).visible(i, j) & (j <= i)
        assert segments.count_pairs(length, segment, memory) == seen.sum()


def test_newest_are_the_last_of_the_latest_document_in_order():
    seg = jnp.array([[1, 1, 2, -1, 2, 2, -1], [-1, -1, -1, -1, -1, -1, -1]])
    pos = jnp.arange(14).reshape(2, 7)
    empty = Keys.empty(DIMS, 2, 7)
    got = segments.newest(empty._replace(pos=pos, seg=seg), 2)
    assert got.seg.tolist() == [[2, 2], [-1, -1]]
    assert got.pos[0].tolist() == [4, 5]
    got = segments.newest(empty._replace(pos=pos, seg=seg), 5)
    assert got.seg[0].tolist() == [-1, -1, 2, 2, 2]
    assert got.pos[0, 2:].tolist() == [2, 4, 5]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_segments_are_numbered_from_the_first_token_of_a_document(count):
    """Against a loop: documents of every length, holes, and one that goes on from before."""
    seg = np.array([[7, 7, -1, 7, 7, 8, 9, 9, 9, -1, 9, 9, 9, 9, -1]])
    wanted, held, last, block = [], count, 7 if count else -1, 0
    for s in seg[0]:
        if s >= 0:
            if s != last or held == 3:
                held, block = 0, block + 1
            held, last = held + 1, s
        wanted.append(block if s >= 0 else -1)
    before = jnp.array([7 if count else -1])
    got, after = segments.number(jnp.asarray(seg), 3, before, jnp.array([count]))
    assert got[0].tolist() == wanted
    assert after.tolist() == [held]


def test_a_call_of_empty_slots_leaves_the_count_alone():
    got, count = segments.number(jnp.full((2, 4), -1), 3, jnp.array([5, -1]), jnp.array([2, 0]))
    assert got.tolist() == [[-1] * 4] * 2
    assert count.tolist() == [2, 0]


def gradient_of_last(case: Case, inputs: Inputs, first: int):
    """Gradient of the outputs from ``first`` on with respect to q, k and v."""

    def late(tokens):
        z = inputs._replace(q=tokens[0], k=tokens[1], v=tokens[2])
        return jnp.sum(jnp.sin(attend(case, z).out[:, first:]))

    compiled = jax.jit(jax.grad(late))
    return [np.asarray(z) for z in compiled((inputs.q, inputs.k, inputs.v))]


CACHES = (TransformerXL, Compressive, KnnMemory)
SEVERAL = [mechanism for mechanism in MEMORIES if mechanism.segment < 70]


@pytest.mark.parametrize("mechanism", [m for m in SEVERAL if isinstance(m, CACHES)], ids=repr)
def test_no_gradient_enters_a_cache_of_earlier_segments(mechanism):
    """T2: exactly 0, for keys, values and what would flow through them."""
    case, S = case_of(mechanism), mechanism.segment
    inputs = draw(case, length=4 * S)
    q, k, v = gradient_of_last(case, inputs, 3 * S)
    for z in (q, k, v):
        assert not z[:, : 3 * S].any()
        assert z[:, 3 * S :].any()


@pytest.mark.parametrize("mechanism", [m for m in SEVERAL if not isinstance(m, CACHES)], ids=repr)
@pytest.mark.slow
def test_gradients_flow_through_a_recurrent_memory(mechanism):
    case, S = case_of(mechanism), mechanism.segment
    q, k, v = gradient_of_last(case, draw(case, length=4 * S), 3 * S)
    assert not q[:, : 3 * S].any()
    assert k[:, :S].any()
    assert v[:, :S].any()
