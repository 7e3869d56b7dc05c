"""The programs of the steps: each is run by itself and tells ``ci.gpu.runner`` what came of it."""
