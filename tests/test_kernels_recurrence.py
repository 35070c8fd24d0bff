"""Kernels for recurrences that decay: interpreted they are the XLA form; both devices take them."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.calls import assert_close, assert_finite
from test_kernels import CALLS
from test_recurrent import B, D, E, G, documents, draw, token_by_token

from attnlab.core import Dims, Keys, Queries, Rule, mechanisms
from attnlab.engines import kernels, recurrent

SLOW = pytest.mark.slow
FADING = ["scalar", "both", *(pytest.param(name, marks=SLOW) for name in ("key", "value"))]


@partial(jax.jit, static_argnums=(0, 1))
def run(kind, mean, seg, inputs):
    """Outputs, final memory and the gradient of a fixed mixture of both; ``inputs`` as drawn, and
    the state's ``memory``, which is of document 0."""

    def loss(inputs):
        tokens, memory = dict(inputs), inputs["memory"]
        del tokens["memory"]
        if kind == "literally":
            out, after = token_by_token(seg, **tokens, memory=memory)
        else:
            state = recurrent.State(memory, jnp.zeros(len(seg), jnp.int32))
            out, state = recurrent.attend(
                seg=seg, state=state, **tokens, chunk=8, mean=mean, kernels=kind
            )
            after = state.memory
        mix = (
            jnp.sin(jnp.arange(z.size, dtype=jnp.float32)).reshape(z.shape) for z in (out, after)
        )
        return sum(jnp.sum(z * m) for z, m in zip((out, after), mix)), (out, after)

    return jax.grad(loss, has_aux=True)(inputs)


def compare(module, seg, inputs, wanted="xla", mean=False):
    """Outputs, state and all gradients are those of the XLA form; returns the former."""
    kind = f"{module} interpreted"
    assert "pallas_call" in run.trace(kind, mean, seg, inputs).jaxpr.pretty_print()
    got = run(kind, mean, seg, inputs)
    assert_finite(got)
    assert_close(got, run(wanted, mean, seg, inputs))
    return got


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("decay", FADING)
def test_interpreted_kernels_are_the_xla_form(decay, module):
    """With two documents, empty slots, an initial state, two query heads a kv head, and gradients
    into the initial state and from the final one."""
    compare(module, documents(), draw(decay))


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("length", [1, pytest.param(31, marks=SLOW), 149])
def test_ragged_lengths_of_several_chunks(length, module):
    seg = np.zeros((B, length), np.int32)
    seg[0, length // 2 :], seg[1, length - length // 5 :] = 3, -1
    inputs = draw("both", length, strength=0.2)
    compare(module, seg, inputs, wanted="literally")


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("decay", ["scalar", "both"])
def test_decays_of_nothing_and_of_everything(decay, module):
    """Weights of exactly 1 and exactly 0, and 1e12 times too strong, token by token."""
    inputs, seg = draw(decay), np.zeros((B, 29), np.int32)
    for name in ("key_decay", "value_decay"):
        if inputs[name] is not None:
            inputs[name][:, ::3] = 0
            inputs[name][:, 4::7] *= 1e12
            inputs[name][:, 5::11] = -1e30
    compare(module, seg, inputs, wanted="literally")


@pytest.mark.parametrize("module", CALLS)
def test_a_state_of_another_document_is_forgotten(module):
    """And one of the same is not, even where no token follows."""
    inputs, seg = draw("key"), documents()
    seg[0], seg[1] = np.where(seg[0] >= 0, seg[0] + 5, -1), -1
    got, (out, after) = compare(module, seg, inputs)
    np.testing.assert_array_equal(got["memory"][0], 0)
    np.testing.assert_array_equal(after[1], inputs["memory"][1])
    np.testing.assert_array_equal(out[1], 0)


@pytest.mark.parametrize("module", CALLS)
def test_pieces_hand_on_the_state(module):
    seg, inputs, outs = documents(), draw("both"), []
    step = partial(recurrent.attend, kernels=f"{module} interpreted")
    tokens = {name: z for name, z in inputs.items() if name != "memory"}
    wanted, last = step(seg=seg, **tokens)
    state = ()
    for a, b in ((0, 14), (14, 15), (15, 29)):
        part = {name: z[:, a:b] for name, z in tokens.items()}
        out, state = step(seg=seg[:, a:b], state=state, **part)
        outs.append(out)
    assert_close(np.concatenate(outs, 1), wanted)
    assert_close(state.memory, last.memory)
    np.testing.assert_array_equal(state.seg, last.seg)


@pytest.mark.parametrize("module", CALLS)
def test_means_and_bfloat16(module):
    """Sums are f32 whatever the tokens are, as in the XLA form; gradients are rounded alike."""
    inputs = {name: z if z is None else np.abs(z) for name, z in draw("key").items()}
    inputs["key_decay"] = -inputs["key_decay"]
    inputs["memory"] = np.abs(
        np.random.default_rng(1).standard_normal((B, G, D, E + 1), np.float32)
    )
    for name in ("q", "k", "v"):
        inputs[name] = jnp.asarray(inputs[name], jnp.bfloat16)
    gradient, values = run(f"{module} interpreted", True, documents(), inputs)
    wanted_gradient, wanted = run("xla", True, documents(), inputs)
    assert_close(values, wanted)
    for name, z in wanted_gradient.items():
        if z is not None:
            assert gradient[name].dtype == z.dtype
            a, b = np.asarray(gradient[name], np.float32), np.asarray(z, np.float32)
            np.testing.assert_allclose(a, b, rtol=0.02, atol=0.005, err_msg=name)


@pytest.mark.parametrize("module", CALLS)
def test_later_tokens_change_no_bit_of_earlier_outputs(module):
    seg, old, new = np.zeros((B, 29), np.int32), draw("both"), draw("both", seed=5)
    attend = jax.jit(partial(recurrent.attend, seg=seg, kernels=f"{module} interpreted"))
    del old["memory"]
    before, _ = attend(**old)
    for t in (1, 6, 8, 21):
        late = np.arange(29)[None, :, None, None] >= t
        mixed = {name: np.where(late, new[name] * np.float32(1e15), old[name]) for name in old}
        np.testing.assert_array_equal(attend(**mixed)[0][:, :t], before[:, :t])


def test_the_backward_pass_keeps_boundaries_only():
    """What a longer sequence adds to the residuals is less than its states would be."""

    def residuals(length, width=16):
        token, seg = jnp.zeros((1, length, 1, width)), jnp.zeros((1, length), jnp.int32)

        def pullback(*tokens):
            def call(*z):
                q, k, v, a, b = z
                kind = "triton interpreted"
                return recurrent.attend(q, k, v, seg, key_decay=a, value_decay=b, kernels=kind)

            return jax.vjp(call, *tokens)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, *[token] * 5))
        return sum(z.size for z in leaves if z.dtype == jnp.float32)

    named_twice, boundaries = 2 * 5 * 16, 16 * 16 / 32
    assert (residuals(256) - residuals(128)) / 128 < named_twice + 4 * boundaries < 16 * 16


