"""Measurements of speed and memory, with the numbers that they recorded (``*.json``, ``*.jsonl``)."""
