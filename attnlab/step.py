"""One optimizer step as a pure function of (state, batch): everything random is folded from
(seed, step), so that a resumed run draws what an uninterrupted one would have drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from attnlab.carry import hand_on, nothing_read, resume
from attnlab.core import Array
from attnlab.cross_entropy import cross_entropy
from attnlab.leaves import all_finite
from attnlab.model import Classifier, Extras, Regressor, Transformer
from attnlab.pointer import PointerNetwork, Trainable
from attnlab.statistics import advance, merge, split


class State(NamedTuple):
    """All that a checkpoint holds. ``step`` int32 counts batches seen; ``optimizer`` knows the
    learned parameters only; ``average`` is the exponential moving average of the parameters, with
    the statistics as they are, or () when it is off; ``memory`` what the next batch goes on from,
    see `attnlab.carry`."""

    step: Array
    params: Any
    optimizer: Any
    average: Any
    memory: Any

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluation and sampling use."""
        return self.average if self.average != () else self.params


def init_params(model: Trainable, seed: int) -> Any:
    """Fresh parameters. A function of the seed and the sizes alone."""
    batch = blank(model, 1, 2)
    inputs = (batch[name] for name in ("tokens", "pos", "seg"))
    return model.init(jax.random.key(seed), *inputs)["params"]


def blank(model: Trainable, rows: int, length: int) -> dict[str, Array]:
    """A batch of zeros, of the shapes that a model is trained on."""
    zeros = jnp.zeros((rows, length), jnp.int32)
    batch = {name: zeros for name in ("tokens", "targets", "pos", "seg")}
    if isinstance(model, Classifier):
        batch["targets"] = zeros[:, 0]
    if isinstance(model, Regressor):
        batch["tokens"] = jnp.zeros((rows, length, model.features))
        batch["targets"] = jnp.zeros((rows, length))
    if isinstance(model, PointerNetwork):
        batch["tokens"] = jnp.zeros((rows, length, 2))
        batch["targets"] = jnp.zeros((rows, model.outputs.steps(length)), jnp.int32)
    return batch


def init_state(
    model: Trainable, optimizer: optax.GradientTransformation, config: ConfigDict
) -> State:
    """The state before the first step."""
    params = init_params(model, config.seed)
    average = jax.tree.map(jnp.copy, params) if config.optimizer.ema else ()
    memory = nothing_read(model, config.task.batch)
    optimizer_state = optimizer.init(split(params)[0])
    return State(jnp.zeros((), jnp.int32), params, optimizer_state, average, memory)


class Losses(NamedTuple):
    """``nll`` f32, of the shape of the targets: negative log-likelihood of each in nats, or the
    squared error of a real one, 0 where is none; ``balance``: the sum of the mechanisms' own loss
    terms; ``extras`` as the model gives them."""

    nll: Array
    balance: Array
    extras: Extras


def losses_of(
    model: Trainable,
    params: Any,
    batch: dict[str, Array],
    *args: Any,
    **options: Any,
) -> Losses:
    """Those of the function that belongs to the model."""
    of_kind = {Classifier: class_losses, PointerNetwork: pointer_losses, Regressor: value_losses}
    found = (losses for kind, losses in of_kind.items() if isinstance(model, kind))
    losses: Any = next(found, token_losses)
    return losses(model, params, batch, *args, **options)


def class_losses(
    model: Classifier, params: Any, batch: dict[str, Array], memory: Any = None, **options: Any
) -> Losses:
    """As `token_losses`, of one target a row, [B]; nothing is continued."""
    tokens = (batch[name] for name in ("tokens", "pos", "seg"))
    out: Any = model.apply({"params": params}, *tokens, **options)
    logits, extras = out
    labels = jnp.maximum(batch["targets"], 0)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Losses(jnp.where(predicted(batch), nll, 0.0), _balance(extras), extras)


def pointer_losses(
    model: PointerNetwork, params: Any, batch: dict[str, Array], memory: Any = None, **options: Any
) -> Losses:
    """As `token_losses`, of the targets [B m] of points; nothing is continued."""
    inputs = (batch[name] for name in ("tokens", "pos", "seg", "targets"))
    scores, extras = model.apply({"params": params}, *inputs, **options)
    chosen = jnp.maximum(batch["targets"], 0)[..., None]
    nll = -jnp.take_along_axis(scores, chosen, -1)[..., 0]
    return Losses(jnp.where(predicted(batch), nll, 0.0), _balance(extras), extras)


def token_losses(
    model: Transformer, params: Any, batch: dict[str, Array], memory: Any = None, **options: Any
) -> Losses:
    """What a batch loses under ``params``, continuing ``memory``; ``options`` of the model."""
    tokens = (batch[name] for name in ("tokens", "pos", "seg"))
    out: Any = model.apply({"params": params}, *tokens, memory, method=model.hidden, **options)
    x, extras = out
    nll = cross_entropy(x, model.table(params), jnp.maximum(batch["targets"], 0))
    return Losses(jnp.where(predicted(batch), nll, 0.0), _balance(extras), extras)


