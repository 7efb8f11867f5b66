"""The environments.

Importing this package registers `PredatorPrey` with jumanji if jumanji is imported already; otherwise call
`register_jumanji` before ``jumanji.make("PredatorPrey-v0")``.
"""

import sys

JUMANJI_ID = "PredatorPrey-v0"


def register_jumanji() -> None:
    """Registers ``PredatorPrey-v0``, so that ``jumanji.make`` finds it; a second call changes nothing.

    Imports jumanji, which takes two seconds, loads matplotlib and starts jax's backend: no run should pay for that.
    """
    from jumanji.registration import register, registered_environments

    if JUMANJI_ID not in registered_environments():
        register(id=JUMANJI_ID, entry_point="wqmix_jax.envs.predator_prey.jumanji:PredatorPreyJumanji")


if "jumanji" in sys.modules:
    register_jumanji()
