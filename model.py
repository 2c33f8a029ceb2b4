"""PolarBERT, top to bottom: embedding, attention, blocks, heads, losses.

    pulses -> PulseEmbedding -> blocks -> final norm -> heads
              (Encoder: all except the heads)

PolarBERT predicts the masked DOMs, and from [CLS] summaries of the event.
Reconstructor predicts from [CLS] the direction, the energy or the class.

A batch is packed: the T tokens of its B events, one after another without
padding. The first token of an event is its [CLS]. A batch is a dict of tensors,
made by data.micro_batches:

    time, charge   (T,) float32 [ns], [p.e.]; 0 at [CLS], as are dom and aux
    dom, aux       (T,) int64 and bool
    cu_seqlens     (B + 1,) int32: where each event starts, and T
    max_seqlen     int: tokens of the longest event
    masked         (M,) int64: the masked tokens
    masked_event   (M,) int64: the event of each
    energy, ...    (B,) or (B, 3): the fields of data.EVENT that were asked for

Sizes: D embedding_dim, E dom_embed_dim, H heads, d = D / H, V DOMs,
L max_seqlen. geometry: data.GEOMETRY records (V,).
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from recurrent import Bidirectional
from utils import fail, print0

POSITION_SCALE = 500.0  # [m] half of IceCube's height
# name: (field of data.EVENT with the truth, width of the head)
CLS_TARGETS = {
    "charge": ("total_charge", 1),
    "center": ("center", 3),
    "line_fit": ("line_fit", 3),
}
TASKS = {
    "direction": (("azimuth", "zenith"), 3),
    "energy": (("energy",), 1),
    "class": (("event_class",), 1),
}

@dataclass
class ModelConfig:
    embedding_dim: int = 256  # D, width of the residual stream
    dom_embed_dim: int = 128  # E, the part of D for the DOM
    num_heads: int = 8  # H
    hidden_size: int = 1024  # width of the MLP, usually 4 D
    num_layers: int = 8  # blocks
    use_dom_positions: bool = True  # DOM part from x, y, z; False: a learned table
    backbone: Literal["transformer", "gru", "mamba"] = "transformer"  # the mixer
    mlp: Literal["relu", "gelu", "swiglu"] = "relu"  # equal parameter count
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before each branch
    qk_norm: bool = False  # normalise queries and keys
    # DIFF(upstream): none up to v0.2
    final_norm: bool = True  # before the heads
    dom_head: Literal["linear", "position"] = "linear"  # weights per DOM, or from x, y, z
    dom_loss: Literal["ce", "emd"] = "ce"  # cross-entropy, or a distance [100 m]
    cls_target: str = "charge"  # or center, line_fit; joined by +
    mup_base_width: int = 0  # muP: width where the learning rate was tuned; 0 = off

def check_model(config):
    D, H = config.embedding_dim, config.num_heads
    if D % H or config.dom_embed_dim >= D:
        fail(f"embedding_dim = {D} must be a multiple of num_heads = {H} and larger than "
             f"dom_embed_dim = {config.dom_embed_dim}")
    if not set(config.cls_target.split("+")) <= CLS_TARGETS.keys():
        fail(f"cls_target = {config.cls_target!r}: join some of {', '.join(CLS_TARGETS)} by +")
    if config.backbone in ("gru", "mamba") and D % (4 * H):
        fail(f"backbone = {config.backbone!r} needs a multiple of 4 num_heads as embedding_dim")
    if config.backbone != "transformer" and (config.qk_norm or config.mup_base_width):
        fail("qk_norm and mup_base_width are for backbone = 'transformer'")

# ---- embedding ----------------------------------------------------------------------------------

# Spread of the first weights of time, charge, aux. While light crosses the detector, the
# scaled time changes by 0.1, the scaled position by 2.  # DIFF(upstream): equal
FEATURE_STD = [10 / 3, 1 / 3, 1 / 3]

class PulseEmbedding(nn.Module):
    """A batch -> token vectors (T, D) = [DOM part (E) | Linear(time, charge, aux) (D - E)]."""

    def __init__(self, config, geometry):
        super().__init__()
        D, E = config.embedding_dim, config.dom_embed_dim
        # (V, 3) [m], saved in the checkpoint: the detector in which the model was trained
        self.register_buffer("geometry", torch.from_numpy(geometry["position"].copy()))
        self.use_dom_positions = config.use_dom_positions
        if config.use_dom_positions:
            self.position = nn.Linear(3, E)
            self.mask = nn.Parameter(torch.empty(1, E))
        else:
            self.dom_table = nn.Embedding(len(geometry) + 1, E)  # the last row is MASK
        self.features = nn.Linear(len(FEATURE_STD), D - E)
        self.cls = nn.Parameter(torch.empty(D))

    def forward(self, batch):
        dom = batch["dom"]
        if "masked" in batch:  # the id alone; time, charge, aux stay
            dom = dom.index_fill(0, batch["masked"], len(self.geometry))
        # physical units -> numbers of order one, by upstream's factors
        time = (batch["time"] - 1e4) / 3e4  # [ns] the trigger is near 10,000
        charge = torch.log10(batch["charge"].clamp(min=1e-3)) / 3  # [p.e.] from 0.025 on
        pulses = torch.stack([time, charge, batch["aux"].to(time.dtype) - 0.5], dim=-1)  # (T, 3)
        with torch.autocast(dom.device.type, enabled=False):  # bfloat16 rounds 12,000 ns by 7
            if self.use_dom_positions:
                position = self.geometry / POSITION_SCALE
                vectors = torch.cat([self.position(position), self.mask])  # (V + 1, E)
            else:
                vectors = self.dom_table.weight
            x = torch.cat([F.embedding(dom, vectors), self.features(pulses)], dim=-1)  # (T, D)
        first = batch["cu_seqlens"][:-1].long()
        return x.index_copy(0, first, self.cls.expand(first.shape[0], -1))

# ---- blocks -------------------------------------------------------------------------------------

class Packing:
    """Where the events are among the tokens; pads them to (B, L) and back."""
    def __init__(self, cu_seqlens, max_seqlen, n_tokens):
        self.cu_seqlens, self.max_seqlen, self.n_extra = cu_seqlens, max_seqlen, 0
        column = torch.arange(max_seqlen, device=cu_seqlens.device)
        self.valid = column < cu_seqlens.diff()[:, None]  # (B, L), False at padding
        token = torch.arange(n_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        event = torch.searchsorted(cu_seqlens, token, right=True) - 1
        self.place = event * max_seqlen + token - cu_seqlens[event]  # (T,)

    def pad(self, x):
        """(T, C) -> (B, L, C), padding 0."""
        B, L = self.valid.shape
        x = x[:self.place.shape[0]]
        return x.new_zeros(B * L, x.shape[1]).index_copy_(0, self.place, x).view(B, L, -1)

    def unpad(self, x):
        """(B, L, ...) -> (T + n_extra, ...)."""
        return x.flatten(0, 1).index_select(0, F.pad(self.place, (0, self.n_extra)))

class Attention(nn.Module):
    """Every token attends to every token of its event."""

    def __init__(self, config):
        super().__init__()
        D, self.num_heads = config.embedding_dim, config.num_heads
        d = D // config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.qk_norm = nn.RMSNorm(d) if config.qk_norm else None
        self.scale = d ** -0.5
        if config.mup_base_width:  # q.k grows with d (muP, table 8)
            self.scale = (config.mup_base_width / config.num_heads) ** 0.5 / d
        has_flash = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        self.can_flash = has_flash and d % 8 == 0 and d <= 256

    def forward(self, x, packing):
        qkv = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1)  # (T, 3, H, d)
        if self.qk_norm is not None:
            q, k, v = qkv.unbind(1)
            # autocast norms in float32
            q, k = self.qk_norm(q).to(v.dtype), self.qk_norm(k).to(v.dtype)
            qkv = torch.stack([q, k, v], dim=1)
        if self.can_flash and qkv.dtype.itemsize == 2 and qkv.device.type != "cpu":
            # DIFF(upstream): it passes a mask, and then CUDA never runs the flash kernel
            starts, longest = packing.cu_seqlens, packing.max_seqlen
            q, k, v = qkv.unbind(1)
            x = varlen_attn(q, k, v, starts, starts, longest, longest, scale=self.scale)
        else:
            x = padded_attention(qkv, packing, self.scale)
        return self.out(x.flatten(1))

def padded_attention(qkv, packing, scale):
    """Attend without flash attention. qkv (T, 3, H, d) -> (T, H, d)."""
    rows = packing.pad(qkv.flatten(1)).unflatten(-1, qkv.shape[1:])  # (B, L, 3, H, d)
    q, k, v = rows.permute(2, 0, 3, 1, 4)  # (B, H, L, d)
    mask = packing.valid[:, None, None, :]
    if q.device.type == "cpu" and q.dtype.itemsize == 2:
        q, k, v = q.float(), k.float(), v.float()  # bfloat16: 4 times slower
    with torch.autocast("cpu", enabled=False):  # it would cast back
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return packing.unpad(x.transpose(1, 2).to(qkv.dtype))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, width, self.activation = config.embedding_dim, config.hidden_size, config.mlp
        if config.mlp == "swiglu":  # 3 matrices, not 2: as many parameters
            width = round(width * 2 / 3 / 8) * 8
        self.up = nn.Linear(D, 2 * width if config.mlp == "swiglu" else width)
        self.down = nn.Linear(width, D)

    def forward(self, x):
        x = self.up(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.relu(x) if self.activation == "relu" else F.gelu(x))

# A mixer takes tokens (T, D) and a Packing, and returns (T, D). An event must not see another
# one or padding; [CLS] must see all of its event. Muon takes matrices of nn.Linear only.
MIXERS = {"transformer": Attention, "gru": Bidirectional, "mamba": Bidirectional}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

class Block(nn.Module):
    """Pre-norm. Only the mixer lets pulses see each other."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = NORMS[config.norm](config.embedding_dim)
        self.mixer = MIXERS[config.backbone](config)
        self.norm2 = NORMS[config.norm](config.embedding_dim)
        self.mlp = MLP(config)

    def forward(self, x, packing, read=None):
        x = x + self.mixer(self.norm1(x), packing)
        x = x if read is None else x.index_select(0, read)
        return x + self.mlp(self.norm2(x))

