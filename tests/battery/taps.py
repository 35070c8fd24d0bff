"""What an analysis may read and rewrite inside a mechanism."""

import jax
import jax.numpy as jnp
import numpy as np

from battery.calls import assert_close, attend, outputs
from battery.cases import DIMS, Case, Inputs, draw, key_of

ABLATED = 1


def check_head_ablation(case: Case) -> None:
    """A tap on "heads" that silences one head leaves the others alone."""

    def silence(z: jax.Array) -> jax.Array:
        return z.at[:, :, ABLATED].set(0)

    inputs = draw(case)
    whole = np.array(tapped(case, inputs, "fast", ("heads", lambda z: z)))
    assert np.any(whole[:, :, ABLATED])
    whole[:, :, ABLATED] = 0
    silenced = tapped(case, inputs, "fast", ("heads", silence))
    assert not np.any(silenced[:, :, ABLATED])
    assert_close(silenced, whole, 1e-6)  # another program, which may round differently


def check_observation(case: Case) -> None:
    """A tap on "logits" or "probs" is called with f32 [B H N M] and what it returns is used, as
    the literal form uses it; a mechanism that has no such array refuses by name."""
    for place in ("logits", "probs"):
        refused = None
        try:
            _check_rewriting(case, place)
        except ValueError as error:
            refused = str(error)
        if refused is not None:
            assert key_of(case.mechanism) in refused
            assert place in refused


def _check_rewriting(case: Case, place: str) -> None:
    inputs, seen = draw(case), []

    def shrink(z: jax.Array) -> jax.Array:
        """Large entries by a half: a mere factor of probabilities is undone by a norm behind."""
        seen.append(z)
        return z * (0.5 + 0.5 / (1 + z * z))

    got = tapped(case, inputs, "fast", (place, shrink))
    assert seen, f"a tap on {place} was ignored"
    for z in seen:
        assert z.dtype == jnp.float32
        assert z.shape[:3] == (inputs.q.shape[0], DIMS.heads, inputs.q.shape[1])
    assert_close(got, tapped(case, inputs, "reference", (place, shrink)))
    assert np.any(np.abs(got - outputs(case, inputs)) > 1e-3), f"{place} rewritten in vain"


def tapped(case: Case, inputs: Inputs, form: str, *taps: tuple) -> jax.Array:
    """``out`` with functions in place; see `Rule.tap`."""
    call = jax.jit(lambda z: attend(case, z, form, taps).out)
    return call(inputs)
