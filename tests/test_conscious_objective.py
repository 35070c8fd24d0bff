"""What a conscious state is trained for beside a task: see experiments/conscious/objective.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments import load

BATCH, STEPS = 64, 150


@pytest.fixture
def objective(monkeypatch):
    return load("conscious", "objective.py", monkeypatch)


@pytest.fixture
def foresight(monkeypatch):
    return load("conscious", "foresight.py", monkeypatch)


def learnt(foresight, diversity: float, lasts: float, favour: float) -> dict[str, float]:
    found = foresight.learn(STEPS, diversity, lasts, favour, 0)
    return {name: float(z) for name, z in found.items()}


def test_agreement_is_the_mean_loss_of_naming_ones_own_row(objective):
    draws = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    said, later = map(jnp.asarray, draws)
    z = draws[0] @ draws[1].T
    wanted = np.mean([np.log(np.exp(z[i]).sum()) - z[i, i] for i in range(5)])
    assert float(objective.agreement(said, later)) == pytest.approx(wanted, rel=1e-5)
    assert float(objective.agreement(0 * said, later)) == pytest.approx(math.log(5))
    assert float(objective.agreement(9 * jnp.eye(5), 9 * jnp.eye(5))) < 1e-6


def test_diversity_is_that_of_the_mean_and_not_the_mean_of_entropies(objective):
    """Rows that read one slot each, and not the same: as diverse as rows that read all."""
    apart, alike = jnp.eye(4), jnp.tile(jnp.eye(4)[:1], (4, 1))
    slope = jax.grad(lambda w: objective.diversity(w))
    assert float(objective.diversity(apart)) == pytest.approx(math.log(4))
    assert float(objective.diversity(jnp.full((4, 4), 0.25))) == pytest.approx(math.log(4))
    assert float(objective.diversity(alike)) == 0
    assert np.all(np.isfinite(slope(alike)))


def test_the_loss_adds_agreement_and_takes_diversity_away(objective):
    said, later, weights = jnp.eye(3), jnp.eye(3), jnp.full((3, 6), 1 / 6)
    wanted = 2 + 0.5 * objective.agreement(said, later) - 0.25 * math.log(6)
    found = objective.loss(2.0, said, later, weights, (0.5, 0.25))
    assert float(found) == pytest.approx(float(wanted))


def test_what_is_said_at_random_tells_nothing_and_training_changes_that(foresight):
    """ln B before; below it where bits last, and not where all are drawn anew."""
    lasting, anew = (learnt(foresight, 0.0, lasts, 0.0) for lasts in (0.8, 0.0))
    for found in (lasting, anew):
        assert found["agreement before"] == pytest.approx(math.log(BATCH), abs=0.15)
    assert lasting["agreement after"] < math.log(BATCH) - 0.2
    assert anew["agreement after"] > math.log(BATCH) - 0.02


def test_a_selection_that_favours_one_slot_collapses_unless_diversity_counts(foresight):
    without, within = (learnt(foresight, weight, 0.8, 60.0) for weight in (0.0, 0.5))
    assert without["entropy before"] == within["entropy before"]
    assert without["entropy after"] < 0.1
    assert within["entropy after"] > max(1.0, within["entropy before"])
