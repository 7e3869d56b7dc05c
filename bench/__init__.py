"""The benchmark: this wheel against stock Ray in one run on one machine. Start with run.py."""
