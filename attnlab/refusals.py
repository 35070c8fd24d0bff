"""Combinations without meaning, refused in one line that names both sides.

A mechanism calls these at the start of both its forms, so that a combination is refused before
anything is computed, whatever the caller.
"""

from collections.abc import Sequence

from attnlab.core import Exponential, Position, Rule
from attnlab.errors import UserError


def key_of(thing: object) -> str:
    """The registry key of an instance: the name of its file, or that of its ``origin`` if it shows
    another instance to some of the heads."""
    thing = getattr(thing, "origin", thing)
    return type(thing).__module__.rpartition(".")[2]


def refuse_bias(name: str, rule: Rule) -> None:
    """Raises `UserError` if the position module adds to logits that the mechanism never forms."""
    position: Position = rule.position
    if position.biased or position.whole:
        raise UserError(
            f"attention {name} forms no logits, so position {key_of(position)} has nothing to add "
            "its bias to; use rope, absolute or none"
        )


def refuse_causal(name: str, rule: Rule, why: str, instead: Sequence[str]) -> None:
    """Raises `UserError` if the rule is causal and the mechanism cannot be; ``why`` in a clause,
    ``instead`` the causal mechanisms of the same family."""
    if rule.causal:
        raise UserError(
            f"attention {name} cannot be causal: {why}; use {', '.join(instead)}, or "
            "model.causal=false"
        )


def refuse_bidirectional(name: str, rule: Rule, why: str) -> None:
    """Raises `UserError` if the rule has no order of time and the mechanism needs one."""
    if not rule.causal:
        raise UserError(f"attention {name} cannot be bidirectional: {why}; use model.causal=true")


def refuse_taps(name: str, rule: Rule) -> None:
    """Raises `UserError` if a tap wants logits or probabilities that the mechanism never forms."""
    for place, _ in rule.taps:
        if place in ("logits", "probs"):
            raise UserError(f"attention {name} forms no {place} for a tap to see")


def refuse_normaliser(name: str, rule: Rule) -> None:
    """Raises `UserError` if a query must meet all its keys at once, for a mechanism that merges
    parts over different keys by their log-sum-exp.

    Hosted: softmax and what only rescales the queries. Refused: every other normaliser, and every
    position module that sees whole rows.
    """
    if not rule.normaliser.separable:
        raise UserError(
            f"attention {name} merges softmax over parts of the keys, so normaliser "
            f"{key_of(rule.normaliser)} has no whole row to weigh; use softmax, ssmax or log_n"
        )
    if rule.position.whole:
        raise UserError(
            f"attention {name} merges parts of the keys, so position {key_of(rule.position)} has "
            "no whole row to look at; use rope, alibi or none"
        )


def refuse_every_normaliser(name: str, rule: Rule) -> None:
    """Raises `UserError` if the rule has any normaliser but softmax, for a mechanism that has no
    row of logits to normalise."""
    if type(rule.normaliser) is not Exponential and key_of(rule.normaliser) != "softmax":
        raise UserError(
            f"attention {name} has no row of logits, so normaliser {key_of(rule.normaliser)} has "
            "nothing to weigh; use softmax"
        )
