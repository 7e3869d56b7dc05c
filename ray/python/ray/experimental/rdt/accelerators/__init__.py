"""Kinds of devices. Each has a module, and ``registry`` finds it."""
