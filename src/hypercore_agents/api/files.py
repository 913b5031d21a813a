"""Files of a session's workspace, as `/v1/agent/session/{id}/files` speaks of them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

READ_LIMIT = 64 * 1024 * 1024
"""Largest file that is given out, in bytes."""
WRITE_LIMIT = 15 * 1024 * 1024
"""Largest file that is taken in, in bytes; below what one request may carry."""
MOST_ENTRIES = 1000

FilePath = Annotated[
    str,
    StringConstraints(max_length=1024, pattern=r"^(?:[^/\x00-\x1f\x7f]+/)*[^/\x00-\x1f\x7f]+$"),
]
"""Relative to the workspace, plain segments only; where it leads is checked inside, with the session's own rights."""


class FileEntry(BaseModel):
    """One entry. `modified_at` is in Unix seconds; `size` in bytes."""

    path: str
    type: Literal["file", "folder", "other"]
    size: int
    modified_at: float


class FileList(BaseModel):
    """Answer of `GET .../files`: the whole workspace, folders before what is in them."""

    session_id: str
    count: int
    files: list[FileEntry]
    truncated: bool = Field(description="more entries than are listed")


class FileWritten(BaseModel):
    """Answer of `PUT .../files/{path}`."""

    session_id: str
    path: str
    size: int
    workspace_durable: bool = Field(default=True, description="whether the file survives the loss of its agent")
