"""Writing files so that they are whole or untouched."""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

TEMPORARY = (".a2k-", ".tmp")  # around the random part of a file's name until it is whole


def replace_file(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Call write(temporary path), then rename the result to path, whose missing folders are made. A file that is there
    keeps its permissions, and a link to one stays a link.

    Raises OSError, also where path is a folder, a device or the like, and whatever write raises.
    """
    if os.fspath(path).endswith(("/", os.sep)):
        raise OSError("it names a folder")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError("it exists and is not a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(secrets.token_hex(8).join(TEMPORARY))
    try:
        temporary.touch(exist_ok=False)
        permissions = (target if target.exists() else temporary).stat().st_mode
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(permissions))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
