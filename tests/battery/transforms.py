"""A pure function: jit knows it again, and vmap, scan, remat, grad, pmap and shards agree."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from battery.calls import assert_close, attend, cotangent_of, evaluate, outputs_and_gradients
from battery.cases import Case, Inputs, draw

ROWS = 4


def check_equal_values(case: Case) -> None:
    """Instances are frozen; equal values are equal, hash equal, and do not trace twice."""
    traces = 0

    def count(case, inputs):
        nonlocal traces
        traces += 1
        return attend(case, inputs).out

    jitted = jax.jit(count, static_argnums=0)
    for _ in range(3):
        parts = (case.mechanism, case.position, case.normaliser)
        mechanism, position, normaliser = (dataclasses.replace(z) for z in parts)
        twin = Case(mechanism, position, case.causal, normaliser)
        assert twin.mechanism is not case.mechanism
        assert twin == case
        assert hash(twin) == hash(case)
        jitted.trace(twin, draw(case))
    assert traces == 1
    for thing in (case.mechanism, case.position, case.normaliser):
        for field in dataclasses.fields(thing):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, field.name, getattr(thing, field.name))


def check_transforms(case: Case) -> None:
    """scan of vmap of grad of remat == the plain batched gradient."""
    inputs = draw(case, batch=ROWS)
    cotangent = cotangent_of(inputs)

    def single(row, c):
        row = _batch(inputs, row)
        return evaluate(case, row, c[None], own_loss=False, transform=jax.checkpoint)

    def composed(tokens, cotangent):
        pairs = jax.tree.map(lambda z: z.reshape(-1, 2, *z.shape[1:]), (tokens, cotangent))
        return jax.lax.scan(lambda _, xs: (None, jax.vmap(single)(*xs)), None, pairs)[1]

    compiled = jax.jit(composed)
    got = compiled(tuple(inputs[1:]), cotangent)
    rows = jax.tree.map(lambda z: z.reshape(ROWS, *z.shape[2:]), got)
    _assert_rows_agree(rows, outputs_and_gradients(case, inputs, own_loss=False))


def check_pmap(case: Case) -> None:
    """One row of the batch on each device == the whole batch on one."""
    inputs = draw(case, batch=ROWS)
    mapped = jax.pmap(lambda row, c: evaluate(case, _batch(inputs, row), c[None], own_loss=False))
    rows = mapped(tuple(inputs[1:]), cotangent_of(inputs))
    _assert_rows_agree(rows, outputs_and_gradients(case, inputs, own_loss=False))


def _assert_rows_agree(rows, wanted) -> None:
    """Batches of one, stacked: tokens are those of the batch, parameters' gradients add up.
    Loss terms do not: they are means over the batch."""
    out, (d_params, *d_tokens) = jax.tree.map(np.asarray, rows)
    wanted_out, (wanted_params, *wanted_tokens) = wanted
    assert_close([z[:, 0] for z in (out, *d_tokens)], [wanted_out, *wanted_tokens])
    assert_close(jax.tree.map(lambda z: z.sum(0), d_params), wanted_params)


def _batch(inputs: Inputs, row: tuple) -> Inputs:
    """The parameters of ``inputs`` with a batch of the one row."""
    return Inputs(inputs.params, *jax.tree.map(lambda z: z[None], row))


def check_sharding(case: Case) -> None:
    """A 4 x 2 mesh (batch x heads) == one device: outputs and every gradient."""
    inputs = draw(case, batch=ROWS)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(z, *axes):
        return jax.device_put(z, NamedSharding(mesh, PartitionSpec(*axes)))

    heads = {name: place(getattr(inputs, name), "data", None, "tensor") for name in "qkv"}
    rows = {name: place(getattr(inputs, name), "data") for name in ("x", "pos", "seg")}
    spread = inputs._replace(params=jax.tree.map(place, inputs.params), **heads, **rows)
    cotangent = place(cotangent_of(inputs), "data", None, "tensor")
    got = outputs_and_gradients(case, spread, cotangent=cotangent)
    wanted = outputs_and_gradients(case, inputs)
    assert_close(jax.tree.map(np.asarray, got), wanted)
