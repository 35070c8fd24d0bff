"""The leaves of a training state, one by one: their dotted paths, and how each is stored.

Arrays and typed PRNG keys (as their raw words) go into the checkpoint's data; Python and empty
values go into its manifest, because an array store would turn an int into an array, a float into
another precision, and refuses arrays without elements.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHOWN = 4  # differing leaves named in an error line


class Leaf(NamedTuple):
    """One leaf of a state, concrete or abstract (jax.ShapeDtypeStruct)."""

    value: Any

    @property
    def spec(self) -> dict[str, Any]:
        """What the manifest records: {"shape", "dtype"} of an array, or {"type", "value"}."""
        if _is_number(self.value):
            return {"type": type(self.value).__name__, "value": self.value}
        return {"shape": list(self.value.shape), "dtype": str(self.value.dtype)}

    @property
    def stored(self) -> bool:
        """Whether the leaf has an entry in the array data."""
        return not _is_number(self.value) and 0 not in self.value.shape

    def data(self) -> Any:
        """The array to write. NumPy arrays are copied: the caller may change them at once."""
        if _is_key(self.value):
            return jax.random.key_data(self.value)
        if isinstance(self.value, jax.Array):
            return self.value
        return np.array(self.value)

    def sharding(self) -> jax.sharding.Sharding | None:
        """Where to restore to; None means to host memory.

        An array that jax placed by default must come back as one that jax may still move: pinned to
        device 0 it could not meet sharded arrays in one computation.
        """
        if isinstance(self.value, jax.Array):
            return self.value.sharding if self.value.committed else None
        return getattr(self.value, "sharding", None)

    def rebuild(self, spec: dict[str, Any], data: Any) -> Any:
        """The restored leaf, of the type and placement of this one."""
        if _is_number(self.value):
            return type(self.value)(spec["value"])
        if data is None:
            data = np.zeros(self.value.shape, self.value.dtype)
            if self.sharding() is not None:
                data = jax.device_put(data, self.sharding())
        if _is_key(self.value):
            return jax.random.wrap_key_data(data, impl=_implementation(self.value))
        if isinstance(self.value, np.generic):
            return data[()]
        if isinstance(self.value, np.ndarray):
            return data
        return jnp.asarray(data)


def flatten_state(state: Any) -> dict[str, Leaf]:
    """Dotted path -> Leaf, in tree order. TypeError for a leaf that is no array and no number."""
    leaves = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if not (_is_number(value) or hasattr(value, "dtype")):
            raise TypeError(f"{path}: cannot save a {type(value).__name__}")
        if path in leaves:
            raise TypeError(f"{path}: two leaves have the same dotted path")
        leaves[path] = Leaf(value)
    return leaves


def describe_difference(saved: dict[str, Any], wanted: dict[str, Leaf]) -> str:
    """The first differing leaves, saved against expected; empty when they agree."""
    lines = []
    for path in [*wanted, *(path for path in saved if path not in wanted)]:
        have = _describe(saved[path]) if path in saved else "missing"
        want = _describe(wanted[path].spec) if path in wanted else "nothing"
        if have != want:
            lines.append(f"{path} saved {have}, expected {want}")
    shown = "; ".join(lines[:SHOWN])
    return shown + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def finite(state: Any) -> bool:
    """Whether no floating or complex leaf holds NaN or Inf: one jitted reduction, one bool back."""
    return bool(all_finite(state))


def all_finite(state: Any) -> jax.Array:
    """`finite` as a bool array, also of a state that is traced."""
    leaves = [leaf.value for leaf in flatten_state(state).values()]
    return _all_finite([value for value in leaves if _is_inexact(value)])


def name_non_finite(state: Any) -> str:
    """The dotted paths of the leaves that hold NaN or Inf; slower than `finite`, for the error."""
    bad = [path for path, leaf in flatten_state(state).items() if not finite([leaf.value])]
    return ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")


@jax.jit
def _all_finite(leaves: list[Any]) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves], bool))


def _describe(spec: dict[str, Any]) -> str:
    if "type" in spec:
        return f"a Python {spec['type']}"
    return f"{spec['dtype']}[{','.join(map(str, spec['shape']))}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and not isinstance(value, np.generic)


def _is_inexact(value: Any) -> bool:
    if _is_key(value):
        return False
    return isinstance(value, float) or jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _implementation(key: Any) -> Any:
    # key_impl wants an array; tracing gives it one when `key` is a ShapeDtypeStruct.
    found = []
    jax.eval_shape(lambda traced: found.append(jax.random.key_impl(traced)), key)
    return found[0]
