"""What ``attnlab data list | get NAME | info NAME`` prints."""

from attnlab.data.corpora import CORPORA, Corpus, Placed
from attnlab.data.labelled import LABELLED, open_labelled
from attnlab.data.places import data_dir
from attnlab.tasks.text import open_text


def run_list() -> None:
    """Every corpus and labelled set, where it comes from and its licence."""
    rows = [("corpus", "source", "licence", "what")]
    for name, source in [*CORPORA.items(), *LABELLED.items()]:
        origin = "this environment"
        if isinstance(source, Placed):
            origin = source.address.rpartition("/")[2]
        elif isinstance(source, Corpus):
            origin = f"{source.archive.distribution} {source.archive.version}"
        labelled = "labelled: " * (name in LABELLED)
        rows.append((name, origin, source.licence, labelled + source.description))
    rows.append(("text:GLOB", "own files", "your own", "every matching file is one document"))
    rows.append(("tfds:NAME", "TFDS", "the set's own", "a set prepared in ArrayRecord format"))
    print_table(rows)
    print(f"\nkept in {data_dir()} (ATTNLAB_DATA)")


def run_get(name: str) -> None:
    """Fetch and prepare a corpus or a labelled set, so that later runs need no network."""
    if name in LABELLED:
        splits = open_labelled(name).splits.values()
        print(f"{name} is ready: {sum(map(len, splits)):,} labelled rows")
        return
    text = open_text(name)
    print(f"{name} is ready: {sum(s.size for s in text.splits.values()):,} bytes")


def run_info(name: str) -> None:
    """Licence, checksum and splits of a corpus, and what compressors make of its test split; of a
    labelled set, how many rows each class has."""
    if name in LABELLED:
        show_classes(name)
        return
    from attnlab.data.compress import baselines

    text = open_text(name)
    for field in ("corpus", "description", "licence", "sha256"):
        print(f"{field}: {text.about[field]}")
    for note in text.about["notes"]:
        print(f"note: {note}")
    rows = [("split", "documents", "bytes", "first documents")]
    for split, part in text.splits.items():
        first = ", ".join(part.documents[:5]) + (", ..." if len(part.documents) > 5 else "")
        rows.append((split, f"{len(part.documents):,}", f"{part.size:,}", first))
    print()
    print_table(rows)
    rows = [("test, bits per byte", "alone", "after train")]
    for compressor, bits in baselines(text).items():
        rows.append((compressor, f"{bits['alone']:.3f}", f"{bits['after_train']:.3f}"))
    print()
    print_table(rows)


def show_classes(name: str) -> None:
    """What is known of a labelled set, and its rows by split and class."""
    found = open_labelled(name)
    for field in ("source", "description", "licence", "duplicates left out"):
        print(f"{field}: {found.about[field]}")
    rows = [("split", "rows", "longest", *found.classes)]
    for split, part in found.splits.items():
        counts = (f"{(part.labels == i).sum():,}" for i in range(len(found.classes)))
        rows.append((split, f"{len(part):,}", f"{part.longest:,}", *counts))
    print()
    print_table(rows)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns padded to their widest cell, the last one left as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        # File names that are not Unicode cannot be printed as they are.
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip().encode("utf-8", "replace").decode())
