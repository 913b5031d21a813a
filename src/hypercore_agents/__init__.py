"""Hypercore Agents: the self-hosted platform that runs the Claude Agent SDK, one sandbox per agent."""

__version__ = "0.1.0"
