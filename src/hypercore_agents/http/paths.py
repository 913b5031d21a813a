"""File paths in URLs: any bytes except a slash and a null character, percent-encoded.

Starlette's `path` parameter stops at a line feed and decodes with replacement characters. `{path:any}` matches
everything, and `PathInUrl` decodes the request's raw target.
"""

from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import Depends, Path, Request
from pydantic import TypeAdapter, ValidationError
from starlette.convertors import Convertor, register_url_convertor

from hypercore_agents.api.errors import InvalidRequest
from hypercore_agents.api.files import FilePath, name_in_url

_PREFIX = b"/files/"
_PATH: TypeAdapter[str] = TypeAdapter(FilePath)


class _Any(Convertor[str]):
    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _Any())


async def _path_of(
    request: Request, path: Annotated[str, Path(description="relative to the workspace", max_length=4096)]
) -> str:
    raw: bytes = request.scope.get("raw_path") or b""
    if _PREFIX in raw:
        path = name_in_url(unquote_to_bytes(raw.partition(_PREFIX)[2]))
    try:
        return _PATH.validate_python(path)
    except ValidationError as error:
        problem = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise InvalidRequest(f"path: {problem}", field="path") from None


PathInUrl = Annotated[str, Depends(_path_of)]
"""For routes with `{path:any}` after `/files/`: the path in the text form of `api.files`."""