class Encoder(nn.Module):
    """A batch -> a vector per event, [CLS] (B, D), and per masked token (M, D)."""

    def __init__(self, config, geometry):
        super().__init__()
        check_model(config)
        D = config.embedding_dim
        self.embedding = PulseEmbedding(config, geometry)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = NORMS[config.norm](D) if config.final_norm else nn.Identity()
        # muP (Yang et al. 2022, arXiv:2203.03466): the learning rate of a narrow model
        # serves a wide one. It enters here, in Attention.scale, in the first weights of
        # the heads (init_weights), in the blocks' learning rate (optim.parameter_groups).
        self.output_scale = config.mup_base_width / D if config.mup_base_width else 1.0

    def forward(self, batch):
        x = self.embedding(batch)
        packing = Packing(batch["cu_seqlens"], batch["max_seqlen"], x.shape[0])
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            packing.n_extra = -x.shape[0] % 128  # oneDNN compiles for each size
            x = F.pad(x, (0, 0, 0, packing.n_extra))
        for block in self.blocks[:-1]:
            x = block(x, packing)
        cls = batch["cu_seqlens"][:-1].long()
        # DIFF(upstream): no other token passes the last MLP
        read = torch.cat([cls, batch.get("masked", cls[:0])])
        x = self.final_norm(self.blocks[-1](x, packing, read)) * self.output_scale
        return x[:cls.shape[0]], x[cls.shape[0]:]

