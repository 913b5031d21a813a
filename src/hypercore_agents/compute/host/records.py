"""The record of a sandbox: what a backend stores to find the sandbox again, also after a restart of the manager.

This module has the fields that all backends of this host share; a backend's subclass adds its own. Records that earlier
releases wrote stay readable: a field that they lack gets its default.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from hypercore_agents.compute.host.identity import ProcessIdentity


@dataclass(frozen=True)
class SandboxRecord(ABC):
    """The shared fields of a record.

    `created_at` is in Unix seconds. `cores` and `memory_mb` are the limits that apply, 0 if none do. `shim` is the
    process above the sandbox. `origin` is the machine and folder that the sandbox was started in; None in records of
    earlier releases.
    """

    agent_id: str
    created_at: float
    address: str = ""
    uid: int | None = None
    cores: int = 0
    memory_mb: int = 0
    cgroups: tuple[str, ...] = ()
    shim: ProcessIdentity | None = None
    origin: str | None = None

    @property
    @abstractmethod
    def process(self) -> ProcessIdentity | None:
        """The process below the shim."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the start came far enough for the sandbox to run without the manager."""

    @abstractmethod
    def own_fields(self) -> dict[str, Any]:
        """Return the backend's own fields as JSON values."""

    @classmethod
    @abstractmethod
    def parse_own_fields(cls, value: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the backend's own fields from JSON values. Raises ValueError if one is missing or invalid."""

    def to_json(self) -> bytes:
        """Return the content of the record's file."""
        value = {
            "agent_id": self.agent_id,
            "created_at": self.created_at,
            "address": self.address,
            "uid": self.uid,
            "cores": self.cores,
            "memory_mb": self.memory_mb,
            "cgroups": [*self.cgroups],
            "shim": self.shim and self.shim.to_json(),
            "origin": self.origin,
            **self.own_fields(),
        }
        return json.dumps(value, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Return the record in a file's content. Raises ValueError if the content is not a record."""
        match json.loads(content):
            case {
                "agent_id": str(agent_id),
                "created_at": float(created_at),
                "address": str(address),
                "uid": int() | None as uid,
                "memory_mb": int() | None as memory_mb,
                "cgroups": list(cgroups),
                "shim": shim,
                **rest,
            }:
                return cls(
                    agent_id=agent_id,
                    created_at=created_at,
                    address=address,
                    uid=uid,
                    cores=integer(rest.get("cores")),
                    memory_mb=memory_mb or 0,
                    cgroups=tuple(str(path) for path in cgroups),
                    shim=ProcessIdentity.from_json(shim),
                    origin=origin if isinstance(origin := rest.get("origin"), str) else None,
                    **cls.parse_own_fields(rest),
                )
        raise ValueError("not a sandbox's record")


def integer(value: object) -> int:
    """Return an integer field of a record, 0 if the record does not have it."""
    return value if isinstance(value, int) else 0
