"""One optimizer step as a pure function of (state, batch): everything random is folded from
(seed, step), so that a resumed run draws what an uninterrupted one would have drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from attnlab.core import Array
from attnlab.model import Transformer


class State(NamedTuple):
    """All that a checkpoint holds. ``step`` int32 counts batches seen; ``average`` is the
    exponential moving average of the parameters, or () when it is off."""

    step: Array
    params: Any
    optimizer: Any
    average: Any

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluation and sampling use."""
        return self.average if self.average != () else self.params


def init_params(model: Transformer, seed: int) -> Any:
    """Fresh parameters. A function of the seed and the sizes alone."""
    row = jnp.zeros((1, 2), jnp.int32)
    return model.init(jax.random.key(seed), row, row, row)["params"]


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, config: ConfigDict
) -> State:
    """The state before the first step."""
    params = init_params(model, config.seed)
    average = jax.tree.map(jnp.copy, params) if config.optimizer.ema else ()
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def token_losses(model: Transformer, params: Any, batch: dict[str, Array], **options):
    """Negative log-likelihood of every target in nats, f32 [B N], 0 in empty slots; and the sum of
    the mechanisms' own loss terms."""
    out: Any = model.apply(
        {"params": params}, batch["tokens"], batch["pos"], batch["seg"], **options
    )
    logits, extras = out
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
    balance = sum((aux["loss"] for aux in extras.aux if aux and "loss" in aux), jnp.zeros(()))
    return jnp.where(batch["seg"] >= 0, nll, 0.0), balance


def make_step(
    model: Transformer, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable[[State, dict[str, Array]], tuple[State, dict[str, Array]]]:
    """The function (state, batch) -> (state, metrics).

    The loss is the mean over the tokens of the whole batch, also when ``accumulate`` computes it in
    parts. A step whose loss or gradient is not finite changes nothing but the step count. Metrics:
    ``loss`` (nats per token), ``grad_norm``, ``finite``.
    """
    parts, decay = config.optimizer.accumulate, config.optimizer.ema

    def loss(params, batch, key, tokens):
        dropout, attention = jax.random.split(key)
        rngs = {"dropout": dropout, "attention": attention}
        nll, balance = token_losses(model, params, batch, train=True, rngs=rngs)
        nll = jnp.sum(nll) / tokens
        return nll + balance / parts, nll

    def gradient(params, batch, key):
        tokens = jnp.maximum(jnp.sum(batch["seg"] >= 0), 1)
        slope = jax.value_and_grad(loss, has_aux=True)
        if parts == 1:
            (_, nll), grads = slope(params, batch, key, tokens)
            return nll, grads

        def part(total, i_and_rows):
            i, rows = i_and_rows
            (_, nll), grads = slope(params, rows, jax.random.fold_in(key, i), tokens)
            return jax.tree.map(jnp.add, total, (nll, grads)), None

        # Every part takes rows from all devices: row r of the batch belongs to part r mod parts.
        rows = jax.tree.map(lambda z: z.reshape(-1, parts, *z.shape[1:]).swapaxes(0, 1), batch)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(part, zero, (jnp.arange(parts), rows))[0]

    def update(state: State, grads: Any) -> State:
        updates, opt = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        average = state.average
        if decay:
            rate = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, average, params)
        return State(state.step, params, opt, average)

    def step(state: State, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        nll, grads = gradient(state.params, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(nll) & jnp.isfinite(norm)
        state = jax.lax.cond(finite, update, lambda state, _: state, state, grads)
        metrics = {"loss": nll, "grad_norm": norm, "finite": finite}
        return state._replace(step=state.step + 1), metrics

    return step
