"""The walls of docs/design.md: who may import whom, read off the sources."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "attnlab"
LAZY = ("tensorflow_datasets", "grain", "orbax", "matplotlib", "tensorboardX", "tokenizers")
FOUNDATION = ("core", "registry", "errors", "products", "refusals")


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name inside the package -> its source, parsed."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def imports(tree: ast.AST) -> tuple[str, ...]:
    """Dotted names of everything imported anywhere in a source; ours without ``attnlab.``"""
    return tuple(name.removeprefix("attnlab.") for name in full_names(tree))


def full_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def ours(tree: ast.AST) -> list[str]:
    """Imports of our own rooms."""
    rooms = tuple({name.partition(".")[0] for name in modules()})
    return [name for name in imports(tree) if within(name, rooms)]


def check(room: str, allowed: tuple[str, ...]) -> None:
    for name, tree in modules().items():
        if within(name, (room,)):
            strange = [other for other in ours(tree) if not within(other, allowed)]
            assert not strange, f"{name} imports {strange}"


def test_core_knows_only_the_registry_and_products():
    check("core", ("registry", "products"))


def test_engines_know_no_mechanism():
    check("engines", (*FOUNDATION, "engines"))


def test_mechanisms_positions_and_normalisers_do_not_know_each_other_nor_the_model():
    check("mechanisms", (*FOUNDATION, "combination", "engines", "mechanisms"))
    check("positions", (*FOUNDATION, "positions"))
    check("normalisers", (*FOUNDATION, "engines.ranks", "normalisers"))


def test_the_model_knows_neither_config_nor_data():
    check("model", FOUNDATION)


def test_data_and_tasks_know_no_model_and_no_jax():
    check("data", ("data", "tasks", "errors", "files", "literals", "manifest", "registry"))
    check("tasks", ("data", "tasks", "errors", "files", "literals", "manifest", "registry"))
    for name, tree in modules().items():
        if within(name, ("data", "tasks")):
            assert not [other for other in imports(tree) if within(other, ("jax", "flax"))], name


def test_only_the_model_imports_linen():
    importing = [n for n, tree in modules().items() if any(map(is_flax, imports(tree)))]
    assert importing == ["model"]


def is_flax(name: str) -> bool:
    return within(name, ("flax",))


def test_heavy_packages_are_imported_inside_functions():
    eager = {}
    for name, tree in modules().items():
        outer = ast.Module([node for node in tree.body if not is_scope(node)], [])
        eager[name] = [other for other in imports(outer) if within(other, LAZY)]
    # The class derives from one of TFDS, so that its module is imported inside a function.
    assert eager.pop("data.builder")
    assert not {name: found for name, found in eager.items() if found}


def is_scope(node: ast.stmt) -> bool:
    """A function, a class, or the part that only a type checker reads."""
    checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return checked or isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_no_tensorflow_torch_or_pickle():
    for name, tree in modules().items():
        refused = ("tensorflow", "torch", "pickle", "cloudpickle", "dill")
        assert not [other for other in imports(tree) if within(other, refused)], name
