"""What ``attnlab data list | get NAME | info NAME`` prints."""

from attnlab.data.corpora import CORPORA, Corpus
from attnlab.data.places import data_dir
from attnlab.tasks.text import open_text


def run_list() -> None:
    """Every corpus, where it comes from and its licence."""
    rows = [("corpus", "source", "licence", "what")]
    for name, source in CORPORA.items():
        archive = source.archive if isinstance(source, Corpus) else None
        origin = f"{archive.distribution} {archive.version}" if archive else "this environment"
        rows.append((name, origin, source.licence, source.description))
    rows.append(("text:GLOB", "own files", "your own", "every matching file is one document"))
    rows.append(("tfds:NAME", "TFDS", "the set's own", "a set prepared in ArrayRecord format"))
    print_table(rows)
    print(f"\nkept in {data_dir()} (ATTNLAB_DATA)")


def run_get(name: str) -> None:
    """Fetch and prepare a corpus, so that later runs need no network."""
    text = open_text(name)
    print(f"{name} is ready: {sum(s.size for s in text.splits.values()):,} bytes")


def run_info(name: str) -> None:
    """Licence, checksum and splits of a corpus, and what compressors make of its test split."""
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


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns padded to their widest cell, the last one left as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        # File names that are not Unicode cannot be printed as they are.
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip().encode("utf-8", "replace").decode())
