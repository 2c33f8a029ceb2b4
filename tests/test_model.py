"""model.py, recurrent.py, parameter groups: sizes, packing, masking, losses, numerics."""
import math
from contextlib import nullcontext
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model as m
import recurrent
from conftest import random_events, random_geometry
from finetune import FinetuneConfig
from optim import clip_and_step, make_optimizers, parameter_groups
from train import TrainConfig

close, equal, tensor = torch.allclose, torch.equal, torch.tensor
SMALL = {"embedding_dim": 32, "dom_embed_dim": 16, "num_heads": 4, "hidden_size": 64,
         "num_layers": 2}
GEOMETRY = random_geometry()
POSITION = GEOMETRY["position"].copy()  # (V, 3)
BACKBONES = [{"backbone": name} for name in get_args(m.ModelConfig.__annotations__["backbone"])]
VARIANTS = [*BACKBONES, {"use_dom_positions": False}, {"mup_base_width": 16}, {"mlp": "gelu"},
            {"dom_head": "position", "cls_target": "charge+center+line_fit"},
            {"dom_loss": "emd"},
            {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "final_norm": False}]
all_backbones = pytest.mark.parametrize("options", BACKBONES, ids=str)
all_variants = pytest.mark.parametrize("options", VARIANTS, ids=str)

def make(kind=m.PolarBERT, **options):
    torch.manual_seed(0)
    Config = TrainConfig if kind is m.PolarBERT else FinetuneConfig
    return kind(Config(**{**SMALL, **options}), GEOMETRY)

