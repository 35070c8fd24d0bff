"""What is said of the machine that a number comes from."""

import platform

import pytest

from attnlab.provenance import describe_processor


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (
            "processor : 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx avx2 avx512f\n",
            "AMD EPYC, avx512f",
        ),
        ("model name: Old\nflags: sse\n\nmodel name: Other\nflags: avx2\n", "Old"),
        ("Features : fp asimd sve\n", "sve"),
    ],
)
def test_a_processor_is_known_by_its_first_core(tmp_path, monkeypatch, info, said):
    monkeypatch.setattr(platform, "machine", lambda: "here")
    monkeypatch.setattr(platform, "processor", lambda: "")
    (tmp_path / "cpuinfo").write_text(info)
    assert describe_processor(tmp_path / "cpuinfo") == f"here, {said}"


def test_a_system_without_that_file_says_what_python_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert describe_processor(tmp_path / "none") == "arm64, arm"