# ---- pretraining: masked DOMs, and summaries of the event from [CLS] ----------------------------

class PositionHead(nn.Module):
    """DOM logits from positions (M, D) -> (M, V): query(x) . key(position) / 8 + bias."""

    def __init__(self, config, geometry):
        super().__init__()
        position = torch.from_numpy(geometry["position"].copy())
        octaves = 2.0 ** torch.arange(8)  # wavelengths 2000 m to 16 m
        phase = (2 * math.pi / 2000 * position[..., None] * octaves).flatten(-2)
        features = torch.cat([position / POSITION_SCALE, phase.sin(), phase.cos()], dim=-1)
        self.query = nn.Linear(config.embedding_dim, 64)
        self.register_buffer("features", features, persistent=False)  # (V, 51)
        self.key = nn.Sequential(nn.Linear(51, 256), nn.GELU(), nn.Linear(256, 64))
        self.bias = nn.Parameter(torch.zeros(len(geometry)))

    def forward(self, x):
        return torch.addmm(self.bias, self.query(x) / 8, self.key(self.features).T)

class PolarBERT(nn.Module):
    def __init__(self, config, geometry):
        super().__init__()
        D = config.embedding_dim
        self.config = config
        self.encoder = Encoder(config, geometry)
        if config.dom_head == "linear":
            self.dom_head = nn.Linear(D, len(geometry))  # DIFF(upstream): no logit for padding
        else:
            self.dom_head = PositionHead(config, geometry)
        self.cls_heads = nn.ModuleDict({name: nn.Linear(D, CLS_TARGETS[name][1])
                                        for name in config.cls_target.split("+")})
        query = self.dom_head if config.dom_head == "linear" else self.dom_head.query
        init_weights(self, heads=[query, *self.cls_heads.values()])

    def forward(self, batch):
        """Return the losses of each event (B,): "dom", and those of cls_target."""
        logits, cls_pred = self.predict(batch)
        losses = {name: cls_loss(name, pred, batch)[0] for name, pred in cls_pred.items()}
        return {"dom": self.dom_loss(logits, batch), **losses}

    def predict(self, batch):
        """Return logits of the masked pulses (M, V), predictions of [CLS] {name: (B, n)}."""
        cls, x = self.encoder(batch)
        logits = self.dom_head(x)  # DIFF(upstream): of masked pulses only
        dtype = self.dom_head.bias.dtype  # of the weights, not autocast's
        cls_pred = {name: head(cls).to(dtype) for name, head in self.cls_heads.items()}
        return logits.to(dtype), cls_pred

    def dom_loss(self, logits, batch):
        """Return the mean loss of each event's masked pulses (B,), 0 if it has none.

        A mean per event, because otherwise bright events dominate (upstream since v0.2).
        """
        dom, event = batch["dom"].index_select(0, batch["masked"]), batch["masked_event"]  # (M,)
        if self.config.dom_loss == "ce":
            loss = F.cross_entropy(logits, dom, reduction="none")
        else:
            loss = earth_movers_distance(logits, dom, self.encoder.embedding.geometry)
        zeros = loss.new_zeros(len(batch["cu_seqlens"]) - 1)
        n_masked = zeros.index_add(0, event, torch.ones_like(loss))
        return zeros.index_add(0, event, loss) / n_masked.clamp(min=1)

