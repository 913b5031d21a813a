"""Requests to this machine's own addresses, past the proxy that `http_proxy` names: it would not reach them."""

from http.client import HTTPResponse
from typing import cast
from urllib.request import ProxyHandler, Request, build_opener


def open_directly(request: str | Request, *, seconds: float) -> HTTPResponse:
    """Open an address of our own settings. Raises as `urllib.request.urlopen` does."""
    return cast(HTTPResponse, build_opener(ProxyHandler({})).open(request, timeout=seconds))
