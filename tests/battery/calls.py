"""A case called in its fast or its literal form, compiled once for all checks that share shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import Result
from battery.cases import Case, Inputs

AS_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **({"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}),
}
"""Compiler options undone that `conftest` sets for all tests."""

EXACT = 2e-5
"""Largest difference of two f32 computations of the same thing, relative to the largest entry: a
hundred roundings."""

DRAWING = 7
"""Seed for mechanisms that draw."""


def attend(case: Case, inputs: Inputs, form: str = "fast", taps: tuple = ()) -> Result:
    """One call without a past; ``form`` is "fast" or "reference"."""
    params, place = inputs.params
    function = case.mechanism if form == "fast" else case.mechanism.reference
    rule = case.rule(place, taps=taps)
    key = jax.random.key(DRAWING)
    return function(params, inputs.queries(), inputs.keys(), rule, x=inputs.x, key=key)


def evaluate(
    case: Case,
    inputs: Inputs,
    cotangent: jax.Array,
    form: str = "fast",
    own_loss: bool = True,
    transform=lambda f: f,
):
    """``out`` and the gradient of <out, cotangent> plus, with ``own_loss``, the mechanism's loss
    terms, with respect to parameters, q, k, v and x. ``transform`` is applied to the call."""

    call = transform(lambda learned: attend(case, Inputs(*learned, *inputs[5:]), form))

    def loss(learned):
        result = call(learned)
        added = (result.aux or {}).get("loss", 0.0) if own_loss else 0.0
        return jnp.sum(result.out.astype(jnp.float32) * cotangent) + added, result.out

    gradient, out = jax.grad(loss, has_aux=True)(tuple(inputs[:5]))
    return out, gradient


@partial(jax.jit, static_argnums=(0, 2), compiler_options=AS_USERS)
def outputs(case: Case, inputs: Inputs, form: str = "fast") -> jax.Array:
    """``out``, compiled as users compile it."""
    return attend(case, inputs, form).out


@partial(jax.jit, static_argnums=(0, 2))
def quick_outputs(case: Case, inputs: Inputs, form: str = "fast") -> jax.Array:
    """``out``, for checks that visit many shapes."""
    return attend(case, inputs, form).out


_evaluate = jax.jit(evaluate, static_argnums=(0, 3, 4))


def outputs_and_gradients(
    case: Case,
    inputs: Inputs,
    form: str = "fast",
    cotangent: jax.Array | None = None,
    own_loss: bool = True,
):
    """`evaluate`, for a fixed random cotangent unless one is given."""
    cotangent = cotangent_of(inputs) if cotangent is None else cotangent
    return _evaluate(case, inputs, cotangent, form, own_loss)


def cotangent_of(inputs: Inputs) -> np.ndarray:
    """Random f32, in the shape of the output."""
    shape = (*inputs.q.shape[:3], inputs.v.shape[-1])
    return np.random.default_rng(3).standard_normal(shape, np.float32)


def assert_close(got, wanted, tolerance: float = EXACT, what: str = "") -> None:
    """Every leaf within ``tolerance`` of the largest magnitude of the wanted leaf (at least 1)."""
    got_leaves = jax.tree_util.tree_leaves_with_path(got)
    wanted_leaves = jax.tree.leaves(wanted)
    assert len(got_leaves) == len(wanted_leaves)
    for (path, a), b in zip(got_leaves, wanted_leaves):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = max(1.0, np.max(np.abs(b), initial=0.0))
        where = f"{what}{jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size, err_msg=where)


def assert_finite(tree, what: str = "") -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.all(np.isfinite(leaf)), f"{what}{jax.tree_util.keystr(path)} is not finite"
