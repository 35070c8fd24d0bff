"""Cells of a tile by tile pyramid: what the search over tiles of keys finds, found in place."""

import numpy as np
import pytest
from battery.calls import assert_close, outputs_and_gradients, quick_outputs
from battery.cases import Case, documents, draw

from attnlab.core import positions
from attnlab.engines import pyramid
from attnlab.mechanisms.hierarchical import Hierarchical
from attnlab.positions.none import NoPosition


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("cells", "place"),
    [(1, "none"), pytest.param(2, "rope", marks=pytest.mark.slow), (8, "alibi")],
)
def test_tiles_of_any_size_agree_with_the_equations(cells, place, causal, monkeypatch):
    """Outputs and all gradients, with padding, in tiles that hold fewer and more cells than the
    levels have."""
    block, length = 4, 40 + cells  # lengths that differ, since what is compiled is kept
    case = Case(Hierarchical(block), positions.get(place)(), causal)
    inputs = draw(case, 1, length)
    parts = 6 if causal else 11
    logits = cells * block**2 * parts * inputs.q.shape[2]
    monkeypatch.setattr(pyramid, "LOGITS_IN_FLIGHT", logits)
    got = outputs_and_gradients(case, inputs)
    assert_close(got, outputs_and_gradients(case, inputs, form="reference"))


@pytest.mark.parametrize("causal", [True, False])
def test_empty_slots_anywhere_are_not_seen(causal):
    case = Case(Hierarchical(4), NoPosition(), causal)
    inputs = draw(case)
    empty = np.isin(np.arange(32), [0, 3, 8, 9, 10, 11, 20, 31])
    inputs = inputs._replace(seg=np.where(empty, -1, inputs.seg))
    assert pyramid.straight(inputs.keys())
    assert_close(quick_outputs(case, inputs), quick_outputs(case, inputs, "reference"))


def test_only_one_document_from_its_first_slot_on_is_straight():
    inputs = draw(Case(Hierarchical(4), NoPosition()))
    assert pyramid.straight(inputs.keys())
    for other in (
        inputs._replace(pos=inputs.pos + 1),
        inputs._replace(seg=inputs.seg + (inputs.pos >= 16)),
        documents(inputs, (13, 19), (32,)),
    ):
        assert not pyramid.straight(other.keys())
