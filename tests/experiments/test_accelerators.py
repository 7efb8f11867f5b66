"""Programs that are compiled for TPUs and GPUs which needn't be there: numbers, refusals, and limits for real runs."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from experiments.benchmarks import accelerator_targets, accelerators, hlo
from experiments.benchmarks.accelerator_targets import Target, find_target, version_of
from experiments.benchmarks.accelerators import Job, assumed_trips, buffer_numbers, cells, compiled_in_process, notes
from tests.running import ROOT
from wqmix_jax import load_config


class Limits(NamedTuple):
    """The most that a compiled program may need; None where a program has no such number."""

    code_megabytes: float
    temporary_megabytes_per_seed: float
    kernels_per_env_step: float | None
    kernels_per_learner_call: float | None = None
    kernels_per_iteration: float | None = None


LIMITS = {
    ("cuda:h100", "qmix", 1, "train"): Limits(1.9, 60, 40, 1_580, 9_460),
    ("cuda:h100", "qmix", 1, "evaluate"): Limits(0.4, 1.1, 44),
    ("cuda:h100", "ow_qmix", 1, "train"): Limits(1.8, 118, 40, 1_790, 9_680),
    ("tpu:v5e", "qmix", 1, "train"): Limits(12.8, 61, 920, 5_280, 189_800),
    ("tpu:v5e", "qmix", 1, "evaluate"): Limits(2.6, 6.6, 175),
    ("tpu:v5e", "ow_qmix", 1, "train"): Limits(17.3, 100, 920, 5_170, 189_800),
}
"""Limits by target, algorithm, number of seeds and program: 10% above the numbers."""


def compiler(target: str) -> str:
    return target.partition(":")[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", LIMITS, ids=lambda case: " ".join(map(str, case)))
def test_a_compiled_program_stays_below_its_limits(case: tuple[str, str, int, str]) -> None:
    name, algo, num_seeds, program = case
    packages = accelerator_targets.PACKAGES[compiler(name)]
    if not any(map(version_of, packages)):
        pytest.skip(f"needs the extra {compiler(name)}: {' or '.join(packages)} is missing")
    [row] = compiled_in_process(Job(find_target(name), algo, num_seeds, (program,), (), None))
    reached = Limits(
        row["code_bytes"] / 1e6,
        row["temporary_bytes_per_seed"] / 1e6,
        row.get("kernels_per_env_step"),
        row.get("kernels_per_learner_call"),
        row.get("kernels_per_iteration"),
    )
    limits = LIMITS[case]
    assert [number is None for number in reached] == [number is None for number in limits]
    exceeded = {
        field: (number, limit)
        for field, number, limit in zip(Limits._fields, reached, limits, strict=True)
        if number is not None and limit is not None and number > limit
    }
    assert exceeded == {}
    assert row["replay_copies"] == []
    assert row["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["target=gpu"], "target=gpu is not allowed: write tpu:KIND or tpu:KIND:TOPOLOGY (2x4, say) with KIND one of"),
        (["target=tpu:v9"], "target=tpu:v9 is not allowed: write tpu:KIND"),
        (["target=tpu:v5e:many"], "target=tpu:v5e:many is not allowed: write tpu:KIND"),
        (["target=cuda:z9"], "target=cuda:z9 is not allowed: z9: No such file or directory; choose one of a100, h100"),
        (["target=cuda:."], "target=cuda:. is not allowed: .: Is a directory; choose one of a100, h100, or a file"),
        ([f"target=cuda:{__file__}"], f"target=cuda:{__file__} is not allowed: {__file__} lacks device_memory_size"),
        (["algo=nonsense"], "algo=nonsense is not allowed: choose one of"),
        (["num_seeds=0"], "num_seeds=0 is not allowed: choose whole numbers above 0, with commas between them"),
        (["num_seeds=1,x"], "num_seeds=x is not allowed: choose whole numbers above 0"),
        (["program=play"], "program=play is not allowed: choose from train, evaluate, learn, init"),
        (["num_env=2"], "num_env is unknown: did you mean num_envs?"),
        (["--out", "nowhere/a.json"], "argument --out: nowhere/a.json is not allowed: there is no folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerators, "compiled_in_process", lambda _: pytest.fail("it compiles"))
    assert refusal(arguments, monkeypatch, capsys).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ("tpu:v5e", "libtpu is missing; "),
        ("cuda:h100", "jax-cuda13-plugin or jax-cuda12-plugin is missing; "),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    target: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator_targets, "version_of", lambda _: None)
    monkeypatch.setattr(accelerator_targets, "install_extra", lambda extra: f"pip install 'wqmix_jax[{extra}]'")
    line = refusal([f"target={target}"], monkeypatch, capsys)
    extra = compiler(target)
    assert line == f"error: target={target} is not allowed: {missing}pip install 'wqmix_jax[{extra}]' installs it\n"


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command and returns the line on stderr."""
    monkeypatch.setattr(sys, "argv", ["accelerators", *arguments])
    with pytest.raises(SystemExit) as ended:
        accelerators.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_targets_are_found_by_name_with_the_memory_of_a_device(tmp_path: Path) -> None:
    v5e, slice_, h100, two = map(find_target, ("tpu:v5e", "tpu:v5e:2x4", "cuda:h100", "cuda:a100:2"))
    assert (v5e.topology, v5e.is_spread, v5e.memory_bytes) == ("v5e:2x2", False, int(15.75 * 2**30))
    assert (slice_.topology, slice_.is_spread) == ("v5e:2x4", True)
    assert (h100.topology, h100.is_spread, h100.memory_bytes) == ("1x1x1", False, 84978434048)
    assert (two.topology, two.is_spread, two.options["topology"]) == ("1x1x2", True, "1x1x2")
    own = tmp_path / "own.txtpb"
    own.write_text(h100.options["target_config"])
    assert find_target(f"cuda:{own}")._replace(name="cuda:h100") == h100


