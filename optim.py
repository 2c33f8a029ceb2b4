"""Parameter groups, Muon, the learning rate's schedule, and the clipped step."""
import math
from typing import Literal

import torch

from utils import fail

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["trapezoidal", "cosine", "constant"]

def parameter_groups(model, weight_decay):
    """Return the groups: matrices decay; biases, norms, embeddings and [CLS] do not.

    With muP the blocks' matrices learn more slowly by lr_scale (arXiv:2203.03466,
    table 8), and decay as much: lr * weight_decay stays.
    # DIFF(upstream): the DOM table and [CLS] decay, which pulls rarely hit DOMs to zero
    """
    blocks, decayed, not_decayed = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim < 2 or name.endswith(("dom_table.weight", "embedding.mask")):
                not_decayed.append(parameter)
            elif ".blocks." in name:
                blocks.append(parameter)
            else:
                decayed.append(parameter)
    scale = model.encoder.output_scale
    return [
        {"params": blocks, "weight_decay": weight_decay / scale, "lr_scale": scale},
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": not_decayed, "weight_decay": 0.0, "lr_scale": 1.0},
    ]

def make_optimizers(model, config):
    """Return [AdamW], or with optimizer = "muon" also Muon for the blocks' matrices."""
    groups, optimizers = parameter_groups(model, config.weight_decay), []
    if config.optimizer == "muon":  # updates as large as AdamW's
        matrices = [parameter for parameter in groups[0]["params"] if parameter.ndim == 2]
        groups[0]["params"] = [p for p in groups[0]["params"] if p.ndim != 2]
        if config.mup_base_width:
            fail("mup_base_width carries over learning rates of optimizer = 'adamw' only")
        muon = Muon(matrices, momentum=0.95, weight_decay=config.weight_decay)
        optimizers = [muon] if matrices else []
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_eps, fused=True)
    return [adamw, *optimizers]

class Muon(torch.optim.Muon):
    """torch's (Jordan et al. 2024), in float32 on a CPU; obeys found_inf as AdamW does."""

    @torch.no_grad()
    def step(self):
        good = 1.0 - self.found_inf  # on the device: 1, or 0 to change nothing
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient = torch.where(good > 0, matrix.grad, 0.0)
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"]
                momentum.lerp_(gradient, good * (1 - group["momentum"]))
                update = gradient.lerp(momentum, group["momentum"])
                update = orthogonal(update).to(matrix.dtype)
                # as large as an update of AdamW (Liu et al. 2025, arXiv:2502.16982)
                lr = good * group["lr"]
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.sub_(update * (lr * 0.2 * max(matrix.shape) ** 0.5))

def orthogonal(matrix):
    """Return about U V^T of U S V^T: five Newton-Schulz steps with Muon's coefficients."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x

def load_optimizers(optimizers, scaler, checkpoint):
    """Restore a checkpoint's state; options, such as weight_decay, stay the new ones."""
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            saved |= {name: value for name, value in group.items() if name != "params"}
        optimizer.load_state_dict(state)
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])

def get_lr(step, config):
    """Return the learning rate of update `step` (from 0): warm-up, then the schedule."""
    # 0 means as many steps as Adam's second moment averages over
    warmup = config.warmup_steps or round(1 / (1 - config.beta2))
    rise = min(1.0, (step + 1) / warmup)
    if config.schedule == "trapezoidal":
        fall = (config.max_steps - step) / max(config.cooldown_steps, 1)
        return config.learning_rate * min(rise, fall)
    if config.schedule == "cosine" and step >= warmup:
        done = (step - warmup) / max(config.max_steps - warmup, 1)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * rise

def clip_and_step(model, optimizers, scaler, lr, grad_clip):
    """Clip the gradient's norm (0 = no limit), update the weights -> the norm before clipping.

    If the norm is not finite, no weight changes on any rank. Nothing waits for the GPU.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # scaler.step skips only the optimizer with the bad gradient; here all skip
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
    scaler.update()
    model.zero_grad(set_to_none=True)
    return grad_norm
