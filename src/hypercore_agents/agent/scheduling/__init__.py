"""Order and limits of work in an agent: the fair queue, the limiter of CLI starts, and load measurements."""
