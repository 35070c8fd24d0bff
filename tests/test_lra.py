"""configs/lra.py has every task of the arena, at two sizes, for every mechanism."""

import pytest

from attnlab.config import architecture_of
from attnlab.errors import UserError
from attnlab.kinds import kind_of
from attnlab.limits import validate
from attnlab.overrides import load

TASKS = ("listops", "text_classification", "retrieval", "image", "pathfinder")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", ["published", "small"])
def test_every_task_has_a_config_of_each_size(task, size):
    config = load(f"configs/lra.py:task={task},attention=window,size={size}")
    validate(config)
    assert (config.task.name, config.attention.name) == (task, "window")
    assert not config.model.causal
    assert kind_of(config).has_text is False
    heads = architecture_of(config)
    assert heads.heads == heads.kv_heads
    assert heads.head_dim % 2 == 0


def test_published_sizes_are_those_of_the_paper():
    def sizes(task):
        c = load(f"configs/lra.py:task={task}")
        return c.task.length, c.model.layers, c.model.width, c.model.heads, c.model.mlp_width

    assert sizes("listops") == (2000, 4, 512, 8, 1024)
    assert sizes("text_classification") == (4000, 4, 256, 4, 1024)
    assert sizes("retrieval") == (8000, 4, 128, 4, 512)
    assert sizes("image")[1:] == (1, 128, 8, 128)
    assert sizes("pathfinder") == (1024, 4, 32, 4, 32)


def test_the_source_of_a_task_is_chosen_where_it_has_one():
    config = load("configs/lra.py:task=text_classification,source=tfds:imdb_reviews")
    assert config.task.source == "tfds:imdb_reviews"
    with pytest.raises(UserError, match="task listops is made up and has none"):
        load("configs/lra.py:task=listops,source=bbc")


@pytest.mark.parametrize(
    ("arg", "message"), [("task=listop", "did you mean 'listops'"), ("size=tiny", "known: ")]
)
def test_a_wrong_name_is_one_line(arg, message):
    with pytest.raises(UserError, match=message) as caught:
        load(f"configs/lra.py:{arg}")
    assert "\n" not in str(caught.value)
