"""PolarBERT: everything that has parameters, and the losses, in the order in which the data flows through them.

    pulses -> PulseEmbedding -> backbone -> final norm -> heads        (Encoder = all but the heads)

Pretrainer hides DOM ids and predicts them, and predicts the event's total charge from [CLS]. DirectionFinder points from
[CLS] to where the neutrino came from. All are pure functions of their inputs: no random number is drawn after the
weights are made.

Shapes: B events, L pulses, D embedding_dim, H heads, E dom_embed_dim, V = 5160 DOMs, M hidden pulses of a batch.
A batch is a dict of tensors, as data.micro_batches makes it: time [ns], charge [p.e.], dom, aux, valid, each (B, L),
hidden (M,) places in the flattened (B, L), total_charge [p.e.] (B,), azimuth and zenith [rad] (B,).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

N_DOMS = 5160  # IceCube-86, row = sensor_id
MASK, PAD = N_DOMS, N_DOMS + 1  # the two extra rows of the DOM table
POSITION_SCALE = 500.0  # [m] half the detector's height: scaled positions lie in about -1..1


@dataclass
class ModelConfig:
    embedding_dim: int = 256  # D, width of the residual stream
    dom_embed_dim: int = 128  # E, part of D that tells which DOM; the other D - E hold time, charge and aux
    num_heads: int = 8  # H, of D / H = 32 dimensions each
    hidden_size: int = 1024  # width of the MLP, 4 D
    num_layers: int = 8  # transformer blocks
    use_dom_positions: bool = True  # DOM part from x, y, z; False: a learned table of the 5160 DOMs
    final_norm: bool = True  # LayerNorm before the heads; upstream has none up to v0.2
    backbone: str = "transformer"  # what mixes the pulses

    def check(self):
        """Yield one line for each value that makes no sense."""
        for key in ("embedding_dim", "dom_embed_dim", "num_heads", "hidden_size", "num_layers"):
            if getattr(self, key) < 1:
                yield f"{key} = {getattr(self, key)}: must be greater than 0"
        if self.embedding_dim % max(self.num_heads, 1):
            yield f"embedding_dim = {self.embedding_dim} cannot be shared among num_heads = {self.num_heads}"
        if self.dom_embed_dim >= self.embedding_dim:
            yield (f"dom_embed_dim = {self.dom_embed_dim} must be smaller than embedding_dim = {self.embedding_dim}: "
                   "the rest holds time, charge and aux")
        if self.backbone not in BACKBONES:
            yield f"backbone = {self.backbone!r}: choose one of {', '.join(map(repr, BACKBONES))}"


# ----------------------------------------------------------------------------------------------------------------------
# embedding
# ----------------------------------------------------------------------------------------------------------------------

class PulseEmbedding(nn.Module):
    """A batch -> one vector a pulse with [CLS] in front, x (B, 1+L, D), and which of them are real, valid (B, 1+L).

    Each vector is [DOM part (E) | Linear(time, charge, aux) (D - E)]. There is no positional encoding: time is a feature.
    """

    def __init__(self, config, geometry):
        super().__init__()
        D, E = config.embedding_dim, config.dom_embed_dim
        self.use_dom_positions = config.use_dom_positions
        if config.use_dom_positions:
            self.register_buffer("geometry", torch.as_tensor(geometry, dtype=torch.float32))  # (V, 3) [m]
            self.position = nn.Linear(3, E)
            self.special = nn.Parameter(torch.empty(2, E))  # MASK and PAD have no position
        else:
            self.dom_table = nn.Embedding(N_DOMS + 2, E)
        self.features = nn.Linear(3, D - E)
        self.cls = nn.Parameter(torch.empty(D))

    def forward(self, batch):
        valid = batch["valid"]
        dom = batch["dom"].masked_fill(~valid, PAD)  # (B, L)
        if "hidden" in batch:  # only the id is hidden: when and how bright the pulse was stays visible
            dom = dom.flatten().index_fill(0, batch["hidden"], MASK).view_as(dom)
        with torch.autocast(valid.device.type, enabled=False):  # bfloat16 would round 12,000 ns by up to 32 ns
            dom_part = F.embedding(dom, self.dom_vectors())  # (B, L, E)
            x = torch.cat([dom_part, self.features(scale_pulses(batch))], dim=-1)  # (B, L, D)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1+L, D)
        return x, F.pad(valid, (1, 0), value=True)

    def dom_vectors(self):
        """One vector for each DOM, MASK and PAD, (V+2, E)."""
        if self.use_dom_positions:
            return torch.cat([self.position(self.geometry / POSITION_SCALE), self.special])
        return self.dom_table.weight


def scale_pulses(batch):
    """Physical units -> numbers of order one, (B, L, 3): the only place where pulses are scaled (upstream's factors)."""
    time = (batch["time"] - 1e4) / 3e4  # the trigger is near 10,000 ns
    charge = torch.log10(batch["charge"].clamp(min=1e-3)) / 3  # the smallest real charge is 0.025 p.e.
    return torch.stack([time, charge, batch["aux"].float() - 0.5], dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# backbone: (x, valid) -> x, both (B, L, ...)
# ----------------------------------------------------------------------------------------------------------------------

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, x, valid):
        for block in self.blocks:
            x = block(x, valid)
        return x


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        D = config.embedding_dim
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, D))

    def forward(self, x, valid):
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, D/H)
        x = x + self.out(attention(q, k, v, valid).transpose(1, 2).reshape(B, L, D))
        return x + self.mlp(self.norm2(x))


