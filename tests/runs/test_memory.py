"""A run prints the memory it needs before it trains; seeds that don't fit learn in groups or are refused."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.environments import TD, Clock, tiny_run, tiny_wqmix
from tests.running import TINY, main, to_continue
from tests.topologies import tpu_devices
from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.options import build
from wqmix_jax.runs import memory, session
from wqmix_jax.runs.checkpoint_pieces import buffer_bytes
from wqmix_jax.runs.memory import (
    MemoryPlan,
    compile_within_memory,
    memory_faults_in_one_line,
    memory_limit,
    memory_plan,
    refuse_small_memory,
)
from wqmix_jax.training.compiled_loop import Compilation, abstract_state, make_trainer
from wqmix_jax.training.devices import TPU_MEMORY, device_memory, seed_sharding
from wqmix_jax.training.members import make_members

CONFIG = tiny_run(tiny_wqmix(hidden_dim=16, batch_size=4, buffer_size=512), Clock(episode_limit=64, ends_from=64))
MEMBERS = make_members(CONFIG.algo, range(4), {})


def grouped(memory_groups):
    return make_trainer(CONFIG, memory_groups=memory_groups)


@pytest.fixture(scope="module")
def programs():
    """Returns the compiled trainer with all seeds together, with two and with one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "memory_limit", lambda _: None)
        return {groups: compile_within_memory(CONFIG, grouped(groups), MEMBERS)[0] for groups in (1, 2, 4)}


def test_the_plan_is_the_programs_own_and_nothing_copies_the_replay(programs):
    plan = memory_plan(programs[1], MEMBERS)
    state = jax.tree.leaves(abstract_state(grouped(1), MEMBERS))
    num_iterations = 4  # bytes
    assert plan.state == sum(leaf.size * leaf.dtype.itemsize for leaf in state) + num_iterations
    replays = programs[1].replay_bytes * len(MEMBERS)
    assert replays < plan.state
    assert memory_plan(programs[4], MEMBERS).temporaries < replays / 2
    assert programs[1].train.memory_analysis().alias_size_in_bytes == plan.state - num_iterations
    assert str(plan._replace(limit=10**9)).endswith("; 1,000.0 MB available")


def test_the_plan_has_room_for_a_checkpoint(programs):
    plan = memory_plan(programs[1], MEMBERS)
    assert plan.checkpoint == buffer_bytes(plan.state) > 0
    assert plan.total == plan.state + plan.temporaries + plan.code + plan.checkpoint
    assert plan._replace(limit=plan.total).fits
    assert not plan._replace(limit=plan.total - 1).fits
    assert f"{plan.checkpoint / 1e6:,.1f} MB for checkpoints" in str(plan)


