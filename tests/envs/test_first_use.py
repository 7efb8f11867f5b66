"""An environment may be used for the first time inside a trace, as `load_policies` and `evaluate` do in a new process.

Whatever it caches then must hold concrete arrays: a tracer that is kept breaks the next trace.
"""

import subprocess
import sys
import textwrap

import pytest

FIRST_USE = """
import jax, jax.numpy as jnp
from wqmix_jax.config import build, load_group

def use(env):
    spec = env.spec
    state = env.reset(jax.random.key(0))
    env.decompress(env.compress(state)), env.metrics(state)
    return env.step(state, jnp.zeros(spec.num_agents, jnp.int32), jax.random.key(1)), env.observe(state)

def first_used_in_a_trace(make):
    env = make()
    with jax.checking_leaks():
        jax.eval_shape(lambda: use(env))
    print(type(env).__name__, flush=True)
"""


@pytest.mark.slow
def test_an_environment_first_used_in_a_trace_keeps_no_tracer() -> None:
    # SMAX's object and jumanji's are cleared from their caches: the options' own checks fill them before any trace.
    code = textwrap.dedent(FIRST_USE) + textwrap.dedent("""
    from tests.envs.host.running import toy
    from wqmix_jax.envs import jaxmarl, jumanji
    from wqmix_jax.envs.smax import task as smax

    def fresh(group, **changes):
        env = build("env", load_group("env", group) | changes)
        smax._game.cache_clear(), smax._library.cache_clear(), jumanji._made.cache_clear()
        jumanji._spec.cache_clear(), jaxmarl._made.cache_clear()
        return env

    first_used_in_a_trace(lambda: fresh("smax", map="3m"))
    first_used_in_a_trace(lambda: fresh("smax", map="corridor"))
    first_used_in_a_trace(lambda: fresh("jumanji"))
    first_used_in_a_trace(lambda: fresh("jumanji", name="RobotWarehouse-v0"))
    first_used_in_a_trace(lambda: fresh("jumanji", name="Connector-v3"))
    first_used_in_a_trace(lambda: fresh("jaxmarl"))
    first_used_in_a_trace(lambda: fresh("predator_prey"))
    first_used_in_a_trace(lambda: fresh("matrix_game"))
    first_used_in_a_trace(lambda: fresh("mmdp"))
    first_used_in_a_trace(toy)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [*["SMAX"] * 2, *["JumanjiEnvironment"] * 3, "JaxMARL"]
    assert done.stdout.split() == [*expected, "PredatorPrey", "MatrixGame", "MMDP", "HostEnvironment"]
