"""Kernels of our own: interpreted they are the XLA form, and both devices' lowerings take them."""

import dataclasses
import json
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blockwise import both, tokens

from attnlab import engines
from attnlab.config import base, from_json, to_json
from attnlab.core import Keys, Pattern, Queries, Rule, normalisers, positions
from attnlab.engines import blockwise, kernels, segments
from attnlab.mechanisms.bigbird import Scattered
from attnlab.mechanisms.window import Near

CALLS = {"triton": ("cuda", "__gpu$xla.gpu.triton"), "mosaic": ("tpu", "tpu_custom_call")}
"""Module -> the platform that it is for, and what a kernel is called there."""

run = jax.jit(partial(both, blockwise.attend))


def asking(rule, module):
    return dataclasses.replace(rule, kernels=f"{module} interpreted")


def assert_same(queries, keys, rule, module, tolerance=2e-5):
    """Outputs, lse and all gradients are those of the XLA form; returns the former."""
    assert kernels.choose(asking(rule, module), queries, keys).module == module
    got, wanted = run(queries, keys, asking(rule, module)), run(queries, keys, rule)
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        a, b = (np.asarray(z[name], np.float32) for z in (got, wanted))
        np.testing.assert_allclose(a, b, atol=tolerance, err_msg=name)
    return got


RULES = {
    "causal, one token": (Rule(), dict(N=1, M=1)),
    "causal": (Rule(), dict(N=256, M=256)),
    "window and sinks, wide values": (Rule().restrict(Near(9, 2)), dict(N=37, M=256, E=20)),
    "both ways, capped": (Rule(causal=False, scale=1.5, soft_cap=2.0), dict(N=130, M=130)),
    "segments, a head each": (Rule().restrict(segments.Span(16, -16, 16)), dict(N=37, M=130, G=4)),
}
LONG = {
    "hashed blocks": (Rule().restrict(Scattered(8, 1, 1, 2, 0)), dict(N=130, M=130, G=1)),
}


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("name", [*RULES, pytest.param("hashed blocks", marks=pytest.mark.slow)])
def test_interpreted_kernels_are_the_xla_form(name, module):
    rule, sizes = {**RULES, **LONG}[name]
    assert_same(*tokens(**sizes), rule, module)


