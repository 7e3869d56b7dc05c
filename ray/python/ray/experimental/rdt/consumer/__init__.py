"""The process that receives an object's tensors."""
