"""PolarBERT: everything that has parameters, and the losses, in the order in which data flows through them.

    pulses -> PulseEmbedding -> Backbone -> final norm -> heads        (Encoder = all but the heads)

Pretrainer predicts the hidden DOM ids, and from [CLS] what is known of the whole event (CLS_TARGETS).
Reconstructor tells from [CLS] one of tasks.TASKS. Both are pure functions of their inputs: no random number
is drawn after the weights are made.

A batch is packed: the T tokens of its B events lie one after another without padding, and the first token of
each event is its [CLS]. It is a dict that data.micro_batches makes: time [ns], charge [p.e.], dom, aux (T,),
meaningless at [CLS]; starts int32 (B + 1,): event i is tokens starts[i] to starts[i + 1] - 1; the int
longest, the tokens of the longest event; hidden and hidden_event (M,), token and event of each hidden pulse;
and what the heads learn, total_charge [p.e.], azimuth, zenith [rad], energy [GeV], event_class (B,), center
[m] and motion (B, 3).
Other sizes: D embedding_dim, E dom_embed_dim, H heads, d = D / H, V DOMs, 5160 in IceCube. geometry: a
detector's data.GEOMETRY records (V,).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from tasks import TASKS, angular_error, direction_outputs, vmf_loss

POSITION_SCALE = 500.0  # [m] half of IceCube's height: its scaled positions lie in about -1..1


@dataclass
class ModelConfig:
    embedding_dim: int = 256  # D, width of the residual stream
    dom_embed_dim: int = 128  # E, part of D that tells which DOM; the other D - E hold time, charge and aux
    num_heads: int = 8  # H, of D / H = 32 dimensions each
    hidden_size: int = 1024  # width of the MLP, 4 D
    num_layers: int = 8  # blocks
    use_dom_positions: bool = True  # DOM part from x, y, z; False: a learned table of all DOMs
    use_dom_table: bool = False  # with positions: add the learned table to them
    fourier_features: bool = False  # beside time, charge and position also their sines and cosines
    backbone: str = "transformer"  # what mixes the pulses; or "gru", "mamba": two directions, equal size
    mlp: str = "relu"  # or "gelu", "swiglu"; of equal parameter count
    norm: str = "layernorm"  # or "rmsnorm"
    qk_norm: bool = False  # transformer: normalise queries and keys, which bounds the attention logits
    final_norm: bool = True  # norm before the heads; upstream has none up to v0.2
    dom_head: str = "linear"  # a weight vector per DOM; or "position": it follows from where the DOM is
    dom_loss: str = "ce"  # cross-entropy; or "emd", "chamfer", distances of the guesses; or some joined by +
    distance_weight: float = 1.0  # of emd and chamfer, which count in 100 m
    loss_weighting: str = "per_event"  # events count alike; or "per_pulse", hidden pulses do (paper v0.1)
    cls_target: str = "charge"  # what [CLS] predicts: "charge", "center", "motion", or some joined by +
    mup_base_width: int = 0  # muP: keep what was tuned at this embedding_dim for others; 0 = off
    mup_base_heads: int = 0  # num_heads of that base model; 0 = as many as here: wider heads
    mup_base_layers: int = 0  # CompleteP: the same for num_layers; 0 = off

    def check(self):
        """Yield one line for each value that makes no sense."""
        for key in ("embedding_dim", "dom_embed_dim", "num_heads", "hidden_size", "num_layers",
                    "distance_weight"):
            if getattr(self, key) <= 0:
                yield f"{key} = {getattr(self, key)}: must be greater than 0"
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                yield f"{key} = {getattr(self, key)!r}: choose one of {', '.join(map(repr, choices))}"
        for key, choices in (("cls_target", CLS_TARGETS), ("dom_loss", DOM_LOSSES)):
            if not set(getattr(self, key).split("+")) <= choices.keys():
                yield f"{key} = {getattr(self, key)!r}: choose among {', '.join(choices)}, joined by +"
        if self.embedding_dim % max(self.num_heads, 1):
            yield f"embedding_dim = {self.embedding_dim} cannot be shared among num_heads = {self.num_heads}"
        if self.dom_embed_dim >= self.embedding_dim:
            yield (f"dom_embed_dim = {self.dom_embed_dim} must be smaller than embedding_dim = "
                   f"{self.embedding_dim}: the rest holds time, charge and aux")
        if self.backbone != "transformer" and self.embedding_dim % (2 * self.num_heads):
            yield (f"backbone = {self.backbone!r} needs an embedding_dim that 2 num_heads = "
                   f"{2 * self.num_heads} divides")
        if self.backbone != "transformer" and (self.mup_base_width or self.qk_norm):
            yield f"mup_base_width and qk_norm are for the transformer, not for backbone = {self.backbone!r}"
        if self.backbone == "mamba" and self.embedding_dim % 4:
            yield ("backbone = 'mamba' needs an embedding_dim that 4 divides: its state is "
                   f"{self.embedding_dim} / 4 wide")
        for key in ("mup_base_width", "mup_base_heads", "mup_base_layers"):
            if getattr(self, key) < 0:
                yield f"{key} = {getattr(self, key)}: must not be negative"
        if self.mup_base_heads and (not self.mup_base_width or self.mup_base_width % self.mup_base_heads):
            yield (f"mup_base_heads = {self.mup_base_heads}: must divide mup_base_width = "
                   f"{self.mup_base_width}, the width of the same base model")


# ------------------------------------------------------------------------------------------------------------
# embedding
# ------------------------------------------------------------------------------------------------------------

class PulseEmbedding(nn.Module):
    """A batch -> one vector for each token, (T, D).

    Each vector is [DOM part (E) | Linear(time, charge, aux) (D - E)]. Time is a feature, so there is no
    positional encoding.
    """

    def __init__(self, config, geometry):
        super().__init__()
        D, E = config.embedding_dim, config.dom_embed_dim
        # (V, 3) [m], kept in the checkpoint: it tells in which detector the model was trained
        self.register_buffer("geometry", torch.from_numpy(geometry["position"].copy()))
        self.has_waves, n_position, n_features = config.fourier_features, 3, 3
        if self.has_waves:  # a sine and a cosine each
            n_position += 3 * 2 * POSITION_WAVES
            n_features += 2 * TIME_WAVES + 2 * CHARGE_WAVES
        self.position = nn.Linear(n_position, E) if config.use_dom_positions else None
        if config.use_dom_positions:
            self.mask = nn.Parameter(torch.empty(1, E))  # a hidden DOM has no position
        has_table = config.use_dom_table or not config.use_dom_positions
        self.dom_table = nn.Embedding(len(geometry) + 1, E) if has_table else None  # the last row is MASK
        self.features = nn.Linear(n_features, D - E)
        self.cls = nn.Parameter(torch.empty(D))

    def forward(self, batch):
        dom = batch["dom"]  # (T,)
        if "hidden" in batch:  # only the id is hidden: when and how bright the pulse was stays visible
            dom = dom.index_fill(0, batch["hidden"], len(self.geometry))  # MASK
        with torch.autocast(dom.device.type, enabled=False):  # bfloat16 would round 12,000 ns by up to 7 ns
            dom_part = F.embedding(dom, self.dom_vectors())  # (T, E)
            features = scale_pulses(batch)  # (T, 3)
            if self.has_waves:
                time = waves(features[:, :1], 1.0, TIME_WAVES)  # wavelengths of 30 us to 30 ns
                charge = waves(features[:, 1:2], 4 / 3, CHARGE_WAVES)  # 4 to 0.5 decades
                features = torch.cat([features, time, charge], dim=-1)
            x = torch.cat([dom_part, self.features(features)], dim=-1)  # (T, D)
        first = batch["starts"][:-1].long()
        return x.index_copy(0, first, self.cls.expand(first.shape[0], -1))

    def dom_vectors(self):
        """One vector for each DOM and for MASK, (V + 1, E)."""
        if self.position is None:
            return self.dom_table.weight
        position = position_features(self.geometry) if self.has_waves else self.geometry / POSITION_SCALE
        vectors = torch.cat([self.position(position), self.mask])
        return vectors if self.dom_table is None else vectors + self.dom_table.weight


def scale_pulses(batch):
    """Physical units -> numbers of order one, (T, 3). Pulses are scaled here alone, by upstream's factors."""
    time = (batch["time"] - 1e4) / 3e4  # the trigger is near 10,000 ns
    charge = torch.log10(batch["charge"].clamp(min=1e-3)) / 3  # the smallest real charge is 0.025 p.e.
    return torch.stack([time, charge, batch["aux"].to(time.dtype) - 0.5], dim=-1)


