"""What a GPU does differently. Without one a step runs on torch's meta device."""
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model as m
import optim
import utils
from conftest import TINY_RUN, run, run_ok, torchrun
from test_model import VARIANTS, doubled, make, one_batch, outputs_and_gradient
from test_train import assert_trained_alike, column

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
LENGTHS = [3, 50, 17, 1, 127]

def batch_to(device, batch):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}

# ---- without a GPU ------------------------------------------------------------------------------

class NothingWaits(TorchDispatchMode):
    """Refuses CPU tensors and masks as indices. The meta device refuses to read values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        assert all(x.device.type == "meta" for x in tensors), f"{function} has a CPU tensor"
        if str(function).startswith("aten.index"):
            assert all(x.dtype != torch.bool for x in tensors[1:]), f"{function} has a mask"
        return function(*args, **(kwargs or {}))

@pytest.mark.parametrize("kind, options", [
    *((m.PolarBERT, options) for options in VARIANTS if "mup_base_width" not in options),
    *((m.Reconstructor, {"task": task, "direction_loss": "angular+vmf"}) for task in m.TASKS)])
def test_a_step_waits_for_nothing(kind, options, monkeypatch):
    """Forward, backward, Muon and the clipped step of a model on the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", MagicMock())  # fused, which meta is not
    net = make(kind, **options, optimizer="muon").to("meta")
    optimizers = optim.make_optimizers(net, net.config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    lengths = [3, 17, 1, 20] if options.get("backbone") == "gru" else LENGTHS  # unrolled, slow
    batches = [batch_to("meta", batch) for batch in one_batch(lengths, n=2)]
    with NothingWaits():
        for batch in batches:
            y = net(batch)
            losses = y.values() if kind is m.PolarBERT else [net.loss(y, batch)]
            sum(loss.sum() for loss in losses).backward()
        norm = optim.clip_and_step(net, optimizers, scaler, 1e-3, 1.0)
    assert norm.device.type == "meta" and all(x.grad is None for x in net.parameters())

@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_is_taken_in_half_precision_and_traced_both_ways(qk_norm, monkeypatch):
    """On the meta device, where varlen_attn has an implementation without a kernel."""
    flash = Mock(wraps=m.varlen_attn)
    monkeypatch.setattr(m, "varlen_attn", flash)
    mixer = make(qk_norm=qk_norm).encoder.blocks[0].mixer.to("meta").bfloat16()
    mixer.can_flash = True
    packing = m.Packing(torch.empty(4, dtype=torch.int32, device="meta"), 9, 15)
    x = torch.empty(15, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mixer(x, packing).sum().backward()
    assert flash.call_count == 1 and x.grad.shape == x.shape
    mixer.float()(x.float(), packing)
    assert flash.call_count == 1  # float32 has no flash kernel

@pytest.mark.parametrize("dtype, tf32", [("bfloat16", "ieee"), ("float32", "tf32")])
def test_what_is_set_on_cuda(dtype, tf32, monkeypatch):
    cuda, backend = Mock(device_count=lambda: 1), Mock()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.backends, "cuda", backend)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: args)
    *_, autocast = utils.init_distributed(SimpleNamespace(device="auto", dtype=dtype))
    assert autocast == ("cuda", getattr(torch, dtype)) and backend.matmul.fp32_precision == tf32
    cuda.set_device.assert_called_once_with(0)
    backend.enable_cudnn_sdp.assert_called_once_with(False)

