"""Opens a compute backend by its name.

Only the requested backend is imported, so the extras of the others need not be installed, and no backend imports
another.

Rejected: entry points (a foreign package could put itself between the platform and its sandboxes, and the available
backends would depend on the other packages that are installed).
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypercore_agents.compute.base import ComputeBackend, SandboxRefused

_BACKENDS = {
    "process": "hypercore_agents.compute.process:ProcessBackend",
    "microvm": "hypercore_agents.compute.microvm.backend:MicrovmBackend",
    "hypercore": "hypercore_agents.compute.hypercore:HypercoreBackend",
}
BACKEND_NAMES = tuple(_BACKENDS)
"""The valid values of `COMPUTE_BACKEND`."""
LOCAL_BACKENDS = frozenset({"process", "microvm"})
"""Backends that run agents on the manager's machine, under its STATE_DIR; all managers must run on that machine."""


def open_backend(name: str, state_dir: Path, options: Mapping[str, Any] | None = None) -> ComputeBackend:
    """Return a new backend with its state under `state_dir`; `options` are keyword arguments of its constructor.

    Raises SandboxRefused for an unknown or unavailable name, for an unknown option, and if the backend cannot work on
    this host.
    """
    backend = _load(name)
    known = [*inspect.signature(backend).parameters][1:]  # without state_dir
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise SandboxRefused(
            f"compute_backend: {name} has no option {', '.join(unknown)}; it has {', '.join(known)}",
            field="compute_backend",
        )
    return backend(state_dir, **(options or {}))


def _load(name: str) -> Callable[..., ComputeBackend]:
    if name not in _BACKENDS:
        raise SandboxRefused(
            f"compute_backend: {name!r} is none of {', '.join(BACKEND_NAMES)}; set COMPUTE_BACKEND to one of them",
            field="compute_backend",
        )
    module, _, attribute = _BACKENDS[name].partition(":")
    try:
        backend: Callable[..., ComputeBackend] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing == module:
            why = f"{name} is not part of this release; use process"
        else:
            why = f"{name} needs the module {missing}: install hypercore-agents[{name}]"
        raise SandboxRefused(f"compute_backend: {why}", field="compute_backend") from error
    return backend
