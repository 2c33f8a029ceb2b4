"""model.py, recurrent.py, parameter groups: sizes, packing, masking, losses, numerics."""
import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
            {"dom_head": "position", "cls_target": "charge+line_fit"}, {"dom_loss": "emd"},
            {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "final_norm": False},
            {"dom_loss": "chamfer"}]
all_backbones = pytest.mark.parametrize("options", BACKBONES, ids=str)
all_variants = pytest.mark.parametrize("options", VARIANTS, ids=str)

def make(kind=m.PolarBERT, seed=0, **options):
    torch.manual_seed(seed)
    Config = TrainConfig if kind is m.PolarBERT else FinetuneConfig
    return kind(Config(**{**SMALL, **options}), GEOMETRY)

def one_batch(lengths, masked_share=0.3, seed=0, n=1):
    """Make n micro-batches of as many events, as equal as can be."""
    rng = np.random.default_rng(seed)
    events, pulses = random_events(rng, lengths)
    mask = rng.random(len(pulses)) < masked_share
    labels = ("total_charge", "center", "line_fit", "azimuth", "zenith", "energy", "event_class")
    return data.micro_batches(events, pulses, -(-len(lengths) // n), labels, mask)

def outputs(net, batch):
    """Return what a model gives as one tensor (B, n)."""
    y = net(batch)
    return torch.stack(list(y.values()), dim=1) if isinstance(y, dict) else y

def gradients(net):
    return [p.grad for p in net.parameters() if p.grad is not None]

def n_parameters(net):
    return sum(p.numel() for p in net.parameters())

def doubled(batch):
    is_float = lambda x: torch.is_tensor(x) and x.is_floating_point()
    return {name: x.double() if is_float(x) else x for name, x in batch.items()}

def unit_vectors(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 3, generator=rng, dtype=torch.float64), dim=-1)

def pack(batches):
    """Pack batches of one event each into one, in this order."""
    batch = {name: torch.cat([b[name] for b in batches])
             for name in batches[0] if torch.is_tensor(batches[0][name])}
    lengths = [len(b["time"]) for b in batches]
    starts = np.cumsum([0, *lengths])
    batch["cu_seqlens"] = tensor(starts, dtype=torch.int32)
    batch["masked"] = torch.cat([b["masked"] + n for b, n in zip(batches, starts)])
    batch["masked_event"] = torch.cat([b["masked_event"] + i for i, b in enumerate(batches)])
    return batch | {"max_seqlen": max(lengths)}

def test_base_has_the_papers_size_and_variants_are_about_as_large():
    assert n_parameters(m.PolarBERT(TrainConfig(), GEOMETRY)) == 7_638_185
    assert n_parameters(m.Reconstructor(FinetuneConfig(), GEOMETRY)) == 6_578_051
    for options in (*BACKBONES, {"mlp": "swiglu"}, {"mlp": "gelu"}):
        net = m.PolarBERT(TrainConfig(**options), GEOMETRY)
        assert n_parameters(net) == pytest.approx(7_638_185, rel=0.04)

# ---- what an event's outputs depend on ----------------------------------------------------------

@all_variants
@pytest.mark.parametrize("kind", [m.PolarBERT, m.Reconstructor])
def test_an_event_does_not_depend_on_its_neighbours(kind, options):
    """Alone, packed with others, in any order: the same outputs and gradient of the weights."""
    net, lengths = make(kind, **options).double(), [3, 50, 17, 127, 1]
    packed, = one_batch(lengths)
    alone, order = one_batch(lengths, n=5), [3, 0, 4, 1, 2]
    grads, results = [], []
    for batches in ([packed], alone, [pack([alone[i] for i in order])]):
        net.zero_grad()
        y = torch.cat([outputs(net, doubled(batch)) for batch in batches])
        y.square().sum().backward()
        grads.append(torch.cat([x.flatten() for x in gradients(net)]))
        results.append(y.detach())
    bound = 1e-4 if kind is m.Reconstructor else 1e-9  # its head gives float32
    assert close(results[0], results[1], atol=bound)
    assert close(results[0][order], results[2], atol=bound)
    for grad in grads[1:]:
        assert close(grad, grads[0], rtol=1e-6, atol=bound * grads[0].abs().max())

@all_backbones
def test_the_last_pulse_reaches_cls(options):
    net, (batch,) = make(m.Reconstructor, **options), one_batch([20])
    batch.pop("masked")
    before = outputs(net, batch)
    for name, value in (("time", 15000.0), ("charge", 4.0), ("dom", 7), ("aux", ~batch["aux"][-1])):
        changed = {**batch, name: batch[name].clone()}
        changed[name][-1] = value
        assert not close(before, outputs(net, changed), atol=1e-7), name

def test_a_masked_dom_cannot_be_seen_and_other_pulses_can():
    net, (batch,) = make(), one_batch([40, 60])
    _, x = net.encoder(batch)
    changed = {**batch, "dom": batch["dom"].index_fill(0, batch["masked"], 123)}
    assert equal(x, net.encoder(changed)[1])
    visible = set(range(1, 41)) - set(batch["masked"].tolist())  # token 0 is [CLS]
    changed["dom"][min(visible)] = 123
    assert not close(x, net.encoder(changed)[1], atol=1e-5)

@all_backbones
def test_what_the_batch_holds_at_cls_means_nothing(options):
    net, (batch,) = make(**options), one_batch([4, 6])
    first, changed = batch["cu_seqlens"][:-1].long(), {**batch}
    for name, value in (("time", 77.0), ("charge", 5.0), ("dom", 4000), ("aux", True)):
        changed[name] = batch[name].index_fill(0, first, value)
    assert equal(outputs(net, batch), outputs(net, changed))

# ---- plain formulas -----------------------------------------------------------------------------

def test_losses_agree_with_the_plain_formula():
    """Logits everywhere, in float64, event by event: what the fast path must equal."""
    net, (batch,) = make().double(), one_batch([2, 50, 17, 3], seed=5)
    batch, starts = doubled(batch), batch["cu_seqlens"].tolist()
    masked = set(batch["masked"].tolist())
    with torch.no_grad():
        losses = net(batch)
        _, x = net.encoder(batch)
        logits = F.linear(x, net.dom_head.weight, net.dom_head.bias)  # (T, V)
        for i in range(4):
            terms = [torch.logsumexp(logits[j], 0) - logits[j, batch["dom"][j]]
                     for j in range(starts[i], starts[i + 1]) if j in masked]
            expected = sum(terms) / len(terms) if terms else tensor(0.0)
            assert losses["dom"][i].item() == pytest.approx(expected.item(), abs=1e-9)
            charge = net.cls_heads["charge"](x[starts[i]])
            expected = (charge - math.log10(batch["total_charge"][i])) ** 2
            assert losses["charge"][i].item() == pytest.approx(expected.item(), rel=1e-9)

def test_other_losses_agree_with_the_plain_formulas():
    batch, = one_batch([2, 50, 17, 3], seed=5)
    batch["center"] = torch.randn(4, 3) * 200
    ce, emd = make(cls_target="center"), make(dom_loss="emd", cls_target="center")
    dom, event = batch["dom"][batch["masked"]], batch["masked_event"]
    with torch.no_grad():
        logits, cls_pred = ce.predict(batch)
        p = logits.double().softmax(1)
        position = tensor(POSITION).double()
        distance = (position[dom][:, None] - position).norm(dim=-1) / 100
        plain_emd, plain_ce = (p * distance).sum(1), -p[torch.arange(len(dom)), dom].log()
        for net, plain in ((ce, plain_ce), (emd, plain_emd)):
            expected = torch.stack([plain[event == i].mean() for i in range(4)]).nan_to_num()
            assert close(net(batch)["dom"].double(), expected, rtol=1e-4)
        expected = ((cls_pred["center"] - batch["center"] / 500) ** 2).mean(1)
        assert close(ce(batch)["center"], expected, rtol=1e-4)

def test_the_transformer_is_the_plain_formula():
    """One block in float64 against softmax(q k / sqrt(d)) v written out, event by event."""
    block = make().double().encoder.blocks[0]
    x = torch.randn(10, 32, dtype=torch.float64)
    out = block(x, m.Packing(tensor([0, 6, 10], dtype=torch.int32), 6, 10))
    up, down = block.mlp.up, block.mlp.down
    for event in (slice(0, 6), slice(6, 10)):
        h = F.layer_norm(x[event], (32,), block.norm1.weight, block.norm1.bias)
        q, k, v = (h @ block.mixer.qkv.weight.T).split(32, dim=1)
        heads = [((q[:, s] @ k[:, s].T) / 8 ** 0.5).softmax(1) @ v[:, s]
                 for s in (slice(8 * i, 8 * i + 8) for i in range(4))]
        y = x[event] + torch.cat(heads, 1) @ block.mixer.out.weight.T
        h = F.layer_norm(y, (32,), block.norm2.weight, block.norm2.bias)
        y = y + F.relu(h @ up.weight.T + up.bias) @ down.weight.T + down.bias
        assert close(out[event], y, atol=1e-10)

def test_the_position_head_is_the_plain_formula():
    net, x = make(dom_head="position").dom_head, torch.randn(5, 32)
    with torch.no_grad():
        net.bias.normal_()
        phase = 2 * np.pi * POSITION[:, :, None].astype(float) * 2.0 ** np.arange(8) / 2000
        phase = phase.reshape(len(POSITION), -1)
        features = np.concatenate([POSITION / 500, np.sin(phase), np.cos(phase)], axis=1)
        key = net.key(torch.from_numpy(features).float())
        for j in (0, 77, 5159):
            expected = (net.query(x) * key[j]).sum(1) / 8 + net.bias[j]
            assert close(net(x)[:, j], expected, atol=1e-5)

def test_chamfer_distance_by_hand():
    """Two masked pulses of one event, one of another; the logits leave a single guess each."""
    geometry = tensor([[0.0, 0, 0], [300, 0, 0], [0, 400, 0], [0, 0, 700]])
    dom, event, guess = tensor([0, 1, 3]), tensor([0, 0, 1]), tensor([1, 2, 0])
    logits = 100 * F.one_hot(guess, 4).float()
    # event 0: from DOM 0 the nearest guess is DOM 1, from DOM 1 itself, guessed for the other
    # pulse; back, from the guesses DOM 1 and DOM 2, 0 m and 400 m. Event 1: 700 m both ways
    distance = m.chamfer_distance(logits, dom, event, geometry)
    assert close(distance, tensor([3.0 + 0, 0 + 4.0, 14.0]))
    with torch.autocast("cpu", torch.bfloat16):  # which has no 303, only 302 and 304
        assert equal(distance, m.chamfer_distance(logits, dom, event, geometry + 3))
    assert len(m.chamfer_distance(logits[:0], dom[:0], event[:0], geometry)) == 0

def test_an_event_without_a_line_fit_does_not_enter_its_loss():
    batch, = one_batch([30, 50, 17], seed=4)
    batch["line_fit"][1] = 0
    net = make(cls_target="line_fit")
    loss = net(batch)["line_fit"]
    loss.sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(net))
    with torch.no_grad():
        guess = net.predict(batch)[1]["line_fit"]
    kappa = guess.norm(dim=1)
    expected = (4 * math.pi * kappa.sinh() / kappa).log() - (guess * batch["line_fit"]).sum(1)
    assert loss[1] == 0 and close(loss[[0, 2]], expected[[0, 2]], rtol=1e-4)

