"""Linux building blocks: control groups, removal of hostile trees, disk reservations, and host identity."""
