"""The HTTP server of an agent: its application, routes, streamed answers, heartbeat and metrics port."""
