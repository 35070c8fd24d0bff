"""Training in rows that grow."""

import jax
import numpy as np
import pytest

from attnlab.config import base
from attnlab.errors import UserError
from attnlab.growing import train_growing
from attnlab.overrides import override

SIZES = {"model.width": 16, "model.layers": 1, "model.heads": 2, "model.kv_heads": 2}


def config_of():
    config = base("softmax", "rope", task="needle")
    for path, value in SIZES.items():
        override(config, path, str(value))
    return config


def test_where_one_length_ends_and_the_same_begins_changes_nothing():
    whole = train_growing(config_of(), ((16, 5),), 64)
    parts = train_growing(config_of(), ((16, 3), (16, 2)), 64)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    assert [step for step, *_ in whole.curve] == [5]
    assert [step for step, *_ in parts.curve] == [3, 5]
    assert parts.curve[-1] == whole.curve[-1]


def test_every_batch_has_as_many_tokens_whatever_its_rows():
    config = config_of()
    curve = train_growing(config, ((8, 1), (32, 102)), 64).curve
    assert [row[:2] for row in curve] == [(1, 8), (100, 32), (103, 32)]
    assert config.task.length * config.task.batch == 64
    assert config.task.length == 32
    assert config.train.steps == 103


def test_rows_too_short_for_the_task_are_refused():
    with pytest.raises(UserError, match="length=2"):
        train_growing(config_of(), ((2, 1),), 64)