def test_groups_take_less_memory_and_give_the_same_numbers(programs):
    assert memory_plan(programs[4], MEMBERS).temporaries < memory_plan(programs[1], MEMBERS).temporaries / 2
    states = {}
    for groups, trainer in ((groups, programs[groups]) for groups in (1, 4)):
        state = trainer.init([member.seed for member in MEMBERS])
        for _ in range(5):
            state, record = trainer.train_chunk(state)
        assert (np.array(record.updates) == 1).all()
        states[groups] = state
    for one, other in zip(*(jax.tree.leaves(states[groups].learner) for groups in (1, 4)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)


def test_code_is_counted_where_the_compiler_reports_it(programs):
    plan = memory_plan(programs[1], MEMBERS)
    all_three = (programs[1].train, programs[1].evaluate, programs[1].init_program)
    assert plan.code == sum(program.memory_analysis().generated_code_size_in_bytes for program in all_three)
    with_code = plan._replace(code=plan.code + 5_000_000)
    assert with_code.total == plan.total + 5_000_000
    assert " MB of code" in str(with_code)
    assert "of code" not in str(plan._replace(code=0))


@pytest.mark.parametrize("shortage", ["none", "some", "most", "too much"])
def test_as_few_groups_as_fit(programs, shortage, monkeypatch):
    whole, least = (memory_plan(programs[groups], MEMBERS).total for groups in (1, 4))
    limit = {"none": whole, "some": whole - 1, "most": least, "too much": least - 1}[shortage]
    monkeypatch.setattr(memory, "memory_limit", lambda _: limit)
    monkeypatch.setattr(
        memory, "compile_trainer", lambda trainer, *_, **__: (programs[trainer.memory_groups], Compilation(0.0, True))
    )
    if shortage == "too much":
        with pytest.raises(RunError, match=r"too little memory, .* MB available"):
            compile_within_memory(CONFIG, grouped(1), MEMBERS)
        return
    trainer, _, lines = compile_within_memory(CONFIG, grouped(1), MEMBERS)
    expected = {"none": (1, []), "some": (2, ["2 seeds"]), "most": (4, ["1 seed"])}[shortage]
    assert (trainer.memory_groups, re.findall(r"they learn (.*) at a time", " ".join(lines))) == expected


def test_a_tpu_needs_the_peak_and_other_devices_the_temporaries_and_new_outputs():
    sizes = {"argument": 100, "output": 90, "alias": 80, "temp": 700}
    analysis = SimpleNamespace(
        peak_memory_in_bytes=500, **{f"{name}_size_in_bytes": size for name, size in sizes.items()}
    )
    assert memory._bytes_added(analysis, "tpu") == 400
    assert memory._bytes_added(analysis, "gpu") == memory._bytes_added(analysis, "cpu") == 710


PLAN = MemoryPlan(64, state=200, temporaries=640, least_temporaries=40, code=5, checkpoint=0, limit=0)


@pytest.mark.parametrize(
    ("limit", "groups", "expected"),
    [
        (844, 1, 2),  # half of the temporaries fit
        (365, 1, 4),
        (364, 1, 8),
        (245, 1, 16),  # as small as the temporaries that no groups save
        (244, 1, None),  # which don't fit
        (365, 2, 8),  # two groups needed more than half of what one needs
        (844, 32, 64),
        (844, 64, None),
    ],
)
def test_the_next_number_of_groups_is_the_least_that_should_do(limit, groups, expected):
    assert memory._more_groups(PLAN._replace(limit=limit), groups, 64) == expected


@pytest.mark.parametrize(
    ("groups", "num_seeds", "expected"), [(1, 64, 2), (2, 64, 4), (1, 9, 3), (3, 9, 9), (4, 4, None)]
)
def test_a_refusal_without_numbers_at_least_halves_the_groups(groups, num_seeds, expected):
    assert memory._more_groups(None, groups, num_seeds) == expected


REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.00G) exceeds "
    "available HBM (15.75G).\nLargest allocations: .."
)
REFUSED_OLD = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G "
    "hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:"
)


def refuse_below(groups, message, programs, monkeypatch):
    """Makes a compiler that refuses programs of fewer groups, and returns the list of the numbers that it got."""
    tried = []

    def compile_or_refuse(trainer, *_, **__):
        tried.append(trainer.memory_groups)
        if trainer.memory_groups < groups:
            raise jax.errors.JaxRuntimeError(message)
        return programs[trainer.memory_groups], Compilation(1.0, True)

    monkeypatch.setattr(memory, "memory_limit", lambda _: None)
    monkeypatch.setattr(memory, "compile_trainer", compile_or_refuse)
    return tried


@pytest.mark.parametrize("message", [REFUSED, REFUSED_OLD])
def test_a_program_that_the_compiler_refuses_gets_more_groups(message, programs, monkeypatch):
    tried = refuse_below(4, message, programs, monkeypatch)
    trainer, compilation, lines = compile_within_memory(CONFIG, grouped(1), MEMBERS)
    assert tried == [1, 2, 4]
    assert trainer is programs[4]
    assert compilation.seconds >= 1
    assert not compilation.from_cache
    assert lines[1] == "memory: not all seeds fit simultaneously: on each device they learn 1 seed at a time"


