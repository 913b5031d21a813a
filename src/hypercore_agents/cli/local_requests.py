"""HTTP requests to addresses of this machine, without the proxy of `http_proxy`, which cannot reach them."""

from http.client import HTTPResponse
from typing import cast
from urllib.request import ProxyHandler, Request, build_opener


def open_directly(request: str | Request, *, seconds: float) -> HTTPResponse:
    """Open a URL without a proxy. Raises the errors of `urllib.request.urlopen`."""
    return cast(HTTPResponse, build_opener(ProxyHandler({})).open(request, timeout=seconds))
