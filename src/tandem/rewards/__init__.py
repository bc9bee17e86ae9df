"""Verifiers, own functions, and the processes that run them. Nothing is imported here: workers start fast."""