def one_batch(lengths, masked_share=0.3, seed=0, n=1):
    """Make n micro-batches of as many events, as equal as can be."""
    rng = np.random.default_rng(seed)
    events, pulses = random_events(rng, lengths)
    mask = rng.random(len(pulses)) < masked_share
    labels = ("total_charge", "center", "line_fit", "azimuth", "zenith", "energy", "event_class")
    return data.micro_batches(events, pulses, -(-len(lengths) // n), labels, mask)

def outputs_and_gradient(net, batches, context=nullcontext):
    """Return all that a model gives (B, n), and the gradient of its mean."""
    net.zero_grad()
    with context():
        y = [net(batch) for batch in batches]
    if isinstance(net, m.PolarBERT):
        y = [torch.stack(list(losses.values()), dim=1) for losses in y]
    y = torch.cat(y)
    y.mean().backward()
    gradient = [x.grad.flatten() for x in net.parameters() if x.grad is not None]
    return y.detach(), torch.cat(gradient)

def doubled(batch):
    is_float = lambda x: torch.is_tensor(x) and x.is_floating_point()
    return {name: x.double() if is_float(x) else x for name, x in batch.items()}

def test_base_has_the_papers_size_and_variants_are_about_as_large():
    variants = (*BACKBONES, {"mlp": "swiglu"}, {"mlp": "gelu"})
    nets = [m.PolarBERT(TrainConfig(**options), GEOMETRY) for options in variants]
    nets.append(m.Reconstructor(FinetuneConfig(), GEOMETRY))
    base, *others, tuned = (sum(p.numel() for p in net.parameters()) for net in nets)
    assert (base, tuned) == (7_638_185, 6_578_051)
    assert all(n == pytest.approx(base, rel=0.04) for n in others)

# ---- what an event's outputs depend on ----------------------------------------------------------

@all_variants
@pytest.mark.parametrize("kind", [m.PolarBERT, m.Reconstructor])
def test_an_event_does_not_depend_on_its_neighbours(kind, options):
    """Alone, with some others, or with all: the same outputs and gradient."""
    net, lengths = make(kind, **options).double(), [3, 50, 17, 127, 1]
    (y, gradient), *others = (
        outputs_and_gradient(net, map(doubled, one_batch(lengths, n=n))) for n in (1, 2, 5))
    bound = 1e-4 if kind is m.Reconstructor else 1e-9  # its head gives float32
    for other_y, other in others:
        assert close(y, other_y, atol=bound)
        assert close(gradient, other, rtol=1e-6, atol=bound * gradient.abs().max())

@all_backbones
def test_first_and_last_pulse_reach_cls(options):
    encoder = make(**options, num_layers=1).double().encoder
    batch = doubled(one_batch([20])[0])
    batch["masked"], batch["aux"][:] = tensor([2, 3]), False
    before, _ = encoder(batch)
    for name, value in (("time", 15000.0), ("charge", 4.0), ("dom", 7), ("aux", True)):
        for place in (1, 20):
            changed = batch | {name: batch[name].index_fill(0, tensor(place), value)}
            assert not close(before, encoder(changed)[0], atol=1e-12, rtol=0), name

@all_variants
def test_masked_doms_and_what_the_batch_holds_at_cls_cannot_be_seen(options):
    net, (batch,) = make(**options), one_batch([40, 60])
    changed = {**batch, "dom": batch["dom"].index_fill(0, batch["masked"], 123)}
    first = batch["cu_seqlens"][:-1].long()
    for name, value in (("time", 77.0), ("charge", 5.0), ("dom", 4000), ("aux", True)):
        changed[name] = changed[name].index_fill(0, first, value)
    assert all(map(equal, net.encoder(batch), net.encoder(changed)))

# ---- plain formulas -----------------------------------------------------------------------------

@pytest.mark.parametrize("dom_loss", ["ce", "emd"])
def test_losses_agree_with_the_plain_formulas(dom_loss):
    net = make(dom_loss=dom_loss, cls_target="charge+center+line_fit").double()
    batch = doubled(one_batch([2, 50, 17, 3], seed=5)[0])
    batch["center"] = torch.randn(4, 3).double() * 200
    batch["line_fit"][1] = 0  # no fit
    position, starts = tensor(POSITION).double(), batch["cu_seqlens"].tolist()
    with torch.no_grad():
        losses, (cls, x) = net(batch), net.encoder(batch)
        log_p = net.dom_head(x).log_softmax(1)  # (M, V)
        charge, center, line_fit = (head(cls) for head in net.cls_heads.values())
    dom, masked = batch["dom"][batch["masked"]], batch["masked"].tolist()
    terms = -log_p.gather(1, dom[:, None])[:, 0]  # (M,)
    if dom_loss == "emd":
        distance = (position[dom][:, None] - position).norm(dim=2) / 100
        terms = (log_p.exp() * distance).sum(1)
    expected = {
        "dom": torch.zeros(4).double(),
        "charge": (charge[:, 0] - batch["total_charge"].log10()) ** 2,
        "center": (center - batch["center"] / 500).square().mean(1),
        "line_fit": m.direction_loss("vmf", line_fit, batch["line_fit"]) * tensor([1, 0, 1, 1]),
    }
    for i in range(4):
        mine = [k for k, j in enumerate(masked) if starts[i] <= j < starts[i + 1]]
        expected["dom"][i] = terms[mine].sum() / max(len(mine), 1)
    assert all(close(losses[name], expected[name], rtol=1e-6) for name in losses)

def test_a_block_is_torchs_own_layer():
    block, x = make().double().encoder.blocks[0], torch.randn(10, 32).double()
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0, norm_first=True).double()
    layer.self_attn.in_proj_weight = block.mixer.qkv.weight  # its biases are 0
    layer.self_attn.out_proj.weight = block.mixer.out.weight
    layer.linear1, layer.linear2 = block.mlp.up, block.mlp.down
    layer.norm1, layer.norm2 = block.norm1, block.norm2
    packing = m.Packing(tensor([0, 6, 10], dtype=torch.int32), 6, 10)
    out = block(x, packing)
    assert close(block(x, packing, tensor([0, 7])), out[[0, 7]], atol=1e-10)
    for event in (slice(0, 6), slice(6, 10)):
        assert close(out[event], layer(x[event]), atol=1e-10)

def test_the_position_head_is_the_plain_formula():
    net, x = make(dom_head="position").dom_head, torch.randn(5, 32)
    with torch.no_grad():
        net.bias.normal_()
        for j in (0, 77, 5159):
            phase = np.outer(POSITION[j], 2 * np.pi / 2000 * 2.0 ** np.arange(8)).ravel()
            features = np.concatenate([POSITION[j] / 500, np.sin(phase), np.cos(phase)])
            key = net.key(tensor(features).float())
            expected = (net.query(x) * key).sum(1) / 8 + net.bias[j]
            assert close(net(x)[:, j], expected, atol=1e-5)

@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu"}, {"backbone": "gru"}], ids=str)
def test_flops_are_those_that_torch_counts(options):
    net, batches = make(**options), one_batch([63] * 16, n=2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(loss.sum() for batch in batches for loss in net(batch).values()).backward()
    assert m.training_flops(net, batches) == pytest.approx(counter.get_total_flops(), rel=0.01)

def test_losses_of_the_tasks():
    (batch,), x = one_batch([5, 9, 7]), torch.randn(3, 3)
    batch |= {"energy": tensor([1e2, 1e4, 1e6]), "event_class": tensor([1, 2, 1])}
    p = x[:, 0].sigmoid()
    cosine = F.cosine_similarity(x, m.unit_vector(batch["azimuth"], batch["zenith"]))
    for options, expected in (
            ({"task": "energy"}, (x[:, 0] - tensor([-2.0, 0, 2])) ** 2),
            ({"task": "class"}, -torch.stack([p[0], 1 - p[1], p[2]]).log()),
            ({"direction_loss": "angular+cosine"}, cosine.arccos() + 1 - cosine)):
        assert close(make(m.Reconstructor, **options).loss(x, batch), expected, atol=1e-5)

def test_angles_and_angular_error():
    torch.manual_seed(0)
    azimuth, zenith = tensor([[0, 0.5, 0.3], [0.5, 0.5, 0]]) * math.pi
    assert close(m.unit_vector(azimuth, zenith), torch.eye(3), atol=1e-6)
    a, b = F.normalize(torch.randn(2, 500, 3).double(), dim=-1)
    assert close(m.angular_error(a, b), torch.arccos((a * b).sum(-1)), atol=1e-6)
    assert m.angular_error(a, a).max() < 2e-6 and m.angular_error(a, -a).min() > math.pi - 2e-6
    a.requires_grad_()
    for other in (a.detach().clone(), -a.detach(), b):
        grad, = torch.autograd.grad(m.angular_error(a, other).sum(), a)
        assert grad.isfinite().all() and grad.norm(dim=-1).max() < 1.5

def test_vmf_loss_is_the_density_from_broad_to_narrow():
    torch.manual_seed(0)
    truth, noise = F.normalize(torch.randn(2, 400, 3).double(), dim=-1)
    for kappa in (1e-3, 0.1, 1.0, 30.0, 300.0):
        x = kappa * F.normalize(truth + noise / (1 + kappa) ** 0.5, dim=-1)
        k = (x.square().sum(-1) + 1e-6).sqrt()
        plain = -(k / (4 * math.pi * torch.sinh(k))).log() - k * F.cosine_similarity(x, truth)
        assert close(m.direction_loss("vmf", x, truth), plain, rtol=1e-9)
        rough = m.direction_loss("vmf", x.float(), truth.float())
        assert close(rough.double(), plain, rtol=2e-4, atol=1e-4)
    # float32, with gradients, also where the truth is met or missed altogether
    for kappa in (0.0, 1e-3, 1e3, 1e6):
        for towards in (truth.float(), -truth.float()):
            x = (kappa * truth.float()).requires_grad_()
            m.direction_loss("vmf", x, towards).sum().backward()
            assert x.grad.isfinite().all()

@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_mambas_matrix_form_is_the_recurrence(chunk):
    torch.manual_seed(0)
    B, L, H, P, N = 2, 37, 3, 4, 5
    x, b, c = (torch.randn(shape).double() for shape in ((B, L, H, P), (B, L, N), (B, L, N)))
    log_decay = -3 * torch.rand(B, L, H).double()
    state, ys = 0, []
    for t in range(L):
        state = state * log_decay[:, t, :, None, None].exp()
        state = state + torch.einsum("bn,bhp->bhnp", b[:, t], x[:, t])
        ys.append(torch.einsum("bn,bhnp->bhp", c[:, t], state))
    y = recurrent.state_space(x, log_decay, b, c, chunk)
    assert close(y, torch.stack(ys, 1), atol=1e-12)

# ---- numerics -----------------------------------------------------------------------------------

@all_backbones
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_autocast_stays_near_float32(dtype, bound, options):
    net, (batch,) = make(**options), one_batch([30, 60, 90])
    exact = net(batch)
    with torch.autocast("cpu", dtype):
        rough = net(batch)
    for name, loss in rough.items():
        assert loss.dtype == torch.float32 and close(exact[name], loss, rtol=bound, atol=bound)
    sum(loss.mean() for loss in rough.values()).backward()
    assert all(x.grad.isfinite().all() for x in net.parameters())

@all_variants
@pytest.mark.parametrize("kind", [m.PolarBERT, m.Reconstructor])
def test_extreme_events_stay_finite(kind, options):
    net, (batch,) = make(kind, **options), one_batch([1, 1, 2, 5], masked_share=0)
    first = batch["cu_seqlens"][:2].long() + 1
    batch["charge"][first] = tensor([0.0, 1e5])
    batch["time"][first] = tensor([0.0, 2e5])
    batch["total_charge"][:2] = tensor([0.025, 1e8])
    batch["line_fit"][0] = 0  # no fit
    assert all(x.isfinite().all() for x in outputs_and_gradient(net, [batch]))

# ---- initial weights, weight decay, muP ---------------------------------------------------------

@all_variants
def test_initial_weights_follow_the_table(options):
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN then
    net = make(embedding_dim=256, dom_embed_dim=128, **options)
    torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
            weight = module.weight.detach().flatten(1).clone()
            if name.endswith("embedding.features"):
                weight /= torch.tensor(m.FEATURE_STD) * (3 * weight.shape[1]) ** 0.5
            has_base = "head" in name and "mup_base_width" in options
            width = 16 if has_base else weight.shape[1]
            bound = 4 * (2 * weight.numel()) ** -0.5  # 4 standard deviations
            assert weight.std().item() * (3 * width) ** 0.5 == pytest.approx(1, abs=bound), name
            assert module.bias is None or not module.bias.any(), name
    for name, vector in net.encoder.embedding.named_parameters():
        if name in ("cls", "mask", "dom_table.weight"):
            assert vector.std().item() == pytest.approx(1, abs=0.25)

@all_variants
def test_weight_decay_spares_biases_norms_and_embeddings(options):
    net = make(**options)
    groups = parameter_groups(net, 0.1)
    rates = [group["weight_decay"] * group["lr_scale"] for group in groups]
    assert rates == pytest.approx([0.1, 0.1, 0])
    blocks, others, kept = ({*map(id, group["params"])} for group in groups)
    for name, x in net.named_parameters():
        is_matrix = "weight" in name and "norm" not in name and "dom_table" not in name
        assert (id(x) in blocks | others, id(x) in kept) == (is_matrix, not is_matrix), name

def coordinates(width, **options):
    """Train 20 steps -> spread of attention logits and outputs, and of their change (4, 2)."""
    batches = [one_batch([30, 30, 30], seed=seed)[0] for seed in range(2)]
    net = make(embedding_dim=width, dom_embed_dim=width // 2, num_heads=1, hidden_size=4 * width,
               beta2=0.95, adam_eps=1e-8, weight_decay=0.0, **options)
    optimizers = make_optimizers(net, net.config)

    @torch.no_grad()
    def look():
        x, values = net.encoder.embedding(batches[0]), []
        packing = m.Packing(batches[0]["cu_seqlens"], 31, 93)
        for block in net.encoder.blocks:
            q, k, _ = block.mixer.qkv(block.norm1(x)).view(3, 31, -1).chunk(3, dim=2)
            x = block(x, packing)
            values += [q @ k.mT * block.mixer.scale, x]
        return values

    before, scaler = look(), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(20):
        sum(loss.mean() for loss in net(batches[step % 2]).values()).backward()
        clip_and_step(net, optimizers, scaler, lr=3e-3, grad_clip=0)
    return np.array([[new.std(), (new - old).std()] for old, new in zip(before, look())])

def test_mup_keeps_the_size_of_an_update_over_width():
    """The coordinate check (Yang et al. 2022, appendix D.1): of one size for widths 32 to 256."""
    mup = [coordinates(width, mup_base_width=32) for width in (32, 64, 128, 256)]
    assert np.max(np.max(mup, axis=0) / np.min(mup, axis=0)) < 2.1
    standard = coordinates(256)
    assert np.all(standard[:, 1] > 2 * mup[-1][:, 1])  # so the check can fail
