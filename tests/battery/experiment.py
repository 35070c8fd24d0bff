"""Inside a Transformer and a config: it learns, shifts as it declares, and is named by its file."""

import jax
import numpy as np
import optax
import pytest

from attnlab.config import base, mechanisms_of, normaliser_of, position_of
from attnlab.core import Position, mechanisms, normalisers, positions
from attnlab.errors import UserError
from attnlab.overrides import override
from battery.calls import assert_close
from battery.cases import Case, key_of
from battery.network import forward, network_of, parameters_of, tokens_of

SHIFTED = 1e-3
"""What f32 phases of RoPE lose a thousand positions further on: 1000 x 2^-24, times a logit."""


def check_learning(case: Case) -> None:
    """Two AdamW steps of a tiny model lower the loss on the batch they were taken on, and every
    learned leaf takes part."""
    network = network_of(case)
    tokens, pos, seg = tokens_of()
    optimizer = optax.adamw(1e-2)

    def loss(params):
        draws = {"attention": jax.random.key(6)}
        logits, extras = network.apply(params, tokens, pos, seg, train=True, rngs=draws)
        target = np.roll(tokens, -1, 1)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()
        return entropy + sum((aux or {}).get("loss", 0.0) for aux in extras.aux)

    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, gradient

    step = jax.jit(step)
    params = parameters_of(network)
    state, losses = optimizer.init(params), []
    for _ in range(3):
        params, state, value, gradient = step(params, state)
        losses.append(float(value))
    assert losses[0] > losses[1] > losses[2], losses
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        measured = jax.tree_util.DictKey("statistics") in path
        assert np.any(leaf) != measured, f"{jax.tree_util.keystr(path)}: gradient {leaf}"


def check_shift(case: Case) -> None:
    """All positions of all documents shifted alike: no logit changes if position, mechanism and
    normaliser all declare themselves ``relative``, and some logit does if one does not, or if a
    position that rotates meets a mechanism that is not ``isotropic``."""
    network = network_of(case)
    params, (tokens, pos, seg) = parameters_of(network), tokens_of()
    before, _ = forward(network, params, tokens, pos, seg)
    rotates = type(case.position).rotate is not Position.rotate
    follows = case.position.relative and (case.mechanism.isotropic or not rotates)
    relative = follows and case.mechanism.relative and case.normaliser.relative
    # What counts by the logarithm of a position moves little until far away.
    shifts = (1, 3, 1000) if relative else (1, 3, 1000, 100_000)
    after = [forward(network, params, tokens, pos + shift, seg)[0] for shift in shifts]
    if relative:
        for logits in after:
            assert_close(logits, before, SHIFTED)
    else:
        moved = max(np.max(np.abs(logits - before)) for logits in after)
        assert moved > 2 * SHIFTED, "declared not to be relative, yet no shift changes it"


def check_config(case: Case) -> None:
    """``attention=NAME, position=NAME, normaliser=NAME`` resolve to the defaults of these classes;
    a field that they lack is refused with its name."""
    name, place, weighing = key_of(case.mechanism), case.place, case.weighing
    config = base(attention=name, position=place, normaliser=weighing)
    assert (config.attention.name, config.position.name) == (name, place)
    assert mechanisms_of(config) == (mechanisms.get(name)(),) * config.model.layers
    assert position_of(config) == positions.get(place)()
    assert normaliser_of(config) == normalisers.get(weighing)()
    for section in ("attention", "position", "normaliser"):
        with pytest.raises(UserError, match=f"{section}.no_such_field"):
            override(config, f"{section}.no_such_field", "1")
