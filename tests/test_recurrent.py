"""Chunked sums over the past compute the recurrence, token by token, and all of its gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, assert_finite

from attnlab.core import Dims
from attnlab.engines import recurrent

B, N, H, G, D, E = 2, 29, 4, 2, 3, 5
DECAYS = {"none": (0, 0), "scalar": (1, 0), "key": (D, 0), "value": (0, E), "both": (D, E)}


def draw(decay="none", length=N, strength=1.0, seed=0) -> dict[str, Any]:
    normal = np.random.default_rng(seed).standard_normal
    q, k, v = (normal((B, length, h, d), np.float32) for h, d in ((H, D), (G, D), (G, E)))
    a, b = (
        -strength * normal((B, length, G, width), np.float32) ** 2 if width else None
        for width in DECAYS[decay]
    )
    memory = normal((B, G, D, E), np.float32)
    return dict(q=q, k=k, v=v, key_decay=a, value_decay=b, memory=memory)


def documents(length=N):
    """Row 0: two documents, an empty slot inside the first; row 1: empty at both ends."""
    seg = np.zeros((B, length), np.int32)
    seg[0, 11:], seg[0, 5] = 1, -1
    seg[1, :3], seg[1, -2:] = -1, -1
    return seg


def token_by_token(seg, q, k, v, key_decay=None, value_decay=None, memory=None):
    """The equations: one outer product after the other."""
    shape = (*seg.shape, G, 1)
    a = jnp.zeros(shape) if key_decay is None else key_decay
    b = jnp.zeros(shape) if value_decay is None else value_decay

    def step(carry, token):
        (memory, before), (q, k, v, a, b, seg) = carry, token
        full, fresh = (z[:, None, None, None] for z in (seg >= 0, seg != before))
        decayed = jnp.exp(a)[..., :, None] * memory * jnp.exp(b)[..., None, :]
        new = jnp.where(fresh, 0, decayed) + k[..., :, None] * v[..., None, :]
        memory = jnp.where(full, new, memory)
        read = jnp.einsum("bgrd,bgde->bgre", q.reshape(B, G, -1, D), memory)
        return (memory, jnp.where(seg >= 0, seg, before)), jnp.where(full, read, 0)

    start = jnp.zeros((B, G, D, E)) if memory is None else memory
    tokens = jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), (q, k, v, a, b, seg))
    (memory, _), outs = jax.lax.scan(step, (start, jnp.zeros(B, jnp.int32)), tokens)
    return jnp.swapaxes(outs, 0, 1).reshape((*q.shape[:3], E)), memory


def chunked(seg, memory=None, chunk=8, **inputs):
    state = () if memory is None else recurrent.State(memory, jnp.zeros(B, jnp.int32))
    out, state = recurrent.attend(seg=seg, state=state, chunk=chunk, **inputs)
    return out, state.memory


@partial(jax.jit, static_argnums=0)
def gradients(function, seg, inputs):
    """Outputs, final memory and the gradient of a fixed mixture of both."""
    normal = np.random.default_rng(9).standard_normal
    mix, mix_memory = normal((B, N, H, E), np.float32), normal((B, G, D, E), np.float32)

    def loss(inputs):
        out, memory = function(seg, **inputs)
        return jnp.sum(out * mix) + jnp.sum(jnp.asarray(mix_memory) * memory), (out, memory)

    return jax.grad(loss, has_aux=True)(inputs)


@pytest.mark.parametrize("decay", DECAYS)
def test_outputs_state_and_every_gradient_are_those_of_the_recurrence(decay):
    seg, inputs = documents(), draw(decay)

    got = gradients(chunked, seg, inputs)
    assert_finite(got)
    assert_close(got, gradients(token_by_token, seg, inputs))


@pytest.mark.parametrize("decay", ["scalar", "both"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.slow
def test_the_chunk_size_changes_nothing(decay, chunk):
    seg, inputs = documents(), draw(decay)
    got = jax.jit(partial(chunked, chunk=chunk))(seg, **inputs)
    assert_close(got, token_by_token(seg, **inputs))


@pytest.mark.parametrize("decay", ["none", "both"])
@pytest.mark.slow
def test_pieces_hand_on_the_state(decay):
    seg, inputs, outs = documents(), draw(decay), []
    wanted = token_by_token(seg, **inputs)[0]
    state = recurrent.State(inputs.pop("memory"), jnp.zeros(B, jnp.int32))
    step = jax.jit(partial(recurrent.attend, chunk=4))
    for a, b in ((0, 14), (14, 15), (15, N)):
        part = {name: None if z is None else z[:, a:b] for name, z in inputs.items()}
        out, state = step(seg=seg[:, a:b], state=state, **part)
        outs.append(out)
    assert_close(np.concatenate(outs, 1), wanted)


@pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4, 1e12])
@pytest.mark.parametrize("decay", ["scalar", "both"])
def test_no_decay_is_too_strong_or_too_weak(decay, strength):
    """After a token that forgets everything, later ones keep all their digits."""
    inputs, seg = draw(decay), np.zeros((B, N), np.int32)
    for name in ("key_decay", "value_decay"):
        if inputs[name] is not None:
            inputs[name][:, ::7] *= strength
    got = gradients(chunked, seg, inputs)
    assert_finite(got)
    assert_close(got, gradients(token_by_token, seg, inputs))


@pytest.mark.parametrize("decay", ["none", "scalar", "both"])
def test_later_tokens_change_no_bit_of_earlier_outputs(decay):
    seg, old, new = np.zeros((B, N), np.int32), draw(decay), draw(decay, seed=5)
    attend = jax.jit(partial(chunked, seg))
    before, _ = attend(**old)
    for t in (1, 6, 8, 21):
        late = np.arange(N)[None, :, None, None] >= t
        mixed = dict(old)
        for name in ("q", "k", "v", "key_decay", "value_decay"):
            if old[name] is not None:
                mixed[name] = np.where(late, new[name] * np.float32(1e15), old[name])
        np.testing.assert_array_equal(attend(**mixed)[0][:, :t], before[:, :t])


def test_both_ways_is_the_whole_document():
    seg, inputs = documents(), draw()
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    seen = (seg[:, :, None] == seg[:, None]) & (seg[:, None] >= 0)
    wide = [np.repeat(z, H // G, 2) for z in (k, v)]
    wanted = np.einsum("bnm,bnhd,bmhd,bmhe->bnhe", seen, q, *wide)
    both = jax.jit(partial(recurrent.attend_both_ways, chunk=8))
    assert_close(both(q, k, v, seg), wanted)


def test_the_backward_pass_keeps_boundaries_only():
    """What a longer sequence adds to the residuals is less than its states would be."""

    def residuals(length, width=16):
        token = jnp.zeros((1, length, 1, width))
        seg = jnp.zeros((1, length), jnp.int32)

        def pullback(*tokens):
            def call(*z):
                q, k, v, a, b = z
                return recurrent.attend(q, k, v, seg, key_decay=a, value_decay=b, chunk=16)

            return jax.vjp(call, *tokens)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, *[token] * 5))
        return sum(z.size for z in leaves)

    inputs, boundaries = 5 * 16, 16 * 16 / 16
    assert (residuals(256) - residuals(128)) / 128 < inputs + 2 * boundaries


@pytest.mark.parametrize(("along_axis", "pairs"), [(False, 64), (True, 28)])
def test_operations_are_counted_once(along_axis, pairs):
    """Four chunks of eight: whole tables or halves of halves, and for every token four reads of the
    memory and two writes."""
    wanted = 2 * (4 * 4 * pairs * (5 + 7) + 32 * (4 + 2) * 5 * 7)
    dims = Dims(1, heads=4, kv_heads=2, key_dim=5, value_dim=7)
    assert recurrent.count_flops(dims, 32, 8, along_axis=along_axis) == wanted
