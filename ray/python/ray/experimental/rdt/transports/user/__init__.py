"""Transports that users register."""