@pytest.mark.parametrize("options", [
    {"cls_target": "charge+line_fit", "dom_head": "position"}, {"backbone": "mamba"},
    {"mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "dom_loss": "emd"}], ids=str)
def test_one_graph_for_all_micro_batches(options):
    """Except with a GRU: torch traces no nn.GRU, each stays one opaque call."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, rng = CompileCounter(), np.random.default_rng(0)
    net = make(**options, num_layers=1)
    compiled = torch.compile(net, backend=counter, dynamic=True, fullgraph=True)
    for seed in range(8):
        compiled(one_batch(rng.integers(2, 128, rng.integers(20, 40)), seed=seed)[0])
    assert counter.frame_count == 1

def test_a_compiled_run_is_the_same(pretrained, demo_data, tmp_path, monkeypatch):
    """Traced, without the compiler, which takes 15 s a layer."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN,
           "--compile=True")
    assert_trained_alike(tmp_path, pretrained)

# ---- on a GPU -----------------------------------------------------------------------------------

@needs_cuda
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cuda_computes_what_the_cpu_does(options):
    net, (batch,) = make(**options), one_batch(LENGTHS)
    y, gradient = outputs_and_gradient(net.double(), [doubled(batch)])
    net.float().cuda()
    half = partial(torch.autocast, "cuda", torch.bfloat16)
    for context, bound in ((nullcontext, 1e-3), (half, 0.05)):
        on_gpu = outputs_and_gradient(net, [batch_to("cuda", batch)], context)
        y_on_gpu, gradient_on_gpu = (x.cpu().double() for x in on_gpu)
        assert torch.allclose(y_on_gpu, y, rtol=bound, atol=bound)
        assert (gradient_on_gpu - gradient).norm() < 2 * bound * gradient.norm()

@needs_cuda
def test_flash_is_the_padded_attention():
    mixer, (batch,) = make().encoder.blocks[0].mixer.cuda().bfloat16(), one_batch(LENGTHS)
    packing = m.Packing(batch["cu_seqlens"].cuda(), batch["max_seqlen"], sum(LENGTHS) + 5)
    x = torch.randn(sum(LENGTHS) + 5, 32, device="cuda", dtype=torch.bfloat16)
    assert mixer.can_flash == (torch.cuda.get_device_capability() >= (8, 0))
    flash = mixer(x, packing)
    mixer.can_flash = False
    assert (flash - mixer(x, packing)).norm() < 0.02 * flash.norm()

@needs_cuda
def test_the_hot_loop_does_not_wait_on_cuda(request):
    request.addfinalizer(partial(torch.cuda.set_sync_debug_mode, "default"))
    net, scaler = make(optimizer="muon").cuda(), torch.amp.GradScaler("cuda", enabled=False)
    optimizers = optim.make_optimizers(net, net.config)
    load = partial(one_batch, LENGTHS, 0.3, n=2)
    for batches in data.prefetch(load, range(9), torch.device("cuda:0")):
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                losses = net(batch)
            sum(losses.values()).sum().backward()
        optim.clip_and_step(net, optimizers, scaler, 1e-3, 1.0)
        torch.cuda.set_sync_debug_mode("error")  # the first step makes the optimizers' state

@needs_cuda
@pytest.mark.parametrize("option", ["--dtype=float32", "--dtype=bfloat16", "--dtype=float16",
                                    "--optimizer=muon", "--compile=True", "--backbone=gru"])
def test_train_resume_and_finetune_on_cuda(pretrained, demo_data, tmp_path, option):
    for n_steps in (3, 6):
        run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *TINY_RUN,
               "--device=cuda", "--schedule=constant", f"--max_steps={n_steps}", option)
    if option in ("--dtype=float32", "--dtype=bfloat16", "--compile=True"):
        loss = column(pretrained, "loss")[:5]  # later its learning rate falls
        assert column(tmp_path / "run", "loss")[:5] == pytest.approx(loss, rel=0.02)
    run_ok("finetune.py", f"--data_dir={demo_data}", f"--pretrained={tmp_path}/run/ckpt.pt",
           f"--out_dir={tmp_path}/tuned", *TINY_RUN, "--device=cuda")
    assert np.isfinite(column(tmp_path / "tuned", "val_loss")).all()

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("option", ["--compile=False", "--compile=True"])
def test_two_gpus_train_like_one(pretrained, demo_data, tmp_path, option):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN,
           "--device=cuda", option, how=run, launcher=torchrun(2))
    assert column(tmp_path, "loss") == pytest.approx(column(pretrained, "loss"), rel=1e-2)
