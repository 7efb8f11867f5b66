"""The settings of every test: strict shapes, no display, no network, nothing written to the user's folders."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = tempfile.mkdtemp(prefix="wqmix_jax_tests_")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

# Set before anything is imported, and inherited by the commands that tests run.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": str(ROOT / ".cache" / "matplotlib"),
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_MODE": "offline",
    "XDG_CACHE_HOME": f"{HOME}/cache",
    "XDG_CONFIG_HOME": f"{HOME}/config",
    "XDG_DATA_HOME": f"{HOME}/data",
    "XDG_STATE_HOME": f"{HOME}/state",
    "WANDB_CACHE_DIR": f"{HOME}/cache/wandb",
    "WANDB_CONFIG_DIR": f"{HOME}/config/wandb",
    "WANDB_DATA_DIR": f"{HOME}/data/wandb",
}
# Nearly all of a small test's time is compilation, which takes 1.7 times as long with the newer emitters.
os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.pop("WANDB_API_KEY", None)

import hypothesis
import jax

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 2)  # so that seeds are spread on any machine
jax.config.update("jax_numpy_rank_promotion", "raise")  # a missing axis is an error, never a silent broadcast

# A first call compiles, so no example has a deadline.
hypothesis.settings.register_profile("wqmix_jax", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("wqmix_jax")
