"""The process that holds an object's reference count: metadata, no tensors."""
