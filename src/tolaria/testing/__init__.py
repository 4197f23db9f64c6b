"""Tools that show whether snapshots and rollbacks are safe: of tolaria itself, and of other people's code."""
