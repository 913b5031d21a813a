"""Reading JSON bodies into wire models straight from their bytes; faults come out as FastAPI's own would."""

from typing import TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the body as a model. Raises RequestValidationError, which never quotes what was sent."""
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        faults = [
            {**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False, include_input=False)
        ]
        raise RequestValidationError(faults) from None
