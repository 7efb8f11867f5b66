"""Commands that measure or reproduce something; run from a clone."""
