"""Files that appear whole or not at all, on a local file system and in a store."""

import uuid
from typing import Any


def write_whole(path: Any, content: bytes) -> None:
    """Writes a file (a path of pathlib or etils) which nobody ever reads half-written, and replaces the one before.

    An object in a store (`gs://`, `s3://`) is whole by itself.

    Raises:
      OSError: naming the file: it cannot be written; the file before stays as it was.
    """
    if "://" in str(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; the file was not written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
