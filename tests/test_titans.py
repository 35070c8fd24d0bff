"""A memory that learns as it reads: chunks are the recurrence, and its limits are known rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close

from attnlab.engines import delta, momentum, undecayed
from attnlab.engines.momentum import Gates
from attnlab.errors import UserError
from attnlab.mechanisms.titans import Titans

NEVER = np.float32(-1e9)
"""The logarithm of a gate that is shut."""


@pytest.fixture
def normal():
    """Draws f32 of a shape."""
    draw = np.random.default_rng(0)
    return lambda *shape: draw.standard_normal(shape, np.float32)


def constant(shape, step, carry, decay):
    return Gates(*(np.full(shape, z, np.float32) for z in (step, carry, decay)))


def test_chunks_are_the_recurrence_with_documents_and_empty_slots(normal):
    B, N, H, G, D, E = 2, 50, 4, 2, 8, 5
    seg = np.zeros((B, N), np.int32)
    seg[0, 12:], seg[0, 30:], seg[1, 5:9], seg[1, 22:] = 1, -1, -1, 3
    draw = normal(B, N, H, D), normal(B, N, G, D), normal(B, N, G, E)
    gates = Gates(*jax.random.uniform(jax.random.key(0), (3, B, N, G)))
    gates = Gates(gates.step, -gates.carry, -gates.decay)
    weight, weight_of_state = normal(B, N, H, E), normal(2, B, G, D, E)

    def gradient(attend):
        def loss(*tokens):
            out, state = attend(*tokens, seg)
            total = jnp.sum(out * weight)
            for z, weighed in zip(state[:2], weight_of_state):
                total += jnp.sum(z * weighed)
            return total, (out, state)

        run = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
        return jax.jit(run)(*draw, gates)

    wanted = gradient(momentum.attend_by_token)
    for chunk in (5, 64):
        got = gradient(lambda *z, chunk=chunk: momentum.attend(*z, chunk=chunk))
        assert_close(got, wanted, 2e-5)


def test_without_momentum_and_forgetting_it_is_the_delta_rule(normal):
    q, k, v = normal(2, 40, 4, 8), normal(2, 40, 2, 8), normal(2, 40, 2, 5)
    beta, seg = np.abs(normal(2, 40, 2)) % 1, np.zeros((2, 40), np.int32)
    gates = constant(beta.shape, 0, NEVER, 0)._replace(step=beta)
    got, state = momentum.attend(q, k, v, gates, seg, chunk=16)
    wanted, after = delta.attend(q, k, v, beta, 0 * beta, seg, chunk=16)
    assert_close((got, state.memory), (wanted, after.memory), 1e-5)


@pytest.mark.slow
def test_small_steps_are_a_sum_over_the_past(normal):
    """Where nothing is recalled yet, the error is the value: θ Σ v kᵀ q."""
    q, k, v, seg = normal(1, 20, 2, 8), normal(1, 20, 2, 8), normal(1, 20, 2, 5), np.zeros((1, 20))
    step, seg = 2.0**-16, seg.astype(np.int32)
    got, _ = momentum.attend(q, k, v, constant((1, 20, 2), step, NEVER, 0), seg)
    q, k = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))
    wanted, _ = undecayed.attend(q, k, v, seg)
    assert_close(got / np.float32(step), wanted, 1e-3)


def test_one_surprise_is_carried_on(normal):
    """A pair written once, then tokens that write nothing: M_t = θ k vᵀ (1 + η + η² + ...)."""
    k, v, seg = normal(1, 9, 1, 8), normal(1, 9, 1, 5), np.zeros((1, 9), np.int32)
    gates = constant((1, 9, 1), 0, np.log(0.5), 0)
    gates.step[0, 0] = 0.3
    _, state = momentum.attend(k, k, v, gates, seg, chunk=4)
    pair = np.outer(k[0, 0, 0] / np.linalg.norm(k[0, 0, 0]), v[0, 0, 0])
    assert_close(state.memory[0, 0], 0.3 * (2 - 0.5**8) * pair, 1e-6)
    assert_close(state.momentum[0, 0], 0.3 * 0.5**8 * pair, 1e-6)


def test_a_wiped_memory_answers_from_later_tokens_only(normal):
    """α = 1 and η = 0 at one token, which writes nothing itself: nothing before it matters."""
    q, k, v, seg = normal(1, 30, 1, 8), normal(1, 30, 1, 8), normal(1, 30, 1, 5), np.zeros((1, 30))
    gates = constant((1, 30, 1), 0.3, np.log(0.5), np.log(0.9))
    gates.step[0, 10], gates.carry[0, 10], gates.decay[0, 10] = 0, NEVER, NEVER
    other = v.copy()
    other[:, :10] = normal(1, 10, 1, 5)
    outs = [momentum.attend(q, k, z, gates, seg.astype(np.int32))[0] for z in (v, other)]
    assert_close(outs[0][:, 10:], outs[1][:, 10:], 1e-6)
    assert np.max(np.abs(outs[0][:, :10] - outs[1][:, :10])) > 0.1


@pytest.mark.slow
def test_what_one_pass_over_random_pairs_leaves_is_known(normal):
    """Error of recall over that of no recall, for D = E = 32. Whole corrections forget earlier
    pairs; small ones that are carried on do better, most where the memory is full."""
    left = {}
    for pairs in (32, 64):
        k, v, seg = normal(32, pairs, 1, 32), normal(32, pairs, 1, 32), np.zeros((32, pairs))
        unit = k[:, :, 0] / np.linalg.norm(k[:, :, 0], axis=-1, keepdims=True)
        for step, carry in ((1.0, NEVER), (0.2, NEVER), (0.2, np.log(0.7))):
            gates = constant((32, pairs, 1), step, carry, 0)
            _, state = _attend(k, v, gates, seg.astype(np.int32))
            error = np.einsum("bnd,bde->bne", unit, state.memory[:, 0]) - v[:, :, 0]
            left[pairs, step, carry == NEVER] = np.mean(error**2) / np.mean(v**2)
    for pairs, known in ((32, (0.61, 0.46)), (64, (1.04, 0.70))):
        got = left[pairs, 1.0, True], left[pairs, 0.2, False]
        np.testing.assert_allclose(got, known, atol=0.05)
    assert left[32, 0.2, False] < left[32, 0.2, True]


_attend = jax.jit(lambda k, v, gates, seg: momentum.attend(k, k, v, gates, seg))


@pytest.mark.parametrize("fields", [{"chunk": 0}, {"rate": 0.0}, {"rate": 2.5}])
def test_steps_that_make_no_sense_are_refused(fields):
    with pytest.raises(UserError, match="titans"):
        Titans(**fields)
