"""`GET` and `PUT /v1/pool`: the pool's desired size, changed by compare-and-set so that two writers cannot fight."""

from pydantic import BaseModel, ConfigDict, Field


class PoolSize(BaseModel):
    """Body of `PUT /v1/pool`, and the answer of both methods.

    In a PUT, `version` is the one that the writer read; the manager answers 409 `conflict` when another write came
    first, and otherwise the new size with its new version. Version 0 means that nobody has set a size yet.
    """

    model_config = ConfigDict(extra="forbid")

    desired: int = Field(ge=0, le=10_000, description="agents")
    version: int = Field(ge=0, description="rises with each change")
