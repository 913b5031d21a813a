"""Files of a session's workspace, as in `/v1/agent/session/{id}/files`.

A file name on disk is any bytes except a slash and a null character. In JSON it is text: each byte that is not part of
valid UTF-8 is shown as one character of U+EF80 to U+EFFF (the byte plus 0xEF00). Such a character in a name is itself
shown byte by byte in this way, so every name has exactly one text, and `name_of` and `bytes_of` are inverse. In a URL,
the text is percent-encoded UTF-8; bytes that are not UTF-8 may also be percent-encoded as they are.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints

READ_LIMIT = 64 * 1024 * 1024
"""Maximum size of a file that can be read, in bytes."""
WRITE_LIMIT = 15 * 1024 * 1024
"""Maximum size of a file that can be written, in bytes; less than the limit of a request."""
MOST_ENTRIES = 1000
"""Maximum number of entries on a page of a list."""
_LONGEST_PATH = 4096
_SHIFT = 0xEF00
_SHOWN_BYTES = re.compile("[\uef80-\uefff]")
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def _is_path(path: str) -> str:
    if "\0" in path or _SURROGATES.search(path) or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(
            "must be relative to the workspace, without empty segments, '.', '..', null characters and surrogates"
        )
    return path


FilePath = Annotated[str, StringConstraints(max_length=_LONGEST_PATH), AfterValidator(_is_path)]
"""Relative to the workspace; links are checked in the sandbox, with the permissions of the session."""
FilesLimit = Annotated[int, Field(ge=1, le=MOST_ENTRIES)]


def name_of(raw: bytes) -> str:
    """Return the text of a path on disk."""
    text = raw.decode("utf-8", "surrogateescape")
    return _ESCAPED_BYTES.sub(_shown, _SHOWN_BYTES.sub(lambda found: _each_byte(found[0]), text))


def name_in_url(raw: bytes) -> str:
    """Return the text of a percent-decoded path: UTF-8 is unchanged, other bytes are shown as characters."""
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
    """Response of `GET .../files`: one page, ordered by path, folders before their contents."""

    session_id: str
    count: int
    files: list[FileEntry]
    truncated: bool = Field(
        description="whether entries are missing: they are on the next page, or deeper than 200 folders"
    )
    next: str | None = Field(default=None, description="value of `after` for the next page; null on the last page")


class FileWritten(BaseModel):
    """Response of `PUT .../files/{path}`."""

    session_id: str
    path: str
    size: int
    workspace_durable: bool = Field(default=True, description="whether the file survives the loss of its agent")
    notices: list[str] = Field(default_factory=list, description="reasons if it may not")


class FileDeleted(BaseModel):
    """Response of `DELETE .../files/{path}`."""

    session_id: str
    path: str
    workspace_durable: bool = Field(default=True, description="whether the deletion survives the loss of its agent")
    notices: list[str] = Field(default_factory=list, description="reasons if it may not")
