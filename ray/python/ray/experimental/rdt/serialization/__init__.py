"""Tensors taken out of a value and put back."""
