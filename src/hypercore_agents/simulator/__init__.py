"""A stand-in for the Claude Messages API on loopback, for the demo, tests and load tests."""
