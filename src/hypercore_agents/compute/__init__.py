"""Where agents run: the backend contract and the backends behind it."""
