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
        if matrices:
            optimizers = [Muon(matrices, momentum=0.95, weight_decay=config.weight_decay)]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_eps, fused=True)
    return [adamw, *optimizers]

class Muon(torch.optim.Muon):
    """torch's (Jordan et al. 2024), but float32 on a CPU; obeys found_inf."""

    @torch.no_grad()
    def step(self):
        good = 1.0 - self.found_inf  # on the device: 1, or 0 to change nothing
        for group in self.param_groups:
            lr, beta = good * group["lr"], group["momentum"]
            for x in group["params"]:
                if not self.state[x]:
                    self.state[x]["momentum_buffer"] = torch.zeros_like(x)
            for shape in dict.fromkeys(x.shape for x in group["params"]):
                matrices = [x for x in group["params"] if x.shape == shape]
                buffers = [self.state[x]["momentum_buffer"] for x in matrices]
                grad = torch.stack([x.grad for x in matrices]).where(good > 0, 0.0)
                momentum = torch.stack(buffers).lerp_(grad, good * (1 - beta))
                update = orthogonal(grad.lerp(momentum, beta))
                update *= lr * 0.2 * max(shape) ** 0.5  # as AdamW's (arXiv:2502.16982)
                torch._foreach_copy_(buffers, momentum.unbind())
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_sub_(matrices, update.unbind())

def orthogonal(matrices):
    """Return about U V^T of each U S V^T (n, rows, columns)."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)

def load_optimizers(optimizers, scaler, checkpoint):
    """Restore a checkpoint's state; options, such as weight_decay, stay the new ones."""
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            saved |= {name: value for name, value in group.items() if name != "params"}
        optimizer.load_state_dict(state)
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])

def get_lr(step, config):
    """Return the learning rate of update `step` (from 0)."""
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
    """Clip the gradient (0 = no limit), update the weights -> its norm before.

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
