"""`up --detach`: start `up` as a background process and wait until the platform is healthy and its pool is running."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.jwk import OctKey
from rich.console import Console

from hypercore_agents.cli.command_errors import CommandError
from hypercore_agents.cli.local_requests import open_directly
from hypercore_agents.cli.up_plan import Plan, is_on

START_SECONDS = 60.0
STOP_SECONDS = 90.0
_POOL_SECONDS = 180.0


def detach(intended: Plan, demo: bool, console: Console) -> int:
    """Start `up` as a background process, wait until it is healthy and its pool is running, and return its pid."""
    log = intended.state / "up.log"
    with open(log, "a+b", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
        output.seek(0, os.SEEK_END)
        began = output.tell()
        process = subprocess.Popen(  # noqa: S603  this interpreter and module
            [sys.executable, "-m", "hypercore_agents", "up", *_flags(intended, demo)],
            # The child must use the backend that was announced above, also if `auto` selected it.
            env={**os.environ, "COMPUTE_BACKEND": intended.environment["COMPUTE_BACKEND"]},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            with console.status("starting gateway and manager …") as status:
                _until(
                    process,
                    START_SECONDS,
                    lambda: _get(f"{intended.url}/ready") is not None,
                    f"the manager at {intended.url} was not ready within {START_SECONDS:g} s",
                )
                status.update(f"starting a pool of {intended.pool} agents …")
                _until(
                    process,
                    _POOL_SECONDS,
                    lambda: _pool_running(intended) >= intended.pool,
                    f"fewer than {intended.pool} agents of the pool ran within {_POOL_SECONDS:g} s",
                )
        except BaseException as error:
            process.terminate()
            process.wait(STOP_SECONDS)
            if not isinstance(error, _NotStarted):
                raise
            # Read from the open file: a demo removes its state folder, including this log, when it ends.
            output.seek(began)
            written = output.read()
            where = _saved(written, log)
            raise CommandError(
                f"the platform did not start: {_why(written, str(error))}\n(full log: {where})"
            ) from None
    return process.pid


def _saved(written: bytes, log: Path) -> Path:
    """Return the path of the log; write a removed log next to its folder."""
    if log.exists():
        return log
    copy = log.parent.with_name(f"{log.parent.name}-{log.name}")
    with open(copy, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(written)
    return copy


def _flags(intended: Plan, demo: bool) -> list[str]:
    return [*(["--demo"] if demo else []), *(["--monitoring"] if intended.monitored else [])]


class _NotStarted(Exception):
    """The process ended (empty message), or did not become ready in time (the message says which part)."""


def _until(process: subprocess.Popen[bytes], seconds: float, holds: Callable[[], bool], late: str) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= deadline:
            raise _NotStarted(late)
        # Another program may have answered: the started process must still run afterwards.
        if holds() and process.poll() is None:
            return
        time.sleep(0.1)
    raise _NotStarted("")


def _pool_running(intended: Plan) -> int:
    stats = _get(f"{intended.url}/v1/agents/stats", _admin(intended.environment)) or {}
    return int(stats.get("pool", {}).get("running", 0))


def _why(written: bytes, late: str) -> str:
    """Return the error messages in the log, or what was late and the last lines of the log."""
    lines = written.decode(errors="replace").splitlines()
    errors = [line.removeprefix("hypercore-agents: ") for line in lines if line.startswith("hypercore-agents: ")]
    return "; ".join(errors) or "\n  ".join([f"{late}; " * bool(late) + "the last lines of its log:", *lines[-15:]])


def _admin(environment: Mapping[str, str]) -> str | None:
    """Return a short-lived admin token for requests to the manager; None if authentication is off."""
    if not is_on(environment.get("ENABLE_AUTH")):
        return None
    claims = {"sub": "up", "scope": "admin", "exp": int(time.time() + _POOL_SECONDS + START_SECONDS)}
    return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(environment.get("JWT_SECRET", "")))


def _get(url: str, token: str | None = None) -> dict[str, Any] | None:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"} if token else {})  # noqa: S310
    try:
        with open_directly(request, seconds=2) as answer:
            body = json.loads(answer.read() or b"{}")
            return body if isinstance(body, dict) else {}
    except (OSError, ValueError):
        return None