TIME_WAVES, CHARGE_WAVES, POSITION_WAVES = 11, 4, 8  # octaves of fourier_features


def waves(x, longest, n):
    """Sines and cosines of x (..., C) with wavelengths longest / 1, 2, 4, ... -> (..., 2 n C)."""
    octaves = 2.0 ** torch.arange(n, device=x.device)
    phase = (2 * math.pi / longest * x[..., None] * octaves).flatten(-2)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def position_features(geometry):
    """x, y, z [m] (V, 3) scaled, and their waves of 2000 m to 16 m, the distance of two DOMs -> (V, 51)."""
    return torch.cat([geometry / POSITION_SCALE, waves(geometry, 2000.0, POSITION_WAVES)], dim=-1)


# ------------------------------------------------------------------------------------------------------------
# backbone: x (T, D) -> x (T, D)
# ------------------------------------------------------------------------------------------------------------

class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, x, starts, longest):
        packing = Packing(starts, longest, x.shape[0])
        for block in self.blocks:
            x = block(x, packing)
        return x


class Packing:
    """Where the events lie among T packed tokens. Only mixers need it, all else works token by token.

    A mixer that cannot work on packed tokens lays them out in a rectangle, one event per row, L = longest
    tokens wide, and packs the result again.
    """

    def __init__(self, starts, longest, n_tokens):
        self.starts, self.longest = starts, longest  # int32 (B + 1,), int
        column = torch.arange(longest, device=starts.device)
        self.valid = column < starts.diff()[:, None]  # (B, L), False at padding
        token = torch.arange(n_tokens, device=starts.device, dtype=starts.dtype)
        event = torch.searchsorted(starts, token, right=True) - 1
        self.cell = event * longest + token - starts[event]  # (T,), its place in the rectangle

    def unpack(self, x):
        """(T, C) -> (B, L, C), padding 0."""
        B, L = self.valid.shape
        return x.new_zeros(B * L, x.shape[1]).index_copy(0, self.cell, x).view(B, L, -1)

    def pack(self, x):
        """(B, L, ...) -> (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.cell)


class Block(nn.Module):
    """Pre-norm: x + mixer(norm(x)), then x + mlp(norm(x)). Only the mixer lets pulses see each other.

    CompleteP (Dey et al. 2025, arXiv:2505.01618, alpha = 1) weighs both branches by base layers / layers.
    """

    def __init__(self, config):
        super().__init__()
        self.norm1 = NORMS[config.norm](config.embedding_dim)
        self.mixer = MIXERS[config.backbone](config)
        self.norm2 = NORMS[config.norm](config.embedding_dim)
        self.mlp = MLP(config)
        self.weight = config.mup_base_layers / config.num_layers if config.mup_base_layers else 1.0

    def forward(self, x, packing):
        x = x.add(self.mixer(self.norm1(x), packing), alpha=self.weight)
        return x.add(self.mlp(self.norm2(x)), alpha=self.weight)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, width = config.embedding_dim, config.hidden_size
        self.is_gated = config.mlp == "swiglu"
        if self.is_gated:
            width = round(width * 2 / 3 / 8) * 8  # three matrices instead of two: as many parameters
        self.up = nn.Linear(D, 2 * width if self.is_gated else width)
        self.activation = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}[config.mlp]
        self.down = nn.Linear(width, D)

    def forward(self, x):
        x = self.up(x)
        if self.is_gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.activation(gate) * x)
        return self.down(self.activation(x))


class Attention(nn.Module):
    """Every token looks at every token of its event."""

    def __init__(self, config):
        super().__init__()
        D, self.num_heads = config.embedding_dim, config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.qk_norm = nn.RMSNorm(D // config.num_heads) if config.qk_norm else None
        self.scale = attention_scale(config)
        self.can_flash = can_flash(D // config.num_heads)

    def forward(self, x, packing):
        T, D = x.shape
        qkv = self.qkv(x).view(T, 3, self.num_heads, -1)  # (T, 3, H, d)
        if self.qk_norm is not None:
            q, k, v = qkv.unbind(1)
            q, k = self.qk_norm(q).to(v.dtype), self.qk_norm(k).to(v.dtype)  # autocast: norms are float32
            qkv = torch.stack([q, k, v], dim=1)
        is_half = qkv.dtype in (torch.bfloat16, torch.float16)
        is_flash = self.can_flash and is_half and qkv.device.type != "cpu"
        attend = flash_attention if is_flash else rectangle_attention
        return self.out(attend(qkv, packing, self.scale).reshape(T, D))

    def flash_error(self, device, dtype):
        """How far flash attention is off on made-up events, relative to the largest number."""
        lengths = torch.tensor([1, 2, 37, 128], dtype=torch.int32, device=device)
        packing = Packing(F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), 128, 168)
        rng = torch.Generator(device).manual_seed(0)
        shape = (168, 3, self.num_heads, self.qkv.in_features // self.num_heads)
        qkv = torch.randn(shape, generator=rng, device=device, dtype=dtype).requires_grad_()
        found = []
        for attend in (flash_attention, rectangle_attention):
            x = attend(qkv, packing, self.scale).float()
            gradient, = torch.autograd.grad(x.square().sum(), qkv)
            found.append((x.detach(), gradient.float()))
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))


def can_flash(d):
    """Whether flash attention over packed events runs here, with heads d wide: on CUDA, from an A100 on."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    return d % 8 == 0 and d <= 256


