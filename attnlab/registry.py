"""A file name is a key: ``attnlab/mechanisms/window.py`` is the mechanism ``window``.

A file enters its registry by decorating one class or function with `@register`; there is no table
to keep in step. Listing reads directories and never imports a candidate, so that the command line
can name every mechanism without starting jax. A key that ends in ``.py`` is the path of a file of
the user's own, which needs nothing but the same decorator.
"""

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from attnlab.errors import UserError, did_you_mean

T = TypeVar("T")

_registered: dict[str, Any] = {}
_DECORATED = re.compile(r"^@register\b", re.MULTILINE)


def register(thing: T) -> T:
    """Makes a class or function the one thing that its file offers under the file's name.

    Raises `TypeError` when the file has registered another: one file is one idea.
    """
    module: str = thing.__module__
    other = _registered.get(module)
    if other is not None and other.__qualname__ != getattr(thing, "__qualname__", None):
        raise TypeError(f"{module} registers both {other.__qualname__} and {thing!r}; one a file")
    _registered[module] = thing
    return thing


class Registry(Generic[T]):
    """The registered things of one package, each of them a subclass of `base` (if it is given)."""

    def __init__(self, package: str, base: type[T] | None = None):
        self.package = package
        self.base = base
        self.kind = package.rpartition(".")[2].removesuffix("s")

    def names(self) -> tuple[str, ...]:
        """Sorted file names that hold an `@register`; nothing is imported but the package."""
        return _offered(tuple(importlib.import_module(self.package).__path__))

    def get(self, name: str) -> Any:
        """What the file of that name registered; the file is imported at the first call.

        Raises `UserError` for an unknown name, a missing path, or a user's file that cannot be
        imported or registers nothing of this registry's kind.
        """
        if name.endswith(".py"):
            return self._checked(_load(name, self.kind), name)
        if name not in self.names():
            hint = did_you_mean(name, self.names())
            raise UserError(f"unknown {self.kind} {name!r}; {hint} (`attnlab list` shows all)")
        return self._checked(importlib.import_module(f"{self.package}.{name}"), name)

    def _checked(self, module: ModuleType, name: str) -> Any:
        thing = _registered.get(module.__name__)
        if thing is None:
            raise UserError(f"{name}: no class is decorated with @register")
        if self.base and not (isinstance(thing, type) and issubclass(thing, self.base)):
            raise UserError(
                f"{name}: {thing.__qualname__} is not a {self.kind}; "
                f"derive it from {self.base.__module__}.{self.base.__qualname__}"
            )
        return thing


@cache
def _offered(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(m.name for m in pkgutil.iter_modules(paths) if _offers(m)))


def _offers(module: pkgutil.ModuleInfo) -> bool:
    if module.name.startswith("_"):
        return False
    spec = module.module_finder.find_spec(module.name, None)
    source = getattr(spec and spec.loader, "get_source", lambda _: None)(module.name)
    return source is not None and bool(_DECORATED.search(source))


def _load(path: str, kind: str) -> ModuleType:
    """The module at `path`, imported once per process however often it is asked for."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"no such {kind} file: {path} (looked for {file})")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:12]
    name = f"attnlab_file_{digest}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        _registered.pop(name, None)
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        message = f"{path}{line}: cannot import: {type(error).__name__}: {error}"
        raise UserError(message.splitlines()[0]) from error
    print(f"attnlab: {kind} loaded from {path}", file=sys.stderr)
    return module
