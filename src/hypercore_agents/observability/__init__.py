"""Logs and metrics (one class per role)."""