@pytest.mark.parametrize("module", CALLS)
def test_several_sets_of_keys_are_one_softmax(module):
    queries, keys = tokens(N=37, M=37)
    near, far = segments.Span(8, 0, 8), segments.Span(8, -16, 0)

    def attend(queries, keys, rule):
        return blockwise.attend_sets(queries, rule, 16, (keys, near), (keys, far))

    whole = jax.jit(partial(both, attend))
    rule = Rule()
    got, wanted = whole(queries, keys, asking(rule, module)), whole(queries, keys, rule)
    once = run(queries, keys, rule.restrict(segments.Span(8, -16, 8)))
    for name in wanted:
        np.testing.assert_allclose(wanted[name], once[name], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("module", CALLS)
def test_fewer_keys_than_queries_in_any_order_with_counts(module):
    queries, keys = tokens(N=140, M=140)
    mix = np.random.default_rng(1).permutation(140)[:50]
    keys = jax.tree.map(lambda z: z[:, mix], keys)
    count = np.random.default_rng(2).integers(1, 9, keys.pos.shape).astype(np.float32)
    assert_same(queries, keys._replace(count=count), Rule(), module)


@pytest.mark.parametrize("module", CALLS)
def test_empty_slots_and_rows_without_a_key_are_as_nothing(module):
    """Whatever they hold; the lse of nothing is `MASK` as in the XLA form, its gradients are 0."""
    queries, keys = tokens(N=40, M=70)
    empty = np.arange(70) % 3 == 0
    seg = np.where(empty, -1, keys.seg)
    k, v = (np.where(empty[:, None, None], np.nan, z) for z in (keys.k, keys.v))
    alone = np.where(np.arange(40) < 9, 7, queries.seg)
    alone[:, -2:] = -1
    got = assert_same(queries._replace(seg=alone), keys._replace(k=k, v=v, seg=seg), Rule(), module)
    np.testing.assert_array_equal(got["out"][:, :9], 0)
    np.testing.assert_array_equal(got["dq"][:, :9], 0)
    np.testing.assert_array_equal(got["dk"][:, empty], 0)


@pytest.mark.parametrize("module", CALLS)
def test_bfloat16_differs_by_its_rounding(module):
    queries, keys = tokens(N=130, M=130)
    half = partial(jnp.asarray, dtype=jnp.bfloat16)
    queries = queries._replace(q=half(queries.q))
    keys = keys._replace(k=half(keys.k), v=half(keys.v))
    got = assert_same(queries, keys, Rule(), module, 0.06)
    np.testing.assert_allclose(got["lse"], run(queries, keys, Rule())["lse"], atol=1e-4)


@pytest.mark.parametrize("module", CALLS)
def test_rotation_share_and_taps_stay_around_the_kernel(module):
    rule = Rule(
        position=positions.get("rope")(),
        normaliser=normalisers.get("softmax_plus_one")(),
        taps=(("heads", jnp.negative),),
    )
    assert_same(*tokens(), rule, module)


@pytest.mark.parametrize("module", CALLS)
def test_earlier_outputs_do_not_depend_on_later_tokens(module):
    """To the bit, tiles of which only some keys are seen included."""
    queries, keys = tokens(N=200, M=200, B=1)
    attend = jax.jit(lambda *z: blockwise.attend(*z, asking(Rule(), module)))
    noise = np.random.default_rng(5).standard_normal
    for cut in (1, 70, 130):
        k, v, q = (np.copy(z) for z in (keys.k, keys.v, queries.q))
        for z in (k, v, q):
            z[:, cut:] = noise(z[:, cut:].shape)
        got, _ = attend(queries._replace(q=q), keys._replace(k=k, v=v))
        np.testing.assert_array_equal(got[:, :cut], attend(queries, keys)[0][:, :cut])


@pytest.mark.parametrize("module", CALLS)
def test_vmap_and_remat_know_the_kernels(module):
    queries, keys = tokens(N=20, M=20)
    rule = asking(Rule(), module)
    one = jax.remat(lambda *z: blockwise.attend(*jax.tree.map(lambda a: a[None], z), rule)[0][0])
    got = jax.jit(jax.vmap(one))(queries, keys)
    np.testing.assert_allclose(got, run(queries, keys, Rule())["out"], atol=2e-5)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("module", CALLS)
def test_both_devices_lowerings_take_every_kernel(module, dtype, size):
    """No device is needed for that; what its compiler makes of them is another matter."""
    platform, call = CALLS[module]
    rule = Rule(kernels=module, soft_cap=5.0).restrict(Near(200, 4))
    shape = jax.ShapeDtypeStruct
    place = shape((2, 1024), jnp.int32)
    q, k = (shape((2, 1024, heads, size), dtype) for heads in (8, 2))
    lowered = (
        jax.jit(partial(both, blockwise.attend))
        .trace(Queries(q, place, place), Keys(k, k, place, place), rule)
        .lower(lowering_platforms=(platform,))
    )
    assert lowered.as_text().count(call) == 3  # forward, dq, dk with dv


@dataclasses.dataclass(frozen=True)
class Listed(Pattern):
    """Keys at listed distances: a look-up, which no kernel does."""

    def visible(self, q_pos, k_pos):
        return jnp.asarray(np.arange(300) % 3 == 0)[jnp.clip(q_pos - k_pos, 0, 299)]

    def reaches(self, q_low, q_high, k_low, k_high):
        return q_high >= k_low


OBSTACLES = {
    "position Alibi": (Rule(position=positions.get("alibi")()), (1, 8, 4, 16), jnp.float32),
    "the type is float16": (Rule(), (1, 8, 4, 16), jnp.float16),
    "are wider than": (Rule(), (1, 8, 4, 2048), jnp.float32),
    "pairs of tiles": (Rule(), (1, 2**23, 1, 64), jnp.bfloat16),
    "2^31 elements": (Rule(), (1, 2**24, 1, 128), jnp.bfloat16),
    "looks up an array": (Rule().restrict(Listed()), (1, 8, 4, 16), jnp.float32),
    "is empty": (Rule(), (1, 0, 4, 16), jnp.float32),
}


@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_a_kernel_cannot_serve_is_left_to_xla_with_the_reason(reason, module):
    rule, shape, dtype = OBSTACLES[reason]
    z = jax.ShapeDtypeStruct(shape, dtype)
    place = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    queries, keys = Queries(z, place, place), Keys(z, z, place, place)
    form = kernels.choose(dataclasses.replace(rule, kernels=module), queries, keys)
    assert not form.module
    assert reason in str(form)


def test_pallas_on_a_cpu_is_xla_and_says_so_once(caplog):
    engines.report_use.cache_clear()
    queries, keys = tokens()
    with caplog.at_level(logging.INFO, logger="attnlab.engines"):
        for _ in range(2):
            out, _ = blockwise.attend(queries, keys, Rule(kernels="pallas"))
    engines.report_use.cache_clear()
    assert caplog.messages == [
        "attention engine: blockwise (XLA, not Pallas: the device is a cpu, cpu)"
    ]
    np.testing.assert_array_equal(out, blockwise.attend(queries, keys, Rule())[0])


@pytest.mark.parametrize(("device", "module"), [("gpu", "triton"), ("tpu", "mosaic")])
def test_pallas_is_the_module_of_the_device_if_it_is_alone(monkeypatch, device, module):
    queries, keys = tokens()
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    form = kernels.choose(Rule(kernels="pallas"), queries, keys)
    assert "devices share" in form.obstacle
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    form = kernels.choose(Rule(kernels="pallas"), queries, keys)
    assert (form.module, form.interpret) == (module, False)
    few = jax.tree.map(lambda z: z[:, -1:], queries)
    assert "fewer than" in kernels.choose(Rule(kernels="pallas"), few, keys).obstacle


def test_another_choice_is_another_program():
    """The choice is part of what jit compares, so nothing compiled for another is used."""
    queries, keys = tokens()
    attend = jax.jit(blockwise.attend)
    text = {
        kind: attend.trace(queries, keys, Rule(kernels=kind)).jaxpr.pretty_print()
        for kind in ("mosaic interpreted", "xla", "triton interpreted")
    }
    assert ["pallas_call" in text[kind] for kind in text] == [True, False, True]


def test_a_precision_that_a_compiler_lacks_is_left_to_xla():
    with jax.default_matmul_precision("high"):
        forms = [kernels.choose(asking(Rule(), module), *tokens()) for module in CALLS]
    assert [form.module for form in forms] == ["triton", ""]
    assert forms[1].obstacle == "the precision of products is high"


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        blockwise.attend(*tokens(), Rule(kernels="cuda"))


def test_a_config_of_before_means_xla():
    old = json.loads(to_json(base()))
    del old["model"]["kernels"]
    assert from_json(json.dumps(old)).model.kernels == "xla"
