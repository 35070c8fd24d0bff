"""Nothing of a later token reaches an earlier output: shown by perturbation, bit by bit.

Gradients prove less: they vanish through a sort, a comparison or a saturated gate that leaks.
"""

import numpy as np

from battery.calls import outputs
from battery.cases import LENGTH, Case, Inputs, draw
from battery.network import forward, network_of, parameters_of, tokens_of
from battery.refusal import causal_only

TIMES = (1, 6, 16, LENGTH - 1)
"""First perturbed token: inside and at the edge of any tile, chunk or bucket."""

HUGE = 1e15
"""Its square is still finite in f32; what leaks by 1e-15 of a sum becomes visible."""


@causal_only
def check_causality(case: Case) -> None:
    """q, k, v and x of all tokens >= t replaced by noise, small or huge: outputs < t are bitwise
    the same."""
    inputs, noise = draw(case), draw(case, seed=5)
    before = np.asarray(outputs(case, inputs))
    for size in (1.0, HUGE):
        for t in TIMES:
            after = np.asarray(outputs(case, replaced(inputs, noise, t, size)))
            same = before[:, :t] == after[:, :t]
            assert same.all(), (
                f"tokens from {t} on (noise x {size:g}) reach outputs at "
                f"{sorted(set(np.argwhere(~same)[:, 1]))}"
            )


def replaced(inputs: Inputs, noise: Inputs, t: int, size: float) -> Inputs:
    """``inputs`` with the features of tokens >= t taken from ``noise``."""

    def mix(name: str) -> np.ndarray:
        old, new = getattr(inputs, name), getattr(noise, name)
        late = np.arange(old.shape[1]).reshape(1, -1, *[1] * (old.ndim - 2)) >= t
        return np.where(late, new * np.float32(size), old)

    return inputs._replace(**{name: mix(name) for name in "qkvx"})


@causal_only
def check_model_causality(case: Case) -> None:
    """The same for the logits of a Transformer whose tokens >= t are replaced."""
    network = network_of(case)
    params = parameters_of(network)
    tokens, pos, seg = tokens_of()
    before = np.asarray(forward(network, params, tokens, pos, seg)[0])
    for t in TIMES:
        other = np.where(pos >= t, (tokens + 1) % network.vocab_size, tokens)
        after = np.asarray(forward(network, params, other, pos, seg)[0])
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert np.any(before[:, t:] != after[:, t:])
