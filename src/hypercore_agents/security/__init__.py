"""Sealed secrets, signed tokens and bearers. The only I/O is the key file."""
