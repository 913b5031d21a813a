"""Load test: users that chat with a running platform, and how long it let them wait.

`scenario` is what to do, `runner` does it, `report` says what came of it. Needs the extra `loadtest` (hdrhistogram).
"""
