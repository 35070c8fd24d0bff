"""The Compressive Transformer: what is forgotten finely is remembered coarsely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, attend, outputs
from battery.cases import DIMS, Case, documents, draw

from attnlab.errors import UserError
from attnlab.mechanisms.compressive import Compressive
from attnlab.mechanisms.transformer_xl import TransformerXL
from attnlab.positions.alibi import Alibi
from attnlab.positions.rope import Rope

SMALL = Compressive(segment=4, memory=4, compressed=2, rate=2)


@pytest.mark.parametrize("position", [Rope(), Alibi()], ids=repr)
@pytest.mark.parametrize("pool", ["conv", "mean"])
def test_groups_of_one_token_are_a_longer_cache(pool, position):
    """T4: rate 1 and W = 1 is Transformer-XL with memory + compressed."""
    case = Case(Compressive(segment=5, memory=3, compressed=4, rate=1, pool=pool), position)
    wider = Case(TransformerXL(segment=5, memory=7), position)
    inputs = documents(draw(case), (13, 19), (32,))
    initial = case.mechanism.init(None, DIMS)
    inputs = inputs._replace(params=(initial, *inputs.params[1:]))
    same = inputs._replace(params=({}, *inputs.params[1:]))
    assert_close(outputs(case, inputs), outputs(wider, same))


def test_which_tokens_a_query_sees_directly_in_groups_and_not_at_all():
    """The last of 20 tokens: 16-19 own, 12-15 cached, 8-11 in two groups, before that nothing."""
    case = Case(SMALL, Rope())
    inputs = draw(case, batch=1, length=20)
    before = np.asarray(outputs(case, inputs))
    moved = []
    for j in range(20):
        v = inputs.v.copy()
        v[:, j] += 1
        moved.append(
            np.any(np.asarray(outputs(case, inputs._replace(v=v)))[:, 19] != before[:, 19])
        )
    assert moved == [False] * 8 + [True] * 12
    # With equal and opposite changes inside a group, the mean of the group stays.
    mean = Case(Compressive(segment=4, memory=4, compressed=2, rate=2, pool="mean"), Rope())
    inputs = draw(mean, batch=1, length=20)
    v = inputs.v.copy()
    v[:, 8] += 1
    v[:, 9] -= 1
    got = np.asarray(outputs(mean, inputs._replace(v=v)))
    assert_close(got[:, 16:], np.asarray(outputs(mean, inputs))[:, 16:])


def losses(case, inputs):
    """Gradients of the auxiliary loss, and of the outputs, with respect to (params, q, k, v)."""

    def call(learned, which):
        (params, q, k, v) = learned
        z = inputs._replace(params=(params, *inputs.params[1:]), q=q, k=k, v=v)
        result = attend(case, z)
        return result.aux["loss"] if which == "loss" else jnp.sum(jnp.sin(result.out))

    learned = (inputs.params[0], inputs.q, inputs.k, inputs.v)
    grad = jax.jit(jax.grad(call), static_argnums=1)
    return grad(learned, "loss"), grad(learned, "out")


def test_the_reconstruction_trains_the_compression_and_nothing_else():
    """T4: its gradient touches only W, and that of the task everything but W."""
    case = Case(SMALL, Rope())
    (d_params, *d_tokens), (t_params, *t_tokens) = losses(case, draw(case))
    for leaf in jax.tree.leaves(d_params):
        assert np.any(leaf)
    for z in d_tokens:
        np.testing.assert_array_equal(z, 0)
    for leaf in jax.tree.leaves(t_params):
        np.testing.assert_array_equal(leaf, 0)
    for z in t_tokens:
        assert np.any(z)


@pytest.mark.slow
def test_a_compression_that_loses_nothing_has_no_loss():
    case = Case(Compressive(segment=4, memory=4, compressed=4, rate=1), Rope())
    inputs = draw(case)
    exact = inputs._replace(params=(case.mechanism.init(None, DIMS), *inputs.params[1:]))
    assert float(attend(case, exact).aux["loss"]) < 1e-10
    assert float(attend(case, inputs).aux["loss"]) > 1e-4


def test_nothing_is_compressed_before_something_leaves_the_cache():
    """The first segment has no cache, so no reconstruction; a mean has nothing to learn."""
    case = Case(SMALL, Rope())
    inputs = draw(case)
    first = inputs.tokens(lambda z: z[:, :4])
    assert float(attend(case, first).aux["loss"]) == 0
    assert Compressive(pool="mean").init(None, DIMS) == {}


@pytest.mark.parametrize(
    "fields",
    [{"segment": 6}, {"memory": 6}, {"memory": 0}, {"compressed": 0}, {"rate": 0}, {"pool": "max"}],
)
def test_sizes_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match="compressive"):
        Compressive(**fields)
