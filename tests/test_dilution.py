"""The statistics of attention rows are those of the weights themselves, whatever normalises them,
and a run is measured by what its layers attend to."""

import csv
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import saved_state, tiny, trained
from weighing import RULES, densely, rule_of, tokens

from attnlab.analysis.dilution import NAMES, SINKS, TOP, measure_rows
from attnlab.analysis.logged import FORM, KEY, LOGGED, history
from attnlab.analysis.margins import FORMS, among, build, sweep, weight
from attnlab.analysis.observed import (
    ALL,
    OWN,
    Observed,
    by_head,
    cut,
    measure_layers,
    observe,
    own_rule,
)
from attnlab.config import mechanisms_of, model_of
from attnlab.core import Rule, mechanisms, normalisers
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.main import main
from attnlab.metrics import read_metrics
from attnlab.runs import open_run
from attnlab.step import init_params
from attnlab.tasks.text import Evaluated
from attnlab.train import train

measured = jax.jit(measure_rows.__wrapped__, static_argnames=("tile",))


def oracle(probs: np.ndarray, seen: np.ndarray, k_pos: np.ndarray, matters: np.ndarray):
    """The definitions, on dense weights [B H N M] in f64."""
    p = probs.astype(np.float64)
    total = p.sum(-1)
    s = p / np.where(total > 0, total, 1)[..., None]
    visible = np.broadcast_to(seen.sum(-1), total.shape)
    entropy = -(s * np.log(np.where(s > 0, s, 1))).sum(-1)
    square = (s * s).sum(-1)
    asked = (k_pos[:, None, :, None] == matters[:, :, None]).any(-1)[:, None]
    even = np.where(visible > 1, entropy / np.log(np.maximum(visible, 2)), 1)
    return {
        "visible": visible,
        "total": total,
        "entropy": entropy,
        "participation": np.where(square > 0, 1 / np.where(square > 0, square, 1), 0),
        "largest": p.max(-1),
        "leading": np.sort(p, -1)[..., -TOP:].sum(-1),
        "sink": (p * (k_pos < SINKS)[:, None, None]).sum(-1),
        "signal": (p * asked).sum(-1),
        "support": np.where(visible > 0, np.exp(entropy), 0),
        "evenness": even,
    }