def flash_attention(qkv, packing, scale):
    """Flash attention over packed events, bfloat16 or float16 on CUDA. qkv (T, 3, H, d) -> (T, H, d).

    # DIFF(upstream): it calls "flash" with a padding mask, and then CUDA never runs the flash kernel
    """
    starts, longest = packing.starts, packing.longest
    return varlen_attn(*qkv.unbind(1), starts, starts, longest, longest, scale=scale)


def rectangle_attention(qkv, packing, scale):
    """The same in a padded rectangle, for all other devices and dtypes. qkv (T, 3, H, d) -> (T, H, d)."""
    rows = packing.unpack(qkv.flatten(1)).unflatten(-1, qkv.shape[1:])  # (B, L, 3, H, d)
    q, k, v = rows.permute(2, 0, 3, 1, 4)  # (B, H, L, d)
    seen = packing.valid[:, None, None, :]  # (B, 1, 1, L)
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # torch's own has a very slow bfloat16 backward: 185 ms against 45 ms at (64, 8, 128, 32), torch 2.13
        scores = (q @ k.transpose(-2, -1)).float() * scale
        x = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return packing.pack(x.transpose(1, 2))


class TwoWays(nn.Module):
    """A recurrent mixer forwards and one backwards, D/2 outputs each: [CLS], the first, sees all pulses."""

    def __init__(self, config, mixer):
        super().__init__()
        self.forwards, self.backwards = mixer(config), mixer(config)

    def forward(self, x, packing):
        x, valid = packing.unpack(x), packing.valid
        n, place = valid.sum(1, keepdim=True), torch.arange(x.shape[1], device=x.device)
        # tokens in reverse; padding stays behind them, so that neither direction passes it on its way
        reverse = torch.where(place < n, n - 1 - place, place)[..., None]  # (B, L, 1)
        y = self.backwards(x.gather(1, reverse.expand_as(x)), valid)
        y = y.gather(1, reverse.expand_as(y))
        return packing.pack(torch.cat([self.forwards(x, valid), y], dim=-1))


