"""Command lines: composes, checks and explains options, and ends commands with one line."""
