"""The demo, the notebooks, and a project that adds an algorithm and an environment."""
