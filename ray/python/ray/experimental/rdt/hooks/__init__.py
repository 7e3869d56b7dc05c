"""Where calls of Ray's worker enter RDT."""
