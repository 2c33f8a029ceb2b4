"""What a GPU does differently: no waiting in the hot loop, flash attention, float16, compile.

Run it first on a new GPU. Where there is none, the same code runs on torch's meta device and with stand-ins,
and the last tests are skipped.
"""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import common
import data
import model as m
import train
from conftest import TINY_RUN, forked_ranks, run_ok, torchrun, user_error
from optimizers import GuardedOptimizer
from tasks import TASKS
from test_model import BACKBONES, doubled, make, one_batch
from test_train import assert_trained_alike, column, weights

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# ------------------------------------------------------------------------------------------------------------
# nothing waits in the hot loop
# ------------------------------------------------------------------------------------------------------------

class NothingWaits(TorchDispatchMode):
    """Raises where a GPU has to wait: tensors of the CPU, numbers read back, shapes that depend on values."""
    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, (tensors, _) = str(function), tree_flatten((args, kwargs or {}))
        tensors = [value for value in tensors if torch.is_tensor(value)]
        if name.startswith(self.WAITING):
            raise AssertionError(f"{name} waits for the GPU")
        if name.startswith("aten.index") and any(value.dtype == torch.bool for value in tensors[1:]):
            raise AssertionError(f"{name} with a mask waits for the GPU")
        if any(value.device.type == "cpu" for value in tensors):
            raise AssertionError(f"{name} has a tensor of the CPU")
        return function(*args, **(kwargs or {}))


def to_meta(batch):
    return {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.mark.parametrize("plant, words", [
    (lambda x: x.sum().item(), "_local_scalar_dense.* waits"), (lambda x: x[x > 0], "with a mask|nonzero"),
    (lambda x: x[torch.tensor([0])], "tensor of the CPU"), (lambda x: bool(x.sum() > 0), "waits")])
def test_what_waits_is_caught(plant, words):
    with pytest.raises(AssertionError, match=words), NothingWaits():
        plant(torch.empty(4, device="meta"))


STEPS = [*((m.Pretrainer, knobs) for knobs in BACKBONES),
         *((m.Pretrainer, {"cls_target": name}) for name in m.CLS_TARGETS),
         *((m.Pretrainer, {"dom_loss": name}) for name in m.DOM_LOSSES),
         (m.Pretrainer, {"dom_head": "position", "fourier_features": True}),
         (m.Pretrainer, {"use_dom_positions": False, "loss_weighting": "per_pulse"}),
         *((m.Reconstructor, knobs) for knobs in BACKBONES),
         *((m.Reconstructor, {"task": name}) for name in TASKS)]


@pytest.mark.parametrize("kind, knobs", STEPS, ids=str)
def test_a_step_waits_for_nothing(kind, knobs, monkeypatch):
    """Forward, backward and the guarded step, of a model on the meta device."""
    class Unfused(torch.optim.AdamW):  # the fused kernel does not exist for meta
        def step(self):
            assert self.found_inf.device.type == "meta"

    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    net = make(kind, **knobs).to("meta")
    process = SimpleNamespace(device=torch.device("meta"), dtype=torch.float32)
    config = SimpleNamespace(grad_clip=1.0, max_bad_steps=3, direction_loss="angular+cosine+vmf")
    optimizer = GuardedOptimizer(net, [Unfused(net.parameters())], config, process)
    lengths = [3, 17, 1, 20] if knobs.get("backbone") == "gru" else [3, 50, 17, 1, 127]  # unrolled, slow
    batches = [to_meta(batch) for batch in one_batch(lengths, n=2)]
    with NothingWaits():
        for batch in batches:
            losses = net(batch)
            if kind is m.Reconstructor:
                losses = {"loss": TASKS[knobs.get("task", "direction")].loss(losses, batch, config)}
            optimizer.backward(sum(loss.sum() for loss in losses.values()))
        norm = optimizer.step()
    assert norm.device.type == "meta" and all(parameter.grad is None for parameter in net.parameters())


def test_copies_overlap_and_go_to_the_ranks_device(monkeypatch):
    """prefetch with CUDA stood in: pinned copies, a stream of its own, nothing freed while it is read."""
    seen = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def record_event(self):
            return "all copied"

        def wait_event(self, event):
            seen.append(event)

    def note(name):
        return lambda value, *args, **kwargs: seen.append((name, *map(str, args), kwargs)) or value

    present = Stream(None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present)
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(("device", str(device)))
                        or nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: seen.append(("stream", str(stream.device)))
                        or nullcontext())
    for name in ("pin_memory", "to", "record_stream"):
        monkeypatch.setattr(torch.Tensor, name, note(name))
    batch, = next(data.prefetch(lambda step: [{"x": torch.zeros(step), "longest": 3}], [5],
                                torch.device("cuda:1")))
    assert len(batch["x"]) == 5 and batch["longest"] == 3
    assert seen == [("device", "cuda:1"), ("stream", "cuda:1"), ("pin_memory", {}),
                    ("to", "cuda:1", {"non_blocking": True}), "all copied",
                    ("record_stream", str(present), {})]


