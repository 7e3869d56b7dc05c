"""Links over torch process groups, for gloo and nccl."""
