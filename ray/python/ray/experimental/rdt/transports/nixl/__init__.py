"""NIXL: the consumer reads the producer's registered memory."""
