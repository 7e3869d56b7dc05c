"""Modules that all other folders use: settings, errors, threads, deadlines, the adapter to Ray."""
