"""The autoscaler: reads how busy the pool is and sets how many agents it should have."""
