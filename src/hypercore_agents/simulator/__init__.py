"""A stand-in for the Claude Messages API on loopback: for the demo, for tests and for load tests.

It speaks the protocol that the `claude` CLI and the official clients expect, deterministically, and does what
directives in a prompt ask for (`directives.py`): call tools, keep a pace, fail. docs/simulator.md is its manual.
"""
