"""State files: what a run or a notebook is doing, as a file that is written last and in one piece."""

import json
import os
from pathlib import Path


def read_state(path: Path) -> dict:
    """A true state, {"state": absent, queued, running, failed, killed or done, ...}.

    One that says running and whose process (`pid`) is gone was killed.
    """
    if not path.exists():
        return {"state": "absent"}
    state = json.loads(path.read_text())
    return state | {"state": "killed"} if state["state"] == "running" and not alive(state["pid"]) else state


def alive(pid: int) -> bool:
    """Whether there is a process `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there is one, of somebody else
        pass
    return True