# ------------------------------------------------------------------------------------------------------------
# flash attention
# ------------------------------------------------------------------------------------------------------------

def stand_in(q, k, v, starts, starts_k, longest, longest_k, scale):
    """What varlen_attn computes, event by event; and what it asks of its arguments."""
    assert starts is starts_k and starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q)
    assert longest == longest_k == starts.diff().max() and isinstance(longest, int)
    assert q.dtype == k.dtype == v.dtype and q.stride(-1) == 1
    parts = []
    for a, b in zip(starts, starts[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[a:b].float()) * scale
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b].float()).to(q.dtype))
    return torch.cat(parts)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_and_the_rectangle_are_the_same(qk_norm, monkeypatch):
    """The whole model with the op stood in, against the one that a CPU takes, outputs and gradients."""
    monkeypatch.setattr(m, "varlen_attn", stand_in)
    net, (batch,) = make(qk_norm=qk_norm), one_batch([3, 50, 17, 1, 127])
    found, gradients, rectangle = [], [], m.rectangle_attention
    for attend in (rectangle, m.flash_attention):
        monkeypatch.setattr(m, "rectangle_attention", attend)
        losses = net(batch)
        sum(loss.sum() for loss in losses.values()).backward()
        found.append(torch.stack(list(losses.values())).detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    assert torch.allclose(*found, rtol=1e-5)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5 * gradients[0].abs().max())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_is_taken_in_half_precision_and_traced_both_ways(qk_norm, monkeypatch):
    """On the meta device, where varlen_attn has an implementation without a kernel."""
    monkeypatch.setattr(m, "can_flash", lambda d: True)
    backbone = make(qk_norm=qk_norm).encoder.backbone.to("meta").bfloat16()
    calls, flash = [], m.flash_attention
    monkeypatch.setattr(m, "flash_attention", lambda *args: calls.append(args[0].dtype) or flash(*args))
    x = torch.empty(15, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    backbone(x, torch.empty(4, dtype=torch.int32, device="meta"), 9).sum().backward()
    assert calls == [torch.bfloat16] * 2 and x.grad.shape == x.shape
    backbone.float()(x.detach().float(), torch.empty(4, dtype=torch.int32, device="meta"), 9)
    assert len(calls) == 2  # float32 has no flash kernel


@pytest.mark.parametrize("fault, device, words", [
    (0.0, "cuda", None), (0.1, "cuda", "flash attention differs"), (0.1, "cpu", None)])
def test_a_wrong_flash_kernel_ends_the_run(fault, device, words, monkeypatch):
    """Where it is used: --device=cpu on a machine with a GPU has no need of it."""
    monkeypatch.setattr(m, "can_flash", lambda d: True)
    monkeypatch.setattr(m, "varlen_attn", lambda *args, **kwargs: stand_in(*args, **kwargs) * (1 + fault))
    flash_error = common.flash_error
    monkeypatch.setattr(common, "flash_error", lambda mixer, _, dtype: flash_error(mixer, "cpu", dtype))
    process = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    with pytest.raises(SystemExit, match=words) if words else nullcontext():
        common.check_flash(make(), process)


# ------------------------------------------------------------------------------------------------------------
# precision
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tf32", [("bfloat16", "ieee"), ("float32", "tf32")])
def test_what_is_set_on_cuda(dtype, tf32, monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", called.append)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: args)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        wanted = "auto" if dtype == "bfloat16" else dtype
        process = common.start_process(SimpleNamespace(device="cuda", dtype=wanted))
        assert torch.backends.cuda.matmul.fp32_precision == tf32
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert called == [0, False] and process.autocast == ("cuda", getattr(torch, dtype))


@pytest.mark.parametrize("harm", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", ["backbone.blocks.0.mixer.qkv.weight", "embedding.cls"])  # Muon, AdamW
def test_a_bad_gradient_in_float16_moves_nothing(place, harm):
    config = train.TrainConfig(optimizer="muon", learning_rate=0.01)
    process = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16)
    net, (batch,) = make(), one_batch([20, 30])
    optimizer = GuardedOptimizer(net, train.make_optimizers(net, config), config, process)

    def step(spoil):
        with torch.autocast("cpu", torch.float16):
            losses = net(batch)
        optimizer.backward(sum(loss.mean() for loss in losses.values()))
        if spoil:
            dict(net.encoder.named_parameters())[place].grad.flatten()[3] = harm
        optimizer.step()
        return [parameter.detach().clone() for parameter in net.parameters()]

    first = step(spoil=False)
    second = step(spoil=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert optimizer.n_bad == optimizer.bad_in_a_row == 1
    third = step(spoil=False)
    assert all(not torch.equal(a, b) and b.isfinite().all() for a, b in zip(second, third))
    assert optimizer.n_bad == 1 and optimizer.bad_in_a_row == 0


# ------------------------------------------------------------------------------------------------------------
# compile
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("knobs", [{}, {"backbone": "mamba"},
                                   {"cls_target": "charge+motion", "dom_head": "position"},
                                   {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "dom_loss": "ce+emd",
                                    "cls_target": "charge+center"}], ids=str)
def test_one_graph_for_all_micro_batches(knobs):
    """Not so the GRU: torch traces no nn.GRU, each stays one opaque call."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, rng = CompileCounter(), np.random.default_rng(0)
    compiled = torch.compile(make(**knobs), backend=counter, dynamic=True, fullgraph=True)
    for seed in range(12):
        compiled(one_batch(rng.integers(2, 128, rng.integers(20, 40)), seed=seed)[0])
    assert counter.frame_count == 1
    for lengths in ([5, 9, 30], [7, 40, 12, 8], [3, 100], [8, 126, 50, 20, 9], [11, 2, 3], [90, 77]):
        compiled(one_batch(lengths)[0])
    assert counter.frame_count <= 3  # three events, as there are coordinates: traced anew


def test_one_rank_and_two_train_the_same_with_compile(demo_data, tmp_path):
    """Compiling a layer takes 15 s; the ranks find in a cache what was compiled for one."""
    args = [f"--data_dir={demo_data}", *TINY_RUN, "--num_layers=1", "--max_steps=4"]
    torch._dynamo.reset()
    run_ok("train.py", *args, f"--out_dir={tmp_path}/plain")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/one", "--compile=True")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/two", "--compile=True", launcher=forked_ranks(2))
    for name in ("one", "two"):
        assert_trained_alike(tmp_path / name, tmp_path / "plain")


def test_compile_without_a_compiler(demo_data, tmp_path):
    line = user_error("train.py", f"--data_dir={demo_data}", *TINY_RUN, "--num_layers=1", "--compile=True",
                      f"--out_dir={tmp_path}/run",
                      env={"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/cache"})
    assert line.startswith("error: torch.compile failed") and "--compile=False" in line


# ------------------------------------------------------------------------------------------------------------
# on a GPU
# ------------------------------------------------------------------------------------------------------------

def to_cuda(batch):
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


def gradients_of(net, batch, context=nullcontext()):
    net.zero_grad()
    with context:
        losses = net(batch)
    sum(loss.mean() for loss in losses.values()).backward()
    return (torch.stack(list(losses.values())).detach().cpu().double(),
            torch.cat([p.grad.flatten() for p in net.parameters()]).cpu().double())


@needs_cuda
@pytest.mark.parametrize("knobs", [*BACKBONES, {"dom_loss": "emd"}, {"dom_loss": "chamfer"},
                                   {"cls_target": "charge+motion", "dom_head": "position"}], ids=str)
def test_cuda_computes_what_the_cpu_does(knobs):
    net, (batch,) = make(**knobs), one_batch([3, 50, 17, 1, 127])
    losses, gradient = gradients_of(net.double(), doubled(batch))
    net.float().cuda()
    for context, bound in ((nullcontext(), 1e-3), (torch.autocast("cuda", torch.bfloat16), 0.05)):
        found, found_gradient = gradients_of(net, to_cuda(batch), context)
        assert torch.allclose(found, losses, rtol=bound, atol=bound)
        assert (found_gradient - gradient).norm() < 2 * bound * gradient.norm()


@needs_cuda
def test_flash_runs_and_is_right_on_cuda():
    net = make().cuda()
    mixer = net.encoder.backbone.blocks[0].mixer
    assert mixer.can_flash == (torch.cuda.get_device_capability() >= (8, 0))
    if mixer.can_flash:
        assert common.flash_error(mixer, torch.device("cuda"), torch.bfloat16) < 0.05


@needs_cuda
def test_logits_far_below_zero_have_finite_gradients():
    """cuDNN's attention had NaN there, at 64 tokens (pytorch issue 196678)."""
    net, (batch,) = make(), one_batch([63, 63, 63, 63])
    with torch.no_grad():
        for block in net.encoder.backbone.blocks:
            D = net.encoder.embedding.cls.shape[0]
            block.mixer.qkv.weight[D:2 * D] = -20 * block.mixer.qkv.weight[:D]  # k = -20 q: logits near -120
    _, gradient = gradients_of(net.cuda(), to_cuda(batch), torch.autocast("cuda", torch.bfloat16))
    assert gradient.isfinite().all()


@needs_cuda
def test_batches_arrive_on_cuda_as_they_were():
    def load(step):
        return one_batch([3, 50, 17, 1, 127], seed=step, n=2)

    for step, batches in enumerate(data.prefetch(load, range(8), torch.device("cuda:0"))):
        for batch, expected in zip(batches, load(step), strict=True):
            for name, value in expected.items():
                if torch.is_tensor(value):
                    assert batch[name].is_cuda and torch.equal(batch[name].cpu(), value)


@needs_cuda
def test_the_hot_loop_does_not_wait_on_cuda():
    net, batches = make().cuda(), [to_cuda(batch) for batch in one_batch([3, 50, 17, 1, 127], n=2)]
    config = train.TrainConfig()
    process = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    optimizer = GuardedOptimizer(net, train.make_optimizers(net, config), config, process)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # first the optimizer's state is made
        try:
            for batch in batches:
                with torch.autocast("cuda", torch.bfloat16):
                    losses = net(batch)
                optimizer.backward(sum(loss.sum() for loss in losses.values()))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


CUDA_RUN = [argument for argument in TINY_RUN if not argument.startswith(("--device", "--dtype"))]
CUDA_RUN.append("--device=cuda")


@needs_cuda
@pytest.mark.parametrize("more", [["--dtype=float32"], ["--dtype=bfloat16"],
                                  ["--dtype=float16", "--optimizer=muon"], ["--compile=True"],
                                  ["--backbone=gru"], ["--backbone=mamba"]], ids=str)
def test_train_and_finetune_on_cuda(pretrained, demo_data, tmp_path, more):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *CUDA_RUN, *more)
    if not {"--backbone=gru", "--backbone=mamba", "--optimizer=muon"} & set(more):
        assert column(tmp_path / "run", "loss") == pytest.approx(column(pretrained[0], "loss"), rel=0.05)
    run_ok("finetune.py", f"--data_dir={demo_data}", f"--pretrained={tmp_path}/run/ckpt.pt", "--device=cuda",
           f"--out_dir={tmp_path}/tuned", "--batch_size=16", "--max_steps=4", "--warmup_steps=1",
           "--val_events=50")
    assert np.isfinite(column(tmp_path / "tuned", "val_loss")).all()


@needs_cuda
def test_a_run_on_cuda_goes_on(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", *CUDA_RUN, "--dtype=float32", "--schedule=constant"]
    run_ok("train.py", *args, f"--out_dir={tmp_path}/a", "--max_steps=3")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/a")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)  # atomics: not bit for bit


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("more", [[], ["--compile=True"]], ids=str)
def test_two_gpus_train_like_one(demo_data, tmp_path, more):
    args = [f"--data_dir={demo_data}", *CUDA_RUN, "--dtype=float32"]
    run_ok("train.py", *args, f"--out_dir={tmp_path}/one")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/two", *more, launcher=torchrun(2))
    assert column(tmp_path / "two", "loss") == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-3)
