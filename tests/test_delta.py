"""The delta rule: what conditioning does to a memory, and what a memory of its size can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close
from battery.cases import DIMS

from attnlab.engines import delta, undecayed
from attnlab.errors import UserError
from attnlab.mechanisms.delta import Delta
from attnlab.mechanisms.gated_delta import GatedDelta

E1, E2, E3 = np.eye(8, dtype=np.float32)[:3]
V = np.arange(1, 5, dtype=np.float32)
NONE = np.zeros(4, np.float32)


@pytest.fixture
def normal():
    """Draws f32 of a shape."""
    draw = np.random.default_rng(0)
    return lambda *shape: draw.standard_normal(shape, np.float32)


def remembered(*pairs, beta=1.0, decay=0.0, state=()):
    """The state [D E] after (key, value) were presented in turn."""
    k, v = (np.stack(z)[None, :, None] for z in zip(*pairs))
    gates = (np.full((1, len(pairs), 1), z, np.float32) for z in (beta, decay))
    _, after = delta.attend(k, k, v, *gates, np.zeros((1, len(pairs)), np.int32), state, chunk=4)
    return after if state else after.memory[0, 0]


def recalled(k, v, rule):
    """What keys [B N D] recall after all pairs have been written once, values [B N E]."""
    B, N, _ = k.shape
    k, v, seg = k[:, :, None], v[:, :, None], np.zeros((B, N), np.int32)
    if rule == "hebb":
        _, state = undecayed.attend(k, k, v, seg)
    else:
        one = np.ones((B, N, 1), np.float32)
        _, state = delta.attend(k, k, v, one, 0 * one, seg)
    return np.einsum("bnd,bde->bne", k[:, :, 0], state.memory[:, 0])


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_are_the_recurrence_with_documents_and_empty_slots(normal, chunk):
    B, N, H, G, D, E = 2, 90, 4, 2, 8, 5
    seg = np.zeros((B, N), np.int32)
    seg[0, 20:], seg[0, 50:], seg[1, 5:9], seg[1, 40:] = 1, -1, -1, 3
    draw = normal(B, N, H, D), normal(B, N, G, D), normal(B, N, G, E)
    beta, decay = 2 * jax.random.uniform(jax.random.key(0), (2, B, N, G))
    weight, weight_of_state = normal(B, N, H, E), normal(B, G, D, E)

    def gradient(attend):
        def loss(*tokens):
            out, state = attend(*tokens, seg)
            total = jnp.sum(out * weight) + jnp.sum(state.memory * weight_of_state)
            return total, (out, state)

        run = jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)
        return jax.jit(run)(*draw, beta, -decay)

    got = gradient(lambda *z: delta.attend(*z, chunk=chunk))
    assert_close(got, gradient(delta.attend_by_token), 1e-5)


def test_forgetting_at_once_leaves_later_tokens_exact(normal):
    """A sum of logs that has grown huge would round what lies between two later tokens."""
    q, k, v = (normal(1, 64, 1, 8) for _ in range(3))
    beta, decay = np.full((2, 1, 64, 1), 0.5, np.float32)
    decay[:, 3], decay[:, 4:] = 1e8, 1e-3
    tokens = q, k, v, beta, -decay, np.zeros((1, 64), np.int32)
    assert_close(delta.attend(*tokens), delta.attend_by_token(*tokens), 1e-5)


def test_orthonormal_keys_are_summed(normal):
    basis = np.linalg.qr(normal(3, 16, 16))[0].transpose(1, 0, 2)[None].astype(np.float32)
    q, v, seg = normal(1, 16, 3, 16), normal(1, 16, 3, 4), np.zeros((1, 16), np.int32)
    one = np.ones((1, 16, 3), np.float32)
    got, _ = delta.attend(q, basis, v, one, 0 * one, seg, chunk=4)
    wanted, _ = undecayed.attend(q, basis, v, seg, chunk=4)
    assert_close(got, wanted / np.linalg.norm(q, axis=-1, keepdims=True), 1e-5)


def test_the_last_pair_is_recalled_exactly(normal):
    k, v, one = normal(2, 50, 2, 8), normal(2, 50, 2, 5), np.ones((2, 50, 2), np.float32)
    out, _ = delta.attend(k, k, v, one, 0 * one, np.zeros((2, 50), np.int32), chunk=16)
    assert_close(out, v, 1e-5)


def test_acquisition_leaves_a_share_of_the_error():
    for times in (1, 3, 9):
        memory = remembered(*[(E1, V)] * times, beta=0.3)
        assert_close(E1 @ memory, (1 - 0.7**times) * V, 1e-6)


def test_extinction_removes_one_association():
    memory = remembered((E1, V), (E2, 2 * V), (E1, NONE))
    assert_close(np.stack([E1, E2]) @ memory, np.stack([NONE, 2 * V]), 1e-6)


def test_blocking_and_overshadowing():
    """In compound with a stimulus that already predicts the outcome, a second one learns nothing;
    without that the two share. The compound has length √2, for which its value stands."""
    compound = (E1 + E2, V / np.sqrt(2, dtype=np.float32))
    assert_close(E2 @ remembered((E1, V), compound), NONE, 1e-6)
    assert_close(np.stack([E1, E2]) @ remembered(compound), np.stack([V, V]) / 2, 1e-6)


def test_nothing_written_and_nothing_forgotten_keeps_the_state(normal):
    before = undecayed.State(normal(1, 1, 8, 4), np.zeros(1, np.int32))
    pairs = [(E1 + E2, V), (E3, -V)]
    np.testing.assert_array_equal(remembered(*pairs, beta=0.0, state=before).memory, before.memory)
    halved = remembered(*pairs, beta=0.0, decay=np.log(0.5), state=before)
    assert_close(halved.memory, before.memory / 4, 1e-6)


def test_repeated_presentation_is_least_squares(normal):
    k, v = normal(4, 8), normal(4, 4)
    memory = remembered(*list(zip(k, v)) * 60)
    wanted = np.linalg.pinv(k / np.linalg.norm(k, axis=-1, keepdims=True)) @ v
    assert_close(memory, wanted, 1e-4)


@pytest.mark.parametrize(
    ("pairs", "known"), [(8, 0.12), (16, 0.31), (32, 0.61), (64, 1.04), (128, 1.49)]
)
def test_one_pass_over_random_pairs_leaves_the_known_error(normal, pairs, known):
    """Mean squared error of recall over that of no recall, for D = E = 32. A sum has (n − 1) / D,
    which is more, and from n = D on more than to recall nothing."""
    k, v = normal(64, pairs, 32), normal(64, pairs, 32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    corrected, summed = (
        np.mean((recalled(k, v, rule) - v) ** 2) / np.mean(v**2) for rule in ("delta", "hebb")
    )
    assert abs(corrected - known) < 0.03 + 0.02 * known
    assert abs(summed / ((pairs - 1) / 32) - 1) < 0.05


@pytest.mark.parametrize("kind", [Delta, GatedDelta])
def test_gates_stay_in_their_range(normal, kind):
    mechanism = kind(rate=2.0)
    params = mechanism.init(jax.random.key(0), DIMS)
    for size in (1.0, 1e3):
        beta, decay = mechanism._gates(params, size * normal(2, 30, DIMS.width))
        assert np.all((beta >= 0) & (beta <= 2))
        assert np.all(decay <= 0)


@pytest.mark.parametrize("kind", [Delta, GatedDelta])
@pytest.mark.parametrize("fields", [{"rate": 0.0}, {"rate": 2.5}, {"chunk": 0}])
def test_fields_out_of_range_are_refused(kind, fields):
    with pytest.raises(UserError, match=r"^(gated_)?delta: rate="):
        kind(**fields)
