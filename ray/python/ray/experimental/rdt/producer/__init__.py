"""The process that created an object: it stores the tensors and sends them to consumers."""
