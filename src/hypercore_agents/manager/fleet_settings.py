"""Derives the fleet's rules, the pool's shape and agents' URLs from the settings."""

import os
from collections.abc import Callable

from hypercore_agents.api.internal import DRAIN_RESERVE_SECONDS
from hypercore_agents.compute.base import ComputeBackend
from hypercore_agents.manager.fleet.pool import PoolShape
from hypercore_agents.manager.fleet.reconciler import FleetRules
from hypercore_agents.manager.settings import PLATFORM_USER, ManagerSettings


def fleet_rules(settings: ManagerSettings) -> FleetRules:
    """Return how agents are started, watched and stopped."""
    environment: dict[str, str] = {"LOG_LEVEL": settings.log_level, "LOG_FORMAT": settings.log_format}
    if settings.log_content:
        environment["LOG_CONTENT"] = "true"
    if settings.otlp_endpoint is not None:
        environment["TRACING"] = "true"
    environment["WORKSPACE_MAX_MB"] = str(settings.workspace_max_mb)
    environment["WORKSPACE_MAX_FILES"] = str(settings.workspace_max_files)
    environment["APPROVAL_TIMEOUT"] = f"{settings.approval_timeout:g}"
    environment["PARK_AFTER"] = f"{settings.park_after:g}"
    environment["BACKGROUND_MAX"] = f"{settings.background_max:g}"
    # The agent finishes its turns before the manager's own limit expires.
    environment["DRAIN_GRACE"] = f"{max(0.0, settings.stop_grace - DRAIN_RESERVE_SECONDS):g}"
    environment["USER_SHARE"] = f"{settings.user_share:g}"
    if settings.skills_dir is not None and settings.compute_backend == "process":  # elsewhere the image holds them
        environment["SKILLS_DIR"] = str(settings.skills_dir)
    if settings.live_sessions is not None:
        environment["LIVE_SESSIONS"] = str(settings.live_sessions)
    return FleetRules(
        gateway_url=settings.sandbox_gateway_url,
        environment=environment,
        start_timeout=settings.start_timeout,
        enrolment_seconds=2 * settings.start_timeout,
        stop_grace=settings.stop_grace,
        drain_timeout=settings.drain_timeout,
        health_interval=settings.health_check_interval,
        starts_at_once=_starts_at_once(settings),
        allow_unisolated_tools=settings.allow_unisolated_tools,
    )


def _starts_at_once(settings: ManagerSettings) -> int:
    return settings.starts_at_once or 2 * (os.cpu_count() or 1)


def pool_shape(settings: ManagerSettings, backend: ComputeBackend) -> PoolShape:
    """Return the shape of the pool's agents, unless a roll changes it, and the limits of the pool's size."""
    config = settings.pool_config
    return PoolShape(
        user_id=PLATFORM_USER,
        backend=backend.name,
        cores=config.cores,
        memory_mb=config.memory,
        capacity=settings.max_concurrent_requests,
        timeout_seconds=settings.request_timeout,
        minimum=settings.min_agents,
        maximum=settings.max_agents,
        starts_at_once=_starts_at_once(settings),
        options=config.options.model_dump(mode="json", exclude_none=True),
    )


def agent_urls(settings: ManagerSettings, base_url: str) -> Callable[[str], str]:
    """Return a function that returns an agent's public base URL."""
    domain = settings.base_domain
    if domain is not None:
        return lambda agent_id: f"https://{agent_id}.{domain}"
    return lambda agent_id: f"{base_url}/agents/{agent_id}"
