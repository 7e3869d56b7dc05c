"""CUDA IPC: GPUs of one host map each other's memory."""