def test_losses_of_the_tasks():
    (batch,), x = one_batch([5, 9, 7]), torch.randn(3, 3)
    batch |= {"energy": tensor([1e2, 1e4, 1e6]), "event_class": tensor([1, 2, 1])}
    p = x[:, 0].sigmoid()
    cosine = F.cosine_similarity(x, m.unit_vector(batch["azimuth"], batch["zenith"]))
    for options, expected in (
            ({"task": "energy"}, (x[:, 0] - tensor([-2.0, 0, 2])) ** 2),
            ({"task": "class"}, -torch.stack([p[0], 1 - p[1], p[2]]).log()),
            ({"direction_loss": "angular+cosine"}, cosine.arccos() + 1 - cosine)):
        loss = make(m.Reconstructor, **options).loss(x, batch)
        assert close(loss, expected, atol=1e-5)

def test_angles_and_angular_error():
    azimuth, zenith = tensor([[0, 0.5, 0.3], [0.5, 0.5, 0]]) * math.pi
    assert close(m.unit_vector(azimuth, zenith), torch.eye(3), atol=1e-6)
    a, b = unit_vectors(500, seed=0), unit_vectors(500, seed=1)
    assert close(m.angular_error(a, b), torch.arccos((a * b).sum(-1)), atol=1e-6)
    assert m.angular_error(a, a).max() < 2e-6
    assert m.angular_error(a, -a).min() > math.pi - 2e-6
    a.requires_grad_()
    for other in (a.detach().clone(), -a.detach(), b):
        grad, = torch.autograd.grad(m.angular_error(a, other).sum(), a)
        assert grad.isfinite().all() and grad.norm(dim=-1).max() < 1.5

