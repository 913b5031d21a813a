"""A stand-in for the Claude Messages API on loopback: for the demo, for tests and for load tests.

It implements the protocol of the `claude` CLI and the official clients, and its answers are deterministic. Directives
in a prompt make it call tools, stream at a given rate, or fail (`directives.py`). The manual is docs/simulator.md.
"""
