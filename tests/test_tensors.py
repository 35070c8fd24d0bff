"""Files of arrays: what is written is read to the bit, and no bytes do any harm."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.errors import AttnlabError, DataError, UserError
from attnlab.tensors import HEADER, TYPES, open_tensors, parse_header, write_tensors

ARRAYS = {
    "layer.kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.scale": np.array([1.5, -2], ml_dtypes.bfloat16),
    "count": np.array(7, np.int32),
    "empty": np.zeros((0, 4), np.float16),
    "mask": np.array([True, False, True]),
}
PLAIN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(path, header, data=b"\0" * 8, length=None):
    """A file with that header, an object or bytes, and a length that may lie."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def test_arrays_of_every_type_come_back_to_the_bit(path):
    arrays = {kind: np.arange(6).reshape(3, 2).astype(dtype) for kind, dtype in TYPES.items()}
    arrays |= ARRAYS
    write_tensors(path, arrays, {"step": "3", "said": "ä \n \u2028"})
    source = open_tensors(path)
    source.check()
    assert source.metadata["said"] == "ä \n \u2028"
    assert source.specs.keys() == arrays.keys()
    for name, array in arrays.items():
        back = source.read(name)
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        assert back.tobytes() == array.tobytes()
    assert source.start % 8 == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_package_reads_what_is_written_and_the_other_way_round(path):
    arrays = {name: array for name, array in ARRAYS.items() if name != "layer.scale"}
    write_tensors(path, arrays, {"step": "3"})
    theirs = safetensors.load_file(path)
    safetensors.save_file(arrays, path, {"step": "3"})
    source = open_tensors(path)
    for name, array in arrays.items():
        assert theirs[name].tobytes() == array.tobytes() == source.read(name).tobytes()
        assert theirs[name].dtype == array.dtype == source.read(name).dtype
    assert source.metadata == {"step": "3"}


HOSTILE = {
    "a length of 2^63": ({}, b"", 2**63),
    "a length beyond the end": ({}, b"", 3),
    "a long header": (b"{" + b" " * HEADER + b"}", b"", None),
    "no object": ([1], b"", None),
    "no JSON": (b"{x", b"", None),
    "no text": (b'{"\xff": 1}', b"", None),
    "a byte order mark": (b"\xef\xbb\xbf{}", b"", None),
    "nested deep": (b'{"a":' + b"[" * 200_000, b"", None),
    "a number of many digits": (b'{"a":' + b"9" * 100_000 + b"}", b"", None),
    "a name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(PLAIN).encode(),) * 2), b"\0" * 8, None),
    "a key twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", None),
    "metadata that are numbers": ({"__metadata__": {"step": 3}}, b"", None),
    "metadata that are a list": ({"__metadata__": []}, b"", None),
    "an entry that is a list": ({"a": []}, b"", None),
    "an entry that lacks something": ({"a": {"dtype": "F32", "shape": [2]}}, b"", None),
    "an entry that has more": ({"a": PLAIN | {"path": "x"}}, b"\0" * 8, None),
    "an unknown type": ({"a": PLAIN | {"dtype": "F31"}}, b"\0" * 8, None),
    "a type that is a list": ({"a": PLAIN | {"dtype": ["F32"]}}, b"\0" * 8, None),
    "a negative dimension": ({"a": PLAIN | {"shape": [-2]}}, b"\0" * 8, None),
    "half a dimension": ({"a": PLAIN | {"shape": [2.0]}}, b"\0" * 8, None),
    "a true dimension": ({"a": PLAIN | {"shape": [2, True]}}, b"\0" * 8, None),
    "dimensions that overflow": ({"a": PLAIN | {"shape": [2**33, 2**33]}}, b"\0" * 8, None),
    "a product of 2^64": ({"a": PLAIN | {"shape": [2**32, 2**32, 0]}}, b"\0" * 8, None),
    "many dimensions": ({"a": PLAIN | {"shape": [2] + [1] * 90}}, b"\0" * 8, None),
    "bytes that the shape lacks": ({"a": PLAIN | {"shape": [3]}}, b"\0" * 8, None),
    "offsets that run back": ({"a": PLAIN | {"data_offsets": [8, 0]}}, b"\0" * 8, None),
    "an end beyond the file": ({"a": PLAIN | {"data_offsets": [8, 16]}}, b"\0" * 8, None),
    "three offsets": ({"a": PLAIN | {"data_offsets": [0, 8, 8]}}, b"\0" * 8, None),
    "arrays that overlap": ({"a": PLAIN, "b": PLAIN}, b"\0" * 8, None),
    "a gap": ({"a": PLAIN | {"data_offsets": [4, 12]}}, b"\0" * 12, None),
    "bytes at the end": ({"a": PLAIN}, b"\0" * 9, None),
    "a name that moves the cursor": ({"a\x1b[2J\n": PLAIN}, b"\0" * 8, None),
    "half a character": (b'{"\\ud800":%s}' % json.dumps(PLAIN).encode(), b"\0" * 8, None),
    "no name": ({"": PLAIN}, b"\0" * 8, None),
    "a long name": ({"a" * 600: PLAIN}, b"\0" * 8, None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_not_sound_is_one_line_and_exit_3(path, what):
    header, data, length = HOSTILE[what]
    with pytest.raises(DataError) as error:
        open_tensors(file_of(path, header, data, length))
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))


