"""Sealing of secrets, signed tokens, bearers. No I/O beyond the key file."""
