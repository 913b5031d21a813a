"""Declared dependencies: every third-party module that the package imports is declared, and nothing else is.

The HTTP server extends uvicorn's httptools protocol. The last tests name the internals that it relies on, so that an
upgrade of uvicorn that changes one of them fails here with a clear message.
"""

import ast
import inspect
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hypercore_agents"

NOT_IMPORTED = {
    "aiosqlite": "SQLAlchemy loads it by the store's URL",
    "psycopg": "SQLAlchemy loads it by the store's URL",
    "uvloop": "uvicorn picks it up",
    "opentelemetry-exporter-otlp-proto-http": "imported as a part of the namespace package opentelemetry",
    "matplotlib": "benchmarks/autoscaler_plots.py imports it",
}
"""Declared packages that no module of the package imports, with the reason for each."""

TESTING_ONLY = {"pytest"}
"""Imported by compute/testing alone, which no role imports."""


def declared() -> set[str]:
    """Return the names of the declared packages: dependencies and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {normalised(re.split(r"[\[<>=! ;]", line)[0]) for line in lines}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, str]:
    """Return the third-party top-level modules that the package imports, each with a file that imports it."""
    found: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "hypercore_agents":
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def test_every_imported_package_is_declared() -> None:
    packages = packages_distributions()
    names = declared()
    undeclared = {
        module: file
        for module, file in imported().items()
        if module not in TESTING_ONLY and not names & {normalised(name) for name in packages.get(module, [module])}
    }
    assert not undeclared, f"imported but not declared in pyproject.toml: {undeclared}"


def test_every_declared_package_is_imported() -> None:
    packages = packages_distributions()
    used = {normalised(name) for module in imported() for name in packages.get(module, [module])}
    unused = declared() - used - set(NOT_IMPORTED)
    assert not unused, f"declared in pyproject.toml but not imported: {sorted(unused)}"


def test_uvicorn_has_an_upper_bound() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(line.startswith("uvicorn") and "<" in line for line in lines)


PROTOCOL = [
    "cycle",
    "scope",
    "headers",
    "url",
    "parser",
    "pipeline",
    "flow",
    "transport",
    "server_state",
    "config",
    "loop",
    "logger",
    "timeout_keep_alive",
    "timeout_keep_alive_task",
]
PROTOCOL_METHODS = [
    "connection_made",
    "connection_lost",
    "data_received",
    "on_message_begin",
    "on_header",
    "on_headers_complete",
    "on_body",
    "on_message_complete",
    "on_response_complete",
    "timeout_keep_alive_handler",
    "send_400_response",
    "_start_asgi_task",
    "_unset_keepalive_if_required",
]
CYCLE = [
    "scope",
    "transport",
    "flow",
    "keep_alive",
    "disconnected",
    "response_started",
    "response_complete",
    "body",
    "more_body",
    "chunked_encoding",
    "waiting_for_100_continue",
]
FLOW = ["read_paused", "write_paused"]
FLOW_METHODS = ["pause_reading", "resume_reading"]
ADVICE = f"uvicorn {uvicorn.__version__} has changed %r, on which http/ relies; adapt http/ or lower the upper bound"


@pytest.mark.parametrize("name", PROTOCOL_METHODS)
def test_uvicorns_protocol_has_the_method(name: str) -> None:
    assert callable(getattr(HttpToolsProtocol, name, None)), ADVICE % f"HttpToolsProtocol.{name}"


@pytest.mark.parametrize(
    ("owner", "names"), [(HttpToolsProtocol, PROTOCOL), (RequestResponseCycle, CYCLE), (FlowControl, FLOW)]
)
def test_uvicorns_constructors_set_the_attributes(owner: type, names: list[str]) -> None:
    source = inspect.getsource(owner)
    missing = [name for name in names if not re.search(rf"self\.{name}\b[^=\n]*=", source)]
    assert not missing, ADVICE % [f"{owner.__name__}.{name}" for name in missing]


@pytest.mark.parametrize("name", FLOW_METHODS)
def test_uvicorns_flow_control_has_the_method(name: str) -> None:
    assert callable(getattr(FlowControl, name, None)), ADVICE % f"FlowControl.{name}"


@pytest.mark.parametrize("name", ["capture_signals", "handle_exit", "shutdown", "serve"])
def test_uvicorns_server_has_the_method(name: str) -> None:
    assert callable(getattr(uvicorn.Server, name, None)), ADVICE % f"Server.{name}"
