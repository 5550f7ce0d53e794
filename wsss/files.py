"""Files that are never half written."""

import json
import os
import tempfile
from pathlib import Path


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path`: first to a temporary file beside it, then by renaming, so that a kill loses nothing.

    Raises:
        PermissionError: the folder cannot be written; the message names it and the remedy.
        OSError: the disk is full; so does the message.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise PermissionError(
            f"{path}: cannot write into the folder {path.parent} ({error.strerror}). "
            "Make it writable, or choose another results folder."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            told = f"{path}: cannot be written ({error.strerror}). What it held is still there; free space and go on"
            raise OSError(error.errno, told) from error
        raise
    return path


def write_json(path: str | Path, value: object) -> Path:
    """Write `value` as indented JSON with a final newline, atomically."""
    return write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
