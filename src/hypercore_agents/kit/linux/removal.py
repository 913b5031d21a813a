"""Deletes a directory tree that a hostile agent or session filled.

It chose every name, depth and mode in it. So: no recursion (a tree a million levels deep is made in
seconds), no path longer than one name (links cannot lead out, long paths cannot fail), no descriptor per level, and
modes that shut the owner out are opened first. Directories that are not empty are moved up to the top, one level
per pass, until everything lies flat there.

The processes that could still write to the tree must be gone.

Rejected: `shutil.rmtree`, which recurses (RecursionError at about a thousand levels, and the sandbox could never be
removed) and stops at a directory without permissions.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Delete `path` and all under it; a link is deleted, not followed. Raises OSError; a missing path is fine."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        path.unlink()
        return
    top = _open(str(path), None)
    try:
        while _flatten(top):
            pass
    finally:
        os.close(top)
    path.rmdir()


def _flatten(top: int) -> bool:
    """Delete what lies at the top and move what lies one level deeper up; say whether anything was there."""
    found = False
    # Entries come one by one, never as one list: there may be millions. Those that move to the top while it is read
    # are seen in this pass or in the next.
    with os.scandir(top) as entries:
        for entry in entries:
            found = True
            if _remove(entry, top):
                continue
            below = _open(entry.name, top)
            try:
                _raise(below, top)
            finally:
                os.close(below)
            os.rmdir(entry.name, dir_fd=top)
    return found


def _raise(below: int, top: int) -> None:
    """Delete what lies in a directory and move what cannot be deleted yet to the top."""
    with os.scandir(below) as entries:
        for entry in entries:
            if not _remove(entry, below):
                # Moving a directory rewrites its "..", for which its owner must be allowed to write to it.
                _permit(entry.name, below)
                os.rename(entry.name, secrets.token_hex(16), src_dir_fd=below, dst_dir_fd=top)


def _remove(entry: os.DirEntry[str], parent: int) -> bool:
    """Delete a file, a link or an empty directory; return False for a directory that is not empty."""
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.name, dir_fd=parent)
        return True
    with suppress(OSError):
        os.rmdir(entry.name, dir_fd=parent)
        return True
    return False


def _open(name: str, parent: int | None) -> int:
    _permit(name, parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def _permit(name: str, parent: int | None) -> None:
    """Give the owner of a directory all rights to it."""
    descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        if os.fstat(descriptor).st_mode & 0o700 != 0o700:
            # fchmod refuses O_PATH descriptors; their link in /proc stands for the same directory.
            os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
