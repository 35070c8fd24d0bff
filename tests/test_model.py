"""The Transformer around the mechanism: sizes, switches and what each of them promises."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close

from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.window import Window
from attnlab.model import (
    Architecture,
    Backbone,
    Classifier,
    PairClassifier,
    Transformer,
    initial_memory,
)
from attnlab.positions.rope import Rope

SMALL = Architecture(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
WORDS, N = 19, 12


SOFTMAX = (Softmax(), Softmax())


def network(mechanisms=SOFTMAX, **changes):
    return Transformer(replace(SMALL, **changes), WORDS, mechanisms, Rope())


def tokens(seed=0):
    words = np.random.default_rng(seed).integers(0, WORDS, (2, N), np.int32)
    pos = np.tile(np.arange(N, dtype=np.int32), (2, 1))
    return words, pos, pos * 0


@partial(jax.jit, static_argnums=0)
def init(net):
    return net.init(jax.random.key(0), *tokens())


@partial(jax.jit, static_argnums=(0, 3))
def apply(net, params, batch, train=False, key=None):
    return net.apply(params, *batch, train=train, rngs=key if key is None else {"dropout": key})


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(net, params, batch):
    return jax.value_and_grad(lambda p: jnp.mean(jnp.square(net.apply(p, *batch)[0])))(params)


def size_of(params):
    return sum(z.size for z in jax.tree.leaves(params))


MATRICES = {"swiglu": 3, "gelu": 2, "none": 0}


@pytest.mark.parametrize("mlp", MATRICES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_number_of_parameters_is_the_formula(mlp, tied, qk_norm):
    a = replace(SMALL, mlp=mlp, tied=tied, qk_norm=qk_norm)
    net = network(mlp=mlp, tied=tied, qk_norm=qk_norm)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *tokens())
    attention = a.width * a.head_dim * 2 * (a.heads + a.kv_heads) + qk_norm * 2 * a.head_dim
    feed_forward = a.width * a.mlp_width * MATRICES[mlp]
    layer = attention + feed_forward + a.width * (1 if mlp == "none" else 2)
    embeddings = WORDS * a.width * (1 if tied else 2)
    assert size_of(shapes) == embeddings + a.layers * layer + a.width
    assert {z.dtype for z in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "changes", [{}, {"tied": False}, {"qk_norm": True}, {"mlp": "gelu"}], ids=str
)
def test_logits_are_float32_and_of_the_first_order(changes):
    net = network(**changes)
    logits, extras = apply(net, init(net), tokens())
    assert (logits.shape, logits.dtype) == ((2, N, WORDS), jnp.float32)
    assert 0.1 < float(jnp.std(logits)) < 10
    assert extras.memory == (None, None)
    assert [aux["lse"].shape for aux in extras.aux] == [(2, 4, N)] * 2


def test_tied_logits_are_the_hidden_state_times_the_embedding():
    net = network()
    params = init(net)
    logits, _ = apply(net, params, tokens())
    table = params["params"]["backbone"]["embedding"]["embedding"]
    hidden = jax.jit(lambda p: net.apply(p, *tokens(), method=lambda m, *z: m.backbone(*z)[0]))(
        params
    )
    np.testing.assert_allclose(logits, hidden @ table.T, atol=1e-4)
    assert "head" not in params["params"]


def test_qk_norm_makes_logits_blind_to_the_scale_of_queries_and_keys():
    net = network(qk_norm=True)
    params = init(net)
    before, _ = apply(net, params, tokens())

    def scaled(path, z):
        names = [getattr(entry, "key", "") for entry in path]
        return 7.0 * z if names[-2] in ("query", "key") else z

    after, _ = apply(net, jax.tree_util.tree_map_with_path(scaled, params), tokens())
    assert_close(after, before, 1e-4)


def test_dropout_is_off_unless_training_and_then_follows_the_key():
    net = network(dropout=0.3)
    params, (a, b) = init(net), jax.random.split(jax.random.key(1))
    plain = apply(network(), params, tokens())[0]
    np.testing.assert_array_equal(apply(net, params, tokens())[0], plain)
    one, again, other = (apply(net, params, tokens(), True, key)[0] for key in (a, a, b))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    assert np.any(one != plain)


def test_remat_changes_no_value_and_no_gradient():
    params = init(network())
    assert_close(
        loss_and_gradient(network(remat=True), params, tokens()),
        loss_and_gradient(network(), params, tokens()),
    )


def test_bfloat16_is_close_to_float32_on_the_same_parameters():
    params = init(network())
    wanted, _ = apply(network(), params, tokens())
    got, extras = apply(network(dtype="bfloat16"), params, tokens())
    assert got.dtype == jnp.float32
    assert extras.aux[0]["lse"].dtype == jnp.float32
    assert float(jnp.max(jnp.abs(got - wanted))) < 0.05 * float(jnp.max(jnp.abs(wanted)))


def test_each_layer_has_the_mechanism_of_its_place():
    mixed = network((Window(2), Softmax()))
    params = init(mixed)
    _, mixed_extras = apply(mixed, params, tokens())
    _, plain_extras = apply(network(), params, tokens())
    _, window_extras = apply(network((Window(2), Window(2))), params, tokens())
    lse = [[aux["lse"] for aux in z.aux] for z in (mixed_extras, plain_extras, window_extras)]
    np.testing.assert_array_equal(lse[0][0], lse[2][0])
    assert np.any(lse[0][0] != lse[1][0])
    assert np.any(lse[0][1] != lse[2][1])


def test_memory_is_a_buffer_of_keys_or_the_mechanisms_own_state():
    full, ring = initial_memory(SMALL, (Softmax(), Window(5, sinks=1)), batch=3, length=40)
    assert full.keys.k.shape == (3, 40, 2, 8)
    assert np.all(full.keys.seg == -1)
    assert (full.state, ring.keys) == ((), None)
    assert ring.state.k.shape == (3, 5, 2, 8)


def test_queries_share_kv_heads_as_if_those_were_repeated():
    grouped, wide = network(), network(kv_heads=4)
    params = init(grouped)

    def repeated(path, z):
        if getattr(path[-2], "key", "") not in ("key", "value"):
            return z
        heads = z.reshape(SMALL.width, SMALL.kv_heads, SMALL.head_dim)
        return jnp.repeat(heads, 2, 1).reshape(SMALL.width, -1)

    wider = jax.tree_util.tree_map_with_path(repeated, params)
    assert_close(apply(wide, wider, tokens())[0], apply(grouped, params, tokens())[0])


def test_packed_documents_do_not_meet_in_the_model():
    net = network()
    params = init(net)
    words, pos, _ = tokens()
    packed = words, np.where(pos < 5, pos, pos - 5), np.where(pos < 5, 0, 1)
    other = np.where(pos < 5, (words + 1) % WORDS, words), *packed[1:]
    a, b = (apply(net, params, batch)[0] for batch in (packed, other))
    np.testing.assert_array_equal(a[:, 5:], b[:, 5:])
    assert np.any(a[:, :5] != b[:, :5])


@pytest.fixture(scope="module")
def classifier():
    encoder = Classifier(SMALL, WORDS, SOFTMAX, Rope(), 3)
    return encoder, init(encoder)


def test_the_encoder_sees_both_ways(classifier):
    """The first token's hidden state depends on the last token."""
    encoder, params = classifier
    words, pos, seg = tokens()

    def first(words):
        hidden = encoder.apply(params, words, pos, seg, capture_intermediates=True, mutable=True)[1]
        return hidden["intermediates"]["backbone"]["layer_1"]["attention"]["__call__"][0][0][:, 0]

    changed = words.copy()
    changed[:, -1] = (words[:, -1] + 1) % WORDS
    a, b = (jax.jit(first)(z) for z in (words, changed))
    assert np.any(a != b)


