"""tools/: pictures, sweeps, ratios of speed, published checkpoints, export. Real runs, tiny."""
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluate
from conftest import TINY_RUN, call, run_ok, user_error
from model import PolarBERT
from tools import bench, sweep
from train import TrainConfig

# ---- plot ---------------------------------------------------------------------------------------

@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    from tools import plot
    yield plot
    plot.plt.close("all")

def legend_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]

def test_curves_show_training_and_every_evaluation(plot, pretrained, finetuned, tmp_path):
    path = tmp_path / "curves.png"
    run_ok("tools/plot.py", f"--runs={pretrained},{finetuned}", f"--out={path}")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    line, dots, _, guess = plot.draw_curves(plot.PlotConfig(), [pretrained]).axes[0].lines
    assert line.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    log = plot.read_log(pretrained)
    assert dots.get_ydata().tolist() == log["val_dom_loss"][[0, 3, 6]].tolist()
    assert guess.get_ydata()[0] == pytest.approx(np.log(5160))

def test_an_event_is_drawn_with_guesses_and_directions(plot, demo_data, pretrained, finetuned):
    config = plot.PlotConfig(data_dir=str(demo_data), event=3)
    legend = " | ".join(legend_of(plot.draw_event(config, [pretrained, finetuned]).axes[0]))
    split = data.open_split(demo_data, "val")
    mask = data.draw_mask(*data.read_events(split, np.array([3])), split.geometry["string"],
                          np.zeros(1, int), 0.25, "pulse", 0)
    assert f"of {mask.sum()} strings right" in legend and "masked DOM" in legend
    assert "truth" in legend and "off by" in legend
    config.split = "test"  # its directions are unknown
    legend = " | ".join(legend_of(plot.draw_event(config, [finetuned]).axes[0]))
    assert "truth" not in legend and "off by" not in legend

def write_results(path, variants):
    """Write results.csv from {variant: {rate: [metric of seed 0, which tunes, 1, 2, ...]}}."""
    sweep.write_csv(path, [
        {"variant": variant, "learning_rate": rate, "seed": seed, "metric": "val_loss",
         "role": "report" if seed else "tune", "val_loss": loss}
        for variant, rates in variants.items() for rate, losses in rates.items()
        for seed, loss in enumerate(losses)])

def test_a_sweep_is_drawn_against_names_numbers_or_rates(plot, tmp_path):
    config = plot.PlotConfig(results=f"{tmp_path}/results.csv")
    write_results(config.results, {"relu": {0.1: [4, 4]}, "gelu": {0.1: [3, 3]}})
    labels = plot.draw_sweep(config, []).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["relu", "gelu"]
    write_results(config.results, {"a/500": {0.1: [4, 5, 5.2], 0.2: [6]}, "b/500": {0.1: [7, 7]},
                                   "a/2000": {0.1: [3, 3], 0.2: ["inf"]}})
    axis = plot.draw_sweep(config, []).axes[0]
    line, _, bars = axis.containers[0]
    assert legend_of(axis) == ["a", "b"]
    assert line.get_xdata().tolist() == [500, 2000] and line.get_ydata().tolist() == [5.1, 3]
    spread = np.ptp(bars[0].get_segments()[0][:, 1]) / 2
    assert spread == pytest.approx(np.std([5, 5.2], ddof=1))
    config.x = "learning_rate"
    axis = plot.draw_sweep(config, []).axes[0]
    assert legend_of(axis)[:3] == ["a/500", "b/500", "a/2000"]
    assert axis.containers[0][0].get_ydata().tolist() == [4, 6]

# ---- sweep, bench -------------------------------------------------------------------------------

