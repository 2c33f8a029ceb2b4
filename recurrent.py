"""GRU and Mamba in the place of attention.

B events of at most L tokens, D embedding_dim, H heads of
P = D / 2 / H dimensions, N = D / 4 the width of Mamba's state.
"""
import torch
import torch.nn.functional as F
from torch import nn

class Bidirectional(nn.Module):
    """One mixer (B, L, D) -> (B, L, D/2) forwards and one backwards: [CLS] sees all."""

    def __init__(self, config):
        super().__init__()
        Mixer = {"gru": GRU, "mamba": Mamba}[config.backbone]
        self.forwards, self.backwards = Mixer(config), Mixer(config)

    def forward(self, x, packing):
        x, valid = packing.pad(x), packing.valid
        n, place = valid.sum(1, keepdim=True), torch.arange(x.shape[1], device=x.device)
        # tokens in reverse; padding stays behind them, so neither direction passes it on its way
        reverse = torch.where(place < n, n - 1 - place, place)[..., None]  # (B, L, 1)
        y = self.backwards(x.gather(1, reverse.expand_as(x)), valid)
        y = y.gather(1, reverse.expand_as(y))
        return packing.unpad(torch.cat([self.forwards(x, valid), y], dim=-1))

class GRU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gru = nn.GRU(config.embedding_dim, config.embedding_dim // 2, batch_first=True)

    def forward(self, x, valid):
        return self.gru(x)[0]  # padding comes last

class Mamba(nn.Module):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): convolution, selective state space, gate.

    Decay rates and time steps start at 0.1 to 1, spread over the heads:
    memories of 1 to 100 pulses. The paper's ranges, 1 to 16 and 0.001 to 0.1,
    are for long texts.
    """

    def __init__(self, config):
        super().__init__()
        D, H = config.embedding_dim, config.num_heads
        self.sizes = [D // 2, D // 2, D // 4, D // 4, H]  # gate, x, b, c, dt
        self.project = nn.Linear(D, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(D, D, 4, groups=D, padding=3)  # x, b and c see 3 pulses back
        steps = torch.logspace(-1, 0, H)
        self.log_a = nn.Parameter(torch.linspace(0.1, 1, H).log())  # of the decay rates
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.skip = nn.Parameter(torch.ones(H))
        self.norm = nn.RMSNorm(D // 2)
        self.out = nn.Linear(D // 2, D // 2, bias=False)

    def forward(self, x, valid):
        L, H = x.shape[1], self.sizes[-1]
        gate, xbc, dt = self.project(x).split([self.sizes[0], sum(self.sizes[1:4]), H], dim=-1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :L].transpose(1, 2))
        with torch.autocast(x.device.type, enabled=False):  # products of up to L decay factors
            x, b, c = (part.to(self.log_a.dtype) for part in xbc.split(self.sizes[1:4], dim=-1))
            x = x.unflatten(-1, (H, -1))  # (B, L, H, P)
            dt = F.softplus(dt.to(self.log_a.dtype) + self.dt_bias) * valid[..., None]
            y = state_space(x * dt[..., None], -self.log_a.exp() * dt, b, c)
            y = y + self.skip[:, None] * x
        return self.out(self.norm(y.flatten(2) * F.silu(gate)))

def state_space(x, log_decay, b, c, chunk=256):
    """Return y_t = c_t . s_t with the state s_t = exp(log_decay_t) s_(t-1) + b_t x_t.

    x (B, L, H, P), log_decay (B, L, H) <= 0, b and c (B, L, N) -> (B, L, H, P).
    Within a chunk of Q tokens y = (decays * c b^T) x; the state is handed from
    chunk to chunk, so memory grows with L * chunk. No einsum of three:
    opt_einsum would tie a compiled graph to the first sizes.
    """
    state, ys = 0.0, []
    chunks = (part.split(chunk, dim=1) for part in (x, log_decay, b, c))
    for x, log_decay, b, c in zip(*chunks):
        total = log_decay.cumsum(1)  # (B, Q, H), decay since the chunk began
        between = total[:, :, None] - total[:, None]  # (B, Q, Q, H)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        decay = between.masked_fill(~past[..., None], float("-inf")).exp()
        y = torch.einsum("btsh,bshp->bthp", (c @ b.transpose(1, 2))[..., None] * decay, x)
        if ys:
            y = y + torch.einsum("btn,bhnp->bthp", c, state) * total.exp()[..., None]
            state = state * total[:, -1, :, None, None].exp()
        until_end = (total[:, -1:] - total).exp()
        state = state + torch.einsum("bsn,bshp->bhnp", b, x * until_end[..., None])
        ys.append(y)
    return torch.cat(ys, dim=1)
