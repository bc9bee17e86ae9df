"""Roles on many processes that Ray starts: the inline roles plus transport."""