def test_vmf_loss_is_the_density_from_broad_to_narrow():
    """Against the textbook formula in float64, with exponents that float32 does not have."""
    truth, noise = unit_vectors(400, seed=0), unit_vectors(400, seed=1)
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

# ---- numerics -----------------------------------------------------------------------------------

@all_backbones
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_autocast_stays_near_float32(dtype, bound, options):
    net, (batch,) = make(**options), one_batch([30, 60, 90])
    exact = net(batch)
    with torch.autocast("cpu", dtype):
        rough = net(batch)
    for name, loss in rough.items():
        assert loss.dtype == torch.float32
        assert close(exact[name], loss, rtol=bound, atol=bound)
    sum(loss.mean() for loss in rough.values()).backward()
    assert all(grad.isfinite().all() for grad in gradients(net))

@pytest.mark.parametrize("kind", [m.PolarBERT, m.Reconstructor])
@pytest.mark.parametrize("options", [*BACKBONES, {"dom_loss": "chamfer"}, {
    "dom_loss": "emd", "cls_target": "charge+center+line_fit"}], ids=str)
def test_extreme_events_stay_finite(kind, options):
    net, (batch,) = make(kind, **options), one_batch([1, 1, 2, 5], masked_share=0)
    first = batch["cu_seqlens"][:2].long() + 1
    batch["charge"][first] = tensor([0.0, 1e5])
    batch["time"][first] = tensor([0.0, 2e5])
    batch["total_charge"][:2] = tensor([0.025, 1e8])
    y = outputs(net, batch)
    y.sum().backward()
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in gradients(net))

