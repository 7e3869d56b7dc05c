"""Requests between the processes of a job."""
