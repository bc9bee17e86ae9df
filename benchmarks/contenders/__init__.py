"""The contenders. Each module has SETTINGS, REQUIRES, and `measure(job)`; it imports what it races only inside."""
