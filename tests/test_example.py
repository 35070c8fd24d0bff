"""The mechanism that the README shows passes the battery as if it lay in the package.

A few checks always, all of them when slow tests are selected.
"""

import importlib
import sys
from pathlib import Path

import pytest
from battery import agreement, causality, continuation, cost, experiment
from battery.cases import Case
from battery.refusal import verify
from test_battery import ALWAYS, CHEAP, TURNS, promise

import attnlab.mechanisms
from attnlab.config import base, mechanisms_of
from attnlab.core import mechanisms, positions

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
QUICK = (
    agreement.check_reference,
    agreement.check_limit,
    causality.check_causality,
    continuation.check_extension,
    cost.check_declared_growth,
    experiment.check_config,
)
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def checks():
    everything = (*ALWAYS, *CHEAP, *TURNS)
    return [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in everything]


@pytest.fixture
def dropped_in(monkeypatch):
    """The examples as files of ``attnlab/mechanisms``."""
    search = [*attnlab.mechanisms.__path__, str(FOLDER)]
    monkeypatch.setattr(attnlab.mechanisms, "__path__", search)
    importlib.invalidate_caches()
    yield
    for name in NAMES:
        sys.modules.pop(f"attnlab.mechanisms.{name}", None)


@pytest.mark.parametrize("check", checks(), ids=promise)
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_every_promise(check, name, dropped_in):
    places = positions.names()
    for i, example in enumerate(mechanisms.get(name).examples()):
        verify(check, Case(example, positions.get(places[i % len(places)])()))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_chosen_by_its_path(name):
    path = str(FOLDER / f"{name}.py")
    config = base(attention=f"{path}+softmax")
    first, second = mechanisms_of(config)[:2]
    assert type(first).__name__ == name.title()
    assert second == mechanisms.get("softmax")()
