"""The arithmetic of attention: a mechanism says which keys a query may see, an engine does it."""

import functools
import logging

import jax

log = logging.getLogger(__name__)


@functools.cache
def report_use(engine: str, backend: str) -> None:
    """Says on the log, once a process, that an engine was compiled in, and with which kernels."""
    log.info("attention engine: %s (%s, %s)", engine, backend, jax.default_backend())
