"""Random work with random faults; checks at the end for errors, hangs and leaks."""
