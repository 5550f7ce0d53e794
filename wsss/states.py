"""State files: what a run or a notebook is doing, as a file that is written last and in one piece."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HOST = socket.gethostname()
BEAT = 20  # seconds between two touches of the state file of something that runs
LOST = 300  # seconds without one after which a process of another machine is gone; clocks may differ by minutes


def running() -> dict:
    """State of something that this process runs."""
    return {"state": "running", "pid": os.getpid(), "host": HOST}


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """Touch a state file every `BEAT` seconds, so that other machines see that this process lives."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            with contextlib.suppress(OSError):  # a beat that is missed does no harm
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def read_state(path: Path) -> dict:
    """A true state, {"state": absent, queued, running, failed, killed or done, ...}.

    One that says running and whose process is gone was killed: on this machine there is no process `pid`; on another
    `host` it has not touched the file for `LOST` seconds, see `beating`.
    """
    if not path.exists():
        return {"state": "absent"}
    state = json.loads(path.read_text())
    return state | {"state": "killed"} if state["state"] == "running" and not _lives(state, path) else state


def _lives(state: dict, path: Path) -> bool:
    if state.get("host", HOST) == HOST:
        return alive(state["pid"])
    return time.time() - path.stat().st_mtime < LOST


def alive(pid: int) -> bool:
    """Whether there is a process `pid` on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there is one, of somebody else
        pass
    return True
