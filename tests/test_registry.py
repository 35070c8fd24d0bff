"""The registry: file names are keys, listing imports nothing, a user's file is as good as ours."""

import subprocess
import sys
import textwrap

import pytest

from attnlab.errors import UserError
from attnlab.registry import Registry, register


class Base:
    pass


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package with two entries, a helper, a private file, and a file that explodes."""
    package = f"shelf_{tmp_path.name}"
    root = tmp_path / package
    root.mkdir()
    (root / "__init__.py").write_text("")
    entry = "from attnlab.registry import register\n@register\nclass {}: pass\n"
    (root / "window.py").write_text(entry.format("Window"))
    (root / "none.py").write_text(entry.format("Nothing"))
    (root / "helper.py").write_text("import attnlab\n")
    (root / "_private.py").write_text(entry.format("Private"))
    (root / "broken.py").write_text("raise ImportError('stop')\n" + entry.format("Broken"))
    monkeypatch.syspath_prepend(tmp_path)
    return Registry(package)


def test_names_are_the_files_with_a_decorator_and_none_is_imported(shelf):
    assert shelf.names() == ("broken", "none", "window")


def test_get_returns_what_the_file_registered(shelf):
    assert shelf.get("window").__name__ == "Window"
    assert shelf.get("none").__name__ == "Nothing"
    assert shelf.get("window") is shelf.get("window")


def test_unknown_name_is_one_line_with_the_nearest_name(shelf):
    with pytest.raises(UserError, match=r"'windw'; did you mean 'window'\? \(`attnlab list`"):
        shelf.get("windw")
    for helper in ("helper", "_private"):
        with pytest.raises(UserError, match="unknown"):
            shelf.get(helper)


def test_an_error_inside_our_own_file_is_not_hidden(shelf):
    with pytest.raises(ImportError, match="stop"):
        shelf.get("broken")


def test_one_file_registers_one_thing():
    class First: ...

    class Second: ...

    First.__module__ = Second.__module__ = "somewhere"
    assert register(First) is First
    assert register(First) is First
    with pytest.raises(TypeError, match="one a file"):
        register(Second)


def test_base_is_enforced(shelf):
    with pytest.raises(UserError, match=r"Window is not a .*derive it from .*Base"):
        Registry(shelf.package, Base).get("window")


def test_a_file_of_the_users_own_is_loaded_once_and_announced(shelf, tmp_path, capfd):
    mine = tmp_path / "mine.py"
    mine.write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from attnlab.registry import register
        @register
        @dataclass(frozen=True)
        class Mine:
            size: int = 3
        """)
    )
    assert shelf.get(str(mine))() == shelf.get(str(mine))()
    assert capfd.readouterr().err.count(f"loaded from {mine}") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such .* file"),
        ("x = 1\n", "no class is decorated"),
        ("def f(:\n", r"mine\.py:1: cannot import: SyntaxError"),
        ("import no_such_module\n", "cannot import: ModuleNotFoundError"),
    ],
)
def test_a_bad_file_of_the_users_is_one_line(shelf, tmp_path, source, message):
    mine = tmp_path / "mine.py"
    if source is not None:
        mine.write_text(source)
    with pytest.raises(UserError, match=message) as error:
        shelf.get(str(mine))
    assert "\n" not in str(error.value)


def test_the_registry_does_not_start_jax():
    code = (
        "import sys; from attnlab.registry import Registry; "
        "Registry('attnlab.mechanisms').names(); Registry('attnlab.tasks').names(); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
