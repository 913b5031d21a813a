"""Starts a Claude CLI: for a session, as a prewarmed CLI, or as the agent's own trial start."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable

import structlog
from claude_agent_sdk import HookMatcher

from hypercore_agents.agent.claude.context import AgentContext
from hypercore_agents.agent.claude.environment import cli_environment
from hypercore_agents.agent.claude.options import SYSTEM_PROMPT_FILE, Offer, offer, prompt_text, sdk_options
from hypercore_agents.agent.claude.process import ClaudeEnded, ClaudeFailed, ClaudeProcess
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.api.errors import HypercoreError
from hypercore_agents.api.options import SessionOptions

_log = structlog.get_logger(__name__)
_TRIAL_TURN_SECONDS = 600.0


async def start(
    context: AgentContext,
    folder: SessionFolder,
    options: SessionOptions,
    offered: Offer,
    *,
    token: str,
    user_id: str | None,
    resume: bool,
    timeout: float,
    approvals: list[HookMatcher] | None,
    transcript: TranscriptPort,
    on_process: Callable[[ClaudeProcess | None], None] = lambda _: None,
    counts: bool = True,
) -> ClaudeProcess:
    """Wait for a start slot, start a CLI and return it connected. Raises ClaudeFailed or AtCapacity.

    A prewarmed CLI has no `token` and no `user_id`, and it takes no session's start slot; its caller holds one.
    `timeout` is the turn's, in seconds. `on_process` is called with the process before it connects, and with None
    afterwards. With `counts`, the outcome counts for the agent's readiness.
    """
    isolation = context.isolation
    environment = cli_environment(
        folder,
        gateway_url=isolation.model_url(),
        session_token=isolation.credential(token),
        timeout=timeout,
        base={} if isolation.separate else os.environ,
    )
    async with context.start_limiter.session_slot(user_id) if user_id is not None else contextlib.nullcontext():
        try:
            await isolation.prepare(folder)
        except OSError as error:
            if counts:
                context.readiness.failed(error)
            raise ClaudeEnded(f"the session's folder cannot be created: {error.strerror}") from error
        process = ClaudeProcess(
            sdk_options(
                options,
                offered,
                folder,
                cli=context.cli,
                environment=environment,
                resume=resume,
                skills=context.skills,
                approvals=approvals,
                transcript=transcript,
            ),
            folder,
            isolation,
            {SYSTEM_PROMPT_FILE: text} if (text := prompt_text(options.system_prompt)) else {},
        )
        on_process(process)
        try:
            began = time.monotonic()
            share = await process.start(window=context.start_timeout)
            context.start_limiter.record_start(share, time.monotonic() - began)
        except ClaudeFailed as error:
            if counts:
                context.readiness.failed(error)
            raise
        finally:
            on_process(None)
    if counts:
        context.readiness.succeeded()
    if isolation.separate and token:
        await process.renew_credential(token)
    return process


async def trial_start(context: AgentContext) -> str | None:
    """Start a CLI that serves no session, and end it. Return why the start failed, None when it succeeded.

    A start that was given up for lack of progress is no failure: it proves nothing about the agent.
    """
    options = SessionOptions()
    offered = offer(options, context.configuration, separate=context.isolation.separate)
    folder = context.isolation.folder(str(uuid.uuid4()))
    try:
        process = await start(
            context, folder, options, offered, token="", user_id=None, resume=False, timeout=_TRIAL_TURN_SECONDS,
            approvals=None, transcript=TranscriptPort(), counts=False,
        )  # fmt: skip
        await process.kill()
    except (HypercoreError, OSError) as error:
        if type(error) is ClaudeFailed:
            return None
        cause = error.message if isinstance(error, HypercoreError) else str(error)
        return f"this agent cannot start the Claude CLI ({cause}); its sessions move to another agent"
    finally:
        try:
            await context.isolation.remove(folder)
        except (HypercoreError, OSError) as error:
            _log.warning("agent.check_not_removed", error=str(error)[:300])
    return None
