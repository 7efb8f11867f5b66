"""Names that options have in PyMARL, EPyMARL and JaxMARL, and here: data for error messages and the documentation."""

from typing import NamedTuple


class Row(NamedTuple):
    """Options of another library and their names here.

    Attributes:
        theirs: their names.
        ours: one for each of ``theirs``; empty where there is none.
        note: what differs, in markdown.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    note: str = ""


TABLES = {
    "PyMARL": (
        Row(("--config=NAME",), ("+algo=NAME",)),
        Row(("--env-config=sc2",), ("env=smac",)),
        Row(("env_args.map_name",), ("env.map",)),
        Row(("env_args.difficulty",), ("env.difficulty",)),
        Row(("env_args.game_version",), ("env.game_version",)),
        Row(("env_args.continuing_episode",), ("env.continuing_episode",)),
        Row(("t_max",), ("total_env_steps",), "per seed"),
        Row(
            ("test_interval",),
            ("eval_interval",),
            "counted in iterations of full episodes: where episodes end early, evaluations come closer together",
        ),
        Row(("test_nepisode",), ("eval_episodes",)),
        Row(("batch_size_run",), ("num_envs",), "per seed"),
        Row(
            ("training_iters",),
            ("updates_per_iteration",),
            "learner steps per iteration of `num_envs` episodes",
        ),
        Row(("seed",), ("seed",), "the first of `num_seeds`"),
        Row(("lr",), ("algo.lr",)),
        Row(("gamma",), ("algo.gamma",)),
        Row(("optim_alpha",), ("algo.rms_decay",)),
        Row(("optim_eps",), ("algo.rms_eps",), "outside the square root, as in PyTorch"),
        Row(("grad_norm_clip",), ("algo.max_grad_norm",), "joint over all parameters"),
        Row(("batch_size",), ("algo.batch_size",), "episodes"),
        Row(("buffer_size",), ("algo.buffer_size",), "episodes"),
        Row(("target_update_interval",), ("algo.target_update_interval",), "episodes"),
        Row(("epsilon_start",), ("algo.epsilon_start",)),
        Row(("epsilon_finish",), ("algo.epsilon_finish",)),
        Row(("epsilon_anneal_time",), ("algo.epsilon_anneal_steps",), "environment steps"),
        Row(("rnn_hidden_dim",), ("algo.hidden_dim",)),
        Row(("mixing_embed_dim",), ("algo.mixer_embed_dim",)),
        Row(("hypernet_embed",), ("algo.hypernet_dim",)),
        Row(("central_mixing_embed_dim",), ("algo.q_star_dim",)),
        Row(("central_mixer",), ("algo.q_star",), "`ff`: `feedforward`; `atten`: `attention`"),
        Row(
            ("opt_loss", "nopt_min_loss"),
            ("algo.lambda_opt", "algo.lambda_nopt"),
            "QTRAN; the released default of the second is 0.1",
        ),
        Row(("network_size",), ("algo.mixer_layers",), "QTRAN; `small`: 2; `big`: 3"),
        Row(("num_kernel", "adv_hypernet_embed"), ("algo.num_heads", "algo.attention_dim"), "QPLEX"),
        Row(("cg_edges", "cg_payoff_rank"), ("algo.graph", "algo.payoff_rank"), "DCG"),
        Row(("cg_payoffs_hidden_dim",), ("algo.payoff_layers",), "DCG; hidden layers, as wide as the agents"),
        Row(("duelling",), ("algo.duelling",), "DCG; its width is `algo.mixer_embed_dim`"),
        Row(
            ("msg_iterations", "msg_anytime", "msg_normalized"),
            ("algo.iterations", "algo.anytime", "algo.normalised"),
            "DCG",
        ),
        Row(("w",), ("algo.alpha",), "the paper's alpha"),
        Row(("entropy_temp",), ("algo.alpha_ent",), "`masac`"),
        Row(("critic_lr",), ("algo.critic_lr_factor",), "`coma`: a factor of `algo.lr`"),
        Row(("policy_temp",), ("algo.gumbel_temperature",), "`maddpg`"),
        Row(("hysteretic_qmix",), ("algo.weighting",), "`True`: `optimistic`; `False`: `central`"),
        Row(("save_model_interval",), ("checkpoint.every",), "environment steps"),
        Row(("checkpoint_path",), ("resume",), "a run of this library; `evaluate pymarl=FOLDER` plays PyMARL's"),
        Row(("local_results_path",), ("run_dir",)),
        Row(("use_cuda",), (), "JAX uses the accelerator that it finds; `JAX_PLATFORMS=cpu` keeps it off"),
        Row(("save_model",), (), "checkpoints are always written"),
        Row(("log_interval",), ("eval_interval",), "one train record per evaluation"),
        Row(("double_q",), ("algo.double_q",)),
        Row(("mac",), ("algo.share_parameters",), "`basic_mac`: `all`; EPyMARL's `non_shared_mac`: `none`"),
        Row(("agent",), ("algo.recurrent",), "`rnn`: `true`; EPyMARL's `rnn_ns` is `algo.share_parameters=none`"),
        Row(("obs_agent_id",), ("algo.agent_id",)),
        Row(("obs_last_action",), ("algo.last_action",)),
        Row(("runner",), (), "`num_envs` environments always run side by side"),
    ),
    "PyMARL2": (
        Row(("optimizer",), ("algo.optimizer",), "`adam` with `algo.lr=0.001`"),
        Row(("q_lambda",), ("algo.returns",), "`True`: `pymarl2_q_lambda`; `False`: `td_lambda`"),
        Row(("td_lambda",), ("algo.td_lambda",), "without effect unless `algo.returns` is one of the lambda-returns"),
        Row(("use_per",), ("algo.prioritised",)),
        Row(("per_alpha", "per_beta"), ("algo.priority_exponent", "algo.importance_exponent")),
    ),
    "EPyMARL": (
        Row(("hidden_dim",), ("algo.hidden_dim",)),
        Row(("use_rnn",), ("algo.recurrent",), "`False`: a linear layer with a ReLU in the GRU's place"),
        Row(
            ("target_update_interval_or_tau",),
            ("algo.target_update_interval",),
            "episodes; up to 1: `algo.target_update_tau`",
        ),
        Row(("env_args.time_limit",), ("env.episode_limit",)),
        Row(
            ("env_args.key",),
            ("env.name",),
            "of `env=gymnasium`, or `env=pettingzoo` with a module's name; `matrixgames`: `env=matrix_game`",
        ),
        Row(("standardise_rewards",), ("algo.standardise_rewards",), "over real steps alone; there, over padding too"),
        Row(("standardise_returns",), ("algo.standardise_returns",), "by the statistics before the batch"),
    ),
    "JaxMARL": (
        Row(("alg", "ALG_NAME"), ("+algo=NAME", "+algo=NAME")),
        Row(("ENV_NAME",), ("env",), "`HeuristicEnemySMAX`: `smax`; others: `env=jaxmarl env.name=NAME`"),
        Row(("MAP_NAME",), ("env.map",)),
        Row(("ENV_KWARGS",), ("env.options",), "`jaxmarl`; `smax` names them one by one"),
        Row(("TOTAL_TIMESTEPS",), ("total_env_steps",), "per seed, over all of its environments"),
        Row(("NUM_SEEDS",), ("num_seeds",)),
        Row(("SEED",), ("seed",), "the first of `num_seeds`"),
        Row(("NUM_ENVS",), ("num_envs",), "per seed"),
        Row(("NUM_STEPS",), ("env.episode_limit",), "an iteration here plays whole episodes"),
        Row(("NUM_EPOCHS", "NUM_MINI_EPOCHS"), ("updates_per_iteration", "updates_per_iteration")),
        Row(("BUFFER_SIZE",), ("algo.buffer_size",), "episodes"),
        Row(("BUFFER_BATCH_SIZE",), ("algo.batch_size",), "episodes"),
        Row(("HIDDEN_SIZE",), ("algo.hidden_dim",)),
        Row(("NORM_TYPE",), ("algo.layer_norm",), "PQN; `layer_norm`: `true`; no batch normalisation"),
        Row(("AGENT_INIT_SCALE",), ("algo.weight_init",), "`orthogonal`, with fixed gains"),
        Row(("PARAMETERS_SHARING",), ("algo.share_parameters",), "`True`: `all`; `False`: `none`"),
        Row(("MIXER_EMBEDDING_DIM",), ("algo.mixer_embed_dim",)),
        Row(("MIXER_HYPERNET_HIDDEN_DIM",), ("algo.hypernet_dim",)),
        Row(("LR",), ("algo.lr",)),
        Row(("GAMMA",), ("algo.gamma",)),
        Row(("MAX_GRAD_NORM",), ("algo.max_grad_norm",)),
        Row(
            ("TARGET_UPDATE_INTERVAL",),
            ("algo.target_update_interval",),
            "episodes; there, updates: rollouts, with `NUM_EPOCHS` learner steps each",
        ),
        Row(("EPS_START",), ("algo.epsilon_start",)),
        Row(("EPS_FINISH",), ("algo.epsilon_finish",)),
        Row(("EPS_DECAY",), ("algo.epsilon_anneal_steps",), "environment steps; there, a share of all updates"),
        Row(("TEST_INTERVAL",), ("eval_interval",), "environment steps; there, a fraction of all updates (0.05)"),
        Row(("REW_SCALE",), ("env.max_return",), "`smax`: the return of a won battle; 10 there is 20 here"),
        Row(("TEST_ENVS", "TEST_NUM_ENVS"), ("eval_episodes", "eval_episodes")),
        Row(("PROJECT",), ("logger.project",)),
        Row(("WANDB_MODE",), ("logger.wandb",)),
        Row(("SAVE_PATH",), ("run_dir",)),
        Row(("TAU",), ("algo.target_update_tau",), "1 there: hard copies, as `algo.target_update_interval` says"),
        Row(("LEARNING_STARTS",), (), "learning starts with `algo.batch_size` stored episodes"),
        Row(("LR_LINEAR_DECAY",), ("algo.lr_schedule",), "`True`: `linear`"),
    ),
}
"""The rows of each library, in the order of docs/pages/coming_from.md."""


class Translation(NamedTuple):
    """An option of another library.

    Attributes:
        library: which one.
        theirs: its name there.
        ours: its name here; None where there is none.
        note: what differs; may be empty.
    """

    library: str
    theirs: str
    ours: str | None
    note: str

    def __str__(self) -> str:
        note = self.note.replace("`", "")
        if self.ours is None:
            return f"{self.library}'s {self.theirs} is not an option here: {note}"
        return f"{self.library}'s {self.theirs} is {self.ours} here{note and f' ({note})'}"


def translated(key: str) -> Translation | None:
    """Finds the option that an unknown ``key`` has the name of, with or without its group; None where there is none."""
    for library, rows in TABLES.items():
        for row in rows:
            for index, theirs in enumerate(row.theirs):
                ours = row.ours[index] if row.ours else None
                if key != ours and _same(key, theirs):
                    return Translation(library, theirs, ours, row.note)
    return None


def table(library: str) -> str:
    """Writes the rows of a library as a table in markdown, as docs/pages/coming_from.md shows it."""

    def cell(names: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in dict.fromkeys(names))

    rows = [f"| {library} | here | |", "|---|---|---|"]
    rows += [f"| {cell(row.theirs)} | {cell(row.ours)} | {row.note} |" for row in TABLES[library]]
    return "\n".join(row.replace("|  |", "| |") for row in rows)


def _same(key: str, theirs: str) -> bool:
    """Compares names without their groups and values; ``env.map_name`` is ``env_args.map_name``."""
    name = theirs.partition("=")[0]
    return key == name or key.rpartition(".")[2] == name.rpartition(".")[2]
