"""Groups by position: the means are the means, whatever is packed beside them."""

import jax
import numpy as np
from battery.calls import assert_close
from battery.cases import Case, documents, draw

from attnlab.engines import pooling
from attnlab.mechanisms.segment import Segment
from attnlab.positions.none import NoPosition

SIZE = 4


def packed_keys():
    """Two documents, the first from position 3 on, and empty slots that hold NaN."""
    inputs = documents(draw(Case(Segment(), NoPosition()), length=16), (7, 6), (5,))
    pos = inputs.pos + 3 * (inputs.seg == 1)
    holes = (inputs.seg < 0)[..., None, None]
    return inputs._replace(pos=pos, k=np.where(holes, np.nan, inputs.k)).keys()


def literal(keys):
    """{(row, document, group): slots}."""
    groups = {}
    for row, slot in np.argwhere(keys.seg >= 0):
        place = row, int(keys.seg[row, slot]), int(keys.pos[row, slot] // SIZE)
        groups.setdefault(place, []).append(slot)
    return groups


def test_means_stand_for_their_tokens():
    keys, wanted = packed_keys(), literal(packed_keys())
    means = jax.jit(pooling.mean, static_argnums=1)(keys, SIZE)
    found = {}
    for row, slot in np.argwhere(np.asarray(means.seg) >= 0):
        place = int(means.pos[row, slot]) // SIZE
        found[row, int(means.seg[row, slot]), place] = row, slot
    assert found.keys() == wanted.keys()
    for place, (row, slot) in found.items():
        members = wanted[place]
        assert means.count[row, slot] == len(members)
        assert means.pos[row, slot] == place[2] * SIZE + (SIZE - 1) // 2
        np.testing.assert_allclose(means.k[row, slot], keys.k[row, members].mean(0), atol=1e-6)
        np.testing.assert_allclose(means.v[row, slot], keys.v[row, members].mean(0), atol=1e-6)
    assert np.all(np.isfinite(means.k))


def test_groups_are_packed_to_the_front():
    seg = np.asarray(pooling.mean(packed_keys(), SIZE).seg)
    assert (seg >= 0).sum(1).tolist() == [5, 2]
    assert np.all(seg[0, 5:] < 0)
    assert np.all(seg[1, 2:] < 0)


def test_equal_scores_give_means_and_a_great_one_its_token():
    keys = packed_keys()
    score = np.zeros((*keys.k.shape[:3], 2), np.float32)
    score[0, 1, :, 1] = 1000  # the second token of the first group, from position 3: slots 1..4
    plain, sharp = pooling.attended(keys, SIZE, score)
    means = pooling.mean(keys, SIZE)
    assert_close((plain.k, plain.v), (means.k, means.v))
    np.testing.assert_array_equal(sharp.v[0, 1], keys.v[0, 1])
    assert_close(sharp.v[1], means.v[1])
