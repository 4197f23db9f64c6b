"""Recorded runs: losses read from files, and what the governor would have said about them. Knows no torch."""
