"""A pointer network computes the equations, and never points where it may not."""

import dataclasses
from functools import cache, partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import lstm
from attnlab.core import Exponential, Mechanism
from attnlab.encoders import LstmEncoder, TransformerEncoder
from attnlab.mechanisms.linear import Linear
from attnlab.mechanisms.softmax import Softmax
from attnlab.model import Architecture
from attnlab.pointer import PointerNetwork
from attnlab.positions.none import NoPosition
from attnlab.positions.rope import Rope
from attnlab.tasks.delaunay import Delaunay
from attnlab.tasks.hull import Hull
from attnlab.tasks.tsp import Tsp

SMALL = Architecture(width=12, layers=1, heads=2, kv_heads=2, head_dim=6, mlp_width=16)
SOFTMAX: tuple[Mechanism, ...] = (Softmax(),)
SET = TransformerEncoder(SMALL, SOFTMAX, NoPosition(), Exponential())
ROW = TransformerEncoder(SMALL, (Linear(),), Rope(), Exponential())
ENCODERS = {"set": SET, "row": ROW, "lstm": LstmEncoder(SMALL)}
TASKS = [Hull(3), Delaunay(3), Tsp(3)]
N, ROWS = 7, 6
encoders = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
outputs = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
pairs = pytest.mark.parametrize(
    ("encoder", "task"),
    list(zip(ENCODERS.values(), TASKS)),
    ids=["set-hull", "row-delaunay", "lstm-tsp"],
)


def drawn(task, length=N, seed=0):
    batch = task.rows(np.random.default_rng(seed), ROWS, length)
    pos = np.broadcast_to(np.arange(length, dtype=np.int32), batch["seg"].shape)
    inputs = tuple(map(jnp.asarray, (batch["tokens"], pos, batch["seg"])))
    return inputs, jnp.asarray(batch["targets"])


@cache
def network(encoder, task):
    """With parameters twice as large as they begin, and an end and a "go" that are not 0."""
    model, (inputs, _) = PointerNetwork(encoder, task), drawn(task)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    key = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda z: 2 * z + 0.3 * jax.random.normal(next(key), z.shape), params)
    return model, {"params": params}


@partial(jax.jit, static_argnums=0)
def scored(model, variables, inputs, targets):
    return model.apply(variables, *inputs, targets)[0]


@partial(jax.jit, static_argnums=(0, 3))
def decoded(model, variables, inputs, beams=1):
    return model.decode(variables, *inputs, beams)


def likelihood(model, variables, inputs, named):
    """Σ log p of sequences that end in -1 [B]."""
    scores = scored(model, variables, inputs, named)
    own = jnp.take_along_axis(scores, jnp.maximum(named, 0)[..., None], -1)[..., 0]
    return jnp.where(named >= 0, own, 0).sum(1)


def cell(params, h, c, x):
    """One step of an LSTM, gate by gate, in float64."""
    gates = x @ params["input_kernel"] + h @ params["kernel"] + params["bias"]
    i, f, g, o = np.split(gates, 4)
    i, f, o = (1 / (1 + np.exp(-z)) for z in (i, f, o))
    c = f * c + i * np.tanh(g)
    return o * np.tanh(c), c


def test_an_lstm_is_its_equations_and_passes_over_what_is_empty():
    params = lstm.init(jax.random.key(0), 2, 5)
    x = jax.random.normal(jax.random.key(1), (1, 6, 2))
    full = jnp.array([[True, True, False, True, False, False]])
    out, last = lstm.read(params, x, full)
    wide = jax.tree.map(lambda z: np.asarray(z, np.float64), params)
    h = c = np.zeros(5)
    for i in (0, 1, 3):
        h, c = cell(wide, h, c, np.asarray(x[0, i], np.float64))
        np.testing.assert_allclose(out[0, i], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last.h[0], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last.c[0], c, rtol=1e-5, atol=1e-6)


@pairs
def test_scores_are_the_equations(encoder, task):
    """Step by step in NumPy, from the states that the encoder gives."""
    model, variables = network(encoder, task)
    (points, pos, seg), targets = drawn(task)
    scores = np.asarray(scored(model, variables, (points, pos, seg), targets))
    states, start, _ = jax.jit(encoder.encode)(variables["params"], points, pos, seg)
    own = jax.tree.map(lambda z: np.asarray(z, np.float64), variables["params"]["decoder"])
    points, seg, targets, states = (np.asarray(z) for z in (points, seg, targets, states))
    for row in range(ROWS):
        full = seg[row] >= 0
        h, c = (np.asarray(z[row], np.float64) for z in start)
        e = np.concatenate([states[row], own["end"][None]])
        x, used = own["go"], np.zeros(N, bool)
        for i, target in enumerate(targets[row]):
            h, c = cell(own["cell"], h, c, x)
            u = np.tanh(e @ own["key_kernel"] + h @ own["query_kernel"]) @ own["v"]
            left = full & ~used
            end = not left.any() if task.complete else used.any()
            seen = np.append(full if task.repeats else left, end)
            log_p = u - np.log(np.exp(u[seen]).sum())
            np.testing.assert_allclose(scores[row, i, seen], log_p[seen], rtol=1e-4, atol=1e-4)
            assert (scores[row, i, ~seen] < -1e29).all()
            if target in (-1, N):
                break
            x, used[target] = points[row, target], True


