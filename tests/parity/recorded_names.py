"""Names in the recordings of options, losses, values of steps and tensors, and ours."""

from collections.abc import Mapping

import numpy as np

from wqmix_jax.interop import pymarl
from wqmix_jax.types import PyTree

SIZES = {
    "gamma": "gamma",
    "lr": "lr",
    "optim_alpha": "rms_decay",
    "optim_eps": "rms_eps",
    "grad_norm_clip": "max_grad_norm",
    "rnn_hidden_dim": "hidden_dim",
    "mixing_embed_dim": "mixer_embed_dim",
    "hypernet_embed": "hypernet_dim",
    "central_mixing_embed_dim": "q_star_dim",
    "adv_hypernet_embed": "attention_dim",
    "num_kernel": "num_heads",
    "network_size": "mixer_layers",
    "opt_loss": "lambda_opt",
    "nopt_min_loss": "lambda_nopt",
    "w": "alpha",
    "policy_temp": "gumbel_temperature",
    "entropy_temp": "alpha_ent",
    "epsilon_target": "epsilon_start",
    "td_lambda": "td_lambda",
    "weighted_qmix_threshold": "threshold",
    "other_actions_weight": "alpha",
    "no_weighted_steps": "no_weighted_steps",
    "v_embed_dim": "recognizer_v_dim",
    "lambda_hypernet_embed_dim": "recognizer_hypernet_dim",
    "lambda_mixing_embed_dim": "recognizer_embed_dim",
    "cg_edges": "graph",
    "cg_payoff_rank": "payoff_rank",
    "duelling": "duelling",
    "msg_iterations": "iterations",
    "msg_anytime": "anytime",
    "msg_normalized": "normalised",
    "noise_dim": "latent_dim",
    "mi_loss": "mi_loss",
    "mi_scaler": "intrinsic_scale",
    "discrim_size": "discriminator_dim",
    "discrim_layers": "discriminator_layers",
    "rnn_agg_size": "memory_dim",
    "critic_width": "critic_dim",
}
"""The recordings' options with a counterpart of ours."""

WORDS = {"small": 2, "big": 3}
"""Options with other names in the recordings: hidden layers of QTRAN's networks."""

LOSSES = {
    "loss": "loss",
    "qmix_loss": "qmix_loss",
    "central_loss": "q_star_loss",
    "td_loss": "td_loss",
    "opt_loss": "opt_loss",
    "nopt_loss": "nopt_loss",
    "noopt_loss": "sign_loss",
    "qr_first_loss": "first_recognizer_loss",
    "qr_last_loss": "recognizer_loss",
    "hit_prob": "greedy_mean",
    "grad_norm": "grad_norm",
    "actor_loss": "actor_loss",
    "qmix_actor_loss": "-actor_loss",
    "agent_policy_loss": "last_objective",
    "logit_entropy": "logit_entropy",
    "discrim_loss": "discriminator_loss",
    "averaged_discrim_loss": "discriminator_loss",
    "coma_loss": "actor_loss",
    "agent_grad_norm": "grad_norm",
    "critic_loss": "critic_losses",
    "critic_grad_norm": "critic_grad_norms",
    "liir_loss": "actor_loss",
    "v_ex_loss": "v_ex_loss",
    "pg_ex_loss": "meta_loss",
    "intrinsic_loss": "intrinsic_loss",
    "grad_total": "gradient_product",
    "pg_loss1": "pg_loss1",
    "pg_loss2": "pg_loss2",
}
"""The recordings' scalars by our names; a minus says that theirs is maximised."""

STEP_VALUES = {
    "ws": "weights",
    "max_action_qtot": "greedy_value",
    "central_chosen_action_qvals": "q_star",
    "joint_qs": "q_star",
    "max_joint_qs": "greedy_q_star",
    "vs": "v",
    "target_vs": "next_v",
    "opt_error": "opt_error",
    "nopt_values": "nopt_error",
    "ans_chosen": "q_value",
    "ans_adv": "q_advantage",
    "target_chosen": "next_q_value",
    "target_adv": "next_q_advantage",
    "q_tot": "q_tot",
    "rest_q": "residual",
    "w_r": "residual_weights",
    "central_q_tot": "q_star",
    "q_tot_qmix": "q_tot",
    "lambda_mut_deltaq": "q_r_advantage",
    "training_weight": "weights",
    "first_q_r": "first_q_r",
    "first_lambda_mut_deltaq": "first_q_r_advantage",
    "discrim_loss": "cross_entropy",
    "discrim_prediction": "latent_logits",
}
"""The recordings' values of single steps that not every algorithm has, by our names."""

UNUSUAL_NAMES = {
    "grads_qr/": "grads/",
    "critic_grads_last_t/": "grads/",
    "grads_intrinsic/": "grads/",
    "/critic/fc3_v_mix.": "/critic/fc3.",
    "/critic/fc3_r_in.": "/proxy/fc3_r_in.",
    "/critic/fc4.": "/proxy/fc4.",
    "/mixer/hyper_w1.": "/mixer/hyper_w_1.",
    "/mixer/hyper_b1.0.": "/mixer/hyper_b_1.",
    "/mixer/hyper_w2.": "/mixer/hyper_w_final.",
    "/mixer/hyper_b2.": "/mixer/V.",
}
"""Parts of names in the recordings of POWQMIX, whose code comes from PyMARL2, and of COMA, and the usual ones."""

DCG_NAMES = {"utility/0.": "agent/fc2.", "payoff/": "payoffs/"}
"""The beginnings of names in DCG's recordings, and in `pymarl.NETS`: its agents have their last layer outside."""


def by_recorded_name(tree: PyTree) -> dict[str, np.ndarray]:
    """Returns our parameters as the tensors of a recording, by their names there."""
    arrays = {
        f"{name}/{tensor}": array
        for name, net in pymarl.NETS.items()
        if net.ours in tree
        for tensor, array in pymarl.to_pymarl(name, tree[net.ours]).items()
    }
    if "payoff" not in tree:
        return arrays
    theirs = {ours: theirs for theirs, ours in DCG_NAMES.items()}
    return {renamed(name, theirs): array for name, array in arrays.items()}


def renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """Returns a name with another beginning, if it has one of these."""
    found = [old for old in beginnings if name.startswith(old)]
    return beginnings[found[0]] + name.removeprefix(found[0]) if found else name