@pytest.mark.parametrize("name", RULES)
def test_statistics_are_those_of_the_dense_weights(name):
    rule = rule_of(name)
    queries, keys = tokens(23, 29)
    matters = jnp.stack([queries.pos // 2, queries.pos - 1], -1)
    rows = measured(queries, keys, rule, matters, tile=8)
    probs = np.asarray(densely(queries, keys, rule))
    seen = np.asarray(rule.allowed(queries, keys))[:, None]
    expected = oracle(probs, seen, np.asarray(keys.pos), np.asarray(matters))
    for field, found in rows.named().items():
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected[field], rtol=2e-5, atol=3e-6, err_msg=field)
    np.testing.assert_allclose(rows.noise, rows.total - rows.signal)


def test_tiles_make_no_difference():
    queries, keys = tokens(23, 29)
    for rule in (Rule(), Rule(normaliser=build("sparsemax", 16))):
        one, other = (measured(queries, keys, rule, tile=tile) for tile in (4, None))
        for a, b in zip(one, other):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_not_seen_counts_nothing():
    queries, keys = tokens(23, 29)
    later = jnp.arange(29)[None] > 15
    noisy = keys._replace(k=jnp.where(later[..., None, None], 1e15, keys.k))
    one, other = (measured(queries, k, Rule(), tile=8) for k in (keys, noisy))
    for a, b in zip(one, other):
        assert (np.asarray(a)[..., :10] == np.asarray(b)[..., :10]).all()
    empty = keys._replace(seg=jnp.full_like(keys.seg, -1))
    for rule in (Rule(), Rule(normaliser=build("sigmoid", 16))):
        rows = measured(queries, empty, rule)
        assert all((np.asarray(z) == 0).all() for z in (*rows, rows.support))


@pytest.mark.parametrize("name", ["softmax", "sparsemax"])
def test_equal_logits_give_as_many_as_there_are(name):
    N = 70
    queries, keys = tokens(N, N, B=1)
    queries = queries._replace(q=queries.q * 0, pos=jnp.arange(N)[None], seg=queries.seg * 0)
    keys = keys._replace(k=jnp.ones_like(keys.k), pos=queries.pos, seg=queries.seg)
    rows = measured(queries, keys, Rule(normaliser=build(name, 16)), tile=16)
    n = np.arange(1, N + 1, dtype=np.float64)
    for field, expected in {
        "visible": n,
        "entropy": np.log(n),
        "support": n,
        "participation": n,
        "evenness": np.ones(N),
        "largest": 1 / n,
        "leading": np.minimum(1, TOP / n),
        "sink": np.minimum(1, SINKS / n),
    }.items():
        found = np.asarray(getattr(rows, field))[0, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=field)


MARGINS = (0.5, 1.5, 4.0, 8.0)
LENGTHS = (2, 16, 1000, 4096)


@pytest.mark.parametrize("name", normalisers.names())
def test_one_key_keeps_what_the_closed_form_says(name):
    normaliser = build(name, 256)
    for n in LENGTHS:
        found = among(normaliser, n, np.zeros((1, LENGTHS[-1]), np.float32), MARGINS).signal
        expected = [weight(name, normaliser, margin, n) for margin in MARGINS]
        np.testing.assert_allclose(np.asarray(found)[:, 0, 0], expected, atol=2e-6)
    assert name in FORMS


def test_softmax_keeps_its_form_among_a_million_keys():
    n = 2**20
    found = among(build("softmax", 256), n, np.zeros((1, n), np.float32), (4.0, 14.0)).signal
    expected = [math.exp(m) / (math.exp(m) + n - 1) for m in (4.0, 14.0)]
    np.testing.assert_allclose(np.asarray(found)[:, 0, 0], expected, atol=1e-6)


def test_noise_counts_as_more_keys_and_the_support_of_noise_is_a_share_of_them():
    rivals = np.random.default_rng(0).standard_normal((32, 4096)).astype(np.float32)
    softmax = build("softmax", 256)
    rows = among(softmax, 4096, rivals, (4.0,))
    expected = weight("softmax", softmax, 4.0, 4096, 1.0)
    assert expected == pytest.approx(0.0080, abs=5e-5)
    assert float(jnp.mean(rows.signal)) == pytest.approx(expected, rel=0.05)
    share = float(jnp.mean(among(softmax, 4096, rivals, (0.0,)).support)) / 4096
    assert share == pytest.approx(math.exp(-1 / 2), abs=0.01)


def test_softmax_loses_what_ssmax_wins_above_its_threshold():
    def kept(name: str, margin: float) -> list[float]:
        rows = sweep([name], (16, 64, 256, 1024), (margin,), (0.0,), samples=1)
        return [row["signal"] for row in rows]

    threshold = math.log(256)
    assert kept("softmax", 8.0) == sorted(kept("softmax", 8.0), reverse=True)
    assert kept("ssmax", 1.1 * threshold) == sorted(kept("ssmax", 1.1 * threshold))
    assert kept("ssmax", 0.9 * threshold) == sorted(kept("ssmax", 0.9 * threshold), reverse=True)
    assert all(p == pytest.approx(0.5, abs=0.04) for p in kept("ssmax", threshold))
    assert kept("sparsemax", 1.0) == [1.0] * 4


@pytest.mark.parametrize("name", ["window", "strided", "fixed"])
def test_a_layer_is_measured_over_the_keys_that_it_attends_to(name):
    mechanism = mechanisms.get(name).examples()[-1]
    queries, keys = tokens(29, 29)

    @jax.jit
    def both(queries, keys):
        result = Observed(mechanism)({}, queries, keys, Rule())
        return result, mechanism.reference({}, queries, keys, Rule())

    result, reference = both(queries, keys)
    assert Observed(mechanism).over == OWN
    np.testing.assert_allclose(result.out, reference.out, rtol=1e-4, atol=1e-5)
    expected = np.asarray(reference.aux["probs"]).max(-1)
    np.testing.assert_allclose(result.aux["observed"].largest, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_without_such_keys_says_so():
    linear = mechanisms.get("linear")()
    assert own_rule(linear, Rule()) is None
    assert Observed(linear).over == ALL


class Documents:
    """Held-out documents of 50, 20 and 90 tokens."""

    boundary = 256

    def documents(self):
        draw = np.random.default_rng(0)
        for size in (50, 20, 90):
            yield Evaluated("", draw.integers(256, size=size).astype(np.int32), size, 0)


def batches(length: int, windows: int, batch: int = 2) -> list[dict]:
    task = Documents()
    return list(cut(task.documents(), task.boundary, length, windows, batch))


def test_windows_are_as_many_as_asked_for():
    for asked, found in ((1, 1), (3, 3), (99, 6)):
        cutting = batches(32, asked)
        assert all(batch["tokens"].shape == (2, 32) for batch in cutting)
        assert sum(int((b["seg"] >= 0).any(1).sum()) for b in cutting) == found


def test_queries_are_counted_by_the_keys_in_sight():
    config = tiny("model.layers=2", "attention.window.window=4", attention="window+softmax")
    model = model_of(config, ByteTokenizer().vocab_size)
    params = init_params(model, 0)
    rows = measure_layers(model, params, batches(32, 4))
    heads = config.model.heads
    assert {row["keys"] for row in rows} == {OWN}
    lows = {
        layer: [r["low"] for r in rows if (r["layer"], r["head"]) == (layer, 0)] for layer in (0, 1)
    }
    assert lows == {0: [1, 2, 4], 1: [1, 2, 4, 8, 16, 32]}
    queries = sum(int((b["seg"] >= 0).sum()) for b in batches(32, 4))
    for layer in range(2):
        assert sum(r["queries"] for r in rows if r["layer"] == layer) == queries * heads
    first = [row for row in rows if row["low"] == 1]
    assert all(row["largest"] == pytest.approx(1) and row["visible"] == 1 for row in first)
    assert all(row["low"] <= row["visible"] < row["high"] for row in rows)
    seeing = observe(model)
    assert jax.tree.structure(init_params(seeing, 0)) == jax.tree.structure(params)
    assert mechanisms_of(config) == model.mechanisms


def read(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_normalisers_are_compared_by_the_command(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert main(["dilution", f"--out={out}", "--length=32", "--samples=2"]) == 0
    assert "sparsemax" in capsys.readouterr().out
    rows = read(out / "margins.csv")
    assert len(rows) == len(normalisers.names()) * 2 * 2 * 2
    assert set(NAMES) < set(rows[0])
    assert {row["n"] for row in rows} == {"16", "32"}
    assert (out / "margins.png").stat().st_size > 10_000


def test_a_run_is_looked_into_by_the_command(tmp_path, capsys):
    path = shutil.copytree(trained("window"), tmp_path / "run")
    assert main(["dilution", f"--workdir={path}", "--samples=3"]) == 0
    assert "its own" in capsys.readouterr().out
    rows = read(path / "dilution" / "layers.csv")
    assert [row["low"] for row in rows if row["head"] == "0"] == ["1", "2", "4"]
    assert {row["layer"] for row in rows} == {"0"}
    for picture in ("layers.png", "heads.png"):
        assert (path / "dilution" / picture).stat().st_size > 5_000
    assert json.loads((path / "config.json").read_text())["attention"]["window"] == 4


def test_a_run_that_is_watched_learns_the_same(tmp_path):
    """Scalars of every layer and head at every rest, over the devices as on one; nothing else."""
    config, path = tiny("train.dilution_every=6"), tmp_path / "run"
    assert train(config, path, ["attnlab", "train"]) == 0
    assert saved_state(path, config) == saved_state(trained(), tiny())
    rows = [row for row in read_metrics(path / "metrics.jsonl") if any(map(FORM.fullmatch, row))]
    assert [row["step"] for row in rows] == [6, 12]
    run = open_run(path)
    task = run.task()
    cutting = cut(task.documents("validation"), task.boundary, 32, 8, 8)
    wanted = by_head(measure_layers(run.model, run.params, cutting), "entropy")
    found = [rows[-1][KEY.format(name="entropy", layer=0, head=head)] for head in range(2)]
    np.testing.assert_allclose(found, wanted[0], rtol=1e-4)
    assert {name: len(history(rows, name)[0][12]) for name in LOGGED} == dict.fromkeys(LOGGED, 2)
    assert (path / "dilution.png").stat().st_size > 10_000
    assert "How attention spreads" in (path / "report.html").read_text()
    assert "How attention spreads" not in (trained() / "report.html").read_text()


@pytest.mark.parametrize(
    "wrong",
    [["--length=8"], ["--samples=0"], ["--seed=-1"], ["--step=3"], ["--workdir=x", "--seed=1"]],
)
def test_what_has_no_meaning_is_refused(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["dilution", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["dilution", f"--out={tmp_path / 'file' / 'x'}", "--length=16"]) == 3
    assert "cannot write in" in capsys.readouterr().err
