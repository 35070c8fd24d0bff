"""What is under test: a mechanism with a position module and a normaliser, in one direction, on
small random tokens."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from attnlab.core import (
    Dims,
    Keys,
    Mechanism,
    Normaliser,
    Position,
    Queries,
    Rule,
    mechanisms,
    normalisers,
    positions,
)
from attnlab.normalisers.softmax import Softmax

LENGTH = 32
BATCH = 2
DIMS = Dims(width=16, heads=4, kv_heads=2, key_dim=8, value_dim=8)


SOFTMAX = Softmax()


@dataclass(frozen=True)
class Case:
    """One mechanism with one position module and one normaliser; frozen, so that jit knows it
    again."""

    mechanism: Mechanism
    position: Position
    causal: bool = True
    normaliser: Normaliser = SOFTMAX

    def __str__(self) -> str:
        direction = "" if self.causal else "-bidirectional"
        weighing = "" if self.weighing == "softmax" else f"-{self.weighing}"
        name = f"{key_of(self.mechanism)}{fields_of(self.mechanism)}"
        return f"{name}-{self.place}{weighing}{direction}"

    @cached_property
    def place(self) -> str:
        """The position's key."""
        return key_of(self.position)

    @cached_property
    def weighing(self) -> str:
        """The normaliser's key."""
        return key_of(self.normaliser)

    def rule(self, params: Any, **changes: Any) -> Rule:
        """``params`` of the position module and of the normaliser."""
        place, weighing = params
        return Rule(
            place,
            self.position,
            self.causal,
            normaliser=self.normaliser,
            normaliser_params=weighing,
            **changes,
        )


def key_of(thing: Mechanism | Position | Normaliser) -> str:
    """The registry key of an instance: the name of its file."""
    return type(thing).__module__.rpartition(".")[2]


def fields_of(mechanism: Mechanism) -> str:
    """The fields that differ from the defaults: "(window=5)"."""
    text = repr(mechanism)
    return text[text.index("(") :].replace(" ", "") if "(" in text else ""


def one_each() -> list[Case]:
    """All example instances, each with one position; the positions take turns."""
    places = positions.names()
    return [
        Case(example, positions.get(places[(shift + i) % len(places)])())
        for shift, name in enumerate(mechanisms.names())
        for i, example in enumerate(mechanisms.get(name).examples())
    ]


def first_of_each() -> list[Case]:
    """The first example of every mechanism, as in `one_each`."""
    first = {key_of(case.mechanism): case for case in reversed(one_each())}
    return [first[name] for name in mechanisms.names()]


def as_shipped() -> list[Case]:
    """Every mechanism with its default options, without positions."""
    nowhere = positions.get("none")()
    return [Case(mechanisms.get(name)(), nowhere) for name in mechanisms.names()]


def pairs() -> list[Case]:
    """The first example of every mechanism with every position."""
    return [
        Case(case.mechanism, positions.get(place)())
        for case in first_of_each()
        for place in positions.names()
    ]


def weighed() -> list[Case]:
    """The first example of every mechanism with every normaliser but softmax."""
    names = [name for name in normalisers.names() if name != "softmax"]
    return [replace(case, normaliser=small(name)) for case in first_of_each() for name in names]


def weighed_in_turn() -> list[Case]:
    """Of these, two for every mechanism: a normaliser that all can host and one that needs the
    whole row, each kind in turn."""
    every, chosen = weighed(), []
    for shift, name in enumerate(mechanisms.names()):
        mine = [case for case in every if key_of(case.mechanism) == name]
        for kind in (True, False):
            kin = [case for case in mine if case.normaliser.separable == kind]
            chosen.append(kin[shift % len(kin)])
    return chosen


def small(name: str) -> Normaliser:
    """A normaliser with its options at the scale of the tests, where some 16 keys are seen."""
    options = {"top_k": {"k": 3}, "ssmax": {"length": 8}, "log_n": {"length": 8}}
    return normalisers.get(name)(**options.get(name, {}))


class Inputs(NamedTuple):
    """All that a call receives: ``params`` = (mechanism's, those of `Case.rule`), then tokens, as
    in `attnlab.core`; ``x`` [B N width]; ``unit`` [B N] for mechanisms that want marks."""

    params: Any
    q: Any
    k: Any
    v: Any
    x: Any
    pos: Any
    seg: Any
    unit: Any = None

    def queries(self) -> Queries:
        return Queries(self.q, self.pos, self.seg)

    def keys(self) -> Keys:
        return Keys(self.k, self.v, self.pos, self.seg, unit=self.unit)

    def tokens(self, change) -> "Inputs":
        """The same parameters, and every array of tokens [B N ...] changed."""
        return Inputs(self.params, *jax.tree.map(change, self[1:]))

    def cast(self, dtype) -> "Inputs":
        """Features in another dtype; parameters stay."""
        return self._replace(**{name: getattr(self, name).astype(dtype) for name in "qkvx"})


def draw(
    case: Case, batch: int = BATCH, length: int = LENGTH, dims: Dims = DIMS, seed: int = 0
) -> Inputs:
    """Random f32 tokens of one document and parameters a little off their initial value, so that
    no gate is at a point where its gradient happens to vanish.

    NumPy arrays throughout: a JAX operation outside jit is compiled once for every new shape.
    """
    normal = np.random.default_rng(seed).standard_normal
    pos = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return Inputs(
        shaken(initial(case, dims)),
        normal((batch, length, dims.heads, dims.key_dim), np.float32),
        normal((batch, length, dims.kv_heads, dims.key_dim), np.float32),
        normal((batch, length, dims.kv_heads, dims.value_dim), np.float32),
        normal((batch, length, dims.width), np.float32),
        pos,
        np.zeros_like(pos),
        units_of(pos + 5 * seed) if case.mechanism.marked else None,
    )


def units_of(tokens: np.ndarray) -> np.ndarray:
    """Marks where units begin and end, as if by tokens of these ids; see `Mechanism.marked`."""
    return np.asarray([0, 1, 4, 0, 2, 1, 0, 3, 0, 2, 5, 0, 1, 3, 0, 4, 2], np.int32)[tokens % 17]


@lru_cache
def initial(case: Case, dims: Dims = DIMS) -> tuple[Any, Any]:
    """Parameters of the mechanism, and of position module and normaliser, as `init` makes them."""
    a, b, c = jax.random.split(jax.random.key(1), 3)
    rule = case.position.init(b, dims), case.normaliser.init(c, dims)
    return case.mechanism.init(a, dims), rule


def shaken(params: Any) -> Any:
    """``params`` plus noise of standard deviation 0.1 in every real leaf."""
    normal = np.random.default_rng(1).standard_normal

    def shake(z):
        z = np.asarray(z)
        return z + 0.1 * normal(z.shape, z.dtype) if z.dtype == np.float32 else z

    return jax.tree.map(shake, params)


def documents(inputs: Inputs, *rows: tuple[int, ...]) -> Inputs:
    """The same tokens as packed documents of the given lengths, one tuple per batch row; segments
    count from 1, positions restart, and the tokens left over are empty slots."""
    pos, seg = np.zeros_like(inputs.pos), np.full_like(inputs.seg, -1)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, 1):
            pos[row, start : start + length] = np.arange(length)
            seg[row, start : start + length] = number
            start += length
    return inputs._replace(pos=pos, seg=seg)


def bidirectional(case: Case) -> Case:
    return replace(case, causal=False)
