"""Deletes a directory tree that an untrusted agent or session created.

Its names, depth and modes may be hostile. So there is no recursion (a tree with a million levels is created in
seconds), no path with more than one name (links cannot lead outside, long paths cannot fail), and no descriptor per
level. Directories that deny their owner access get permissions first. Directories that are not empty are moved to the
top, one level per pass, until the tree is flat.

All processes that can write to the tree must have ended.

Rejected: `shutil.rmtree`, which recurses (RecursionError at about a thousand levels, and the sandbox could never be
removed) and stops at a directory without permissions.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Delete `path` and everything below it, if it exists. Links are deleted, not followed. Raises OSError."""
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
    """Delete the entries at the top and move those one level below up; return whether there were entries."""
    found = False
    # Entries are read one by one, because there may be millions. Those that move to the top meanwhile are read in this
    # pass or in the next.
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
    """Delete the entries of a directory and move those that cannot be deleted yet to the top."""
    with os.scandir(below) as entries:
        for entry in entries:
            if not _remove(entry, below):
                # Moving a directory rewrites its "..", which requires write permission for its owner.
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
    """Give the owner of a directory all permissions."""
    descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        if os.fstat(descriptor).st_mode & 0o700 != 0o700:
            # fchmod refuses O_PATH descriptors; their link in /proc refers to the same directory.
            os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