@pairs
def test_rows_of_probabilities_sum_to_one_over_what_may_be_chosen(encoder, task):
    model, variables = network(encoder, task)
    inputs, targets = drawn(task)
    p = np.exp(scored(model, variables, inputs, targets))
    assert p.shape == (ROWS, task.steps(N), N + 1)
    asked = np.asarray(targets) >= 0
    np.testing.assert_allclose(p.sum(-1)[asked], 1, rtol=1e-5)
    empty = np.broadcast_to(np.asarray(inputs[2] < 0)[:, None], p[..., :N].shape)
    assert p[..., :N][empty & asked[..., None]].max() == 0
    assert p[:, 0, N].max() == 0  # nothing ends before it begins
    assert p[asked].max(-1).min() > 1 / (N + 1)


@pairs
def test_empty_slots_change_nothing(encoder, task):
    model, variables = network(encoder, task)
    (points, pos, seg), targets = drawn(task)
    spoilt = jnp.where(seg[..., None] < 0, jnp.nan, points)
    whole = scored(model, variables, (points, pos, seg), targets)
    np.testing.assert_array_equal(scored(model, variables, (spoilt, pos, seg), targets), whole)

    def loss(variables, points):
        return likelihood(model, variables, (points, pos, seg), targets).sum()

    slope = jax.jit(jax.grad(loss))(variables, spoilt)
    assert all(bool(jnp.isfinite(z).all()) for z in jax.tree.leaves(slope))
    row = int(jnp.argmin((seg >= 0).sum(1)))
    n = int((seg[row] >= 0).sum())
    assert n < N
    short = tuple(z[row : row + 1, :n] for z in (points, pos, seg))
    named = targets[row : row + 1]
    moved = jnp.where(named == N, n, named)[:, : task.steps(n)]
    alone = scored(model, variables, short, moved)
    kept = jnp.concatenate([whole[row, :, :n], whole[row, :, N:]], -1)[: task.steps(n)]
    asked = np.asarray(moved[0] >= 0)
    np.testing.assert_allclose(alone[0][asked], kept[asked], rtol=1e-4, atol=1e-4)


