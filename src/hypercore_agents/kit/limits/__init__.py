"""Limits of request bodies: bytes held in memory, and the number of JSON values."""
