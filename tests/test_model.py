"""model.py: sizes, packing, masking, losses, numerics."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model as m
import recurrent
import tasks
from common import count_parameters
from conftest import random_events, random_geometry
from finetune import FinetuneConfig
from tools.import_published import from_published
from train import TrainConfig

SMALL = {"embedding_dim": 32, "dom_embed_dim": 16, "num_heads": 4, "hidden_size": 64, "num_layers": 2}
GEOMETRY = random_geometry()
POSITION = GEOMETRY["position"].copy()  # (V, 3)


def make(kind=m.Pretrainer, seed=0, **knobs):
    torch.manual_seed(seed)
    config = (TrainConfig if kind is m.Pretrainer else FinetuneConfig)(**SMALL, **knobs)
    return kind(config, GEOMETRY)


def one_batch(lengths, hidden_share=0.3, seed=0, n=1):
    """n micro-batches of as many events, as equal as can be."""
    rng = np.random.default_rng(seed)
    events, pulses = random_events(rng, lengths)
    labels = ("total_charge", "center", "motion", "azimuth", "zenith", "energy", "event_class")
    hidden = rng.random(len(pulses)) < hidden_share
    return data.micro_batches(events, pulses, -(-len(lengths) // n), labels, hidden)


def outputs(found):
    """What a model gives, as one tensor (B, n)."""
    return torch.cat([value.view(len(value), -1) for value in found.values()], 1)


def shuffled(batch, order):
    """The events of a packed batch in another order."""
    starts, B = batch["starts"].tolist(), len(batch["row"])
    tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
    new = {name: value[tokens] if len(value) == starts[-1] else value[torch.tensor(order)]
           for name, value in batch.items()
           if torch.is_tensor(value) and name not in ("starts", "hidden", "hidden_event")}
    new["starts"] = torch.tensor([0, *np.cumsum(np.diff(starts)[order])], dtype=torch.int32)
    is_hidden = torch.zeros(starts[-1], dtype=torch.bool).index_fill(0, batch["hidden"], True)[tokens]
    new["hidden"] = is_hidden.nonzero().squeeze(1)
    new["hidden_event"] = torch.arange(B).repeat_interleave(new["starts"].diff())[new["hidden"]]
    return new | {"longest": batch["longest"], "row": batch["row"][order]}


def test_base_has_the_papers_size():
    assert count_parameters(m.Pretrainer(TrainConfig(), GEOMETRY).state_dict()) == 7_638_185
    assert count_parameters(m.Reconstructor(FinetuneConfig(), GEOMETRY).state_dict()) == 6_578_051


VARIANTS = [{}, {"backbone": "gru"}, {"backbone": "mamba"}, {"use_dom_positions": False},
            {"use_dom_table": True}, {"dom_head": "position", "fourier_features": True},
            {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "final_norm": False},
            {"mup_base_width": 16, "mup_base_layers": 1}]
BACKBONES = [{}, {"backbone": "gru"}, {"backbone": "mamba"}]


@pytest.mark.parametrize("knobs", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", [m.Pretrainer, m.Reconstructor])
def test_an_event_does_not_depend_on_its_neighbours(kind, knobs):
    """Alone, packed with others, in any order: the same outputs and the same gradient of the weights."""
    net, lengths = make(kind, **knobs).double(), [3, 50, 17, 127, 1]
    packed, = one_batch(lengths)
    alone = one_batch(lengths, n=5)
    order = [3, 0, 4, 1, 2]
    gradients, found = [], []
    for batches in ([packed], alone, [shuffled(packed, order)]):
        net.zero_grad()
        parts = [outputs(net(batch)) for batch in map(doubled, batches)]
        torch.cat(parts).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        found.append(torch.cat(parts).detach())
    has_float32 = knobs.get("backbone") == "mamba" or kind is m.Reconstructor  # at places
    bound = 1e-4 if has_float32 else 1e-9
    assert torch.allclose(found[0], found[1], atol=bound)
    assert torch.allclose(found[0][order], found[2], atol=bound)
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], rtol=1e-6, atol=bound * gradients[0].abs().max())


def doubled(batch):
    return {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in batch.items()}


@pytest.mark.parametrize("knobs", BACKBONES, ids=str)
def test_the_last_pulse_reaches_cls(knobs):
    net, (batch,) = make(m.Reconstructor, **knobs), one_batch([20])
    batch.pop("hidden")
    before = outputs(net(batch))
    for name, value in (("time", 15000.0), ("charge", 4.0), ("dom", 7), ("aux", ~batch["aux"][-1])):
        changed = {**batch, name: batch[name].clone()}
        changed[name][-1] = value
        assert not torch.allclose(before, outputs(net(changed)), atol=1e-7), name


def test_a_hidden_dom_cannot_be_seen_and_other_pulses_can():
    net, (batch,) = make(), one_batch([40, 60])
    _, x = net.encoder(batch)
    changed = {**batch, "dom": batch["dom"].index_fill(0, batch["hidden"], 123)}
    assert torch.equal(x, net.encoder(changed)[1])
    is_visible = torch.ones(len(x), dtype=torch.bool).index_fill(0, batch["hidden"], False)
    visible = is_visible.nonzero()[1]  # the first of them is [CLS]
    changed["dom"][visible] = 123
    assert not torch.allclose(x, net.encoder(changed)[1], atol=1e-5)


@pytest.mark.parametrize("knobs", BACKBONES, ids=str)
def test_what_the_batch_holds_at_cls_means_nothing(knobs):
    net, (batch,) = make(**knobs), one_batch([4, 6])
    changed = {**batch}
    for name, value in (("time", 77.0), ("charge", 5.0), ("dom", 4000), ("aux", True)):
        changed[name] = batch[name].index_fill(0, batch["starts"][:-1].long(), value)
    assert torch.equal(outputs(net(batch)), outputs(net(changed)))


@pytest.mark.parametrize("knobs", [{}, {"use_dom_positions": False}, {"use_dom_table": True}], ids=str)
def test_every_dom_and_mask_have_vectors_of_their_own(knobs):
    vectors = make(**knobs).encoder.embedding.dom_vectors()
    assert vectors.shape == (5161, 16) and len(torch.unique(vectors, dim=0)) == 5161


def test_losses_agree_with_the_plain_formula():
    """Logits everywhere, in float64, event by event: what the fast path must equal."""
    net, (batch,) = make().double(), one_batch([3, 50, 17, 9], seed=4)
    batch, starts = doubled(batch), batch["starts"].tolist()
    hidden = set(batch["hidden"].tolist())
    with torch.no_grad():
        losses = net(batch)
        _, x = net.encoder(batch)
        logits = F.linear(x, net.dom_head.weight, net.dom_head.bias)  # (T, V)
        for i in range(4):
            terms = [torch.logsumexp(logits[j], 0) - logits[j, batch["dom"][j]]
                     for j in range(starts[i], starts[i + 1]) if j in hidden]
            expected = sum(terms) / len(terms) if terms else torch.tensor(0.0)
            assert losses["dom"][i].item() == pytest.approx(expected.item(), abs=1e-9)
            head = net.cls_heads["charge"]
            charge = x[starts[i]] @ head.weight[0] + head.bias[0]
            truth = math.log10(batch["total_charge"][i])
            assert losses["charge"][i].item() == pytest.approx((charge - truth).item() ** 2, rel=1e-9)


def test_the_transformer_is_the_plain_formula():
    """One block in float64 against softmax(q k / sqrt(d)) v written out, event by event."""
    block = make().double().encoder.backbone.blocks[0]
    x, starts = torch.randn(10, 32, dtype=torch.float64), torch.tensor([0, 6, 10], dtype=torch.int32)
    out = block(x, m.Packing(starts, 6, 10))
    for event in (slice(0, 6), slice(6, 10)):
        h = F.layer_norm(x[event], (32,), block.norm1.weight, block.norm1.bias)
        q, k, v = (h @ block.mixer.qkv.weight.T).split(32, dim=1)
        heads = [((q[:, s] @ k[:, s].T) / 8 ** 0.5).softmax(1) @ v[:, s]
                 for s in (slice(8 * i, 8 * i + 8) for i in range(4))]
        y = x[event] + torch.cat(heads, 1) @ block.mixer.out.weight.T
        h = F.layer_norm(y, (32,), block.norm2.weight, block.norm2.bias)
        y = y + F.relu(h @ block.mlp.up.weight.T
                       + block.mlp.up.bias) @ block.mlp.down.weight.T + block.mlp.down.bias
        assert torch.allclose(out[event], y, atol=1e-10)


@pytest.mark.parametrize("knobs", BACKBONES, ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_autocast_stays_near_float32(dtype, bound, knobs):
    net, (batch,) = make(**knobs), one_batch([30, 60, 90])
    exact = net(batch)
    with torch.autocast("cpu", dtype):
        rough = net(batch)
    for name, loss in rough.items():
        assert loss.dtype == torch.float32 and torch.allclose(exact[name], loss, rtol=bound, atol=bound)
    sum(loss.mean() for loss in rough.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("knobs", [*BACKBONES, {"dom_loss": "ce+emd", "cls_target": "charge+center"}],
                         ids=str)
def test_extreme_events_stay_finite(knobs):
    for kind in (m.Pretrainer, m.Reconstructor):
        net, (batch,) = make(kind, **knobs), one_batch([1, 1, 2, 5], hidden_share=0)
        assert len(batch["hidden"]) == 0
        first = batch["starts"][:2].long() + 1
        batch["charge"][first] = torch.tensor([0.0, 1e5])
        batch["time"][first] = torch.tensor([0.0, 2e5])
        batch["total_charge"][:2] = torch.tensor([0.025, 1e8])
        out = outputs(net(batch))
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_angles_and_angular_error():
    azimuth, zenith = torch.tensor([0.0, math.pi / 2, 1.0]), torch.tensor([math.pi / 2, math.pi / 2, 0.0])
    vectors = tasks.unit_vector(azimuth, zenith)
    assert torch.allclose(vectors, torch.eye(3), atol=1e-6)
    rng = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(500, 3, generator=rng, dtype=torch.float64), dim=-1) for _ in range(2))
    assert torch.allclose(tasks.angular_error(a, b), torch.arccos((a * b).sum(-1)), atol=1e-6)
    assert tasks.angular_error(a, a).max() < 2e-6 and tasks.angular_error(a, -a).min() > math.pi - 2e-6
    a.requires_grad_()
    for other in (a.detach().clone(), -a.detach(), b):
        grad, = torch.autograd.grad(tasks.angular_error(a, other).sum(), a)
        assert torch.isfinite(grad).all() and grad.norm(dim=-1).max() < 1.5


def test_vmf_loss_is_the_density_from_broad_to_narrow():
    """Against the textbook formula in float64, which needs exponents that float32 does not have."""
    rng = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(400, 3, generator=rng, dtype=torch.float64), dim=-1)
    for kappa in (1e-3, 0.1, 1.0, 30.0, 300.0):
        direction = F.normalize(truth + torch.randn(400, 3, generator=rng,
                                                    dtype=torch.float64) / (1 + kappa) ** 0.5, dim=-1)
        k = torch.full((400,), kappa, dtype=torch.float64)
        plain = -(k / (4 * math.pi * torch.sinh(k))).log() - k * (direction * truth).sum(-1)
        assert torch.allclose(tasks.vmf_loss(direction, k, truth), plain, rtol=1e-9)
        assert torch.allclose(tasks.vmf_loss(direction.float(), k.float(), truth.float()).double(), plain,
                              rtol=2e-4, atol=1e-4)
    # float32, with gradients, also where the truth is met or missed altogether
    for kappa in (1e-3, 1e3, 1e6):
        for towards in (truth.float(), -truth.float()):
            direction, k = truth.float().requires_grad_(), torch.full((400,), kappa, requires_grad=True)
            tasks.vmf_loss(direction, k, towards).sum().backward()
            assert direction.grad.isfinite().all() and k.grad.isfinite().all()


def test_weight_decay_spares_biases_norms_and_embeddings():
    for use_dom_positions in (True, False):
        net = make(use_dom_positions=use_dom_positions)
        hidden, decayed, kept = m.parameter_groups(net, 0.1)
        names = {id(p): name for name, p in net.named_parameters()}
        assert len(hidden["params"]) + len(decayed["params"]) + len(kept["params"]) == len(names)
        assert [group["weight_decay"] for group in (hidden, decayed, kept)] == [0.1, 0.1, 0.0]
        for p in hidden["params"] + decayed["params"]:
            assert names[id(p)].endswith("weight") and "norm" not in names[id(p)]
            assert "dom_table" not in names[id(p)]
        assert {"encoder.embedding.cls", "encoder.final_norm.weight",
                "dom_head.bias"} <= {names[id(p)] for p in kept["params"]}


def test_same_seed_same_weights_and_no_randomness_in_forward():
    a, b, (batch,) = make(seed=5), make(seed=5), one_batch([10, 20])
    assert torch.equal(outputs(a(batch)), outputs(b(batch)))
    assert not torch.equal(outputs(a(batch)), outputs(make(seed=6)(batch)))


# ------------------------------------------------------------------------------------------------------------
# backbones
# ------------------------------------------------------------------------------------------------------------

def test_mambas_heads_remember_what_events_have():
    """Memory of a head in pulses, 1 / (time step * decay rate); its time step, which weighs what it reads."""
    mixer = make(backbone="mamba").encoder.backbone.blocks[0].mixer.forwards
    step = F.softplus(mixer.dt_bias)
    memory = 1 / (step * mixer.log_a.exp())
    assert memory.min() > 0.9 and memory.max() < 128 and step.min() > 0.05
    assert len({round(x, 3) for x in memory.tolist()}) == len(memory) == SMALL["num_heads"]


@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_mambas_matrix_form_is_the_recurrence(chunk):
    rng = torch.Generator().manual_seed(0)
    B, L, H, P, N = 2, 37, 3, 4, 5
    x, b, c = (torch.randn(*shape, generator=rng, dtype=torch.float64)
               for shape in ((B, L, H, P), (B, L, N), (B, L, N)))
    log_decay = -torch.rand(B, L, H, generator=rng, dtype=torch.float64) * 3
    state, ys = torch.zeros(B, H, N, P, dtype=torch.float64), []
    for t in range(L):
        state = log_decay[:, t].exp()[..., None, None] * state + b[:, t, None, :, None] * x[:, t, :, None, :]
        ys.append((c[:, t, None, :, None] * state).sum(2))
    assert torch.allclose(recurrent.state_space(x, log_decay, b, c, chunk), torch.stack(ys, 1), atol=1e-12)


def test_both_ways_read_the_event_in_reverse():
    net, x = make(backbone="gru").encoder.backbone.blocks[0].mixer, torch.randn(15, 32)
    y = net(x, m.Packing(torch.tensor([0, 6, 15], dtype=torch.int32), 9, 15))
    for event in (x[:6], x[6:]):
        found = y[:6] if len(event) == 6 else y[6:]
        assert torch.allclose(found[:, :16], net.forwards(event[None], None)[0], atol=1e-6)
        assert torch.allclose(found[:, 16:], net.backwards(event.flip(0)[None], None)[0].flip(0), atol=1e-6)


def test_packing_and_unpacking():
    x, starts = torch.arange(12.0).view(6, 2) + 1, torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    packing = m.Packing(starts, 3, 6)
    rows = packing.unpack(x)
    assert rows.shape == (3, 3, 2) and torch.equal(packing.pack(rows), x)
    assert torch.equal(rows[1], x[1:4]) and torch.equal(rows[2, :2], x[4:]) and rows[0, 1:].sum() == 0
    assert packing.valid.tolist() == [[True, False, False], [True] * 3, [True, True, False]]


def test_backbones_and_mlps_are_of_about_equal_size():
    sizes = [count_parameters(m.Pretrainer(TrainConfig(**knobs), GEOMETRY).state_dict())
             for knobs in (*BACKBONES, {"mlp": "swiglu"}, {"mlp": "gelu"})]
    assert max(sizes) < 1.07 * min(sizes)


# ------------------------------------------------------------------------------------------------------------
# losses and metrics
# ------------------------------------------------------------------------------------------------------------

def test_other_losses_agree_with_the_plain_formulas():
    (batch,) = one_batch([3, 50, 17, 9], seed=4)
    batch["center"] = torch.randn(4, 3) * 200
    ce, emd, both = (make(dom_loss=kind, distance_weight=0.5, loss_weighting="per_pulse",
                          cls_target="charge+center")
                     for kind in ("ce", "emd", "ce+emd"))
    with torch.no_grad():
        logits, answers = ce.predict(batch)
        dom, event = batch["dom"][batch["hidden"]], batch["hidden_event"]
        p = logits.double().softmax(1)
        true = torch.tensor(POSITION)[dom].double()
        distance = (true[:, None] - torch.tensor(POSITION).double()).norm(dim=-1) / 100
        plain_emd, plain_ce = (p * distance).sum(1), -p[torch.arange(len(dom)), dom].log()
        for net, per_pulse in ((ce, plain_ce), (emd, 0.5 * plain_emd), (both, plain_ce + 0.5 * plain_emd)):
            sums = torch.stack([per_pulse[event == i].sum() for i in range(4)])
            assert torch.allclose(net(batch)["dom"].double(), sums, rtol=1e-4)
        losses = ce(batch)
        assert torch.allclose(losses["charge"],
                              (answers["charge"][:, 0] - batch["total_charge"].log10()) ** 2, rtol=1e-4)
        assert torch.allclose(losses["center"], ((answers["center"] - batch["center"] / 500) ** 2).mean(1),
                              rtol=1e-4)


def test_a_target_that_some_events_lack(monkeypatch):
    """Those events have loss 0, and the NaN of their truth does not reach the gradient."""
    monkeypatch.setitem(tasks.CLS_TARGETS, "energy", tasks.ClsTarget(
        width=1, label="energy", truth=lambda energy: torch.log10(energy)[:, None], metric="energy_rms",
        measure=lambda x, truth: (x - truth).square().sum(-1)))
    net, (batch,) = make(cls_target="energy"), one_batch([5, 9, 7])
    batch["energy"] = torch.tensor([float("nan"), 100.0, 1e4])
    losses = net(batch)["energy"]
    answers = net.predict(batch)[1]["energy"].flatten()
    assert losses.tolist() == pytest.approx([0, (answers[1] - 2).item() ** 2, (answers[2] - 4).item() ** 2])
    losses.sum().backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert net.metrics(batch)[net.metric_names.index("energy_known")] == 2


def test_metrics_by_hand():
    (batch,) = one_batch([30, 50, 17], seed=4)
    batch["dom"] %= 70  # many on the first string
    net = make(cls_target="charge+center")
    dom = batch["dom"][batch["hidden"]]
    with torch.no_grad():
        net.dom_head.weight.zero_()
        net.dom_head.bias.copy_(torch.arange(5160) * -1e-3)  # always guesses 0, 1, 2, ...
        found = dict(zip(net.metric_names, net.metrics(batch).tolist(), strict=True))
        _, answers = net.predict(batch)
        logits = net.dom_head.bias.expand(len(dom), -1)
    assert found["top1"] == (dom == 0).sum() and found["top5"] == (dom < 5).sum()
    assert found["string"] == (dom < 60).sum() > 0
    assert found["distance"] == pytest.approx(np.linalg.norm(POSITION[dom] - POSITION[0], axis=1).sum(),
                                              rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(logits, dom, reduction="sum").item(),
                                                   rel=1e-5)
    error = answers["charge"][:, 0] - batch["total_charge"].log10()
    assert found["charge_metric"] == pytest.approx((error ** 2).sum().item(), rel=1e-4)
    error = answers["center"] * 500 - batch["center"]  # [m]
    assert found["center_metric"] == pytest.approx((error ** 2).sum().item(), rel=1e-4)


def test_an_event_without_a_known_motion_does_not_enter_its_loss():
    (batch,) = one_batch([30, 50, 17], seed=4)
    batch["motion"][1] = 0
    net = make(cls_target="motion")
    losses = net(batch)["motion"]
    with torch.no_grad():
        found = dict(zip(net.metric_names, net.metrics(batch).tolist(), strict=True))
        guess = net.predict(batch)[1]["motion"]
    kappa = guess.norm(dim=1)
    expected = torch.log(4 * math.pi * kappa.sinh() / kappa) - (guess * batch["motion"]).sum(1)
    assert losses[1] == 0 and torch.allclose(losses[[0, 2]], expected[[0, 2]], rtol=1e-4)
    cosine = F.cosine_similarity(guess, batch["motion"])[[0, 2]]
    assert found["motion_metric"] == pytest.approx(cosine.arccos().sum().item(), rel=1e-3)
    assert found["motion_known"] == 2 and found["motion_loss"] == pytest.approx(losses.sum().item())


def test_chamfer_distance_by_hand():
    """Two hidden pulses of one event, one of another; the logits leave a single guess each."""
    geometry = torch.tensor([[0.0, 0, 0], [300, 0, 0], [0, 400, 0], [0, 0, 700]])
    dom, event, guess = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])
    logits = 100 * F.one_hot(guess, 4).float()
    # event 0: from DOM 0 the nearest guess is DOM 1, from DOM 1 it is DOM 1 itself, though guessed for the
    # other pulse; back, from the guesses DOM 1 and DOM 2: 0 m and 400 m. Event 1: 700 m both ways
    found = tasks.chamfer_distance(logits, dom, event, geometry)
    assert torch.allclose(found, torch.tensor([3.0 + 0, 0 + 4.0, 14.0]))
    with torch.autocast("cpu", torch.bfloat16):  # which has no 303, but 302 and 304
        assert torch.equal(found, tasks.chamfer_distance(logits, dom, event, geometry + 3))
    assert len(tasks.chamfer_distance(logits[:0], dom[:0], event[:0], geometry)) == 0


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
            assert torch.allclose(net(x)[:, j], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# muP
# ------------------------------------------------------------------------------------------------------------

def test_mup_at_its_base_width_changes_nothing():
    plain, mup, (batch,) = make(), make(mup_base_width=32), one_batch([10, 20])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), mup.parameters()))
    assert torch.equal(outputs(plain(batch)), outputs(mup(batch)))
    for a, b in zip(m.parameter_groups(plain, 0.1), m.parameter_groups(mup, 0.1)):
        assert (a["weight_decay"], a["lr_scale"]) == (b["weight_decay"], b["lr_scale"])


def update_size(width=64, layers=2, **knobs):
    """How much 4 Adam steps move the backbone's outputs, for a coordinate check over depth."""
    batches = [one_batch([20, 40, 30], seed=seed)[0] for seed in range(2)]
    torch.manual_seed(0)
    net = m.Pretrainer(TrainConfig(embedding_dim=width, dom_embed_dim=width // 2, num_heads=4,
                                   hidden_size=2 * width, num_layers=layers, **knobs), GEOMETRY)
    groups = m.parameter_groups(net, 0.0)
    optimizer = torch.optim.AdamW([{**g, "lr": 1e-3 * g["lr_scale"]} for g in groups], betas=(0.9, 0.95))
    x = net.encoder.embedding(batches[0]).detach()

    @torch.no_grad()
    def look():
        return net.encoder.backbone(x, batches[0]["starts"], batches[0]["longest"])

    before = look()
    for step in range(4):
        sum(loss.mean() for loss in net(batches[step % 2]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (look() - before).std().item()


def coordinates(width, heads, steps=20, **knobs):
    """Spread of attention logits and block outputs after some steps, and of their change, (2 layers, 2)."""
    batches = [one_batch([20, 40, 30], seed=seed)[0] for seed in range(2)]
    torch.manual_seed(0)
    net = m.Pretrainer(TrainConfig(embedding_dim=width, dom_embed_dim=width // 2, num_heads=heads,
                                   hidden_size=4 * width, num_layers=2, **knobs), GEOMETRY)
    optimizer = torch.optim.AdamW([{**g, "lr": 3e-3 * g["lr_scale"]} for g in m.parameter_groups(net, 0.0)],
                                  betas=(0.9, 0.95))

    @torch.no_grad()
    def look():
        x, starts = net.encoder.embedding(batches[0]), batches[0]["starts"]
        packing, found = m.Packing(starts, batches[0]["longest"], len(x)), []
        for block in net.encoder.backbone.blocks:
            q, k, _ = block.mixer.qkv(block.norm1(x)).view(len(x), 3, heads, -1).unbind(1)
            logits = [torch.einsum("lhd,mhd->hlm", q[a:b], k[a:b]).flatten()
                      for a, b in zip(starts, starts[1:])]
            x = block(x, packing)
            found += [torch.cat(logits) * block.mixer.scale, x]
        return found

    before = look()
    for step in range(steps):
        sum(loss.mean() for loss in net(batches[step % 2]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return np.array([[size.std().item() for size in (new, new - old)] for old, new in zip(before, look())])


@pytest.mark.parametrize("heads", [lambda width: width // 32, lambda width: 1],
                         ids=["more heads", "wider heads"])
def test_mup_keeps_the_size_of_an_update_over_width(heads):
    """The coordinate check (Yang et al. 2022, appendix D.1): of one size for widths 32 to 256."""
    mup = [coordinates(width, heads(width), mup_base_width=32, mup_base_heads=1)
           for width in (32, 64, 128, 256)]
    assert np.max(np.max(mup, axis=0) / np.min(mup, axis=0)) < 2.1
    standard = coordinates(256, heads(256))
    assert np.all(standard[:, 1] > 2 * mup[-1][:, 1])  # so the check can fail


def test_completep_keeps_the_size_of_an_update_over_depth():
    assert 0.6 < update_size(layers=16, mup_base_layers=2) / update_size(layers=2) < 1.5
    assert update_size(layers=16) / update_size(layers=2) > 2
    assert update_size(layers=2, mup_base_layers=2) == update_size(layers=2)


# ------------------------------------------------------------------------------------------------------------
# checkpoints of the published code
# ------------------------------------------------------------------------------------------------------------

def published_state(rng, variant="table", D=32, E=16, width=64, n_layers=2):
    """Names and shapes of timinar/PolarBERT's flash variant, in its three forms of DOM embedding."""
    shapes = {"table": {"embedding.dom_embedding.weight": (5162, E)},
              "table, own mask": {"embedding.dom_embedding.weight": (5161, E),
                                  "embedding.mask_token_embedding": (1, E)},
              "positions": {"embedding.position_embedding.weight": (E, 3),
                            "embedding.position_embedding.bias": (E,),
                            "embedding.mask_token_embedding": (1, E), "final_layer_norm.weight": (D,),
                            "final_layer_norm.bias": (D,)}}[variant]
    shapes = {**shapes, "embedding.features_embedding.weight": (D - E, 3),
              "embedding.features_embedding.bias": (D - E,), "embedding.cls_embedding": (1, 1, D),
              "unembedding.weight": (5161, D), "unembedding.bias": (5161,),
              "charge_prediction.weight": (1, D), "charge_prediction.bias": (1,)}
    for i in range(n_layers):
        block = f"transformer_blocks.{i}"
        shapes |= {f"{block}.attention.w{x}.weight": (D, D) for x in "qkvo"}
        shapes |= {f"{block}.feed_forward.0.weight": (width, D), f"{block}.feed_forward.0.bias": (width,),
                   f"{block}.feed_forward.2.weight": (D, width), f"{block}.feed_forward.2.bias": (D,)}
        shapes |= {f"{block}.layer_norm{j}.{kind}": (D,) for j in (1, 2) for kind in ("weight", "bias")}
    state = {name: torch.randn(*shape, generator=rng) * 0.3 for name, shape in shapes.items()}
    if variant == "positions":
        state["embedding.dom_positions"] = torch.cat([torch.zeros(1, 3),
                                                      torch.as_tensor(POSITION) / 500]).float()
    return state


def published_outputs(w, dom, features, hidden, n_heads=4):
    """Logits and charge of one event as the published code computes them, written out in float64."""
    w = {name: value.double() for name, value in w.items()}
    ids = torch.where(hidden, 5161, dom + 1)  # 0 is padding, 5161 the mask
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda x, name: F.layer_norm(x, (x.shape[1],), w[f"{name}.weight"], w[f"{name}.bias"])
    if "embedding.position_embedding.weight" in w:
        table = linear(w["embedding.dom_positions"], "embedding.position_embedding")
    else:
        table = w["embedding.dom_embedding.weight"]
    table = torch.cat([table, w.get("embedding.mask_token_embedding", table[:0])])
    x = torch.cat([table[ids], linear(features, "embedding.features_embedding")], 1)
    x = torch.cat([w["embedding.cls_embedding"][0], x])
    D = x.shape[1]
    for i in range(2):
        block = f"transformer_blocks.{i}"
        h = norm(x, f"{block}.layer_norm1")
        q, k, v = (h @ w[f"{block}.attention.w{name}.weight"].T for name in "qkv")
        heads = [((q[:, s] @ k[:, s].T) / (D / n_heads) ** 0.5).softmax(1) @ v[:, s]
                 for s in torch.arange(D).chunk(n_heads)]
        x = x + torch.cat(heads, 1) @ w[f"{block}.attention.wo.weight"].T
        h = linear(norm(x, f"{block}.layer_norm2"), f"{block}.feed_forward.0").relu()
        x = x + linear(h, f"{block}.feed_forward.2")
    x = norm(x, "final_layer_norm") if "final_layer_norm.weight" in w else x
    return linear(x[1:], "unembedding"), linear(x[:1], "charge_prediction")[0, 0]


@pytest.mark.parametrize("prefix, variant", [("", "table"), ("model.", "table, own mask"),
                                             ("model.", "positions")])
def test_a_published_checkpoint_gives_its_own_outputs(prefix, variant):
    published = published_state(torch.Generator().manual_seed(0), variant)
    knobs, ours = from_published({prefix + name: value for name, value in published.items()})
    has_positions = variant == "positions"
    assert knobs == {"embedding_dim": 32, "dom_embed_dim": 16, "num_layers": 2, "hidden_size": 64,
                     "use_dom_positions": has_positions, "final_norm": has_positions}
    net = m.Pretrainer(TrainConfig(num_heads=4, **knobs), GEOMETRY)
    missing, unexpected = net.load_state_dict(ours, strict=False)
    assert missing == ([] if has_positions else ["encoder.embedding.geometry"]) and not unexpected
    batch, = one_batch([40])
    hidden = torch.zeros(41, dtype=torch.bool).index_fill(0, batch["hidden"], True)[1:]  # token 0 is [CLS]
    time, charge, aux = (batch[name][1:].double() for name in ("time", "charge", "aux"))
    features = torch.stack([(time - 1e4) / 3e4, charge.log10() / 3, aux - 0.5], 1)
    logits, log_charge = published_outputs(published, batch["dom"][1:], features, hidden)
    with torch.no_grad():
        found, answers = net.predict(batch)
    assert torch.allclose(found.double(), logits[hidden][:, 1:], atol=1e-3)
    assert answers["charge"].item() == pytest.approx(log_charge.item(), abs=1e-3)
