"""A mask that values make: the right keys, of the past only, and no more of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, outputs
from battery.cases import BATCH, DIMS, Case, documents, draw

from attnlab.core import Rule
from attnlab.errors import UserError
from attnlab.mechanisms.dynamic_mask import DynamicMask
from attnlab.mechanisms.window import Window
from attnlab.positions.none import NoPosition

CASE = Case(DynamicMask(kept=4, chunk=5), NoPosition())


def telling(case=CASE):
    """Inputs of one row whose values tell tokens apart, next to noise that says what they matter:
    the first 32 entries of an output are the weights themselves."""
    inputs = draw(case, batch=1, dims=DIMS._replace(value_dim=40))
    v = inputs.v.copy()
    v[..., :32] = 0
    v[0, np.arange(32), :, np.arange(32)] = 1
    (params, place) = inputs.params
    params = params | {"coefficient": np.ones(2, np.float32)}
    return inputs._replace(v=v, params=(params, place))


def importance(inputs):
    params = inputs.params[0]
    gate = np.einsum("mfe,feg->mg", inputs.v[0], params["gate"]) / 2
    return params["coefficient"] * np.logaddexp(0, gate)


@pytest.mark.parametrize("mechanism", [DynamicMask(4, 5)], ids=str)
def test_a_query_keeps_the_past_keys_of_the_largest_say(mechanism):
    inputs = telling()
    weights = np.asarray(outputs(Case(mechanism, NoPosition()), inputs))[0, ..., :32]
    say = importance(inputs)
    for (i, h), _ in np.ndenumerate(np.zeros((32, 4))):
        wanted = np.sort(np.argsort(say[: i + 1, h // 2])[::-1][:4])
        np.testing.assert_array_equal(np.flatnonzero(weights[i, h]), wanted)
        z = inputs.q[0, i, h] @ inputs.k[0, wanted, h // 2].T / 8**0.5 + say[wanted, h // 2]
        assert_close(weights[i, h][wanted], np.exp(z) / np.exp(z).sum())


def test_without_a_say_the_latest_are_kept():
    """The coefficient is 0 at the start: a window."""
    inputs = documents(draw(CASE), (13, 19), (20, 12))
    params, place = inputs.params
    params = params | {"coefficient": np.zeros(2, np.float32)}
    wanted = outputs(Case(Window(4), NoPosition()), inputs._replace(params=({}, place)))
    assert_close(outputs(CASE, inputs._replace(params=(params, place))), wanted)


def test_later_tokens_displace_no_key_of_an_earlier_query():
    """Values that matter beyond all others, at the end: nothing before them changes. One choice
    for the whole sequence, as it is sometimes computed, leaves earlier queries without a key."""
    inputs = telling()
    v = inputs.v.copy()
    v[0, 20:, :, 32:] = 9 * np.sign(inputs.params[0]["gate"][:, 32:].sum(-1))
    loud = inputs._replace(v=v)
    before, after = outputs(CASE, inputs), outputs(CASE, loud)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    chosen = np.argsort(importance(loud)[:, 0])[::-1][:4]
    assert chosen.min() >= 20


def test_a_state_of_as_many_keys_as_are_kept_is_enough():
    """Token by token with 4 slots == all at once."""
    inputs = telling()
    mechanism, rule = CASE.mechanism, Rule()
    dims = DIMS._replace(value_dim=40)
    step = jax.jit(
        lambda part, state: mechanism(
            part.params[0], part.queries(), part.keys(), rule, state, x=part.x
        )[:2]
    )
    state, outs = mechanism.initial_state(dims, 1), []
    assert state.k.shape[2] == 4
    for t in range(32):
        out, state = step(inputs.tokens(lambda z, t=t: z[:, t : t + 1]), state)
        outs.append(out)
    assert_close(np.concatenate(outs, 1), outputs(CASE, inputs))


def test_a_dropped_key_receives_no_gradient():
    inputs = telling()

    def last(k):
        keys = inputs.keys()._replace(k=k)
        result = CASE.mechanism(inputs.params[0], inputs.queries(), keys, Rule())
        return jnp.sum(jnp.sin(result.out[:, -1]))

    gradient = np.asarray(jax.jit(jax.grad(last))(inputs.k))[0]
    kept = np.argsort(importance(inputs), 0)[::-1][:4]
    for g in range(2):
        received = np.flatnonzero(np.any(gradient[:, g], -1))
        np.testing.assert_array_equal(received, np.sort(kept[:, g]))


@pytest.mark.parametrize("fields", [{"kept": 0}, {"chunk": 0}])
def test_sizes_that_keep_nothing_are_refused(fields):
    with pytest.raises(UserError, match="dynamic_mask"):
        DynamicMask(**fields)


def test_taps_while_decoding_are_refused():
    inputs = draw(CASE)
    rule = Rule(taps=(("logits", lambda z: z),))
    state = CASE.mechanism.initial_state(DIMS, BATCH)
    with pytest.raises(UserError, match="dynamic_mask"):
        CASE.mechanism(inputs.params[0], inputs.queries(), inputs.keys(), rule, state)
