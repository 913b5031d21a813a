"""The agent's side of the gateway: enrolment, and the client of the internal routes."""
