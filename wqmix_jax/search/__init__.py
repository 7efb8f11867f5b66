"""A search for good values of an algorithm's options, with optuna: ``python -m wqmix_jax.search``."""
