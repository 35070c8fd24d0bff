"""Gradient transformations by name, all with the same schedule, clipping and decay mask."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from attnlab.errors import UserError, did_you_mean


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over ``warmup`` steps, then a cosine to ``final_fraction`` of the peak
    at ``steps``. Returns the learning rate at a step."""
    peak, warmup = config.learning_rate, min(config.warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), peak * config.final_fraction
    )


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (``clip`` > 0), then the named optimizer; weight decay touches only
    matrices that are not embeddings. Raises `UserError` for an unknown name."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={config.name!r}: {did_you_mean(config.name, OPTIMIZERS)}")
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.name](config, make_schedule(config, steps)))


def learn_only(
    optimizer: optax.GradientTransformation, learned: Callable[[str], bool]
) -> optax.GradientTransformation:
    """``optimizer`` for the parameters whose path, as `jax.tree_util.keystr` writes it, is
    ``learned``; the others stay as they are, and have no part in the norm that is clipped."""

    def labels(params: Any) -> Any:
        def decide(path, _) -> str:
            return "learned" if learned(jax.tree_util.keystr(path)) else "frozen"

        return jax.tree_util.tree_map_with_path(decide, params)

    kinds: dict[Any, Any] = {"learned": optimizer, "frozen": optax.set_to_zero()}
    return optax.multi_transform(kinds, labels)


def is_matrix(params: Any) -> Any:
    """True at the weight matrices of the layers: not at norms, embeddings or position tables."""

    def decide(path, leaf) -> bool:
        name = jax.tree_util.keystr(path)
        return leaf.ndim == 2 and "kernel" in name

    return jax.tree_util.tree_map_with_path(decide, params)


def _adamw(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=is_matrix)


def _muon(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices, with updates of RMS 0.2 times the learning rate, and
    Adam at half the rate for the rest. Learning rates are some five times those of AdamW.
    Source: Jordan et al., 2024; Liu et al., arXiv 2502.16982."""
    from optax import contrib

    def dimensions(params: Any) -> Any:
        number = contrib.MuonDimensionNumbers()
        return jax.tree.map(lambda yes: number if yes else None, is_matrix(params))

    return contrib.muon(
        rate,
        adam_b1=config.b1,
        adam_b2=config.b2,
        weight_decay=config.weight_decay,
        weight_decay_mask=is_matrix,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
        adam_learning_rate=lambda step: 0.5 * rate(step),
    )


OPTIMIZERS: dict[str, Callable[[ConfigDict, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}