def test_a_program_that_the_compiler_always_refuses_ends_the_run_in_one_line(programs, monkeypatch):
    tried = refuse_below(5, REFUSED, programs, monkeypatch)
    with pytest.raises(RunError) as caught:
        compile_within_memory(CONFIG, grouped(1), MEMBERS)
    assert tried == [1, 2, 4]
    assert str(caught.value) == f"too little memory, train fewer seeds: {REFUSED.splitlines()[0]}"


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: Mosaic failed to compile TPU kernel",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.",
    ],
)
def test_other_errors_of_the_compiler_are_not_about_the_number_of_seeds(message, programs, monkeypatch):
    tried = refuse_below(4, message, programs, monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message.split(":")[0]):
        compile_within_memory(CONFIG, grouped(1), MEMBERS)
    assert tried == [1]


class Device(SimpleNamespace):
    """A device with the given statistics, or one that is only compiled for."""

    def memory_stats(self):
        if self.stats == "compile only":
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: MemoryStats is only supported for addressable devices.")
        return self.stats


@pytest.mark.parametrize(
    ("kind", "stats", "expected"),
    [
        ("TPU v5 lite", {"bytes_limit": 7, "bytes_in_use": 3}, 7),
        ("TPU v5 lite", None, TPU_MEMORY["TPU v5 lite"]),
        ("TPU v6 lite", {}, TPU_MEMORY["TPU v6 lite"]),
        ("TPU v4", "compile only", TPU_MEMORY["TPU v4"]),
        ("NVIDIA H100 80GB HBM3", None, None),
    ],
)
def test_the_memory_of_an_accelerator_is_what_it_reports_or_what_its_kind_has(kind, stats, expected, monkeypatch):
    device = Device(platform="tpu", device_kind=kind, stats=stats)
    assert device_memory(device) == expected
    monkeypatch.setattr(memory, "_device", lambda _: device)
    limit = memory_limit(grouped(1))
    assert limit == (None if expected is None else int(memory.USABLE_SHARE * expected))


def test_states_that_can_never_fit_are_refused_before_anything_compiles(monkeypatch):
    trainer = grouped(1)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(trainer, MEMBERS)))
    monkeypatch.setattr(memory, "memory_limit", lambda _: size)
    refuse_small_memory(trainer, MEMBERS)
    monkeypatch.setattr(memory, "memory_limit", lambda _: size - 1)
    with pytest.raises(ConfigError, match=r"training 4 seeds in one run is not allowed: .* MB is available"):
        refuse_small_memory(trainer, MEMBERS)


def test_devices_that_share_a_batch_hold_a_copy_each():
    one, shared = (
        memory._state_bytes(make_trainer(CONFIG, sharding=sharding), MEMBERS[:1])
        for sharding in (None, seed_sharding(1, batch_size=8))
    )
    assert shared == 2 * one


