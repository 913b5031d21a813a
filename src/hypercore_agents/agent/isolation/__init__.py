"""Isolation of sessions: their users, folders, processes, files, and the proxy for their model requests."""
