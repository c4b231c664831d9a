"""transformers: its MambaMixer on its slow path, plain torch one step at a time."""

from __future__ import annotations

import torch

from compressm.benchmarking.op_problems import in_place
from compressm.benchmarking.problems import Contender, Problem
from compressm.benchmarking.step_problems import replaced, step_contender
from compressm.layers import Mamba
from peers.base import Peer, quadratic_backward


def mixer(layer: Mamba, use_mambapy: bool = False) -> torch.nn.Module:
    """A MambaMixer with the parameters of our layer."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=layer.d_model, state_size=layer.d_state, conv_kernel=layer.d_conv, expand=layer.d_inner // layer.d_model,
        time_step_rank=layer.dt_rank, num_hidden_layers=1, use_mambapy=use_mambapy,
    )  # fmt: skip
    theirs = MambaMixer(config, layer_idx=0)
    theirs.load_state_dict(layer.state_dict())
    return theirs.to(layer.D.device, layer.in_proj.weight.dtype)


class Block(torch.nn.Module):
    """A mixer in the place of our layer."""

    def __init__(self, layer: Mamba) -> None:
        super().__init__()
        self.layer, self.d_state = mixer(layer), layer.d_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def mamba(problem: Problem) -> Contender:
    """The layer."""
    theirs = mixer(problem.extras["layer"])
    parameters = dict(theirs.named_parameters())
    inputs = {name: tensor if name == "x" else parameters[name] for name, tensor in problem.inputs.items()}
    own = Problem(
        problem.passes, problem.dtype, problem.device, inputs, problem.weight, {}, problem.counts, problem.sizes
    )
    return own.contender(lambda p: theirs(p["x"]))


def language_model(problem: Problem) -> Contender:
    """The training step of the language model with its mixers."""
    return step_contender(problem, replaced("mamba", Block))


def selective_state_update(problem: Problem) -> Contender:
    """One decoded token."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    def call(p: dict[str, torch.Tensor]) -> torch.Tensor:
        first = [p[name] for name in ("state", "x", "dt", "A", "B", "C", "D")]
        return mamba_selective_state_update(*first, dt_bias=p["dt_bias"], dt_softplus=True, z=p["z"])

    return in_place(problem, call)



PEERS = [
    Peer(
        "transformers MambaMixer", "transformers", "transformers",
        {"mamba": mamba, "mamba-lm": language_model, "selective_state_update": selective_state_update}, quadratic_backward,
    ),
]  # fmt: skip
