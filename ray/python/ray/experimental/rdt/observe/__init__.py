"""Metrics, and the explanation of a transport's selection."""
