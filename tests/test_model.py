"""model.py: sizes, padding, masking, losses, numerics."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model as m
from common import count_parameters
from conftest import random_events
from finetune import FinetuneConfig
from train import TrainConfig

SMALL = {"embedding_dim": 32, "dom_embed_dim": 16, "num_heads": 4, "hidden_size": 64, "num_layers": 2}
GEOMETRY = np.random.default_rng(0).uniform(-500, 500, (5160, 3)).astype(np.float32)


def make(kind=m.Pretrainer, seed=0, **knobs):
    torch.manual_seed(seed)
    config = (TrainConfig if kind is m.Pretrainer else FinetuneConfig)(**SMALL, **knobs)
    return kind(config, GEOMETRY)


def one_batch(lengths, hidden_share=0.3, seed=0, n=1):
    rng = np.random.default_rng(seed)
    events, pulses = random_events(rng, lengths)
    return data.micro_batches(events, pulses, n, rng.random(len(pulses)) < hidden_share)


def test_base_has_the_papers_size():
    assert count_parameters(m.Pretrainer(TrainConfig(), GEOMETRY)) == 7_638_313
    assert count_parameters(m.DirectionFinder(FinetuneConfig(), GEOMETRY)) == 6_578_179


@pytest.mark.parametrize("use_dom_positions", [True, False])
@pytest.mark.parametrize("kind", [m.Pretrainer, m.DirectionFinder])
def test_padding_never_changes_an_output(kind, use_dom_positions):
    net = make(kind, use_dom_positions=use_dom_positions)
    padded, = one_batch([3, 50, 17, 120, 1])
    alone = one_batch([3, 50, 17, 120, 1], n=5)
    with torch.no_grad():
        together = net(padded)
        single = [net(batch) for batch in alone]
    if kind is m.Pretrainer:
        together = torch.stack(together, 1)
        single = [torch.stack(part, 1) for part in single]
    assert torch.allclose(together, torch.cat(single), atol=1e-5)
    # nor does what the padding holds
    for name in ("time", "charge"):
        padded[name][~padded["valid"]] = 77.0
    padded["dom"][~padded["valid"]] = 4000
    with torch.no_grad():
        again = net(padded)
    again = torch.stack(again, 1) if kind is m.Pretrainer else again
    assert torch.allclose(together, again, atol=1e-6)


def test_swapping_events_swaps_outputs():
    net, (batch,) = make(m.DirectionFinder), one_batch([20, 30, 25])
    del batch["hidden"]
    order = torch.tensor([2, 0, 1])
    swapped = {name: value[order] for name, value in batch.items() if value.ndim}
    assert torch.allclose(net(batch)[order], net(swapped), atol=1e-5)


def test_the_last_pulse_reaches_cls():
    net, (batch,) = make(m.DirectionFinder), one_batch([20])
    before = net(batch)
    for name, value in (("time", 15000.0), ("charge", 4.0), ("dom", 7), ("aux", ~batch["aux"][0, -1])):
        changed = {**batch, name: batch[name].clone()}
        changed[name][0, -1] = value
        changed.pop("hidden")
        assert not torch.allclose(before, net(changed), atol=1e-6), name


def test_a_hidden_dom_cannot_be_seen_and_other_pulses_can():
    net, (batch,) = make(), one_batch([40, 60])
    x = net.encoder(batch)
    changed = {**batch, "dom": batch["dom"].clone()}
    changed["dom"].view(-1)[batch["hidden"]] = 123
    assert torch.equal(x, net.encoder(changed))
    visible = (batch["valid"].flatten().index_fill(0, batch["hidden"], False)).nonzero()[0]
    changed["dom"].view(-1)[visible] = 123
    assert not torch.allclose(x, net.encoder(changed), atol=1e-5)


@pytest.mark.parametrize("use_dom_positions", [True, False])
def test_every_dom_mask_and_padding_have_vectors_of_their_own(use_dom_positions):
    vectors = make(use_dom_positions=use_dom_positions).encoder.embedding.dom_vectors()
    assert vectors.shape == (5162, 16) and len(torch.unique(vectors, dim=0)) == 5162


def test_losses_agree_with_the_plain_formula():
    """Logits everywhere, padded, in float64, event by event: what the fast path must equal."""
    net, (batch,) = make().double(), one_batch([3, 50, 17, 9], seed=4)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        dom_loss, charge_loss = net(batch)
        x = net.encoder(batch)
        logits = F.linear(x[:, 1:], net.dom_head.weight, net.dom_head.bias)  # (B, L, V)
        is_hidden = torch.zeros(batch["dom"].numel(), dtype=torch.bool)
        is_hidden[batch["hidden"]] = True
        is_hidden = is_hidden.view_as(batch["dom"])
        assert 0 < is_hidden.any(1).sum() < len(x) or is_hidden.any(1).all()
        for i in range(len(x)):
            terms = [torch.logsumexp(logits[i, j], 0) - logits[i, j, batch["dom"][i, j]]
                     for j in range(logits.shape[1]) if is_hidden[i, j]]
            expected = sum(terms) / len(terms) if terms else torch.tensor(0.0)
            assert dom_loss[i].item() == pytest.approx(expected.item(), abs=1e-4)
            charge = x[i, 0] @ net.charge_head.weight[0] + net.charge_head.bias[0]
            assert charge_loss[i].item() == pytest.approx((charge - math.log10(batch["total_charge"][i])).item() ** 2, rel=1e-4)


def test_the_transformer_is_the_plain_formula():
    """One block in float64 against softmax(q k / sqrt(d)) v written out, real pulses only."""
    block = make().double().encoder.backbone.blocks[0]
    x, valid = torch.randn(2, 6, 32, dtype=torch.float64), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    out = block(x, valid)
    for b in range(2):
        n = valid[b].sum()
        h = F.layer_norm(x[b, :n], (32,), block.norm1.weight, block.norm1.bias)
        q, k, v = (h @ block.qkv.weight.T).split(32, dim=1)
        heads = [((q[:, s] @ k[:, s].T) / 8 ** 0.5).softmax(1) @ v[:, s] for s in (slice(8 * i, 8 * i + 8) for i in range(4))]
        y = x[b, :n] + torch.cat(heads, 1) @ block.out.weight.T
        h = F.layer_norm(y, (32,), block.norm2.weight, block.norm2.bias)
        y = y + F.relu(h @ block.mlp[0].weight.T + block.mlp[0].bias) @ block.mlp[2].weight.T + block.mlp[2].bias
        assert torch.allclose(out[b, :n], y, atol=1e-10)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_autocast_stays_near_float32(dtype, bound):
    net, (batch,) = make(), one_batch([30, 60, 90])
    exact = net(batch)
    with torch.autocast("cpu", dtype):
        rough = net(batch)
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32 and torch.allclose(a, b, rtol=bound, atol=bound)
    sum(part.mean() for part in rough).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_extreme_events_stay_finite():
    for kind in (m.Pretrainer, m.DirectionFinder):
        net, (batch,) = make(kind), one_batch([1, 1, 2, 5], hidden_share=0)
        assert len(batch["hidden"]) == 0
        batch["charge"][:2, 0] = torch.tensor([0.0, 1e5])
        batch["time"][:2, 0] = torch.tensor([0.0, 2e5])
        batch["total_charge"][:2] = torch.tensor([0.025, 1e8])
        out = net(batch)
        torch.cat([o.flatten() for o in out]).sum().backward()
        assert all(torch.isfinite(o).all() for o in out)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_angles_and_angular_error():
    azimuth, zenith = torch.tensor([0.0, math.pi / 2, 1.0]), torch.tensor([math.pi / 2, math.pi / 2, 0.0])
    vectors = m.unit_vector(azimuth, zenith)
    assert torch.allclose(vectors, torch.eye(3), atol=1e-6)
    rng = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(500, 3, generator=rng, dtype=torch.float64), dim=-1) for _ in range(2))
    assert torch.allclose(m.angular_error(a, b), torch.arccos((a * b).sum(-1)), atol=1e-6)
    assert m.angular_error(a, a).max() < 2e-6 and m.angular_error(a, -a).min() > math.pi - 2e-6
    a.requires_grad_()
    for other in (a.detach().clone(), -a.detach(), b):
        grad, = torch.autograd.grad(m.angular_error(a, other).sum(), a)
        assert torch.isfinite(grad).all() and grad.norm(dim=-1).max() < 1.5


def test_weight_decay_spares_biases_norms_and_embeddings():
    for use_dom_positions in (True, False):
        net = make(use_dom_positions=use_dom_positions)
        decayed, kept = m.parameter_groups(net, 0.1)
        names = {id(p): name for name, p in net.named_parameters()}
        assert len(decayed["params"]) + len(kept["params"]) == len(names)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
        for p in decayed["params"]:
            assert names[id(p)].endswith("weight") and "norm" not in names[id(p)] and "dom_table" not in names[id(p)]
        assert {"encoder.embedding.cls", "encoder.final_norm.weight", "dom_head.bias"} <= {names[id(p)] for p in kept["params"]}


def test_same_seed_same_weights_and_no_randomness_in_forward():
    a, b, (batch,) = make(seed=5), make(seed=5), one_batch([10, 20])
    assert all(torch.equal(x, y) for x, y in zip(a(batch), b(batch)))
    assert not torch.equal(a(batch)[0], make(seed=6)(batch)[0])
