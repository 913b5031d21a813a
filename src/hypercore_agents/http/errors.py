"""The one place where domain errors become HTTP responses, for every server of the platform.

FastAPI's own errors (422 for a body, 404 for a path, 405) and invalid UTF-8 are returned in the same shape. A defect is
logged with its stack trace, which the client does not receive.
"""

import math
import sys

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hypercore_agents.api.errors import (
    AtCapacity,
    ErrorBody,
    Forbidden,
    HypercoreError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from hypercore_agents.http.context import INTERNAL_ERROR_MESSAGE, request_id_of
from hypercore_agents.http.routes import CheckedRoute
from hypercore_agents.http.validation_errors import describe_faults, fields_of_body

_log = structlog.get_logger(__name__)

_BY_STATUS: dict[int, type[HypercoreError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    429: RateLimited,
    503: Unavailable,
}


def error_response(error: HypercoreError, request_id: str) -> Response:
    """Return the HTTP response for a domain error."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = error.body(request_id).model_dump(mode="json", exclude_none=True)
    return JSONResponse(body, status_code=error.status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Return every error of the app in the common shape, and make its own routes instances of CheckedRoute."""
    app.router.route_class = CheckedRoute

    def respond(request: Request, error: HypercoreError) -> Response:
        # Seen by RequestContext's `on_end`, for metrics.
        request.scope.setdefault("state", {})["error_type"] = error.type
        return error_response(error, request_id_of(request.scope))

    async def domain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HypercoreError)
        return respond(request, error)

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(request, describe_faults(error.errors(), fields_of_body(request)))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        mapped = _BY_STATUS.get(error.status_code, InternalError if error.status_code >= 500 else InvalidRequest)
        domain_error: HypercoreError
        if isinstance(error.__cause__, HypercoreError):  # FastAPI wraps errors of reading the body
            return respond(request, error.__cause__)
        if isinstance(error.__cause__, UnicodeDecodeError):
            return await encoding(request, error.__cause__)
        if isinstance(error.__cause__, RecursionError):
            return respond(request, InvalidRequest("body: the JSON is nested too deeply", field="body"))
        if isinstance(error.__cause__, ValueError):  # the parser's limit on digits
            most = sys.get_int_max_str_digits()
            return respond(request, InvalidRequest(f"body: a number has more than {most} digits", field="body"))
        if mapped is NotFound:
            domain_error = NotFound(f"there is no route {request.method} {request.url.path[:200]}; see /docs")
        elif mapped is MethodNotAllowed:
            domain_error = MethodNotAllowed(f"{request.method} is not allowed here; see /docs")
        else:
            domain_error = mapped(str(error.detail))
        response = respond(request, domain_error)
        for name in ("allow", "retry-after"):
            if error.headers and name in {key.lower() for key in error.headers}:
                response.headers[name] = next(v for k, v in error.headers.items() if k.lower() == name)
        return response

    async def encoding(request: Request, _: Exception) -> Response:
        return respond(request, InvalidRequest("the body is not valid UTF-8"))

    async def disconnected(request: Request, _: Exception) -> Response:
        return respond(request, InvalidRequest("the client disconnected before it had sent the whole request"))

    async def defect(request: Request, error: Exception) -> Response:
        request_id = request_id_of(request.scope)
        _log.error("request.defect", request_id=request_id, path=request.url.path, exc_info=error)
        return respond(request, InternalError(INTERNAL_ERROR_MESSAGE))

    app.add_exception_handler(HypercoreError, domain)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(UnicodeDecodeError, encoding)
    app.add_exception_handler(ClientDisconnect, disconnected)
    app.add_exception_handler(Exception, defect)


_DESCRIPTIONS: dict[int, str] = {
    error.status: (error.__doc__ or "").split("\n")[0]
    for error in (
        InvalidRequest,
        Unauthenticated,
        Forbidden,
        NotFound,
        PayloadTooLarge,
        RateLimited,
        AtCapacity,
    )
}
ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorBody, "description": _DESCRIPTIONS.get(status, "An error in the common shape")}
    for status in (400, 401, 403, 404, 405, 409, 413, 429, 500, 502, 503, 504)
}
"""For `FastAPI(responses=...)`: documents the common error shape for every route."""

TEXT_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text"}
}
"""For a route that returns text instead of JSON, such as a metrics page."""
