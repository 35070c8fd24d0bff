"""What a layer projects its queries and keys from is said by its mechanism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.network import VOCABULARY, tokens_of

from attnlab.core import mechanisms
from attnlab.errors import UserError
from attnlab.mechanisms.random_positions import RandomPositions
from attnlab.mechanisms.softmax import Softmax
from attnlab.mechanisms.static import Static
from attnlab.mechanisms.uniform import Uniform
from attnlab.model import Architecture, Transformer
from attnlab.positions.rope import Rope

SMALL = Architecture(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=32)
TOKENS, POS, SEG = tokens_of()


def network(*layers):
    return Transformer(SMALL, VOCABULARY, layers, Rope())


def initial(net):
    return jax.jit(net.init)(jax.random.key(0), TOKENS, POS, SEG)


def size_of(params):
    return sum(z.size for z in jax.tree.leaves(params))


def second_weights(mechanism, params, tokens):
    """Who attends to whom in the second of two layers."""
    seen = []

    def look(z):
        seen.append(z)
        return z

    network(mechanism, mechanism).apply(params, tokens, POS, SEG, taps=(("probs", look),))
    return np.asarray(seen[1])


def with_another_first_layer(params):
    layer = jax.tree.map(lambda z: 2 * z, params["params"]["backbone"]["layer_0"])
    return {"params": {"backbone": params["params"]["backbone"] | {"layer_0": layer}}}


@pytest.mark.parametrize(
    ("mechanism", "follows_layers", "follows_tokens"),
    [(Softmax(), True, True), (Static(), False, True), (RandomPositions(), False, False)],
)
def test_weights_follow_layers_below_and_tokens_as_said(mechanism, follows_layers, follows_tokens):
    params = initial(network(mechanism, mechanism))
    weights = second_weights(mechanism, params, TOKENS)
    below = second_weights(mechanism, with_another_first_layer(params), TOKENS)
    assert np.array_equal(below, weights) != follows_layers
    other = second_weights(mechanism, params, (TOKENS + 1) % VOCABULARY)
    assert np.array_equal(other, weights) != follows_tokens
    assert np.ptp(weights[:, :, -1]) > 0.01, "all keys alike"


def test_the_first_layer_of_static_is_softmax():
    plain, static = network(Softmax(), Softmax()), network(Static(), Softmax())
    params = initial(plain)
    wanted = jax.jit(plain.apply)(params, TOKENS, POS, SEG)[0]
    np.testing.assert_array_equal(jax.jit(static.apply)(params, TOKENS, POS, SEG)[0], wanted)
    later = jax.jit(network(Static(), Static()).apply)(params, TOKENS, POS, SEG)[0]
    assert np.max(np.abs(later - wanted)) > 1e-3


def test_a_place_has_its_vector_wherever_it_stands_and_a_seed_has_others():
    x, pos = jnp.zeros((1, 9, 16)), jnp.arange(9)[None]
    drawn = RandomPositions().source(x, x, pos)
    np.testing.assert_array_equal(RandomPositions().source(x, x, pos[:, ::-1]), drawn[:, ::-1])
    assert np.all(np.abs(RandomPositions(seed=1).source(x, x, pos) - drawn).max(-1) > 0.1)
    assert abs(np.std(RandomPositions().source(jnp.zeros((1, 9, 999)), x, pos)) - 1) < 0.05


def test_what_is_not_asked_is_no_parameter():
    a, wanted = SMALL, size_of(initial(network(Softmax(), Softmax())))
    for mechanism in (Static(), RandomPositions()):
        assert size_of(initial(network(mechanism, Softmax()))) == wanted
    asking = a.width * a.head_dim * (a.heads + a.kv_heads)
    params = initial(network(Uniform(), Softmax()))
    assert size_of(params) == wanted - asking
    assert not {"query", "key"} & set(params["params"]["backbone"]["layer_0"]["attention"])


def test_parts_share_a_source_or_are_refused():
    heads = mechanisms.get("heads")
    together = (Uniform(), Static()), (Static(), Static()), (RandomPositions(), RandomPositions())
    for parts in together:
        initial(network(heads(parts=parts), Softmax()))
    for parts in ((Static(), Softmax()), (Softmax(), RandomPositions()), (heads(), Static())):
        with pytest.raises(UserError, match="project queries and keys from different things"):
            initial(network(heads(parts=parts), Softmax()))
    nothing = initial(network(heads(parts=(Uniform(), Uniform())), Softmax()))
    assert "query" not in nothing["params"]["backbone"]["layer_0"]["attention"]


def test_two_seeds_are_two_sources():
    parts = RandomPositions(), RandomPositions(seed=1)
    with pytest.raises(UserError, match="heads: random_positions and random_positions"):
        initial(network(mechanisms.get("heads")(parts=parts), Softmax()))
