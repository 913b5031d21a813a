"""Logging, tracing and metrics, for every role."""
