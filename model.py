"""PolarBERT: the transformer with its embedding and its heads, in the order in which data flows through them.

    pulses -> PulseEmbedding -> Backbone -> final norm -> heads        (Encoder = all but the heads)

Pretrainer predicts the hidden DOM ids, and from [CLS] what is known of the whole event (tasks.CLS_TARGETS).
Reconstructor tells from [CLS] one of tasks.TASKS. Both are pure functions of their inputs: no random number
is drawn after the weights are made.

A batch is packed: the T tokens of its B events lie one after another without padding, and the first token of
each event is its [CLS]. It is a dict that data.micro_batches makes, of tensors but for longest:

    time, charge   (T,) float32, [ns] and [p.e.]; like dom and aux 0 at [CLS], where nothing reads them
    dom, aux       (T,) int64 and bool
    starts         (B + 1,) int32: event i is tokens starts[i] to starts[i + 1] - 1
    longest        int: the tokens of the longest event
    hidden         (M,) int64: the tokens whose DOM is hidden; hidden_event (M,): the event of each, 0..B - 1
    labels         fields of data.EVENT that the heads learn: total_charge, energy, ... (B,), center (B, 3)

Other sizes: D embedding_dim, E dom_embed_dim, H heads, d = D / H, V DOMs, 5160 in IceCube. geometry: a
detector's data.GEOMETRY records (V,). DIFF(upstream) marks what differs from the published PolarBERT code;
docs/upstream.md lists it.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

import knobs
import recurrent
from tasks import CLS_TARGETS, DOM_LOSSES, POSITION_SCALE, TASKS


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
    distance_weight: float = 1.0  # of all DOM losses but ce: emd and chamfer count in 100 m
    loss_weighting: str = "per_event"  # events count alike; or "per_pulse", hidden pulses do (paper v0.1)
    cls_target: str = "charge"  # what [CLS] predicts: "charge", "center", "motion", or some joined by +
    mup_base_width: int = 0  # muP: embedding_dim where the learning rate was tuned, see width_ratio; 0 = off
    mup_base_heads: int = 0  # num_heads of that base model; 0 = as many as here: wider heads
    mup_base_layers: int = 0  # CompleteP: the same for num_layers; 0 = off

    def check(self):
        """Yield one line for each value that makes no sense."""
        yield from knobs.check_positive(self, "embedding_dim", "dom_embed_dim", "num_heads", "hidden_size",
                                        "num_layers", "distance_weight")
        yield from knobs.check_not_negative(self, "mup_base_width", "mup_base_heads", "mup_base_layers")
        for key, choices in CHOICES.items():
            yield from knobs.check_choice(self, key, choices)
        yield from knobs.check_joined(self, "cls_target", CLS_TARGETS)
        yield from knobs.check_joined(self, "dom_loss", DOM_LOSSES)
        if self.embedding_dim % self.num_heads:
            yield f"embedding_dim = {self.embedding_dim} cannot be shared among num_heads = {self.num_heads}"
        if self.dom_embed_dim >= self.embedding_dim:
            yield (f"dom_embed_dim = {self.dom_embed_dim} must be smaller than embedding_dim = "
                   f"{self.embedding_dim}: the rest holds time, charge and aux")
        if self.backbone != "transformer":
            yield from recurrent.check(self)
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
        with torch.autocast(dom.device.type, enabled=False):  # bfloat16: a scaled 12,000 ns is 7 off
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
        self.branch_scale = config.mup_base_layers / config.num_layers if config.mup_base_layers else 1.0

    def forward(self, x, packing):
        x = x.add(self.mixer(self.norm1(x), packing), alpha=self.branch_scale)
        return x.add(self.mlp(self.norm2(x)), alpha=self.branch_scale)


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


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
MIXERS = {"transformer": Attention, "gru": lambda config: recurrent.TwoWays(config, recurrent.GRU),
          "mamba": lambda config: recurrent.TwoWays(config, recurrent.Mamba)}


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
CHOICES = {"backbone": MIXERS, "mlp": ("relu", "gelu", "swiglu"), "norm": NORMS, "dom_head": DOM_HEADS,
           "loss_weighting": ("per_event", "per_pulse")}


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
        """Sums over a batch, in the order of metric_names: of losses, and of what tells them to a reader."""
        logits, answers = self.predict(batch)
        dom, geometry = batch["dom"].index_select(0, batch["hidden"]), self.encoder.embedding.geometry
        best = logits.topk(min(5, logits.shape[1]), dim=-1).indices  # (M, 5)
        sums = [self.dom_losses(logits, batch).sum(),
                (best[:, 0] == dom).float().sum(), (best == dom[:, None]).float().sum(),
                (self.string[best[:, 0]] == self.string[dom]).float().sum(),
                (geometry[best[:, 0]] - geometry[dom]).norm(dim=-1).sum(),  # [m]
                F.cross_entropy(logits, dom, reduction="sum")]
        for name, target in self.targets.items():
            truth, is_known = target.known_truth(batch)
            sums += [(target.loss(answers[name], truth) * is_known).sum(),
                     (target.measure(answers[name], truth) * is_known).sum(), is_known.sum()]
        return torch.stack(sums)


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
    """muP (Yang et al. 2022, arXiv:2203.03466): how much wider than the model that was tuned; 1 without muP.

    It enters in four places: what the heads see and the learning rate of the backbone's matrices shrink with
    it (Encoder.output_scale, parameter_groups), the heads' first weights do not (init_weights); and
    attention_scale.
    """
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
                                                       # the scaled time, but in 2 of the scaled positions: a
                                                       # small signal, which it would learn late
    heads              1/sqrt(3 D); with muP 1/sqrt(3 mup_base_width), whatever the width
    dom_table, MASK, [CLS]   normal, std 1             upstream's
    norms              weight 1, bias 0                torch's default; GRU likewise torch's
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=(3 * module.weight[0].numel()) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
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

    Each group has an lr_scale: 1, but 1 / width_ratio for the matrices of the backbone (muP's table 8: Adam).
    Their decay grows by as much: lr * weight_decay stays the same.
    # DIFF(upstream): it decays the DOM table and [CLS] too, which pulls rarely hit DOMs to zero
    """
    backbone, decayed, not_decayed = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim < 2 or name.endswith(("dom_table.weight", "embedding.mask")):
                not_decayed.append(parameter)
            elif ".backbone." in name:
                backbone.append(parameter)
            else:
                decayed.append(parameter)
    scale = model.encoder.output_scale
    return [{"params": backbone, "weight_decay": weight_decay / scale, "lr_scale": scale},
            {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
            {"params": not_decayed, "weight_decay": 0.0, "lr_scale": 1.0}]
