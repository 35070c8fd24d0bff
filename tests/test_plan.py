"""The plan agrees with the model it plans for, and refuses before anything compiles."""

import jax
import jax.numpy as jnp
import pytest

from attnlab import plan as planning
from attnlab.config import base, model_of
from attnlab.core import count_pairs
from attnlab.errors import UserError
from attnlab.overrides import override
from attnlab.plan import estimate_cost, plan

SMALL = ("model.width=32", "model.layers=2", "task.length=32", "task.batch=8", "model.heads=4")
VOCAB = 257


def small(attention="softmax", *changes):
    config = base(attention)
    for change in (*SMALL, *changes):
        override(config, *change.split("="))
    return config


def counted(config, *devices):
    return estimate_cost(config, model_of(config, VOCAB), *devices)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_are_those_of_the_model(tied):
    config = small("window+softmax", f"model.tied={tied}")
    model = model_of(config, VOCAB)
    tokens = jnp.zeros((1, 32), jnp.int32)
    params = model.init(jax.random.key(0), tokens, tokens, tokens)
    estimate = counted(config)
    assert sum(estimate.parameters.values()) == sum(x.size for x in jax.tree.leaves(params))
    assert estimate.parameters["embedding"] == VOCAB * 32
    assert ("head" in estimate.parameters) == (tied == "false")


def test_flops_count_every_multiplied_parameter_and_the_mechanism():
    tied, untied = (counted(small("softmax", f"model.tied={t}")) for t in ("1", "0"))
    assert tied.matmul_flops == untied.matmul_flops == 6 * sum(tied.parameters.values())
    pairs = count_pairs(32)
    assert tied.attention_flops == 3 * 2 * (2 * 4 * 16 * pairs) / 32
    assert counted(small("window", "attention.window=4")).attention_flops < 1000 * 3


def test_decoding_memory_is_all_keys_or_the_mechanisms_own_state():
    def decoding(attention, *changes):
        return counted(small(attention, *changes)).decoding

    slot = 4 * (2 * 4 * 8 + 2)  # k and v in f32, pos, seg
    softmax, longer = decoding("softmax"), decoding("softmax", "task.length=64")
    assert longer - softmax == 2 * 32 * slot
    window, longer = (
        decoding("window", "attention.window=8", f"task.length={n}") for n in (32, 64)
    )
    assert window == longer < softmax


def test_every_mechanism_has_its_share():
    estimate = counted(small("window+softmax+window", "model.layers=5"))
    window, softmax = estimate.layers["window"], estimate.layers["softmax"]
    assert (window.count, softmax.count) == (3, 2)
    alone = {name: counted(small(name)) for name in estimate.layers}
    for name, each in estimate.layers.items():
        assert 2 * each.flops == alone[name].attention_flops
        assert 2 * each.decoding == alone[name].decoding
    assert estimate.attention_flops == 3 * window.flops + 2 * softmax.flops
    assert estimate.decoding == 3 * window.decoding + 2 * softmax.decoding


def test_training_memory_falls_with_accumulation_and_remat():
    plain = counted(small())
    adam = 4 * 4 * sum(plain.parameters.values())
    assert adam <= plain.fixed < adam + 100
    parts = counted(small("softmax", "optimizer.accumulate=4"))
    assert parts.activations < plain.activations / 2
    assert parts.fixed - plain.fixed == 4 * sum(plain.parameters.values())
    remat = counted(small("softmax", "model.remat=true", "model.layers=4"))
    whole = counted(small("softmax", "model.layers=4"))
    assert remat.activations < whole.activations / 2


def test_memory_of_a_device_is_shared_over_the_mesh():
    one, many = (counted(small(), n, f) for n, f in ((1, 1), (8, 2)))
    assert many.activations == one.activations // 8
    assert many.fixed == one.fixed // 2
    heads = counted(small(), 1, 1, 2)
    kernels = 2 * (4 * 32 * 32 + 3 * 32 * 128)
    assert one.fixed - heads.fixed == 4 * 4 * kernels // 2  # gradients and two moments too


def test_the_plan_of_a_mesh_that_splits_sequences_names_who_gathers_them(corpus, capsys):
    mesh = "mesh=data:2,seq:4"
    plan(small("softmax+strided", corpus, mesh))
    out = capsys.readouterr().out
    assert "strided has no sequence-parallel form" in out
    assert "softmax has" not in out
    with pytest.raises(UserError, match=r"use task.length=36, or seq:2"):
        plan(small("softmax", corpus, mesh, "task.length=34"))


def test_window_keeps_no_more_activations_than_softmax():
    long = ("task.length=512", "task.batch=1")
    window, softmax = (counted(small(a, *long)) for a in ("window", "softmax"))
    assert window.activations <= softmax.activations


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    (tmp_path / "book.txt").write_bytes(b"and it came to pass. " * 2000)
    return f"task.corpus=text:{tmp_path}/*.txt"


def test_the_plan_is_printed_without_compiling(corpus, capsys):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    plan(small("window+softmax", corpus))
    assert not compiled
    jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    assert compiled, "the listener hears compilations"
    out = capsys.readouterr().out
    shares = "window (1 x)", "softmax (1 x)"
    for word in ("parameters", "FLOPs", *shares, "decoding", "memory", "1,000 of 8 x 32", "epochs"):
        assert word in out
    assert "warning" not in out


def test_what_no_device_can_hold_is_refused(corpus, capsys, monkeypatch):
    monkeypatch.setattr(planning, "device_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"lower model\.width"):
        plan(small("softmax", corpus))
    monkeypatch.setattr(planning, "device_memory", lambda: 1_000_000)
    plan(small("softmax", corpus))
    assert "warning" in capsys.readouterr().out


def test_a_plan_is_made_without_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    for tokenizer, ids in (("bytes", 257), ("bpe:300", 300)):
        plan(small("softmax", "task.corpus=enwik8", f"task.tokenizer={tokenizer}"))
        out = capsys.readouterr().out
        assert "missing: corpus enwik8 is on no package index" in out
        assert f"embedding {32 * ids:,}" in out
    with pytest.raises(UserError, match="no tokenizer 'byte'"):
        plan(small("softmax", "task.corpus=enwik8", "task.tokenizer=byte"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1234, "1.23 k"), (999_900, "1 M"), (29.51e6, "29.5 M")],
)
def test_numbers_have_three_digits_and_a_prefix(number, text):
    assert planning._si(number) == text
