"""Parameters that are measured and not learned: apart from the others, and replaced after a step.

A mechanism keeps them under the key ``"statistics"`` of what its ``init`` returns and gives their
next value as ``aux["statistics"]``: moving averages, counters, random features. They are no leaves
of the tree that is differentiated and optimized, so neither gradient, clipping, weight decay nor
optimizer state ever sees them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

KEY = "statistics"


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(learned, measured): nested dicts that hold each leaf in one of the two; see `merge`."""
    learned, measured = {}, {}
    for name, value in params.items():
        if name == KEY:
            measured[name] = value
        elif isinstance(value, Mapping):
            learned[name], inside = split(value)
            measured |= {name: inside} if inside else {}
        else:
            learned[name] = value
    return learned, measured


def merge(learned: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `split` took apart."""
    inside = {name: merge(learned[name], measured[name]) for name in measured if name != KEY}
    return {**learned, **measured, **inside}


def advance(measured: dict[str, Any], aux: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The measured parameters of a model as the layers' ``aux`` say they go on.

    Raises `TypeError` for a mechanism that has statistics and does not return their next value with
    the same structure, shapes and dtypes.
    """
    if not measured:
        return measured
    layers = {}
    for name, layer in measured["backbone"].items():
        old = layer["attention"]["mechanism"].get(KEY)
        new = (aux[int(name.removeprefix("layer_"))] or {}).get(KEY)
        if old is None or _specs(new) != _specs(old):
            raise TypeError(
                f"{name}: a mechanism with statistics must keep them at the top of its parameters "
                f'and return aux["statistics"] alike: {_specs(new)}, not {_specs(old)}'
            )
        layers[name] = {"attention": {"mechanism": {KEY: new}}}
    return {"backbone": layers}


def _specs(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