def test_a_sweep_tunes_on_one_seed_and_reports_on_others(demo_data, tmp_path, monkeypatch):
    commands = []
    def call_script(command, stdout, stderr):  # in this process, which saves its start
        commands.append(command)
        done = call(*command[1:])
        stdout.write(done.stdout + done.stderr)
        return SimpleNamespace(wait=lambda: done.returncode)
    monkeypatch.setattr(sweep.subprocess, "Popen", call_script)
    base = " ".join([f"--data_dir={demo_data}", *TINY_RUN, "--max_steps=2", "--grad_clip=1e30",
                     "--val_events=8", "--num_layers=1"])
    args = [f"--base={base}", "--rates=0.001,1e30", f"--out_dir={tmp_path}/s",
            "--seeds=20261128,20261129", "--variants={'relu': '', 'gelu': '--mlp=gelu'}"]
    listed = run_ok("tools/sweep.py", *args, "--dry_run=True").stdout
    assert listed.count("python train.py") == 8 and listed.count("BEST --seed=20261129") == 2
    assert not commands and not (tmp_path / "s").exists()
    args.append("--variants={'gelu': '--mlp=gelu'}")
    done = run_ok("tools/sweep.py", *args)
    assert len(commands) == 4 and "warning: gelu: 0.001 is at the end" in done.stdout
    low, high, *runs = rows = sweep.read_csv(tmp_path / "s/results.csv")
    assert high["learning_rate"] == "1e30" and high["val_dom_loss"] == "inf"  # it diverged
    assert [row["seed"] for row in runs] == ["20261128", "20261129"]
    last = sweep.read_csv(tmp_path / "s/gelu/lr0.001_seed20261128/log.csv")[-1]
    assert last["step"] == "2" and last["val_dom_loss"] == runs[0]["val_dom_loss"]
    x = [float(row["val_dom_loss"]) for row in runs]
    assert f"| gelu | 0.001 | {np.mean(x):.4g} +- {np.std(x, ddof=1):.2g} | 2 |" in done.stdout
    run_ok("tools/sweep.py", *args)  # all are finished
    assert len(commands) == 4 and sweep.read_csv(tmp_path / "s/results.csv") == rows
    assert "report = ''" in user_error("tools/sweep.py", *args, "--report=--val_events=9")
    assert "'gelu', not 'relu'" in user_error("tools/sweep.py", *args, "--variants={'gelu': ''}")
    (tmp_path / "s/results.csv").unlink()
    assert "no loss at its end" in user_error("tools/sweep.py", *args, "--metric=loss")
    log = tmp_path / "s/gelu/lr0.001_seed0/log.csv"
    log.write_text(log.read_text().partition("\n1,")[0])  # the disk was full
    assert "no val_dom_loss at its end" in user_error("tools/sweep.py", *args)
    (tmp_path / "s/options.json").unlink()
    assert "gelu ran with adam_eps = None" in user_error("tools/sweep.py", *args)

def test_sweeps_at_the_same_time_lose_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **_: SimpleNamespace(wait=lambda: 3))
    config = sweep.SweepConfig(base="", variants=dict.fromkeys("abcdef", ""), out_dir=tmp_path)
    with ThreadPoolExecutor() as pool:
        [*pool.map(lambda x: sweep.run_missing(config, x, "1", "1,2,3,4", "report"), "abcdef")]
    assert len(sweep.read_csv(tmp_path / "results.csv")) == 24

def test_a_run_that_fails_ends_the_sweep_in_one_line(demo_data, tmp_path):
    args = [f"--base=--data_dir={demo_data}", "--rates=0.001", f"--out_dir={tmp_path}"]
    line = user_error("tools/sweep.py", *args, "--variants={'a': '--val_split=nowhere'}")
    assert "a/lr0.001_seed1 ended with status 1" in line and "no split 'nowhere'" in line

def test_bench_compares_with_named_baselines(demo_data):
    done = run_ok("tools/bench.py", f"--data_dir={demo_data}", "--rounds=1", "--batch_size=4",
                  "--device=cpu", "--dtype=float32")
    baselines = [line for line in done.stdout.splitlines() if " baseline " in line]
    assert len(baselines) == 4 and all(" 1.00 x" in line for line in baselines)
    assert done.stdout.count(" events/s ") == 8

@pytest.mark.parametrize("mask_unit", ["pulse", "string"])
def test_the_baseline_of_bench_computes_the_same_losses(demo_data, mask_unit):
    split, run = data.open_split(demo_data, "pretrain"), TrainConfig(num_layers=2)
    run.mask_unit, run.cls_target = mask_unit, "charge+line_fit"
    plain = bench.plain_batch(split, np.arange(20), run)
    events, pulses = data.read_events(split, np.arange(20))
    mask = torch.zeros(plain["valid"].numel(), dtype=bool).index_fill(0, plain["masked"], True)
    mask = mask.view_as(plain["valid"])[:, 1:][plain["valid"][:, 1:]].numpy()  # without [CLS]
    packed, = data.micro_batches(events, pulses, 20, ["total_charge", "line_fit"], mask)
    model = PolarBERT(run, split.geometry)
    losses, expected = model(packed), bench.plain_losses(model, plain)
    for name, loss in losses.items():
        assert torch.allclose(loss, expected[name][packed["row"]], atol=1e-4), name

# ---- published checkpoints and export -----------------------------------------------------------

