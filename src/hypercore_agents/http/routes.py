"""Routes that ignore nothing: they refuse undeclared or repeated query parameters, and bodies that are not UTF-8.

A misspelled filter would otherwise widen a query: a list of one user's agents would become a list of all agents. A
request without a query string pays for one look-up in its scope.

Use `CheckedRouter`; `install_error_handlers` sets the route class of an app's own routes. Documentation pages are not
checked, because browsers add parameters to them. Rejected: a dependency of the app, which costs every request; a
middleware, which cannot see the route.
"""

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute

from hypercore_agents.http.validation_errors import refuse_other_encodings, refuse_parameters


class CheckedRoute(APIRoute):
    """A route that checks what FastAPI does not check."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle = super().get_route_handler()
        declared = [field for field in get_flat_params(self.dependant) if isinstance(field.field_info, Query)]
        known = [field.alias for field in declared]
        required = [field.alias for field in declared if field.field_info.is_required()]
        takes_json = self.body_field is not None

        async def checked(request: Request) -> Response:
            if query := request.scope["query_string"]:
                given = Counter(name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
                refuse_parameters(given, known, required)
            if takes_json:
                refuse_other_encodings(await request.body())
            return await handle(request)

        return checked


class CheckedRouter(APIRouter):
    """An APIRouter whose routes are CheckedRoutes."""

    def __init__(self, **named: Any) -> None:
        super().__init__(route_class=CheckedRoute, **named)