# ---- backbones ----------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_mambas_matrix_form_is_the_recurrence(chunk):
    rng = torch.Generator().manual_seed(0)
    B, L, H, P, N = 2, 37, 3, 4, 5
    x, b, c = (torch.randn(*shape, generator=rng, dtype=torch.float64)
               for shape in ((B, L, H, P), (B, L, N), (B, L, N)))
    log_decay = -torch.rand(B, L, H, generator=rng, dtype=torch.float64) * 3
    state, ys = torch.zeros(B, H, N, P, dtype=torch.float64), []
    for t in range(L):
        update = b[:, t, None, :, None] * x[:, t, :, None, :]
        state = log_decay[:, t].exp()[..., None, None] * state + update
        ys.append((c[:, t, None, :, None] * state).sum(2))
    y = recurrent.state_space(x, log_decay, b, c, chunk)
    assert close(y, torch.stack(ys, 1), atol=1e-12)

def test_both_ways_read_the_event_in_reverse():
    net, x = make(backbone="gru").encoder.blocks[0].mixer, torch.randn(15, 32)
    y = net(x, m.Packing(tensor([0, 6, 15], dtype=torch.int32), 9, 15))
    for event in (slice(0, 6), slice(6, 15)):
        forwards = net.forwards(x[event][None], None)[0]
        backwards = net.backwards(x[event].flip(0)[None], None)[0].flip(0)
        assert close(y[event], torch.cat([forwards, backwards], dim=1), atol=1e-6)

