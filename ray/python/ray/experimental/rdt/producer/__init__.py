"""The process that made an object: its tensors and who may have them."""