class Published(nn.Module):
    """timinar/PolarBERT's flash variant, written out for one event: D = 32, 4 heads, 2 blocks."""

    def __init__(self, position):
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.cls_embedding = nn.Parameter(torch.empty(1, 1, 32))
        self.embedding.features_embedding = nn.Linear(3, 16)
        if position is None:
            self.embedding.dom_embedding = nn.Embedding(5162, 16)
        else:
            self.embedding.position_embedding = nn.Linear(3, 16)
            self.embedding.register_buffer("dom_positions", F.pad(position / 500, (0, 0, 1, 0)))
            self.embedding.mask_token_embedding = nn.Parameter(torch.empty(1, 16))
            self.final_layer_norm = nn.LayerNorm(32)
        self.transformer_blocks = nn.ModuleList(nn.ModuleDict({
            "layer_norm1": nn.LayerNorm(32), "layer_norm2": nn.LayerNorm(32),
            "attention": nn.ModuleDict({f"w{x}": nn.Linear(32, 32, bias=False) for x in "qkvo"}),
            "feed_forward": nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)),
        }) for _ in range(2))
        self.unembedding, self.charge_prediction = nn.Linear(32, 5161), nn.Linear(32, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, dom, features, masked):
        embedding = self.embedding
        table = embedding.dom_embedding.weight if hasattr(embedding, "dom_embedding") else \
            torch.cat([embedding.position_embedding(embedding.dom_positions),
                       embedding.mask_token_embedding])
        dom = torch.where(masked, 5161, dom + 1)  # 0 is padding
        x = torch.cat([table[dom], embedding.features_embedding(features)], 1)
        x = torch.cat([embedding.cls_embedding[0], x])
        for block in self.transformer_blocks:
            attention, h = block["attention"], block["layer_norm1"](x)
            q, k, v = (attention[f"w{i}"](h).view(-1, 4, 8).transpose(0, 1) for i in "qkv")
            h = (q @ k.mT / 8 ** 0.5).softmax(-1) @ v
            x = x + attention["wo"](h.transpose(0, 1).flatten(1))
            x = x + block["feed_forward"](block["layer_norm2"](x))
        x = self.final_layer_norm(x) if hasattr(self, "final_layer_norm") else x
        return self.unembedding(x[1:]), self.charge_prediction(x[:1])

@pytest.mark.parametrize("has_positions", [False, True])
def test_a_published_checkpoint_gives_its_own_outputs(has_positions, demo_data, tmp_path):
    torch.manual_seed(0)
    position = torch.from_numpy(data.read_folder(demo_data)[1]["position"].copy())
    published = Published(position if has_positions else None)
    state = {f"model.{name}": x for name, x in published.state_dict().items()}  # as in Lightning's
    path = tmp_path / "published.ckpt"
    args = ["tools/import_published.py", f"--checkpoint={path}", "--num_heads=4",
            f"--data_dir={demo_data}", f"--out={tmp_path}/ours.pt"]
    path.write_text("<html>")
    assert "damaged, or not a checkpoint" in user_error(*args)
    torch.save({"state_dict": state, "hyper_parameters": sweep.SweepConfig()}, path)
    exec(user_error(*args).split('"')[1])  # python -c "..."
    torch.save({"state_dict": torch.load(f"{path}.pth")}, path)
    run_ok(*args)
    model, *_ = evaluate.load_model(tmp_path / "ours.pt", demo_data)
    events, pulses = data.read_events(data.open_split(demo_data, "val"), np.array([5]))
    mask = np.arange(len(pulses)) % 3 == 0
    batch, = data.micro_batches(events, pulses, 1, ["total_charge"], mask)
    time, charge, aux = (batch[name][1:].double() for name in ("time", "charge", "aux"))
    features = torch.stack([(time - 1e4) / 3e4, charge.log10() / 3, aux - 0.5], 1)
    with torch.no_grad():
        logits, cls_pred = model.predict(batch)
        expected, charge = published.double()(batch["dom"][1:], features, torch.from_numpy(mask))
    assert torch.allclose(logits.double(), expected[mask][:, 1:], atol=1e-3)
    assert cls_pred["charge"].item() == pytest.approx(charge.item(), abs=1e-3)

def test_an_exported_model_gives_the_same(demo_data, finetuned, tmp_path):
    run_ok("tools/export.py", f"--checkpoint={finetuned}/best.pt", f"--out={tmp_path}/model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    events, pulses = data.read_events(data.open_split(demo_data, "val"), np.arange(20))
    columns = {name: torch.tensor(pulses[name].tolist()) for name in data.PULSE.names}
    x = exported(columns, torch.tensor(events["length"].tolist()))
    model, *_ = evaluate.load_model(finetuned / "best.pt")
    batch, = data.micro_batches(events, pulses, 20)
    assert torch.allclose(x[batch["row"]], model(batch), atol=1e-5)
    for dom, n, text in (0, [128], "127"), (0, [0, 9], "127"), (0, [10], "add"), (5160, [9], "dom"):
        columns["dom"][0] = dom
        with pytest.raises(RuntimeError, match=text):
            exported({name: x[:1].expand(9) for name, x in columns.items()}, torch.tensor(n))
