"""Exchange with other projects' files."""
