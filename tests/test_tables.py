"""The data commands print what is there."""

from attnlab.data.corpora import CORPORA
from attnlab.data.tables import run_get, run_info, run_list


def test_the_list_names_every_corpus_and_its_licence(capsys):
    run_list()
    shown = capsys.readouterr().out
    for name, source in CORPORA.items():
        assert name in shown
        assert source.licence in shown
    assert "text:GLOB" in shown
    assert "tfds:NAME" in shown


def test_get_prepares_and_info_shows_splits_and_compressors(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"some words " * 20)
    run_get(f"text:{tmp_path}/*.txt")
    assert "1,100 bytes" in capsys.readouterr().out
    run_info(f"text:{tmp_path}/*.txt")
    shown = capsys.readouterr().out
    assert "licence: the user's own" in shown
    assert "validation" in shown
    assert "xz -9e" in shown
