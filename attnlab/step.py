"""One optimizer step as a pure function of (state, batch): everything random is folded from
(seed, step), so that a resumed run draws what an uninterrupted one would have drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from attnlab.core import Array
from attnlab.leaves import all_finite
from attnlab.model import Extras, Transformer
from attnlab.statistics import advance, merge, split


class State(NamedTuple):
    """All that a checkpoint holds. ``step`` int32 counts batches seen; ``optimizer`` knows the
    learned parameters only; ``average`` is the exponential moving average of the parameters, with
    the statistics as they are, or () when it is off."""

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
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(split(params)[0]), average)


class Losses(NamedTuple):
    """``nll`` f32 [B N]: negative log-likelihood of every target in nats, 0 in empty slots;
    ``balance``: the sum of the mechanisms' own loss terms; ``extras`` as the model gives them."""

    nll: Array
    balance: Array
    extras: Extras


def token_losses(
    model: Transformer, params: Any, batch: dict[str, Array], memory: Any = None, **options: Any
) -> Losses:
    """What a batch loses under ``params``, continuing ``memory``; ``options`` of the model."""
    out: Any = model.apply(
        {"params": params}, batch["tokens"], batch["pos"], batch["seg"], memory, **options
    )
    logits, extras = out
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
    balance = sum((aux["loss"] for aux in extras.aux if aux and "loss" in aux), jnp.zeros(()))
    return Losses(jnp.where(batch["seg"] >= 0, nll, 0.0), balance, extras)


def make_step(
    model: Transformer, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable[[State, dict[str, Array]], tuple[State, dict[str, Array]]]:
    """The function (state, batch) -> (state, metrics).

    The loss is the mean over the tokens of the whole batch, also when ``accumulate`` computes it in
    parts. Statistics (see `attnlab.statistics`) pass from part to part, each going on from what the
    one before it measured, as they would in as many steps. A step whose loss, gradient or
    statistics are not finite changes nothing but the step count. Metrics: ``loss`` (nats per
    token), ``grad_norm``, ``finite``.
    """
    parts, decay = config.optimizer.accumulate, config.optimizer.ema

    def loss(learned, measured, batch, key, tokens):
        dropout, attention = jax.random.split(key)
        rngs = {"dropout": dropout, "attention": attention}
        params = merge(learned, measured)
        nll, balance, extras = token_losses(model, params, batch, train=True, rngs=rngs)
        nll = jnp.sum(nll) / tokens
        return nll + balance / parts, (nll, advance(measured, extras.aux))

    def gradient(params, batch, key):
        """Loss, gradient of the learned parameters, next value of the measured ones."""
        learned, measured = split(params)
        tokens = jnp.maximum(jnp.sum(batch["seg"] >= 0), 1)
        slope = jax.value_and_grad(loss, has_aux=True)
        if parts == 1:
            (_, (nll, measured)), grads = slope(learned, measured, batch, key, tokens)
            return nll, grads, measured

        def part(carry, i_and_rows):
            (*total, measured), (i, rows) = carry, i_and_rows
            key_i = jax.random.fold_in(key, i)
            (_, (nll, measured)), grads = slope(learned, measured, rows, key_i, tokens)
            return (*jax.tree.map(jnp.add, total, [nll, grads]), measured), None

        # Every part takes rows from all devices: row r of the batch belongs to part r mod parts.
        rows = jax.tree.map(lambda z: z.reshape(-1, parts, *z.shape[1:]).swapaxes(0, 1), batch)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, learned), measured)
        return jax.lax.scan(part, zero, (jnp.arange(parts), rows))[0]

    def update(state: State, grads: Any, measured: Any) -> State:
        learned, _ = split(state.params)
        updates, opt = optimizer.update(grads, state.optimizer, learned)
        learned: Any = optax.apply_updates(learned, updates)
        average = state.average
        if decay:
            rate = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            older = split(average)[0]
            older = jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, older, learned)
            average = merge(older, measured)
        return State(state.step, merge(learned, measured), opt, average)

    def step(state: State, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        nll, grads, measured = gradient(state.params, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(nll) & jnp.isfinite(norm) & all_finite(measured)
        state = jax.lax.cond(finite, update, lambda old, *_: old, state, grads, measured)
        metrics = {"loss": nll, "grad_norm": norm, "finite": finite}
        return state._replace(step=state.step + 1), metrics

    return step