@outputs
def test_without_positions_permuted_points_permute_the_scores(task):
    model, variables = network(SET, task)
    (points, pos, seg), targets = drawn(task)
    keys = jax.random.split(jax.random.key(2), ROWS)
    order = jax.vmap(lambda key: jax.random.permutation(key, N))(keys)
    place = jnp.argsort(order, 1)  # where each point went
    turned = tuple(
        jnp.take_along_axis(z, order.reshape(ROWS, N, *[1] * (z.ndim - 2)), 1)
        for z in (points, seg)
    )
    ids = jnp.concatenate([place, jnp.full((ROWS, 1), N)], 1)
    renamed = jnp.where(targets < 0, -1, jnp.take_along_axis(ids, jnp.maximum(targets, 0), 1))
    whole = scored(model, variables, (points, pos, seg), targets)
    moved = scored(model, variables, (turned[0], pos, turned[1]), renamed)
    back = jnp.take_along_axis(moved, ids[:, None], 2)
    np.testing.assert_allclose(back, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", [ROW, LstmEncoder(SMALL)], ids=["row", "lstm"])
def test_an_encoder_that_knows_the_order_is_not_blind_to_it(encoder):
    model, variables = network(encoder, TASKS[0])
    (points, pos, seg), targets = drawn(TASKS[0])
    full = jnp.zeros_like(seg)
    first = scored(model, variables, (points, pos, full), targets)[:, 0, :N]
    turned = scored(model, variables, (points[:, ::-1], pos, full), targets)[:, 0, :N]
    assert float(jnp.abs(turned[:, ::-1] - first).max()) > 1e-3


@pairs
def test_scores_of_a_step_do_not_know_what_comes_then(encoder, task):
    model, variables = network(encoder, task)
    inputs, targets = drawn(task)
    before = scored(model, variables, inputs, targets)
    for i in (0, 1, 3):
        later = jnp.where(jnp.arange(targets.shape[1]) < i, targets, (targets + 1) % N)
        after = scored(model, variables, inputs, later)
        np.testing.assert_array_equal(after[:, : i + 1], before[:, : i + 1])
    assert bool(jnp.any(after != before))


@pairs
def test_a_decoded_sequence_keeps_to_the_rules(encoder, task):
    for seed in range(3):
        model, variables = network(encoder, task)
        inputs, _ = drawn(task, seed=seed)
        for beams in (1, 3):
            named = np.asarray(decoded(model, variables, inputs, beams))
            assert named.shape == (ROWS, task.steps(N))
            for row, count in zip(named, np.asarray(inputs[2] >= 0).sum(1)):
                sequence = row[row >= 0].tolist()
                ends = [i for i, index in enumerate(sequence) if index == N]
                assert ends in ([len(sequence) - 1], [])
                points = sequence[: -len(ends) or None]
                assert points
                assert max(points) < count
                if not task.repeats:
                    assert len(set(points)) == len(points)
                    assert ends
                if task.complete:
                    assert sorted(points) == list(range(count))


@encoders
def test_greedy_takes_the_likeliest_index_at_each_step(encoder):
    model, variables = network(encoder, TASKS[0])
    inputs, _ = drawn(TASKS[0])
    named = decoded(model, variables, inputs)
    best = jnp.argmax(scored(model, variables, inputs, named), -1)
    np.testing.assert_array_equal(jnp.where(named >= 0, best, -1), named)


@outputs
def test_as_many_beams_as_sequences_find_the_likeliest(task):
    """Of 4 points all sequences without a repetition can be tried."""
    once = task if not task.repeats else Hull(3)
    model, variables = network(SET, once)
    inputs = tuple(z[:, :4] for z in drawn(once)[0])
    inputs = (*inputs[:2], jnp.zeros_like(inputs[2]))
    every = [list(s) for s in sequences(4, once.complete)]
    table = jnp.array([s + [-1] * (5 - len(s)) for s in every])
    nats = jax.vmap(
        lambda named: likelihood(model, variables, inputs, jnp.broadcast_to(named, (ROWS, 5)))
    )(table)
    best = table[jnp.argmax(nats, 0)]
    np.testing.assert_array_equal(decoded(model, variables, inputs, len(every)), best)
    np.testing.assert_allclose(jnp.exp(nats).sum(0), 1, rtol=1e-4)  # and these are all there are


def sequences(n, complete):
    sizes = [n] if complete else range(1, n + 1)
    for size in sizes:
        for points in permutations(range(n), size):
            yield [*points, n]


@pairs
def test_the_same_parameters_read_more_points(encoder, task):
    model, variables = network(encoder, task)
    inputs, targets = drawn(task, length=11)
    p = jnp.exp(scored(model, variables, inputs, targets))
    assert p.shape == (ROWS, task.steps(11), 12)
    np.testing.assert_allclose(p.sum(-1)[np.asarray(targets) >= 0], 1, rtol=1e-5)
    assert decoded(model, variables, inputs).shape == targets.shape


@encoders
def test_gradients_are_finite_differences(encoder):
    """Of every array of the decoder, in a random direction."""
    model, variables = network(encoder, TASKS[0])
    inputs, targets = drawn(TASKS[0])

    @jax.jit
    def loss(decoder):
        params = {"params": {**variables["params"], "decoder": decoder}}
        return likelihood(model, params, inputs, targets).sum()

    decoder = variables["params"]["decoder"]
    slopes, rng = jax.tree.leaves(jax.jit(jax.grad(loss))(decoder)), np.random.default_rng(0)
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(decoder)):
        leaves, tree = jax.tree.flatten(decoder)
        step = rng.standard_normal(leaf.shape).astype(np.float32)
        step *= 0.02 / np.linalg.norm(step)
        ahead, back = (
            loss(tree.unflatten([*leaves[:number], leaf + s, *leaves[number + 1 :]]))
            for s in (step, -step)
        )
        slope = float((slopes[number] * step).sum())
        assert slope == pytest.approx(float(ahead - back) / 2, rel=0.02, abs=1e-4), path
        assert slope != 0


def test_dropout_acts_in_training_alone():
    dropped = dataclasses.replace(SET, architecture=dataclasses.replace(SMALL, dropout=0.5))
    plain, variables = network(SET, TASKS[0])
    model = PointerNetwork(dropped, TASKS[0])
    inputs, targets = drawn(TASKS[0])
    quiet = scored(model, variables, inputs, targets)
    np.testing.assert_array_equal(quiet, scored(plain, variables, inputs, targets))
    rngs = {"dropout": jax.random.key(3)}
    loud, _ = model.apply(variables, *inputs, targets, train=True, rngs=rngs)
    assert bool(jnp.any(loud != quiet))


def test_equal_networks_are_compiled_once():
    copy = TransformerEncoder(SMALL, (Softmax(),), NoPosition(), Exponential())
    assert PointerNetwork(SET, Hull(3)) == PointerNetwork(copy, Hull(3))
    assert hash(PointerNetwork(SET, Hull(3))) == hash(PointerNetwork(copy, Hull(3)))
    assert PointerNetwork(SET, Hull(3)) != PointerNetwork(SET, Tsp(3))