def test_padding_and_unpadding():
    x = torch.arange(12.0).view(6, 2) + 1
    packing = m.Packing(tensor([0, 1, 4, 6], dtype=torch.int32), 3, 6)
    rows = packing.pad(x)
    assert rows.shape == (3, 3, 2) and equal(packing.unpad(rows), x)
    assert equal(rows[1], x[1:4]) and equal(rows[2, :2], x[4:])
    assert not rows[~packing.valid].any()
    assert packing.valid.tolist() == [[True, False, False], [True] * 3, [True, True, False]]

@pytest.mark.parametrize("options", [
    {"num_heads": 7}, {"dom_embed_dim": 32}, {"cls_target": "charge+size"},
    {"backbone": "mamba", "embedding_dim": 36}], ids=str)
def test_sizes_that_do_not_fit_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        make(**options)
    assert f"{next(iter(options))} = " in capsys.readouterr().err

# ---- initial weights, weight decay, muP ---------------------------------------------------------

@all_variants
def test_initial_weights_follow_the_table(options):
    net = make(embedding_dim=256, dom_embed_dim=128, **options)
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
    names = {id(p): name for name, p in net.named_parameters()}
    blocks, decayed, kept = ([names[id(p)] for p in group["params"]] for group in groups)
    assert sorted(blocks + decayed + kept) == sorted(names.values())
    rates = [group["weight_decay"] * group["lr_scale"] for group in groups]
    assert rates == pytest.approx([0.1, 0.1, 0])
    for name in blocks + decayed:
        assert "weight" in name and "norm" not in name and "dom_table" not in name
    embeddings = [name for name in names.values() if name.endswith(("cls", "mask", "table.weight"))]
    assert len(embeddings) == 2 and set(embeddings) <= set(kept)

def test_mup_at_its_base_width_changes_nothing():
    plain, mup, (batch,) = make(), make(mup_base_width=32), one_batch([10, 20])
    assert all(equal(a, b) for a, b in zip(plain.parameters(), mup.parameters()))
    assert equal(outputs(plain, batch), outputs(mup, batch))
    for a, b in zip(parameter_groups(plain, 0.1), parameter_groups(mup, 0.1)):
        assert (a["weight_decay"], a["lr_scale"]) == (b["weight_decay"], b["lr_scale"])

def coordinates(width, **options):
    """Train 20 steps; return the spread of attention logits and outputs, of their change (4, 2)."""
    batches = [one_batch([20, 40, 30], seed=seed)[0] for seed in range(2)]
    net = make(embedding_dim=width, dom_embed_dim=width // 2, num_heads=1, hidden_size=4 * width,
               beta2=0.95, adam_eps=1e-8, weight_decay=0.0, **options)
    optimizers = make_optimizers(net, net.config)

    @torch.no_grad()
    def look():
        x, starts = net.encoder.embedding(batches[0]), batches[0]["cu_seqlens"]
        packing, values = m.Packing(starts, batches[0]["max_seqlen"], len(x)), []
        for block in net.encoder.blocks:
            q, k, _ = block.mixer.qkv(block.norm1(x)).chunk(3, dim=1)
            logits = [(q[a:b] @ k[a:b].T).flatten() for a, b in zip(starts, starts[1:])]
            x = block(x, packing)
            values += [torch.cat(logits) * block.mixer.scale, x]
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

@pytest.mark.parametrize("options", BACKBONES, ids=str)
def test_every_parameter_gets_a_first_value(options):
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN then
    try:
        model = make(m.PolarBERT, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
