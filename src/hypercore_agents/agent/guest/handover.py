"""What pid 1 and the waiting server say over the socket between them, besides the handover itself."""

CHANNEL = 3
"""Descriptor of the socket in the server."""
UP = b"up\n"
"""The server has imported everything and waits."""
SERVING = b"serving\n"
"""The server is enrolled and takes turns."""
