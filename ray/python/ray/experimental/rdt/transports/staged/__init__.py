"""Device memory through pinned host memory."""
