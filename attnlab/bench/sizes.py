"""What a package of others is asked to compute."""

from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """Of one call; ``causal`` and ``options`` are those of the mechanism it stands beside."""

    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool
    options: dict[str, Any]
