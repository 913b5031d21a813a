"""Messages between pid 1 and the standby server, besides the handover of the identity."""

CHANNEL = 3
"""Descriptor of the socket to pid 1, in the server."""
UP = b"up\n"
"""The server has imported all modules and waits for its identity."""
SERVING = b"serving\n"
"""The server is enrolled and accepts turns."""
