"""The agent's connection to the gateway: enrolment, and the client of the internal routes."""
