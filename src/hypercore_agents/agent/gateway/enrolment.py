"""Enrolment: the agent exchanges its one-use secret for its credentials and configuration.

The secret is read once from an inherited descriptor and dropped after enrolment. The key pair is created here, in the
sandbox. A response may get lost; for 60 s the gateway gives the same response to the same key, so every retry repeats
the same request. A refusal (4xx) is final: a replayed or expired secret stays invalid.
"""

import asyncio
import contextlib
import os
import select
import time

import aiohttp
import structlog
from pydantic import ValidationError

from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.internal import EnrolmentGrant, EnrolRequest, EnrolResponse
from hypercore_agents.security.enrolment import EnrolmentKey

_log = structlog.get_logger(__name__)
_LONGEST_SECRET = 4096
_ATTEMPT_SECONDS = 10.0


class EnrolmentFailed(Exception):
    """This agent cannot enrol and must not serve; the message has the reason."""


async def enrol(agent_id: str, gateway_url: str, descriptor: int, *, timeout: float) -> EnrolmentGrant:
    """Read the secret, close its descriptor, and return the grant. Raises EnrolmentFailed within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    if _is_written(descriptor):
        secret = read_secret(descriptor, timeout)  # a thread would cost a restored VM half a megabyte
    else:
        secret = await asyncio.to_thread(read_secret, descriptor, timeout)
    key = EnrolmentKey()
    try:
        request = EnrolRequest(agent_id=agent_id, secret=secret, public_key=key.public())
    except ValidationError:
        raise EnrolmentFailed("the enrolment secret is malformed; the backend must send 32 to 128 characters") from None
    body = request.model_dump_json().encode()
    pause = 0.1
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ATTEMPT_SECONDS)) as client:
        while True:
            try:
                return await _request_grant(client, gateway_url, body, key, agent_id)
            except (aiohttp.ClientError, TimeoutError, _RetryableResponse) as error:
                if time.monotonic() + pause >= deadline:
                    raise EnrolmentFailed(f"the gateway {gateway_url} did not enrol this agent: {error}") from None
                _log.warning("enrolment.retry", gateway=gateway_url, error=str(error) or type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


def _is_written(descriptor: int) -> bool:
    """Return whether reading to the end cannot block: the pipe's other end is closed, or the pipe is missing."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(events & (select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))


def read_secret(descriptor: int, timeout: float) -> str:
    """Read the secret to the end of the pipe and close the descriptor. Blocking; raises EnrolmentFailed."""
    deadline = time.monotonic() + timeout
    parts: list[bytes] = []
    try:
        os.set_inheritable(descriptor, False)
        while sum(map(len, parts)) <= _LONGEST_SECRET:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EnrolmentFailed("the enrolment secret did not arrive in time over ENROLMENT_FD")
            part = os.read(descriptor, _LONGEST_SECRET)
            if not part:
                break
            parts.append(part)
    except OSError as error:
        raise EnrolmentFailed(
            f"ENROLMENT_FD={descriptor} cannot be read ({error.strerror}); the backend must pass the descriptor"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return b"".join(parts).decode("ascii", errors="replace").strip()


class _RetryableResponse(Exception):
    pass


async def _request_grant(
    client: aiohttp.ClientSession, gateway_url: str, body: bytes, key: EnrolmentKey, agent_id: str
) -> EnrolmentGrant:
    async with client.post(
        f"{gateway_url}/internal/enrol",
        data=body,
        headers={"content-type": "application/json"},
        allow_redirects=False,
    ) as answer:
        content = await answer.read()
        if answer.status == 429 or answer.status >= 500:
            raise _RetryableResponse(f"it answered {answer.status}")
        if answer.status != 200:
            raise EnrolmentFailed(f"the gateway refused the enrolment secret of {agent_id} (HTTP {answer.status})")
    try:
        return key.open(EnrolResponse.model_validate_json(content).sealed, agent_id)
    except (HypercoreError, ValidationError):
        raise EnrolmentFailed("the gateway's enrolment response cannot be decrypted with this agent's key") from None