def test_the_smallest_sound_file_is_read(path):
    assert open_tensors(file_of(path, {}, b"")).specs == {}
    assert open_tensors(file_of(path, {"a": PLAIN})).read("a").tolist() == [0, 0]


@pytest.mark.parametrize("size", range(10))
def test_a_file_cut_short_is_refused(path, size):
    write_tensors(path, ARRAYS, {})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * size // 10])
    with pytest.raises(DataError):
        open_tensors(path)


def test_no_flipped_bit_goes_unseen(path):
    write_tensors(path, ARRAYS, {"step": "3"})
    content, unseen = path.read_bytes(), []
    for place in range(len(content)):
        path.write_bytes(bytes(b ^ (i == place) for i, b in enumerate(content)))
        try:
            flipped = open_tensors(path)
            flipped.check()
        except DataError:
            continue
        unseen.append(flipped)
    # Only where the digest itself lost its name, and then nothing else changed.
    assert len(unseen) <= len("sha256")
    assert not any("sha256" in flipped.metadata for flipped in unseen)


def test_a_boolean_that_is_neither_is_refused(path):
    entry = {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}
    with pytest.raises(DataError, match="neither true nor false"):
        open_tensors(file_of(path, {"a": entry}, b"\2" * 8)).read("a")


def test_a_file_that_shrinks_after_it_was_opened_is_seen(path):
    source = open_tensors(file_of(path, {"a": PLAIN}))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="shorter"):
        source.read("a")


@pytest.mark.parametrize("name", ["w.pt", "w.PTH", "w.pkl", "w.bin", "w.ckpt"])
def test_a_pickle_is_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    with pytest.raises(UserError, match="runs when it is read"):
        open_tensors(tmp_path / name)


def test_what_is_no_file_is_the_mistake_of_who_typed_it(tmp_path, path):
    write_tensors(path, {}, {})
    with pytest.raises(UserError, match=r"did you mean .*weights\.safetensors"):
        open_tensors(tmp_path / "wieghts.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="no file"):
        open_tensors(tmp_path / "folder.safetensors")
    with pytest.raises(UserError, match="only files that end in"):
        open_tensors(tmp_path / "weights.npz")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**48, 2**63, 2**64 - 1, 10**30])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*TYPES, "F4", ""]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


def sound_or_refused(header: bytes, size: int) -> None:
    """What is not refused lies within the data, end to end."""
    try:
        specs, metadata = parse_header(header, size)
    except (ValueError, RecursionError):
        return
    assert all(type(text) is str for text in metadata.values())
    assert sum(spec.end - spec.begin for spec in specs.values()) == size
    for spec in specs.values():
        assert np.ndarray(spec.shape, spec.dtype, bytes(size), spec.begin).nbytes <= size


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=6), ENTRIES | JSON, max_size=3), st.integers(0, 64))
def test_no_header_harms(entries, size):
    sound_or_refused(json.dumps(entries).encode(), size)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_mutation_of_a_sound_file_harms(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    write_tensors(path, ARRAYS, {"step": "3"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, min(begin + 20, len(content))))
        content[begin:end] = data.draw(st.binary(max_size=20))
    path.write_bytes(bytes(content))
    try:
        source = open_tensors(path)
        source.check()
        for name in source.specs:
            source.read(name)
    except AttnlabError:
        pass
