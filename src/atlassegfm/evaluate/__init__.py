"""Scores of results against references."""