USERS = [
    path.stem
    for path in sorted(Path(recurrent.__file__).parents[1].glob("mechanisms/*.py"))
    if "recurrent.attend(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", USERS)
def test_every_mechanism_hands_on_what_is_asked_for(name):
    """Whoever calls the engine names the kernels of its rule."""
    mechanism, dims = mechanisms.get(name).examples()[0], Dims(12, 4, 2, 8, 6)
    normal = np.random.default_rng(0).standard_normal
    place = np.tile(np.arange(19, dtype=np.int32), (2, 1))
    params = mechanism.init(jax.random.key(0), dims)
    queries = Queries(normal((2, 19, 4, 8), np.float32), place, place * 0)
    keys = Keys(*(normal((2, 19, 2, z), np.float32) for z in (8, 6)), place, place * 0)

    @jax.jit
    def call(rule):
        return mechanism(params, queries, keys, rule, x=np.ones((2, 19, 12), np.float32)).out

    asked = Rule(kernels="triton interpreted")
    text = call.trace(asked).jaxpr.pretty_print()
    assert "pallas_call" in text
    assert_close(call(asked), call(Rule()))


def test_the_mechanisms_of_the_engine_are_found():
    assert set(USERS) >= {"favor", "gated_slots", "low_rank", "slots"}


def shapes(length=1024, key=64, value=64, dtype=jnp.bfloat16, decay=jnp.float32):
    token = [(8, key), (2, key), (2, value)]
    token = [jax.ShapeDtypeStruct((2, length, *z), dtype) for z in token]
    return *token, *(jax.ShapeDtypeStruct((2, length, 2, z), decay) for z in (key, value))


@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 64)])
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("module", CALLS)
def test_both_devices_lowerings_take_every_kernel(module, scalar, key, value):
    platform, call = CALLS[module]
    q, k, v, a, b = shapes(256, key, value)
    a = jax.ShapeDtypeStruct((2, 256, 2, 1), jnp.float32) if scalar else a

    def gradient(q, k, v, a, b):
        def total(*z):
            q, k, v, a, b = z
            seg = jnp.zeros((2, 256), jnp.int32)
            out, _ = recurrent.attend(q, k, v, seg, key_decay=a, value_decay=b, kernels=module)
            return jnp.sum(jnp.sin(out))

        return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, a, b)

    lowered = jax.jit(gradient).trace(q, k, v, a, b).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(call) == 2  # forward and backward


OBSTACLES = {
    "the type is float16": {"dtype": jnp.float16},
    "is empty": {"length": 0},
    "a state of 1024 by 1024 is more than": {"key": 1024, "value": 1024},
    "2^31 elements": {"length": 2**23},
}


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_a_kernel_cannot_serve_is_left_to_xla_with_the_reason(reason, module):
    form = kernels.choose_chunks(module, False, *shapes(**OBSTACLES[reason]))
    assert not form.module
    assert reason in str(form)


@pytest.mark.parametrize(("device", "module"), [("gpu", "triton"), ("tpu", "mosaic")])
def test_pallas_is_the_module_of_the_device(monkeypatch, device, module):
    assert "is a cpu" in kernels.choose_chunks("pallas", False, *shapes()).obstacle
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    assert "devices share" in kernels.choose_chunks("pallas", False, *shapes()).obstacle
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernels.choose_chunks("pallas", False, *shapes()).module == module
    assert "fewer than" in kernels.choose_chunks("pallas", False, *shapes(1)).obstacle