def loop(op_name: str, trips: int | None, *inner: hlo.Part, kernels: int = 1, check: int = 0) -> hlo.Part:
    return hlo.Part("loop", op_name, kernels, check, trips, inner)


def choice(*branches: hlo.Part) -> hlo.Part:
    return hlo.Part("choice", "cond", 0, 0, 1, branches)


def block(*inner: hlo.Part, kernels: int = 0) -> hlo.Part:
    return hlo.Part("block", "", kernels, 0, 1, inner)


LEARNER = block(
    loop("jit(f)/while/body/cond/while", None, loop("jit(f)/while/body/cond/while/body/while", 16, kernels=2)),
    loop("jit(f)/while/body/cond/vmap(blocks_at_most_9)/while", None, kernels=3),
    loop("jit(f)/while/body/cond/other/while", None, kernels=5),
    kernels=7,
)

TRAIN = block(
    loop(
        "jit(f)/while",
        None,
        loop("jit(f)/while/body/while", None, loop("jit(f)/while/body/while/body/while", 8), kernels=10, check=1),
        choice(LEARNER, block(kernels=3)),
        kernels=20,
    ),
    kernels=4,
)


def numbers(part: hlo.Part, program: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(hlo, "structure", lambda *_, **__: part)
    config = load_config("+algo=vdn", "env.episode_limit=40", "updates_per_iteration=2")
    return accelerators.kernel_numbers({}, config, program, "cuda")


def test_kernels_of_a_training_iteration_are_those_of_a_full_episode_and_the_learner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = numbers(TRAIN, "train", monkeypatch)
    play = 40 * (10 + 8) + 41  # the condition of the loop is evaluated after the last step too
    learner = 7 + 3 * (1 + 16 * 2) + 9 * 3 + 41 * 5
    assert found["kernels_per_env_step"] == 19.0
    assert found["kernels_per_learner_call"] == learner / 2
    assert found["kernels_per_iteration"] == 20 + play + learner
    assert found["assumed_trips"] == [
        "1 iterations: jit(f)/while",
        "40 steps: jit(f)/while/body/while",
        "3 blocks: jit(f)/while/body/cond/while",
        "9 blocks: jit(f)/while/body/cond/vmap(blocks_at_most_9)/while",
        "41 blocks: jit(f)/while/body/cond/other/while",
    ]


@pytest.mark.parametrize(
    ("program", "op_name", "roles", "assumed"),
    [
        ("train", "jit(f)/while", [], ("iterations", 1)),
        ("train", "jit(f)/while/body/while", ["iterations"], ("steps", 200)),
        ("train", "jit(f)/while/body/steps_at_most_20/while", ["iterations"], ("steps", 20)),
        ("train", "jit(f)/x_at_most_3/while/body/while", ["iterations", "steps"], ("blocks", 201)),
        ("evaluate", "jit(f)/while", [], ("steps", 200)),
        ("evaluate", "jit(f)/while/body/turns_at_most_4/while", ["steps"], ("turns", 4)),
        ("learn", "jit(f)/while", [], ("blocks", 201)),
    ],
)
def test_loops_of_dynamic_length_are_known_by_their_scopes_and_places(
    program: str, op_name: str, roles: list[str], assumed: tuple[str, int]
) -> None:
    around = [block(), *(loop("", 5)._replace(role=role) for role in ["", *roles])]
    assert assumed_trips(program, 200, loop(op_name, None), around) == assumed


def test_a_temporary_with_the_size_of_the_replay_is_reported() -> None:
    import jax

    replay = jax.ShapeDtypeStruct((2, 50, 30), "uint8")
    widened = hlo.Buffer(12_000_000, "f32[100,30]", "convert.1", "jit(f)/convert")
    packed = hlo.Buffer(3_000, "u32[750]", "bitcast.2", "jit(f)/pack")
    other = hlo.Buffer(4_000_000, "f32[1000,1000]", "dot.3", "jit(f)/dot_general")
    found = buffer_numbers([widened, other, packed], replay)
    assert [buffer["name"] for buffer in found["replay_copies"]] == ["convert.1", "bitcast.2"]
    row = {"target": "cuda:h100", "algo": "qmix", "num_seeds": 1, "program": "train", "fits": True, **found}
    assert cells(row)["replay copies"] == 2
    assert list(notes([row])) == [
        "cuda:h100, qmix, 1, train: a temporary as large as the replay: 12.0 MB f32[100,30] jit(f)/convert",
        "cuda:h100, qmix, 1, train: a temporary as large as the replay: 0.0 MB u32[750] jit(f)/pack",
        "cuda:h100, qmix, 1, train: 12.0 MB f32[100,30] jit(f)/convert",
        "cuda:h100, qmix, 1, train: 4.0 MB f32[1000,1000] jit(f)/dot_general",
    ]


def test_the_numbers_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def compiled(job: Job) -> list[dict[str, Any]]:
        made.append((job.target.name, job.algo, job.num_seeds, job.programs, job.overrides))
        row = {"target": job.target.name, "algo": job.algo, "num_seeds": job.num_seeds, "program": "train"}
        if job.num_seeds == 8:
            return [row | {"fits": False, "reason": "RESOURCE_EXHAUSTED", "loops": []}]
        return [row | {"fits": True, "compile_seconds": 5.0, "code_bytes": 2_500_000, "loops": ["block: 3 kernels"]}]

    monkeypatch.setattr(accelerators, "compiled_in_process", compiled)
    monkeypatch.setattr(accelerators, "refuse_missing_extra", lambda _: None)
    out = tmp_path / "out.json"
    options = ["target=tpu:v6e", "algo=vdn", "num_seeds=1,8", "program=train", "num_envs=2"]
    monkeypatch.setattr(sys, "argv", ["accelerators", *options, "--out", str(out), "--loops"])
    accelerators.main()
    assert made == [("tpu:v6e", "vdn", number, ("train",), ("num_envs=2",)) for number in (1, 8)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "tpu:v6e, vdn, 1 seed, train: compiled in 5 s",
        "block: 3 kernels",
        "tpu:v6e, vdn, 8 seeds, train: refused: RESOURCE_EXHAUSTED",
    ]
    assert printed[-2].split() == ["tpu:v6e", "vdn", "1", "train", "5", "2.5", "yes"]
    assert printed[-1].split() == ["tpu:v6e", "vdn", "8", "train", "no"]
    header, *rows = json.loads(out.read_text())
    assert header["command"].startswith("python -m experiments.accelerators target=tpu:v6e algo=vdn")
    assert header["versions"]["jax"]
    assert [row["fits"] for row in rows] == [True, False]
    assert not any("loops" in row for row in rows)


def test_targets_that_the_compiler_refuses_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("tpu:v5e:9x9", "tpu", "v5e:9x9", {}, 1, True)

    def refuse(**_: Any) -> None:
        raise RuntimeError("INVALID_ARGUMENT: no such topology\nmore")

    monkeypatch.setattr(accelerator_targets.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=r"^target=tpu:v5e:9x9 is not allowed: INVALID_ARGUMENT: no such topology$"):
        accelerator_targets.sharding_of(target, 1)


def test_the_page_has_the_recorded_numbers_of_every_algorithm() -> None:
    _, *rows = json.loads(accelerators.OUT.read_text())
    found = {(row["target"], row["algo"], row["num_seeds"]): row for row in rows}
    assert all(row["fits"] and not row["replay_copies"] for row in rows)
    page = (ROOT / "docs" / "pages" / "accelerators.md").read_text()
    for algo in {row["algo"] for row in rows}:
        gpu, tpu = (found[target, algo, 8] for target in ("cuda:h100", "tpu:v5e"))
        temporaries = [
            " / ".join(f"{found[target, algo, seeds]['temporary_bytes_per_seed'] / 1e6:.0f}" for seeds in (1, 8, 64))
            for target in ("cuda:h100", "tpu:v5e")
        ]
        kernels = f"{gpu['kernels_per_learner_call']:,.0f} | {gpu['kernels_per_iteration']:,.0f}"
        compiled = f"{tpu['compile_cpu_seconds']:.0f} | {tpu['code_bytes'] / 1e6:.1f}"
        assert f"| `{algo}` | {kernels} | {temporaries[0]} | {compiled} | {temporaries[1]} |" in page
