"""Entry points called by Ray's worker."""