def test_the_encoder_ignores_padding(classifier):
    encoder, params = classifier
    words, pos, seg = tokens()
    seg = np.where(pos < 7, 0, -1).astype(np.int32)
    got, _ = apply(encoder, params, (words, pos, seg))
    assert (got.shape, got.dtype) == ((2, 3), jnp.float32)
    short = tuple(z[:, :7] for z in (words, pos, seg))
    assert_close(got, apply(encoder, params, short)[0])
    empty, _ = apply(encoder, params, (words, pos, np.full_like(seg, -1)))
    assert np.all(np.isfinite(empty))


def test_a_pair_is_read_by_two_towers_and_one_head():
    encoder = PairClassifier(SMALL, WORDS, SOFTMAX, Rope(), 3)
    params = init(encoder)
    words, pos, _ = tokens()
    packed = words, np.where(pos < 5, pos, pos - 5), np.where(pos < 5, 0, np.where(pos < 9, 1, -1))
    got, _ = apply(encoder, params, packed)
    tower = Backbone(replace(SMALL, causal=False), WORDS, SOFTMAX, Rope())
    weights = params["params"]
    a, b = (
        jnp.mean(
            apply(tower, {"params": weights["backbone"]}, tuple(z[:, part] for z in packed))[0], 1
        )
        for part in (slice(0, 5), slice(5, 9))
    )
    hidden = jnp.concatenate([a, b, a * b, a - b], -1) @ weights["pair"]["kernel"]
    hidden = jax.nn.relu(hidden + weights["pair"]["bias"])
    assert hidden.shape == (2, SMALL.mlp_width)
    assert_close(got, hidden @ weights["head"]["kernel"] + weights["head"]["bias"])
    swapped, _ = apply(
        encoder, params, (packed[0], packed[1], np.where(packed[2] < 0, -1, 1 - packed[2]))
    )
    assert np.any(got != swapped)


def test_a_tap_reaches_every_layer():
    net = network()
    params = init(net)
    words, pos, seg = tokens()
    own = np.broadcast_to(np.arange(N, dtype=np.int32), seg.shape)

    @jax.jit
    def silent(seg):
        return net.apply(params, words, pos, seg, taps=(("heads", jnp.zeros_like),))[0]

    np.testing.assert_array_equal(silent(seg), silent(own))  # attention has nothing left to say
    assert np.any(apply(net, params, (words, pos, seg))[0] != silent(seg))
