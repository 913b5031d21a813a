"""Files of a session's workspace, as `/v1/agent/session/{id}/files` speaks of them.

A file's name on disk is any bytes but a slash and a null. In JSON it is text: bytes that are not UTF-8 are each shown
as one character of U+EF80 to U+EFFF (the byte plus 0xEF00). A name that holds such a character itself has it shown byte
by byte in the same way, so every name has one text, and `name_of` and `bytes_of` undo each other. In a URL, the
text is percent-encoded UTF-8, and bytes that are not UTF-8 may stand for themselves.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

READ_LIMIT = 64 * 1024 * 1024
"""Largest file that is given out, in bytes."""
WRITE_LIMIT = 15 * 1024 * 1024
"""Largest file that is taken in, in bytes; below what one request may carry."""
MOST_ENTRIES = 1000
"""Entries of one page of a list."""
_LONGEST_PATH = 4096
_SHIFT = 0xEF00
_SHOWN_BYTES = re.compile("[\uef80-\uefff]")
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def _is_path(path: str) -> str:
    if "\0" in path or _SURROGATES.search(path) or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("must be relative to the workspace, without empty segments, '.', '..', nulls and surrogates")
    return path


FilePath = Annotated[str, StringConstraints(max_length=_LONGEST_PATH), AfterValidator(_is_path)]
"""Relative to the workspace; where it leads is checked inside, with the session's own rights."""
FilesLimit = Annotated[int, Field(ge=1, le=MOST_ENTRIES)]


def name_of(raw: bytes) -> str:
    """Return the text of a path on disk."""
    text = raw.decode("utf-8", "surrogateescape")
    return _ESCAPED_BYTES.sub(_shown, _SHOWN_BYTES.sub(lambda found: _each_byte(found[0]), text))


def name_in_url(raw: bytes) -> str:
    """Return the text of a path in a URL, decoded from percent signs: text as it is, other bytes as they are shown."""
    return _ESCAPED_BYTES.sub(_shown, raw.decode("utf-8", "surrogateescape"))


def _shown(found: re.Match[str]) -> str:
    return chr(_SHIFT + ord(found[0]) - 0xDC00)


def _each_byte(character: str) -> str:
    return "".join(chr(_SHIFT + byte) for byte in character.encode())


def bytes_of(name: str) -> bytes:
    """Return the bytes of a path."""
    escaped = _SHOWN_BYTES.sub(lambda found: chr(0xDC00 + ord(found[0]) - _SHIFT), name)
    return escaped.encode("utf-8", "surrogateescape")


class FileEntry(BaseModel):
    """One entry. `modified_at` is in Unix seconds; `size` in bytes."""

    path: str
    type: Literal["file", "folder", "other"]
    size: int
    modified_at: float


class FileList(BaseModel):
    """Answer of `GET .../files`: a page of the workspace in the order of paths, folders before what is in them."""

    session_id: str
    count: int
    files: list[FileEntry]
    truncated: bool = Field(description="more entries than are listed: on the next page, or below 200 folders")
    next: str | None = Field(default=None, description="`after` of the next page; none after the last")


class FileWritten(BaseModel):
    """Answer of `PUT .../files/{path}`."""

    session_id: str
    path: str
    size: int
    workspace_durable: bool = Field(default=True, description="whether the file survives the loss of its agent")
    notices: list[str] = Field(default_factory=list, description="why it may not")


class FileDeleted(BaseModel):
    """Answer of `DELETE .../files/{path}`."""

    session_id: str
    path: str
    workspace_durable: bool = Field(default=True, description="whether the deletion survives the loss of its agent")
    notices: list[str] = Field(default_factory=list, description="why it may not")
