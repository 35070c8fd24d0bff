"""What a config may not say is refused with the nearest legal values."""

import pytest

from attnlab.config import base
from attnlab.errors import UserError
from attnlab.limits import validate
from attnlab.overrides import override


def changed(*changes: str, attention: str = "window"):
    config = base(attention)
    for change in changes:
        override(config, *change.split("="))
    return config


def test_the_defaults_and_their_edges_are_legal():
    validate(base())
    zeros = ["train.steps", "optimizer.warmup", "sample.temperature", "sample.top_k"]
    validate(changed(*(f"{path}=0" for path in zeros), "model.dropout=0.5", "task.length=1"))
    validate(changed("model.heads=3", "model.kv_heads=1", "model.head_dim=16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.heads=7"], "model.heads=7 does not divide model.width=256; use heads of 4 or 8"),
        (["model.heads=7"], "a width of 252 or 259"),
        (["model.heads=300"], "use heads of 256"),
        (["model.kv_heads=3"], "model.kv_heads=3 does not divide model.heads=4; use 2 or 4"),
        (["model.kv_heads=8"], "use 4"),
        (["model.head_dim=15"], "head size 15 is odd; use 14 or 16"),
        (["optimizer.accumulate=3"], "does not divide task.batch=16; use 2 or 4"),
        (["task.length=0"], "task.length=0: must be > 0"),
        (["task.batch=-1"], "task.batch=-1: must be > 0"),
        (["model.layers=0"], "model.layers=0: must be > 0"),
        (["model.kv_heads=0"], "model.kv_heads=0: must be > 0"),
        (["model.dropout=1"], "model.dropout=1.0: must be >= 0 and < 1"),
        (["optimizer.learning_rate=nan"], "must be finite"),
        (["optimizer.clip=-1"], "optimizer.clip=-1.0: must be >= 0"),
        (["optimizer.ema=1"], "optimizer.ema=1.0: must be >= 0 and < 1"),
        (["sample.top_p=1.5"], "sample.top_p=1.5: must be between 0 and 1"),
        (["sample.top_p=0"], "sample.top_p=0.0"),
        (["evaluate.stride=600"], "must be at most the evaluated length, 512"),
        (["attention.window=0"], "window >= 1"),
    ],
)
def test_an_illegal_config_is_refused_with_legal_values(changes, message):
    with pytest.raises(UserError) as error:
        validate(changed(*changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_choice_set_by_a_config_file_is_checked_too():
    config = base()
    config.model.mlp = "swigul"
    config.task.name = "text"
    with pytest.raises(UserError, match=r"model\.mlp=swigul: did you mean 'swiglu'"):
        validate(config)
