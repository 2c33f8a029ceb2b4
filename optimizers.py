"""How both training loops update the weights: GuardedOptimizer, around torch's AdamW and the Muon below."""
import torch


class GuardedOptimizer:
    """A step: unscale the gradients, clip them, update the weights if they are finite, zero them.

    n_bad counts the steps that were skipped, bad_in_a_row those since the last good one, both without waiting
    for the GPU.
    """

    def __init__(self, model, optimizers, config, process):
        self.model, self.optimizers = model, optimizers
        self.grad_clip, self.max_bad_steps = config.grad_clip, config.max_bad_steps
        self.scaler = torch.amp.GradScaler(process.device.type, init_scale=2.0**10,
                                           enabled=process.dtype == torch.float16)
        self.n_bad = self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=process.device)

    def set_learning_rate(self, rate):
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group.get("lr_scale", 1.0)  # other than 1 with muP, or in finetune.py's head

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self):
        """-> norm of the gradient before it is clipped, a tensor on the device."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        is_bad = ~grad_norm.isfinite()
        # not scaler.step, which asks each optimizer for itself: here one bad gradient makes all of them skip
        for optimizer in self.optimizers:
            optimizer.found_inf = is_bad.float()  # fused AdamW and Muon then change nothing
            optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.n_bad = self.n_bad + is_bad
        is_over = self.bad_in_a_row > self.max_bad_steps  # then it stays so, until the next log line looks
        in_a_row = torch.where(is_bad, self.bad_in_a_row + 1, 0)
        self.bad_in_a_row = torch.where(is_over, self.bad_in_a_row, in_a_row)
        return grad_norm

    def gave_up(self):
        return self.bad_in_a_row.item() > self.max_bad_steps

    def state_dict(self):
        return {"optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(), "bad_steps": self.n_bad.item()}

    def load_state_dict(self, saved):
        for optimizer, state in zip(self.optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.n_bad = self.n_bad + saved["bad_steps"]


class Muon(torch.optim.Muon):
    """torch's, but in float32 on a CPU, where that is faster; and whether a step is bad is not waited for."""

    @torch.no_grad()
    def step(self):
        good = 1.0 - self.found_inf  # of the device: 1, or 0 to change nothing
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient = torch.where(good > 0, matrix.grad, 0.0)
                momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(gradient, good * (1 - group["momentum"]))
                update = orthogonal(gradient.lerp(momentum, group["momentum"])).to(matrix.dtype)
                matrix.mul_(1 - good * group["lr"] * group["weight_decay"])
                # as large as an update of AdamW (Liu et al. 2025, arXiv:2502.16982)
                matrix.sub_(update * (good * group["lr"] * 0.2 * max(matrix.shape) ** 0.5))


def orthogonal(matrix):
    """About U V^T of U S V^T: five Newton-Schulz steps with Muon's coefficients (Jordan et al. 2024)."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