def value_losses(
    model: Regressor, params: Any, batch: dict[str, Array], memory: Any = None, **options: Any
) -> Losses:
    """As `token_losses`, of real targets, NaN where is none: squared errors [B N]."""
    tokens = (batch[name] for name in ("tokens", "pos", "seg"))
    out: Any = model.apply({"params": params}, *tokens, memory, **options)
    asked = predicted(batch)
    error = out[0] - jnp.where(asked, batch["targets"], 0.0)
    return Losses(jnp.where(asked, jnp.square(error), 0.0), _balance(out[1]), out[1])


def _balance(extras: Extras) -> Array:
    losses = (aux["loss"] for aux in extras.aux if aux and "loss" in aux)
    return sum(losses, jnp.zeros(()))


def predicted(batch: dict[str, Array]) -> Array:
    """Which targets there are: bool, as the targets; of tokens [B N] none in an empty slot."""
    targets, full = batch["targets"], batch["seg"] >= 0
    real = jnp.issubdtype(targets.dtype, jnp.floating)
    given = ~jnp.isnan(targets) if real else targets >= 0
    return given & full if given.shape == full.shape else given


class Kept(NamedTuple):
    """What a batch leaves behind besides its gradient: the parameters that it ``measured`` and the
    ``memory`` for the next one."""

    measured: Any
    memory: Any


def make_gradient(model: Trainable, parts: int) -> Callable[..., tuple[Array, Any, Kept]]:
    """The function (params, memory, batch, key) -> (loss, gradient of the learned parameters,
    `Kept`), computed in ``parts``. Every part takes rows from all devices: row r of the batch, and
    of the memory, belongs to part r mod parts."""

    def loss(learned, measured, memory, batch, key, tokens):
        dropout, attention = jax.random.split(key)
        rngs = {"dropout": dropout, "attention": attention}
        params, memory = merge(learned, measured), resume(model, memory, batch)
        nll, balance, extras = losses_of(model, params, batch, memory, train=True, rngs=rngs)
        kept = Kept(advance(measured, extras.aux), hand_on(model, extras.memory, batch))
        nll = jnp.sum(nll) / tokens
        return nll + balance / parts, (nll, kept)

    def gradient(params, memory, batch, key):
        learned, measured = split(params)
        tokens = jnp.maximum(jnp.sum(predicted(batch)), 1)
        slope = jax.value_and_grad(loss, has_aux=True)
        if parts == 1:
            (_, (nll, kept)), grads = slope(learned, measured, memory, batch, key, tokens)
            return nll, grads, kept

        def part(carry, i_and_rows):
            (total, measured), (i, memory, rows) = carry, i_and_rows
            key_i = jax.random.fold_in(key, i)
            (_, (nll, kept)), grads = slope(learned, measured, memory, rows, key_i, tokens)
            return (jax.tree.map(jnp.add, total, (nll, grads)), kept.measured), kept.memory

        memory, rows = jax.tree.map(
            lambda z: z.reshape(-1, parts, *z.shape[1:]).swapaxes(0, 1), (memory, batch)
        )
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, learned))
        total, memory = jax.lax.scan(part, (zero, measured), (jnp.arange(parts), memory, rows))
        memory = jax.tree.map(lambda z: z.swapaxes(0, 1).reshape(-1, *z.shape[2:]), memory)
        (nll, grads), measured = total
        return nll, grads, Kept(measured, memory)

    return gradient


def make_step(
    model: Trainable, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable[[State, dict[str, Array]], tuple[State, dict[str, Array]]]:
    """The function (state, batch) -> (state, metrics).

    The loss is the mean over the targets of the whole batch, also when ``accumulate`` computes it
    in parts. Statistics (see `attnlab.statistics`) pass from part to part, each going on from what
    the one before it measured, as they would in as many steps. A step whose loss, gradient,
    statistics or memory are not finite changes nothing but the step count. Metrics: ``loss`` (nats
    per target), ``grad_norm``, ``finite``.
    """
    gradient = make_gradient(model, config.optimizer.accumulate)
    decay = config.optimizer.ema

    def update(state: State, grads: Any, kept: Kept) -> State:
        learned, _ = split(state.params)
        updates, opt = optimizer.update(grads, state.optimizer, learned)
        learned: Any = optax.apply_updates(learned, updates)
        average = state.average
        if decay:
            rate = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            older = split(average)[0]
            older = jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, older, learned)
            average = merge(older, kept.measured)
        return State(state.step, merge(learned, kept.measured), opt, average, kept.memory)

    def step(state: State, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        nll, grads, kept = gradient(state.params, state.memory, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(nll) & jnp.isfinite(norm) & all_finite(kept)
        state = jax.lax.cond(finite, update, lambda old, *_: old, state, grads, kept)
        metrics = {"loss": nll, "grad_norm": norm, "finite": finite}
        return state._replace(step=state.step + 1), metrics

    return step