PEAK = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989}  # bfloat16

def peak_flops(device):
    """Return a GPU's FLOPs per second, 0 if unknown."""
    name = torch.cuda.get_device_name(device)
    return 1e12 * next((peak for gpu, peak in PEAK.items() if gpu in name), 0)

def training_flops(model, batches):
    """Return the FLOPs of matrix products, forward and backward."""
    config, blocks = model.config, model.encoder.blocks
    D, V = config.embedding_dim, len(model.encoder.embedding.geometry)
    T, M, B = (sum(len(batch[name]) for batch in batches) for name in ("dom", "masked", "row"))
    n, n_last = (sum(x.numel() for x in part.parameters() if x.ndim == 2)
                 for part in (blocks, blocks[-1].mlp))
    n = T * n - (T - M - B) * n_last
    if config.backbone == "transformer":  # q.k, and the sum of v
        pairs = sum(batch["cu_seqlens"].diff().square().sum().item() for batch in batches)
        n += 2 * D * config.num_layers * pairs
    n += M * (D * V if config.dom_head == "linear" else 64 * (D + V))
    return 6 * n

def earth_movers_distance(logits, dom, geometry):
    """Return sum_j p_j |x_j - x_true| [100 m], logits (M, V), dom (M,) -> (M,)."""
    exact = "donot_use_mm_for_euclid_dist"  # small distances are not rounded
    distance = torch.cdist(geometry[dom], geometry, compute_mode=exact) / 100  # (M, V)
    return (logits.softmax(-1) * distance).sum(-1)

def cls_loss(name, pred, batch):
    """Return the loss of a [CLS] target, 0 where unknown, and where it is known (B,)."""
    field, width = CLS_TARGETS[name]
    truth = batch[field].view(-1, width)
    if name == "charge":
        truth = torch.log10(truth.clamp(min=1e-3))
    if name == "center":
        truth = truth / POSITION_SCALE
    if name == "line_fit":
        known = truth.any(-1)
        return direction_loss("vmf", pred, truth) * known, known
    known = truth.isfinite().all(-1)
    return (pred - truth.nan_to_num()).square().mean(-1) * known, known

# ---- fine-tuning: direction, energy or class from [CLS] ------------------------------------------

