"""Several processes, on one machine or many, that train one run together.

Every process runs the same command and holds a part of the devices. Process 0 alone writes config,
log, metrics, report; all write their parts of a checkpoint. They meet in every step, so one that
leaves alone leaves the others waiting: whether to stop is asked of all (`Together`), and one that
fails ends at once, which the others notice (`leave`).
"""

import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from attnlab.errors import AttnlabError, PeerError, UserError
from attnlab.flags import Flag
from attnlab.signals import Signals
from attnlab.watchdog import Watchdog

T = TypeVar("T")

HOSTS = {
    "coordinator": Flag(
        "where process 0 can be reached; auto: the cluster says all", example="HOST:PORT"
    ),
    "num-processes": Flag("how many processes there are", int, "K"),
    "process-id": Flag("which of them this is, from 0", int, "I"),
    "initialization-timeout": Flag("seconds to wait until all are there (default 300)", int, "S"),
    "heartbeat-timeout": Flag("seconds of silence until one is given up (default 100)", int, "S"),
}
"""Flags of the commands that several processes can run."""

PLACE = ("coordinator", "num-processes", "process-id")
PEER = re.compile(
    r"gloo|nccl|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|connection|socket|peer|barrier"
    r"|coordination",
    re.IGNORECASE,
)
"""What a failed meeting says, whichever library it was held by."""

PATIENCE = 300  # seconds, where nothing else is said
REMEDY = (
    "start all processes with one --coordinator, and with a longer --initialization-timeout if "
    "they start far apart"
)

DONE, MADE, STOP = "attnlab/done", "attnlab/made", "attnlab/stop"
EVERY = 0.2  # seconds between two looks

_begun = False