def test_the_limit_is_what_the_machine_and_the_control_group_have_left(tmp_path, monkeypatch):
    (group := tmp_path / "slurm" / "job").mkdir(parents=True)
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(jax, "live_arrays", lambda: [np.zeros(5, np.uint8)])
    trainer = grouped(1)
    assert memory_limit(trainer) is None
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 20 kB\n")
    assert memory_limit(trainer) == 20 * 1024 + 5
    (tmp_path / "self" / "status").write_text("Name: python\nVmSize: 2 kB\n")
    (tmp_path / "self" / "limits").write_text("Max address space  unlimited  unlimited  bytes\n")
    assert memory_limit(trainer) == 20 * 1024 + 5
    (tmp_path / "self" / "limits").write_text("Max address space  12048  unlimited  bytes\n")
    assert memory_limit(trainer) == 10000 + 5
    (tmp_path / "self" / "cgroup").write_text("4:memory:/old\n0::/slurm/job\n")
    (group / "memory.max").write_text("max\n")
    assert memory_limit(trainer) == 10000 + 5
    (group / "memory.max").write_text("9000\n")
    assert memory_limit(trainer) == 10000 + 5, "its use is unknown"
    for folder, limit in ((group, 9000), (group.parent, 8000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("6000\n")
    assert memory_limit(trainer) == 2000 + 5
    cached = "anon 900\nactive_file 2000\ninactive_file 2500\nshmem 100\nslab_reclaimable 500\n"
    (group.parent / "memory.stat").write_text(cached)
    assert memory_limit(trainer) == 3000 + 5, "what is cached makes way"


def test_a_run_prints_it_and_one_that_is_too_large_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert main(*TINY, f"run_dir={tmp_path / 'fits'}", "total_env_steps=1") == 0
    assert re.search(r"^memory: [\d.,]+ MB per seed, [\d.,]+ MB in all \(", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(memory, "memory_limit", lambda _: 1000)
    assert main(*TINY, f"run_dir={tmp_path / 'large'}") == 2
    refused = capsys.readouterr().err.strip().splitlines()
    assert len(refused) == 1
    assert "training 2 seeds in one run is not allowed" in refused[0]
    assert not (tmp_path / "large").exists()


FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.\nBufferAssignment: ..."


@pytest.mark.parametrize("message", [FULL, "INTERNAL: Failed to create cuDNN handle", "CUBLAS_STATUS_ALLOC_FAILED"])
@pytest.mark.parametrize(("platform", "preallocate"), [("gpu", None), ("gpu", "false"), ("cpu", None)])
def test_a_full_device_is_reported_in_one_line(message, platform, preallocate, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    if preallocate is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", preallocate)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform=platform)])
    with pytest.raises(RunError) as caught, memory_faults_in_one_line():
        raise jax.errors.JaxRuntimeError(message)
    reported = str(caught.value)
    assert reported.startswith(f"out of memory ({message.splitlines()[0]}); train fewer seeds")
    hint = "set XLA_PYTHON_CLIENT_PREALLOCATE=false for each process to share it"
    assert (hint in reported) == (platform == "gpu" and preallocate is None)


def test_other_errors_of_jax_stay_as_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"), memory_faults_in_one_line():
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: of something else")


def test_a_run_on_a_full_gpu_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(FULL)

    monkeypatch.setattr(session, "compile_within_memory", fail)
    assert main(*TINY, f"run_dir={tmp_path / 'run'}") == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: out of memory (RESOURCE_EXHAUSTED: ")
    assert line.endswith(to_continue(tmp_path / "run"))


@pytest.mark.slow
def test_seeds_that_exceed_a_tpu_are_refused_by_its_compiler_and_learn_in_groups(monkeypatch):
    """64 seeds with large batches on one v5e, whose 16 GB hold the states but not all temporaries."""
    device = tpu_devices("v5e:2x2", monkeypatch)[0]
    sizes = {"batch_size": 6144, "buffer_size": 6144, "hidden_dim": 64}
    algo = build("algo", {"_target_": "wqmix_jax.algos.iql.IQL", **TD, "weighting": "uniform", "alpha": 1.0, **sizes})
    config, members = tiny_run(algo, Clock(episode_limit=15, ends_from=15)), make_members(algo, range(64), {})
    refusals, compile_trainer = [], memory.compile_trainer

    def watched(trainer, *args, **options):
        try:
            return compile_trainer(trainer, *args, **options)
        except jax.errors.JaxRuntimeError as error:
            refusals.append((trainer.memory_groups, str(error).splitlines()[0]))
            raise

    monkeypatch.setattr(memory, "compile_trainer", watched)
    trainer = make_trainer(config, sharding=SingleDeviceSharding(device))
    refuse_small_memory(trainer, members)
    compiled, _, lines = compile_within_memory(config, trainer, members)
    assert [groups for groups, _ in refusals] == [1]
    assert re.match("RESOURCE_EXHAUSTED: Ran out of memory", refusals[0][1])
    assert compiled.memory_groups == 2
    plan = memory_plan(compiled, members)
    assert plan.fits
    assert plan.code > 0
    assert " of code)" in lines[0]
