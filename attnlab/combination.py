"""Mechanisms that are made of other mechanisms."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp

from attnlab.core import Array, Cost, Dims, Keys, Mechanism, Queries, Result, Rule, mechanisms
from attnlab.errors import UserError
from attnlab.refusals import key_of

T = TypeVar("T")
STATISTICS = "statistics"
USED = "used"


class OfParts(Generic[T]):
    """What the parts of a combination decide; asked of a class, what its default parts do."""

    def __init__(self, decide: Callable[[tuple[Mechanism, ...]], T]):
        self.decide = decide

    def __get__(self, instance: Any, owner: Any) -> T:
        return self.decide((owner() if instance is None else instance).parts)


def greatest(parts: tuple[Mechanism, ...]) -> Cost:
    """The growth of the whole is that of its fastest growing part."""
    costs = [part.cost for part in parts] or [Cost(0, 0, 0)]  # none while the class is being made
    return Cost(*(max(exponents) for exponents in zip(*costs)))


def any_carries(parts: tuple[Mechanism, ...]) -> bool:
    return any(part.carries for part in parts)


def any_marked(parts: tuple[Mechanism, ...]) -> bool:
    return any(part.marked for part in parts)


def all_spread(parts: tuple[Mechanism, ...]) -> bool:
    return all(part.spreads for part in parts)


def all_isotropic(parts: tuple[Mechanism, ...]) -> bool:
    return all(part.isotropic for part in parts)


@dataclass(frozen=True)
class Combination(Mechanism):
    """Base of mechanisms made of ``parts``, named after a colon each: ``heads:window:softmax``.

    Parameters, statistics and states of the parts stand under part_0, part_1, ... A part whose
    decoding state has a fixed size is handed the new tokens, any other the whole past; if there are
    both, the whole `recalls`. Training hands on the states of the parts that carry, and the others
    begin anew with every batch.
    """

    parts: tuple[Mechanism, ...] = ()

    default_parts: ClassVar[tuple[str, ...]] = ("window", "softmax")
    cost = OfParts(greatest)  # pyright: ignore[reportAssignmentType]
    carries = OfParts(any_carries)  # pyright: ignore[reportAssignmentType]
    isotropic = OfParts(all_isotropic)  # pyright: ignore[reportAssignmentType]
    spreads = OfParts(all_spread)  # pyright: ignore[reportAssignmentType]
    marked = OfParts(any_marked)  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        if not self.parts:
            parts = tuple(mechanisms.get(name)() for name in self.default_parts)
            object.__setattr__(self, "parts", parts)

    @property
    def recalls(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        keeps = [needs_all_keys(part) for part in self.parts]
        return any(keeps) and (not all(keeps) or any(part.recalls for part in self.parts))

    @property
    def relative(self) -> bool:
        return all(part.relative for part in self.parts)

    def dims_of_parts(self, dims: Dims) -> tuple[Dims, ...]:
        """The sizes that each part is told."""
        return (dims,) * len(self.parts)

    def init(self, key, dims):
        params, measured = {}, {}
        for i, (part, its) in enumerate(zip(self.parts, self.dims_of_parts(dims))):
            made, name = part.init(jax.random.fold_in(key, i), its), f"part_{i}"
            if isinstance(made, Mapping) and STATISTICS in made:
                measured[name] = made[STATISTICS]
                made = {field: value for field, value in made.items() if field != STATISTICS}
            params[name] = made
        return {**params, STATISTICS: measured} if measured else params

    def initial_state(self, dims: Dims, batch: int, dtype: Any = jnp.float32):
        pairs = enumerate(zip(self.parts, self.dims_of_parts(dims)))
        states = {f"part_{i}": part.initial_state(d, batch, dtype) for i, (part, d) in pairs}
        states = {name: state for name, state in states.items() if state != ()}
        if self.recalls:
            states[USED] = jnp.zeros((), jnp.int32)
        return states or ()

    def source(self, x, embedded, pos):
        """That of all parts that ask for one. Raises `UserError` where they ask for several."""
        asked = ((part, part.source(x, embedded, pos)) for part in dict.fromkeys(self.parts))
        found = {id(z): (part, z) for part, z in asked if z is not None}
        if len(found) > 1:
            (one, _), (other, _), *_ = found.values()
            raise UserError(
                f"attention {key_of(self)}: {key_of(one)} and {key_of(other)} project queries and "
                "keys from different things, and a layer has one projection; give each its layers"
            )
        return next((z for _, z in found.values()), None)

    def carried(self, state):
        names = {f"part_{i}": part for i, part in enumerate(self.parts) if part.carries}
        return {name: part.carried(state[name]) for name, part in names.items()}

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = zip(self.parts, self.dims_of_parts(dims))
        return sum(part.flops(its, length, causal) for part, its in pairs)

    def limit(self, length: int):
        limits = tuple(part.limit(length) for part in self.parts)
        found = tuple(limit for limit in limits if limit is not None)
        return dataclasses.replace(self, parts=found) if len(found) == len(limits) else None

    def call_parts(
        self,
        form: Callable[[Mechanism], Callable[..., Result]],
        params: Any,
        handed: tuple[tuple[Queries, Keys, Rule], ...],
        state: Any,
        x: Array | None,
        key: Array | None,
    ) -> tuple[list[Array], Any, dict[str, Any]]:
        """The ``out`` of every part called with what it is ``handed``, the next state, and ``aux``.

        ``form`` chooses the fast or the literal form of a part. A refusal of a part names the whole
        too. Where the state counts the slots used, keys are those of the whole past.
        """
        outs, after, auxes = [], {}, []
        used = state[USED] if state and USED in state else None
        measured = params.get(STATISTICS, {})
        for i, (part, (queries, keys, rule)) in enumerate(zip(self.parts, handed)):
            name, past = f"part_{i}", (state or {}).get(f"part_{i}", ())
            if used is not None and not needs_all_keys(part):
                keys = _since(keys, used, queries.q.shape[1])
            if not part.marked:
                keys = keys._replace(unit=None)
            own = params[name]
            own = {**own, STATISTICS: measured[name]} if name in measured else own
            draw = None if key is None else jax.random.fold_in(key, i)
            with _named(self):
                result = form(part)(own, queries, keys, rule, past, x=x, key=draw)
            outs.append(result.out)
            auxes.append(result.aux or {})
            after |= {name: result.state} if past != () else {}
        if used is not None:
            after[USED] = used + handed[0][0].q.shape[1]
        return outs, after or (), _joined(auxes, measured)


def needs_all_keys(part: Mechanism) -> bool:
    """Decoding keeps the whole past for it."""
    return part.cost.state >= 1


def options(cls: type) -> list[dataclasses.Field]:
    """The fields of a registered dataclass that are typed as its options: not the parts of a
    combination, which are named after its colons."""
    hidden = ("parts",) if issubclass(cls, Combination) else ()
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in hidden]


def _since(keys: Keys, used: Array, length: int) -> Keys:
    """The slots of a buffer that this call has filled."""
    return jax.tree.map(lambda z: jax.lax.dynamic_slice_in_dim(z, used, length, 1), keys)


def _joined(auxes: list[dict[str, Any]], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Losses added, statistics as `Combination.init` keeps them, and the ``stats`` of all parts."""
    aux: dict[str, Any] = {}
    if losses := [each["loss"] for each in auxes if "loss" in each]:
        aux["loss"] = sum(losses)
    if measured:
        parts = {name: auxes[int(name.removeprefix("part_"))] for name in measured}
        aux[STATISTICS] = {n: each.get(STATISTICS, measured[n]) for n, each in parts.items()}
    stats = {f"part_{i}_{n}": z for i, e in enumerate(auxes) for n, z in e.get("stats", {}).items()}
    return aux | ({"stats": stats} if stats else {})


@contextlib.contextmanager
def _named(whole: Mechanism) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"attention {key_of(whole)}: {error}") from error
