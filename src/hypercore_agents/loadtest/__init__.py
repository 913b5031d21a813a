"""Load test: simulated users that chat with a running platform, and the times that they wait.

`scenario` is the plan, `runner` carries it out, `report` has the result. Needs the extra `loadtest` (hdrhistogram).
"""
