"""The programs of the steps: each runs alone and reports its result to ``ci.gpu.runner``."""
