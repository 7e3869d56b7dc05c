"""Collective groups of actors: membership, creation and destruction."""
