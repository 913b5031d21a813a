"""Isolation of sessions: their users, folders, processes, files, and their only route to the model."""
