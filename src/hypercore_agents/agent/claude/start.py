"""Starting a session's CLI: the one way, for sessions and for prewarmed CLIs."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from claude_agent_sdk import HookMatcher

from hypercore_agents.agent.claude.environment import cli_environment
from hypercore_agents.agent.claude.options import SYSTEM_PROMPT_FILE, Offer, prompt_text, sdk_options
from hypercore_agents.agent.claude.process import ClaudeEnded, ClaudeFailed, ClaudeProcess
from hypercore_agents.agent.isolation.workspace import SessionFolder
from hypercore_agents.agent.persistence.transcript import TranscriptPort
from hypercore_agents.api.options import SessionOptions

if TYPE_CHECKING:
    from hypercore_agents.agent.claude.context import AgentContext


async def start(
    context: "AgentContext",
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
    starting: Callable[[ClaudeProcess | None], None] = lambda _: None,
    judged: bool = True,
) -> ClaudeProcess:
    """Return a connected CLI, once it may start (`start_limiter`). Raises ClaudeFailed or AtCapacity.

    Without a `token` and a `user_id` it is a spare's, which takes no session's place; the caller holds its slot.
    `timeout` is the turn's, in seconds. `starting` is told the process while it connects, and None afterwards.
    What is `judged` counts for the agent's readiness.
    """
    isolation = context.isolation
    environment = cli_environment(
        folder,
        gateway_url=isolation.model_url(),
        session_token=isolation.credential(token),
        timeout=timeout,
        own={} if isolation.separate else os.environ,
    )
    async with context.start_limiter.session(user_id) if user_id is not None else contextlib.nullcontext():
        try:
            await isolation.prepare(folder)
        except OSError as error:
            if judged:
                context.readiness.failed(error, context)
            raise ClaudeEnded(f"the session's folder cannot be made: {error.strerror}") from error
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
        starting(process)
        try:
            began = time.monotonic()
            share = await process.start(window=context.start_timeout)
            context.start_limiter.finished(share, time.monotonic() - began)
        except ClaudeFailed as error:
            if judged:
                context.readiness.failed(error, context)
            raise
        finally:
            starting(None)
    if judged:
        context.readiness.succeeded()
    if isolation.separate and token:
        await process.renew(token)
    return process