class Reconstructor(nn.Module):
    def __init__(self, config, geometry):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, geometry)
        hidden, (_, width) = config.head_hidden_size, TASKS[config.task]
        D = config.embedding_dim
        self.head = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, width))
        init_weights(self, heads=[self.head[0]])

    def forward(self, batch):
        """Return what the head predicts (B, n) float32.

        direction: a vector towards the source, whose length is kappa;
        energy: log10(E / 10 TeV); class: the logit of a track.
        """
        cls, _ = self.encoder(batch)
        return self.head(cls).float()

    def loss(self, x, batch):
        """Return the loss of each event (B,)."""
        if self.config.task == "energy":
            return (x[:, 0] + 4 - torch.log10(batch["energy"])).square()
        if self.config.task == "class":
            is_track = (batch["event_class"] == 1).to(x.dtype)
            return F.binary_cross_entropy_with_logits(x[:, 0], is_track, reduction="none")
        truth = unit_vector(batch["azimuth"], batch["zenith"])
        names = self.config.direction_loss.split("+")
        return sum(direction_loss(name, x, truth) for name in names)

def direction_loss(name, x, truth):
    """Return the loss of vectors x (B, 3) against unit vectors truth (B, 3) -> (B,)."""
    kappa = (x.square().sum(-1) + 1e-6).sqrt()  # |x|; |x| = 0 has a gradient too
    direction = F.normalize(x, dim=-1)
    if name == "angular":
        return angular_error(direction, truth)
    one_minus_cosine = (direction - truth).square().sum(-1) / 2  # exact at small angles
    if name == "cosine":
        return one_minus_cosine
    # vmf: -ln of kappa / (4 pi sinh kappa) exp(kappa cos), exact in float32 for kappa 1e-3 to 1e6
    log_area = torch.log(-torch.expm1(-2 * kappa) / kappa)
    return kappa * one_minus_cosine + log_area + math.log(2 * math.pi)

def unit_vector(azimuth, zenith):
    """Return the unit vectors (..., 3) towards the source from its angles [rad]."""
    x, y = azimuth.cos() * zenith.sin(), azimuth.sin() * zenith.sin()
    return torch.stack([x, y, zenith.cos()], dim=-1)

def angular_error(direction, truth):
    """Return the angle [rad] between unit vectors (..., 3)."""
    # DIFF(upstream): arccos clipped at 1 - 1e-4, no gradient within 0.8 degrees
    sine = (torch.linalg.cross(direction, truth).square().sum(-1) + 1e-12).sqrt()
    return torch.atan2(sine, (direction * truth).sum(-1))

# ---- weights ------------------------------------------------------------------------------------

def init_weights(model, heads):
    """Set all initial values:

    Linear, Conv1d           normal, std 1/sqrt(3 fan_in), the variance of torch's default
    their biases             0                             # DIFF(upstream): uniform
    pulse features           FEATURE_STD, however many there are
    heads                    with muP std 1/sqrt(3 mup_base_width) at any width
    dom_table, MASK, [CLS]   normal, std 1
    norms, GRU               torch's default
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=(3 * module.weight[0].numel()) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    embedding = model.encoder.embedding
    with torch.no_grad():
        std = torch.tensor(FEATURE_STD)
        embedding.features.weight *= std * (3 * len(std)) ** 0.5
        nn.init.normal_(embedding.cls)
        if embedding.use_dom_positions:
            nn.init.normal_(embedding.mask)
        for head in heads:
            head.weight *= model.encoder.output_scale ** -0.5

def weights_for_detector(weights, geometry, path):
    """Return a checkpoint's weights for this detector, maybe another one."""
    old = weights["encoder.embedding.geometry"]
    new = torch.from_numpy(geometry["position"].copy())  # (V, 3)
    if torch.equal(old, new):
        return weights
    text = f"{path}: trained on another detector ({len(old):,} DOMs, now {len(new):,})"
    if {"encoder.embedding.dom_table.weight", "dom_head.weight"} & weights.keys():
        fail(f"{text}; only use_dom_positions = True and dom_head = 'position' carry over")
    print0(f"note: {text}; it knows DOMs by position alone")
    replaced = {"encoder.embedding.geometry": new, "dom_head.bias": torch.zeros(len(new))}
    return weights | {name: x for name, x in replaced.items() if name in weights}