class GRU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gru = nn.GRU(config.embedding_dim, config.embedding_dim // 2, batch_first=True)

    def forward(self, x, valid):
        return self.gru(x)[0]  # (B, L, D/2); padding lies behind all real tokens and reaches none of them


class Mamba(nn.Module):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060) in one direction, D -> D/2.

    A convolution, a selective state space, a gate.
    """

    def __init__(self, config):
        super().__init__()
        D, H = config.embedding_dim, config.num_heads
        self.sizes = [D // 2, D // 2, D // 4, D // 4, H]  # gate, x, b, c, dt; the state is D/4 wide
        self.project = nn.Linear(D, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(D, D, 4, groups=D, padding=3)  # x, b and c see 3 pulses back
        self.log_a, self.dt_bias, self.skip = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = nn.RMSNorm(D // 2)
        self.out = nn.Linear(D // 2, D // 2, bias=False)

    def forward(self, x, valid):
        L, H = x.shape[1], self.sizes[-1]
        gate, xbc, dt = self.project(x).split([self.sizes[0], sum(self.sizes[1:4]), H], dim=-1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :L].transpose(1, 2))
        with torch.autocast(x.device.type, enabled=False):  # products of up to L decay factors
            x, b, c = (part.to(self.log_a.dtype) for part in xbc.split(self.sizes[1:4], dim=-1))
            x = x.unflatten(-1, (H, -1))  # (B, L, H, P)
            dt = F.softplus(dt.to(self.log_a.dtype) + self.dt_bias)  # (B, L, H), the time steps
            dt = dt * valid[..., None]  # 0 at padding, which so leaves no trace
            y = state_space(x * dt[..., None], -self.log_a.exp() * dt, b, c) + self.skip[:, None] * x
        return self.out(self.norm(y.flatten(2) * F.silu(gate)))


def state_space(x, log_decay, b, c, chunk=256):
    """y_t = c_t . s_t with the state s_t = exp(log_decay_t) s_(t-1) + b_t x_t, without a loop over t.

    x (B, L, H, P), log_decay (B, L, H) <= 0, b and c (B, L, N) -> y (B, L, H, P). Within a chunk of Q tokens
    y = (decays * c b^T) x, a product with a masked Q x Q matrix. The state is handed from chunk to chunk, so
    memory grows with L * chunk, not with L * L.
    """
    state, ys = 0.0, []
    for x, log_decay, b, c in zip(*(part.split(chunk, dim=1) for part in (x, log_decay, b, c))):
        total = log_decay.cumsum(1)  # (B, Q, H), decay since the chunk began
        between = total[:, :, None] - total[:, None]  # (B, Q, Q, H)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[..., None]
        weight = (c @ b.transpose(1, 2))[..., None] * between.masked_fill(~past, float("-inf")).exp()
        y = torch.einsum("btsh,bshp->bthp", weight, x)
        if ys:
            y = y + torch.einsum("btn,bhnp,bth->bthp", c, state, total.exp())
            state = state * total[:, -1, :, None, None].exp()
        state = state + torch.einsum("bsn,bshp,bsh->bhnp", b, x, (total[:, -1:] - total).exp())
        ys.append(y)
    return torch.cat(ys, dim=1)


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
MIXERS = {"transformer": Attention, "gru": lambda config: TwoWays(config, GRU),
          "mamba": lambda config: TwoWays(config, Mamba)}


# ------------------------------------------------------------------------------------------------------------
# models
# ------------------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """A batch -> what the model knows about each event, [CLS] (B, D), and about each token (T, D)."""

    def __init__(self, config, geometry):
        super().__init__()
        self.embedding = PulseEmbedding(config, geometry)
        self.backbone = Backbone(config)
        self.final_norm = NORMS[config.norm](config.embedding_dim) if config.final_norm else nn.Identity()
        self.output_scale = 1 / width_ratio(config)  # muP: what heads see shrinks with the width

    def forward(self, batch):
        x = self.backbone(self.embedding(batch), batch["starts"], batch["longest"])
        x = self.final_norm(x) * self.output_scale
        return x.index_select(0, batch["starts"][:-1].long()), x


class PositionHead(nn.Module):
    """DOM logits from where the DOMs are, (M, D) -> (M, V): query(x) . key(position of j) / 8 + bias_j.

    The key is a small network of the position's Fourier features, evaluated once per micro-batch. Neighbours
    get similar keys before they are ever hit. It has a fraction of the linear head's parameters (base: 0.05 M
    instead of 1.3 M), and only the bias knows how many DOMs there are.
    """
    SIZE, HIDDEN = 64, 256  # of the key, of its network

    def __init__(self, config, geometry):
        super().__init__()
        self.query = nn.Linear(config.embedding_dim, self.SIZE)
        position = torch.from_numpy(geometry["position"].copy())
        self.register_buffer("features", position_features(position), persistent=False)  # (V, 51)
        self.key = nn.Sequential(nn.Linear(self.features.shape[1], self.HIDDEN), nn.GELU(),
                                 nn.Linear(self.HIDDEN, self.SIZE))
        self.bias = nn.Parameter(torch.zeros(len(geometry)))

    def forward(self, x):
        return self.query(x) @ self.key(self.features).T * self.SIZE ** -0.5 + self.bias


# DIFF(upstream): no logit for padding
DOM_HEADS = {"linear": lambda config, geometry: nn.Linear(config.embedding_dim, len(geometry)),
             "position": PositionHead}


@dataclass(frozen=True)
class ClsTarget:
    """Something about the whole event that [CLS] learns to tell, from the data alone."""
    width: int  # numbers that tell it
    label: str  # field of data.EVENT that it comes from
    truth: Callable  # that field of a batch -> (B, width), numbers of order one
    metric: str  # column of log.csv that tells in units how good it is: val_<metric>
    measure: Callable  # prediction, truth (B, width) -> (B,)
    of_mean: Callable = math.sqrt  # mean of that over the events -> the number in the column
    loss: Callable = lambda x, truth: (x - truth).square().mean(-1)  # prediction, truth (B, width) -> (B,)
    is_known: Callable = lambda truth: truth[:, 0].isfinite()  # truth (B, width) -> bool (B,)

    def known_truth(self, batch):
        """-> truth (B, width), 0 where it is not known; whether it is known, bool (B,)."""
        truth = self.truth(batch[self.label])
        is_known = self.is_known(truth)
        return torch.where(is_known[:, None], truth, 0.0), is_known


# to add one: an entry here, its weight lambda_<name> in train.py
CLS_TARGETS = {
    "charge": ClsTarget(  # log10 of the total charge; its metric in dex
        width=1, label="total_charge", truth=lambda charge: torch.log10(charge.clamp(min=1e-3))[:, None],
        metric="charge_rms", measure=lambda x, truth: (x - truth).square().sum(-1)),
    "center": ClsTarget(  # charge-weighted centre; its metric in m
        width=3, label="center", truth=lambda center: center / POSITION_SCALE,
        metric="center_rms", measure=lambda x, truth: ((x - truth) * POSITION_SCALE).square().sum(-1)),
    "motion": ClsTarget(  # a first guess of the source's direction, zeros where there is none; metric in rad
        width=3, label="motion", truth=lambda motion: motion, is_known=lambda truth: truth.any(-1),
        loss=lambda x, truth: vmf_loss(**direction_outputs(x), truth=truth),  # docs/studies.md, cls
        metric="motion_angle", measure=lambda x, truth: angular_error(F.normalize(x, dim=-1), truth),
        of_mean=float),
}


class Pretrainer(nn.Module):
    """Encoder with the heads of pretraining; forward gives the losses of each event."""

    def __init__(self, config, geometry):
        super().__init__()
        self.config = config
        self.targets = {name: CLS_TARGETS[name] for name in config.cls_target.split("+")}
        self.encoder = Encoder(config, geometry)
        self.dom_head = DOM_HEADS[config.dom_head](config, geometry)
        strings = torch.from_numpy(geometry["string"].astype("int64"))
        self.register_buffer("string", strings, persistent=False)  # (V,), for metrics alone
        self.cls_heads = nn.ModuleDict({name: nn.Linear(config.embedding_dim, target.width)
                                        for name, target in self.targets.items()})
        init_weights(self, config)

    def forward(self, batch):
        """-> dict of float32 losses (B,): "dom" (see dom_losses), and one for each name in cls_target."""
        logits, answers = self.predict(batch)
        return {"dom": self.dom_losses(logits, batch), **self.cls_losses(answers, batch)}

    def predict(self, batch):
        """-> logits of the hidden pulses (M, V); dict name of a ClsTarget to prediction (B, width)."""
        cls, x = self.encoder(batch)
        # DIFF(upstream): logits at the hidden pulses only, 8 % of the positions that upstream computes
        logits = self.dom_head(x.index_select(0, batch["hidden"]))
        dtype = self.dom_head.bias.dtype  # that of the weights, whatever autocast has chosen
        return logits.to(dtype), {name: head(cls).to(dtype) for name, head in self.cls_heads.items()}

    def dom_losses(self, logits, batch):
        """Mean loss of each event's hidden pulses ("per_event"), or their sum ("per_pulse"), (B,).

        Mean per event first: otherwise bright events dominate (upstream since v0.2).
        """
        dom, event = batch["dom"].index_select(0, batch["hidden"]), batch["hidden_event"]  # (M,)
        geometry, loss = self.encoder.embedding.geometry, 0.0
        for name in self.config.dom_loss.split("+"):
            weight = 1.0 if name == "ce" else self.config.distance_weight
            loss = loss + weight * DOM_LOSSES[name](logits, dom, event, geometry)  # (M,)
        zeros = loss.new_zeros(len(batch["starts"]) - 1)
        total = zeros.index_add(0, event, loss)
        if self.config.loss_weighting == "per_pulse":
            return total
        return total / zeros.index_add(0, event, torch.ones_like(loss)).clamp(min=1)

    def cls_losses(self, answers, batch):
        """Dict name of a ClsTarget to the loss of each event (B,), 0 where the truth is not known."""
        losses = {}
        for name, target in self.targets.items():
            truth, is_known = target.known_truth(batch)
            losses[name] = target.loss(answers[name], truth) * is_known
        return losses

    @property
    def metric_names(self):
        of_targets = [f"{target}_{what}" for target in self.targets for what in ("loss", "metric", "known")]
        return ["dom_loss", "top1", "top5", "string", "distance", "cross_entropy", *of_targets]

    def metrics(self, batch):
        """Sums over a batch, in the order of metric_names, of the losses and of what makes them readable."""
        logits, answers = self.predict(batch)
        dom, geometry = batch["dom"].index_select(0, batch["hidden"]), self.encoder.embedding.geometry
        best = logits.topk(5, dim=-1).indices  # (M, 5)
        sums = [self.dom_losses(logits, batch).sum(),
                (best[:, 0] == dom).float().sum(), (best == dom[:, None]).float().sum(),
                (self.string[best[:, 0]] == self.string[dom]).float().sum(),
                (geometry[best[:, 0]] - geometry[dom]).norm(dim=-1).sum(),  # [m]
                F.cross_entropy(logits, dom, reduction="sum")]
        losses = self.cls_losses(answers, batch)
        for name, target in self.targets.items():
            truth, is_known = target.known_truth(batch)
            found = target.measure(answers[name], truth) * is_known
            sums += [losses[name].sum(), found.sum(), is_known.sum()]
        return torch.stack(sums)


def earth_movers_distance(logits, dom, event, geometry):
    """Mean distance of the predicted DOM from the true one, sum_j p_j |x_j - x_true| [100 m], (M,).

    So far has the predicted distribution to be carried: all of it goes to a single DOM, and no solver is
    needed.
    """
    exact = "donot_use_mm_for_euclid_dist"  # torch's name for: no rounding of small distances
    distance = torch.cdist(geometry[dom], geometry, compute_mode=exact) / 100  # (M, V)
    return (logits.softmax(-1) * distance).sum(-1)


def chamfer_distance(logits, dom, event, geometry):
    """From each hidden DOM to the nearest of its event's expected positions, and back [100 m], (M,).

    Expected position of a hidden pulse: sum_j p_j x_j. Which guess belongs to which pulse does not count: the
    mean over an event is the Chamfer distance of two sets of points.
    """
    expected, true = logits.softmax(-1) @ geometry, geometry[dom]  # (M, 3)
    distance = torch.cdist(true, expected, compute_mode="donot_use_mm_for_euclid_dist") / 100  # (M, M)
    distance = distance.masked_fill(event[:, None] != event, float("inf"))
    return distance.amin(1) + distance.amin(0)


# to add one: an entry here. logits (M, V), true DOM and event of the hidden pulses (M,), positions (V, 3) [m]
# -> (M,)
DOM_LOSSES = {"ce": lambda logits, dom, event, geometry: F.cross_entropy(logits, dom, reduction="none"),
              "emd": earth_movers_distance, "chamfer": chamfer_distance}
CHOICES = {"backbone": MIXERS, "mlp": ("relu", "gelu", "swiglu"), "norm": NORMS, "dom_head": DOM_HEADS,
           "loss_weighting": ("per_event", "per_pulse")}


class Reconstructor(nn.Module):
    """Encoder with a head on [CLS] for one of TASKS; forward gives its outputs, a dict of float32 tensors."""

    def __init__(self, config, geometry):
        super().__init__()
        task = TASKS[config.task]
        self.encoder = Encoder(config, geometry)
        self.head = nn.Sequential(nn.Linear(config.embedding_dim, config.head_hidden_size), nn.ReLU(),
                                  nn.Linear(config.head_hidden_size, task.width))
        self.outputs = task.outputs
        init_weights(self, config)

    def forward(self, batch):
        return self.answer(self.encoder(batch)[0])

    def answer(self, cls):
        return self.outputs(self.head(cls).float())


# ------------------------------------------------------------------------------------------------------------
# initial weights and parameter groups
# ------------------------------------------------------------------------------------------------------------

def width_ratio(config):
    """muP: how much wider than the model whose learning rate was tuned; 1 without muP."""
    return config.embedding_dim / config.mup_base_width if config.mup_base_width else 1.0


def attention_scale(config):
    """1/sqrt(d) for heads d wide; with muP sqrt(d of the base model)/d, which at the base is the same.

    Trained queries and keys correlate, so that their products grow with d, not with sqrt(d) (muP's table 8).
    """
    d = config.embedding_dim // config.num_heads
    if not config.mup_base_width:
        return d ** -0.5
    return (config.mup_base_width / (config.mup_base_heads or config.num_heads)) ** 0.5 / d


def init_weights(model, config):
    """All initial values:

    Linear, Conv1d     normal, std 1/sqrt(3 fan_in)    the variance of torch's and upstream's default
    their biases       0                               # DIFF(upstream): uniform
    features, time     weights 10 times as large       # DIFF(upstream): light crosses the detector in 0.1 of
                                                       # the scaled time, but in 2 of the scaled positions;
                                                       # else it stays unseen long
    heads              1/sqrt(3 D); with muP 1/sqrt(3 mup_base_width), whatever the width
    dom_table, MASK, [CLS]   normal, std 1             upstream's
    norms              weight 1, bias 0                torch's default; GRU likewise torch's
    Mamba              decay rates 0.1..1, time steps 0.1..1, spread over the heads: memories of 1 to 100
                       pulses. Its paper's ranges, 1..16 and 0.001..0.1, are for long texts: with them heads
                       forget at once or see next to nothing
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=(3 * module.weight[0].numel()) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, Mamba):
            H = len(module.skip)
            steps = torch.logspace(-1, 0, H)
            module.log_a.data = torch.linspace(0.1, 1, H).log()
            module.dt_bias.data = steps + torch.log(-torch.expm1(-steps))  # softplus of it is the step
            nn.init.ones_(module.skip)
    with torch.no_grad():
        embedding = model.encoder.embedding
        embedding.features.weight[:, 0] *= 10
        nn.init.normal_(embedding.cls)
        if config.use_dom_positions:
            nn.init.normal_(embedding.mask)
        for head in heads_of(model):
            head.weight *= width_ratio(config) ** 0.5


def heads_of(model):
    """The linear layers that read what the encoder gives."""
    if not isinstance(model, Pretrainer):
        return [model.head[0]]
    return [getattr(model.dom_head, "query", model.dom_head), *model.cls_heads.values()]


def parameter_groups(model, weight_decay):
    """Groups for AdamW: matrices decay; biases, norms, embeddings and [CLS] do not.

    Each group has an lr_scale: 1, but 1 / width_ratio for the matrices of the backbone (muP, Yang et al.
    2022, arXiv:2203.03466, table 8: Adam). Their decay grows by as much: lr * weight_decay stays the same.
    # DIFF(upstream): it decays the DOM table and [CLS] too, which pulls rarely hit DOMs to zero
    """
    hidden, decayed, kept = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim < 2 or name.endswith(("dom_table.weight", "embedding.mask"))
            (kept if is_kept else hidden if ".backbone." in name else decayed).append(parameter)
    scale = model.encoder.output_scale
    return [{"params": hidden, "weight_decay": weight_decay / scale, "lr_scale": scale},
            {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
            {"params": kept, "weight_decay": 0.0, "lr_scale": 1.0}]
