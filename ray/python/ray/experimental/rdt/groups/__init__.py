"""Process groups of actors: which ones a process is in, and how they are made and ended."""