def start(flags: dict[str, Any], environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes if ``flags`` (whose `HOSTS` are taken out) or the cluster say that
    there are any. Must precede the first use of a device.

    Raises `UserError` for flags that make no sense, `PeerError` when the others do not come.
    """
    global _begun
    given = {name: flags.pop(name) for name in HOSTS if name in flags}
    options = read(given, environ)
    if options is None:
        return
    need_port(options)
    import jax

    with suppress(AttributeError):  # versions without that choice
        jax.config.update("jax_enable_preemption_service", False)
    _begun = True  # from here on one that fails must not wait for the others
    seconds = options.get("initialization_timeout", PATIENCE)
    try:
        with Watchdog(seconds, lambda: REMEDY, f"{describe(options)} has not met the others"):
            # Where jax gives up itself, it does so with a page and SIGABRT.
            options["initialization_timeout"] = int(2 * seconds) + 120
            jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "process_id" in options:
            raise PeerError(
                f"{describe(options)} has not met the others: {reason}; {REMEDY}"
            ) from error
        raise UserError(
            f"no cluster was recognised: {reason}; say --coordinator, --num-processes, --process-id"
        ) from error
    # What jax has installed would only note the signal, for a service that nobody asks.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index() > 0:
        logging.getLogger("attnlab").setLevel(logging.WARNING)


def describe(options: Mapping[str, Any]) -> str:
    """Who is about to meet whom, for a line."""
    if "process_id" not in options:
        return "this process"
    index, address = options["process_id"], options["coordinator_address"]
    return f"process {index} of {options['num_processes']}, looking for {address},"


def need_port(options: Mapping[str, Any]) -> None:
    """Raises `UserError` where the port of process 0 is taken, of which jax would die."""
    if options.get("process_id") != 0:
        return
    address = options["coordinator_address"]
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"--coordinator={address}: cannot listen there: {error.strerror}; choose another port"
        ) from None


def read(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The options of `jax.distributed.initialize`; None where this process is alone.

    Without flags it is not when SLURM, Open MPI or GKE started several. Raises `UserError`.
    """
    options: dict[str, Any] = {}
    for name in ("initialization-timeout", "heartbeat-timeout"):
        if name in given:
            if given[name] < 1:
                raise UserError(f"--{name}={given[name]}: must be at least 1 second")
            seconds = "_seconds" * name.startswith("heartbeat")
            options[name.replace("-", "_") + seconds] = given[name]
    place = {name: given[name] for name in PLACE if name in given}
    if place == {"coordinator": "auto"}:
        return options
    if not place:
        return options if detect(environ) else None
    if missing := [f"--{name}" for name in PLACE if name not in place]:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in place)} without {' and '.join(missing)}; "
            "give all three, or --coordinator=auto alone"
        )
    address, count, index = (place[name] for name in PLACE)
    port = re.fullmatch(r"\S+:(\d{1,5})", address)
    if not port or not 0 < int(port[1]) < 2**16:
        raise UserError(f"--coordinator={address}: must be HOST:PORT, such as 10.0.0.1:1234")
    if not 0 <= index < count:
        raise UserError(
            f"--process-id={index}: must lie in 0..{count - 1}, as --num-processes={count}"
            if count > 0
            else f"--num-processes={count}: must be at least 1"
        )
    return options | {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def detect(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several that a cluster started: a step of SLURM (not the
    script around it), Open MPI, or the pods that GKE gives one TPU slice."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if environ.get(name, "").isdecimal() and int(environ[name]) > 1:
            return True
    return "," in environ.get("TPU_WORKER_HOSTNAMES", "")


def leave(code: int) -> int:
    """``code``, to exit with; in one of several processes, this ends it there and then.

    Python would first wait for the others to leave as well, who wait for this one. Their next
    meeting fails.
    """
    if _begun:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    return code


def agree(what: str, value: Any) -> None:
    """Raises `UserError`, in all processes, unless they all have the same JSON ``value``."""
    import jax

    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    found = gather(int.from_bytes(digest[:4], "big") >> 1)
    if strange := [index for index, other in enumerate(found) if other != found[0]]:
        raise UserError(
            f"{what} of process {strange[0]} differs from that of process 0; start all processes "
            "with the same command, code and data"
        )


def need_shared(path: Path) -> None:
    """Raises `UserError`, in all processes, where one does not see a file that process 0 wrote."""
    import jax

    if jax.process_count() == 1:
        return
    gather(0)  # it is written
    found = gather(int(path.exists()))
    if blind := [index for index, sees in enumerate(found) if not sees]:
        raise UserError(
            f"process {blind[0]} does not see {path}; the workdir must be a directory that all "
            "processes share"
        )


def in_turn(make: Callable[[], T]) -> T:
    """``make()``, by process 0 before the others, so that they find what it left on the disk."""
    import jax

    if jax.process_count() == 1:
        return make()
    if jax.process_index() == 0:
        made = make()
        _client().key_value_set(MADE, "", allow_overwrite=True)
        return made
    while _look(MADE) is None:
        time.sleep(EVERY)
    return make()


def gather(value: int) -> list[int]:
    """The int32 of every process, in order; all must call."""
    import numpy as np
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(value)).ravel().tolist()


@contextmanager
def meeting(last_good: Callable[[], str]) -> Iterator[None]:
    """A meeting that fails becomes a `PeerError` that says from where the run goes on."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, AttnlabError) or not (_begun and PEER.search(str(error))):
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise PeerError(
            f"another process of the run is gone or does not answer: {reason}; {last_good()}"
        ) from error


class Together:
    """Stopping, and work for one, when there may be several processes.

    A signal that any of them got is every one's at the same question, and `Signals.exit_code` then
    is the same in all. Alone, it is what `Signals` says.
    """

    def __init__(self, signals: Signals):
        import jax

        self.signals = signals
        self._several = jax.process_count() > 1
        self._asked: Any = None
        if self._several:
            self._prepare()

    def _prepare(self) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        self._mesh = Mesh(np.array(jax.devices()), ("all",))
        self._place = NamedSharding(self._mesh, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def stop(self) -> bool:
        """Whether to stop. All must ask equally often.

        The answer is to the question before, so that no device waits for a host: what is asked
        now is computed after the steps that were already sent off.
        """
        if not self._several:
            return self.signals.received is not None
        import jax
        import numpy as np

        mine = np.full(jax.local_device_count(), self.signals.received or 0, np.int32)
        before, flags = self._asked, jax.make_array_from_process_local_data(self._place, mine)
        with jax.set_mesh(self._mesh):  # not that of the run, which is asked from within
            self._asked = self._largest(flags)
        return self._hear(0 if before is None else int(before))

    def alone(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """``work(stop)`` by process 0; the others wait for its end and pass on their signals."""
        import jax

        if not self._several:
            work(lambda: self.signals.received is not None)
        elif jax.process_index() == 0:
            work(lambda: self._hear(int(_look(STOP) or 0)) or self.signals.received is not None)
            _client().key_value_set(DONE, str(int(self.signals.received or 0)))
        else:
            told = False
            while (done := _look(DONE)) is None:
                if self.signals.received and not told:
                    told = True
                    value = str(int(self.signals.received))
                    _client().key_value_set(STOP, value, allow_overwrite=True)
                time.sleep(EVERY)
            self._hear(int(done))

    def _hear(self, number: int) -> bool:
        if number and self.signals.received is None:
            self.signals.received = signal.Signals(number)
        return number > 0


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _look(key: str) -> str | None:
    """What a process has said under a key, or None."""
    try:
        return _client().key_value_try_get(key)
    except RuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
