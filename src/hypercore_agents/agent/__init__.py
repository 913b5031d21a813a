"""The server inside the sandbox: FastAPI around the Claude Agent SDK."""
