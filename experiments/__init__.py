"""Commands that measure or reproduce something; run them from a clone.

Commands in ``benchmarks`` and ``examples`` also run without the folder's name: ``python -m experiments.benchmark``.
"""

__path__ += [f"{__path__[0]}/benchmarks", f"{__path__[0]}/examples"]
