"""The whole training step of the LRU classifier in jax, its layer as the LRU paper writes it; for the original CompreSSM code.

Encoder, blocks (layer norm, LRU, GELU, dropout, GLU, dropout, skip), mean over time, decoder, cross-entropy, AdamW: one jitted
function of parameters, moments, batch, step and dropout rate, compiled once.  It starts at the torch model's values.
Its gradients without dropout, read off the first moments behind one step, are compared with the float64 model's.
"""

from __future__ import annotations

from typing import Any

import torch

from compressm.benchmarking.problems import Answers, Contender, Problem
from compressm.benchmarking.step_problems import training_run
from compressm.benchmarking.timing import Timed
from peers import jax_scans

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def step(problem: Problem) -> Contender:
    """One step after another on the task's batches."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    run = training_run(problem)
    task, settings = run.task, run.settings
    parameters = {name: jax_scans.to_jax(p) for name, p in run.model.named_parameters()}
    rates = _rates(run)
    mean, std = jax_scans.to_jax(run.model.mean), jax_scans.to_jax(run.model.std)
    loss_of = _loss(settings.blocks, mean, std)
    update = jax.jit(_update(loss_of, rates), donate_argnums=(0, 1))

    def start() -> dict[str, Any]:
        moments = jax.tree.map(lambda p: (p * 0, p * 0), parameters)
        return {"parameters": jax.tree.map(lambda p: p.copy(), parameters), "moments": moments, "step": 0}

    def train(state: dict[str, Any], batch: int, dropout: float) -> Any:
        state["step"] += 1
        x, y = (jax_scans.to_jax(t) for t in task.objective.batches[batch])
        state["parameters"], state["moments"], loss = update(
            state["parameters"], state["moments"], x, y, state["step"], jax.random.key(state["step"]), dropout
        )
        return jax.block_until_ready(loss)

    state = start()

    def one() -> None:
        train(state, state["step"] + 1, settings.dropout)

    def answers() -> Answers:
        first = start()
        loss = train(first, 0, 0.0)
        found = [jax_scans.to_torch(first["moments"][name][0]).flatten() / (1 - BETA1) for name in sorted(parameters)]
        return {"loss": jax_scans.to_torch(loss), "gradients": torch.cat(found)}

    return Contender(Timed(one), answers)


def _rates(run: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter by name."""
    names = {id(p): name for name, p in run.model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}


def _loss(blocks: int, mean: Any, std: Any):
    import jax
    import jax.numpy as jnp

    def linear(p, name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(p, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def drop(x, key, rate):
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)

    def loss(p, pixels, labels, key, rate):
        keys = jax.random.split(key, 2 * blocks)
        x = linear(p, "encoder", (pixels.astype(jnp.float32) - mean) / std)
        for i in range(blocks):
            layer = {name.rpartition(".")[2]: value for name, value in p.items() if name.startswith(f"blocks.{i}.lru.")}
            y = jax_scans.lru_paper({**layer, "x": norm(p, f"blocks.{i}.norm", x)})
            y = drop(jax.nn.gelu(y, approximate=False), keys[2 * i], rate)
            a, b = jnp.split(linear(p, f"blocks.{i}.glu", y), 2, -1)
            x = x + drop(a * jax.nn.sigmoid(b), keys[2 * i + 1], rate)
        scores = linear(p, "decoder", norm(p, "norm", x).mean(1))
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1).mean()

    return loss


def _update(loss_of, rates: dict[str, tuple[float, float]]):
    import jax
    import jax.numpy as jnp

    def update(parameters, moments, x, y, step, key, dropout):
        loss, gradients = jax.value_and_grad(loss_of)(parameters, x, y, key, dropout)
        new_parameters, new_moments = {}, {}
        for name, p in parameters.items():
            lr, decay = rates[name]
            first = BETA1 * moments[name][0] + (1 - BETA1) * gradients[name]
            second = BETA2 * moments[name][1] + (1 - BETA2) * gradients[name] ** 2
            size = jnp.sqrt(second / (1 - BETA2**step)) + EPSILON
            new_parameters[name] = p * (1 - lr * decay) - lr * first / (1 - BETA1**step) / size
            new_moments[name] = (first, second)
        return new_parameters, new_moments, loss

    return update
