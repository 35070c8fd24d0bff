"""Linear attention with features of its own is the same with features made outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close
from test_recurrent import B, D, E, G, documents, draw

from attnlab.engines import undecayed

WIDER = 7


def widened(z):
    """Another size than the input's, and not 0 where the input is."""
    plane = jnp.sin(jnp.arange(z.shape[-1] * WIDER, dtype=jnp.float32)).reshape(-1, WIDER)
    return jnp.exp(z @ plane / 4)


def inside(q, k, v, memory, seg, mean):
    state = undecayed.State(memory, jnp.zeros(B, jnp.int32))
    return undecayed.attend(q, k, v, seg, state, chunk=8, mean=mean, features=widened)


def outside(q, k, v, memory, seg, mean):
    state = undecayed.State(memory, jnp.zeros(B, jnp.int32))
    full = (seg >= 0)[..., None, None]
    q, k = (jnp.where(full, widened(z), 0) for z in (q, k))
    return undecayed.attend(q, k, v, seg, state, chunk=32, mean=mean)


def arguments(mean):
    drawn = draw()
    memory = np.random.default_rng(2).standard_normal((B, G, WIDER, E + mean)).astype(np.float32)
    if mean:  # sums of positive weights
        memory[..., -1] = np.abs(memory[..., -1])
    return drawn["q"], drawn["k"], drawn["v"], memory


@pytest.mark.parametrize("mean", [False, True])
def test_features_are_mapped_in_the_chunks_with_every_gradient(mean):
    seg, given = documents(), arguments(mean)

    def run(form):
        def loss(*given):
            out, state = form(*given, seg, mean)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state.memory)), (out, state)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*given)

    assert_close(run(inside), run(outside), 1e-4)


def test_what_an_empty_slot_holds_is_never_seen():
    seg, (q, k, v, memory) = documents(), arguments(True)
    empty = seg < 0
    spoiled = [np.where(empty[..., None, None], np.nan, z) for z in (q, k, v)]

    def run(q, k, v):
        def loss(q, k, v):
            out, _ = inside(q, k, v, memory, seg, True)
            return jnp.sum(out**2), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    got, wanted = run(*spoiled), run(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert not np.any(np.asarray(got[1])[empty])


def test_without_any_token_the_state_is_handed_on():
    seg, (q, k, v, memory) = np.full((B, 3), -1, np.int32), arguments(False)
    out, state = inside(q[:, :3], k[:, :3], v[:, :3], memory, seg, False)
    assert not np.any(out)
    np.testing.assert_array_equal(state.memory, memory)
    np.testing.assert_array_equal(state.seg, np.zeros(B))
    assert D != WIDER