def attention(q, k, v, valid):
    """Every pulse looks at every real pulse of its event. q, k, v (B, H, L, d), valid (B, L) -> (B, H, L, d)."""
    seen = valid[:, None, None, :]  # (B, 1, 1, L)
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # torch's fused CPU kernel has a very slow bfloat16 backward: 185 ms against 45 ms at (64, 8, 128, 32), torch 2.13
        scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v
    # DIFF(upstream): it calls this flash attention, but flash takes no mask; CUDA runs its memory-efficient kernel here
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


BACKBONES = {"transformer": Transformer}


# ----------------------------------------------------------------------------------------------------------------------
# models
# ----------------------------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """A batch -> (B, 1+L, D): what the model knows about the event ([:, 0], [CLS]) and about each pulse ([:, 1:])."""

    def __init__(self, config, geometry):
        super().__init__()
        self.embedding = PulseEmbedding(config, geometry)
        self.backbone = BACKBONES[config.backbone](config)
        self.final_norm = nn.LayerNorm(config.embedding_dim) if config.final_norm else nn.Identity()

    def forward(self, batch):
        x, valid = self.embedding(batch)
        return self.final_norm(self.backbone(x, valid))


class Pretrainer(nn.Module):
    """Encoder with the two heads of pretraining; forward gives the two losses of each event."""

    def __init__(self, config, geometry):
        super().__init__()
        self.encoder = Encoder(config, geometry)
        self.dom_head = nn.Linear(config.embedding_dim, N_DOMS)  # DIFF(upstream): no logit for padding
        self.charge_head = nn.Linear(config.embedding_dim, 1)
        self.apply(init_weights)

    def forward(self, batch):
        """-> dom_loss [nats] (B,), 0 for an event without a hidden pulse, and charge_loss [dex^2] (B,), both float32."""
        x = self.encoder(batch)
        hidden = batch["hidden"]
        # DIFF(upstream): logits at the hidden pulses only, 8 % of the positions that upstream computes
        logits = self.dom_head(x[:, 1:].flatten(0, 1)[hidden])  # (M, V)
        dom = batch["dom"].flatten()[hidden]  # (M,)
        log_charge = self.charge_head(x[:, 0]).squeeze(-1)  # (B,)
        return (dom_losses(logits, dom, event=hidden // batch["dom"].shape[1], n_events=len(x)),
                charge_losses(log_charge, batch["total_charge"]))


def dom_losses(logits, dom, event, n_events):
    """Cross-entropy of the logits (M, V) of pulses in DOMs dom (M,), mean over the hidden pulses of each event -> (B,).

    event (M,) is the row of a pulse's event. Loss per event first: otherwise bright events dominate (upstream since v0.2).
    """
    loss = F.cross_entropy(logits.float(), dom, reduction="none")  # (M,)
    n_hidden = loss.new_zeros(n_events).index_add(0, event, torch.ones_like(loss))
    return loss.new_zeros(n_events).index_add(0, event, loss) / n_hidden.clamp(min=1)


def charge_losses(log_charge, total_charge):
    """Squared error of the predicted log10 of the full event's charge [p.e.], (B,) -> (B,)."""
    return (log_charge.float() - torch.log10(total_charge.clamp(min=1e-3))).square()


class DirectionFinder(nn.Module):
    """Encoder with the direction head; forward gives unit vectors (B, 3) towards the neutrino's source."""

    def __init__(self, config, geometry):
        super().__init__()
        self.encoder = Encoder(config, geometry)
        self.direction_head = nn.Sequential(nn.Linear(config.embedding_dim, config.head_hidden_size), nn.ReLU(),
                                            nn.Linear(config.head_hidden_size, 3))
        self.apply(init_weights)

    def forward(self, batch):
        return F.normalize(self.direction_head(self.encoder(batch)[:, 0]).float(), dim=-1)


def unit_vector(azimuth, zenith):
    """Angles [rad] of a direction (where the neutrino came from) -> unit vector (..., 3)."""
    return torch.stack([azimuth.cos() * zenith.sin(), azimuth.sin() * zenith.sin(), zenith.cos()], dim=-1)


def angular_error(direction, truth):
    """The angle [rad] between unit vectors (..., 3). Unlike arccos of the dot product it has a gradient everywhere.

    # DIFF(upstream): arccos clipped at 1 - 1e-4, which has no gradient within 0.8 degrees
    """
    sine = (torch.linalg.cross(direction, truth).square().sum(-1) + 1e-12).sqrt()
    return torch.atan2(sine, (direction * truth).sum(-1))


# ----------------------------------------------------------------------------------------------------------------------
# initial weights and parameter groups
# ----------------------------------------------------------------------------------------------------------------------

def init_weights(module):
    """All initial values:

    Linear weight      normal, std 1/sqrt(3 fan_in)    the variance of torch's (and upstream's) uniform default
    Linear bias        0                               # DIFF(upstream): uniform
    features, time     10 times that                   # DIFF(upstream): light crosses the detector in 0.1 of the scaled
                                                       # time, but in 2 of the scaled positions; else it stays unseen long
    dom_table, MASK, PAD, [CLS]   normal, std 1        upstream's
    LayerNorm          weight 1, bias 0                torch's default
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
    elif isinstance(module, PulseEmbedding):
        nn.init.normal_(module.cls)
        module.features.weight.data[:, 0] *= 10
        if module.use_dom_positions:
            nn.init.normal_(module.special)


def parameter_groups(model, weight_decay):
    """Two groups for AdamW: matrices of Linear layers decay; biases, norms, embeddings and [CLS] do not.

    # DIFF(upstream): it decays the DOM table and [CLS] too, which pulls rarely hit DOMs to zero
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and not name.endswith(("dom_table.weight", "special"))
            (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
