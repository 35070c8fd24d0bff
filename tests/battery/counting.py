"""How many floating-point operations a program executes, counted and not looked up.

A multiply-add of a matrix product, convolution or triangular solve counts two; what is done entry
by entry (exp, masks, gates) counts nothing. A loop counts as often as it turns: where that depends
on data, as for tiles that are skipped, the loop turns, and carries the count along.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval

CALLS = {"jaxpr", "call_jaxpr", "fun_jaxpr"}
"""Where operations that merely call, such as jit and checkpoint, keep what they call."""


def count(function: Callable, *arguments: Any) -> float:
    """Operations of ``function(*arguments)`` that its result needs."""
    program = jax.make_jaxpr(function)(*arguments)
    needed, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    leaves = [z for z, kept in zip(jax.tree.leaves(arguments), used) if kept]
    # Nothing but the count is asked for: the compiler leaves the products themselves out.
    return float(jax.jit(lambda *z: run(needed, program.consts, z)[1])(*leaves))


def run(jaxpr: Jaxpr, consts: Sequence, arguments: Sequence) -> tuple[list, Any]:
    """The results, and the operations done for them: f32, or a number."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments)))
    total = 0.0
    for eqn in jaxpr.eqns:
        given = [z.val if isinstance(z, Literal) else values[z] for z in eqn.invars]
        results, added = step(eqn, given)
        total = total + added
        values.update(zip(eqn.outvars, results))
    return [z.val if isinstance(z, Literal) else values[z] for z in jaxpr.outvars], total


def step(eqn, given: list) -> tuple[Sequence, Any]:
    """`run` of one equation."""
    name, params = eqn.primitive.name, eqn.params
    if name in LOOPS:
        return LOOPS[name](given, **params)
    if inner := CALLS & params.keys():
        return run(*opened(params[inner.pop()]), given)
    results = eqn.primitive.bind(*given, **params)
    results = results if eqn.primitive.multiple_results else [results]
    return results, PRODUCTS[name](eqn) if name in PRODUCTS else 0.0


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def scan(given, *, jaxpr, length, reverse, num_consts, num_carry, unroll, **_):
    consts, carry, xs = cut(given, num_consts, num_carry)

    def body(carry, x):
        total, carry = carry
        results, added = run(*opened(jaxpr), [*consts, *carry, *x])
        return (total + added, results[:num_carry]), results[num_carry:]

    (total, carry), ys = lax.scan(body, (jnp.zeros(()), carry), xs, length, reverse)
    return [*carry, *ys], total


def while_loop(given, *, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts, **_):
    asked, consts, carry = cut(given, cond_nconsts, body_nconsts)

    def body(carry):
        results, added = run(*opened(body_jaxpr), [*consts, *carry[1]])
        return carry[0] + added, results

    def goes_on(carry):
        return run(*opened(cond_jaxpr), [*asked, *carry[1]])[0][0]

    total, carry = lax.while_loop(goes_on, body, (jnp.zeros(()), carry))
    return carry, total


def cond(given, *, branches, **_):
    def branch(jaxpr):
        def taken(*z):
            results, added = run(*opened(jaxpr), z)
            return results, jnp.asarray(added, jnp.float32)

        return taken

    return lax.switch(given[0], [branch(z) for z in branches], *given[1:])


LOOPS = {"scan": scan, "while": while_loop, "cond": cond}


def cut(given: list, *sizes: int) -> list[list]:
    """Parts of the given sizes, and the rest."""
    parts = []
    for size in sizes:
        parts.append(given[:size])
        given = given[size:]
    return [*parts, given]


def of_dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def of_convolution(eqn) -> float:
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    each = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * each


def of_solve(eqn) -> float:
    """Half of the products with a full matrix."""
    size = eqn.invars[0].aval.shape[-1]
    return 1.0 * math.prod(eqn.outvars[0].aval.shape) * size


PRODUCTS = {
    "dot_general": of_dot,
    "conv_general_dilated": of_convolution,
    "triangular_solve": of_solve,
}
