"""The files that a run leaves behind, and how they are read."""
