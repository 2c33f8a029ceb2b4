"""Config rules, learning rate, checkpoints, log.csv."""
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import knobs
from conftest import ROOT, forked_ranks, run, run_ok, torchrun, user_error
from evaluate import EvaluateConfig
from finetune import FinetuneConfig
from prepare import PrepareConfig
from simulate import SimulateConfig
from tools.export import ExportConfig
from tools.graphnet import GraphnetConfig
from tools.plot import PlotConfig
from tools.prometheus import PrometheusConfig
from tools.study import StudyConfig
from train import TrainConfig, learning_rate

CONFIGS = {"simulate": SimulateConfig, "prepare": PrepareConfig, "tools/prometheus": PrometheusConfig,
           "train": TrainConfig, "finetune": FinetuneConfig}
OTHERS = {"evaluate": EvaluateConfig, "tools/study": StudyConfig, "tools/plot": PlotConfig,
          "tools/export": ExportConfig, "tools/graphnet": GraphnetConfig}


def load(monkeypatch, cls, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    return knobs.load_config(cls)


def test_files_and_flags_apply_left_to_right(monkeypatch, tmp_path, capsys):
    (tmp_path / "a.py").write_text("# one\nmax_steps = 5 * 100\nbatch_size = 64\nlearning_rate = 1\n")
    (tmp_path / "b.py").write_text("batch_size = 32\n")
    config = load(monkeypatch, TrainConfig, tmp_path / "a.py", "--max_steps=7", tmp_path / "b.py",
                  "--batch_size=1.6e1")
    assert (config.max_steps, config.batch_size, config.learning_rate) == (7, 16, 1.0)
    assert isinstance(config.batch_size, int) and isinstance(config.learning_rate, float)
    assert config.out_dir == "out/a+b"
    assert config.sources == {"max_steps": "command line", "batch_size": "command line",
                              "learning_rate": f"{tmp_path}/a.py"}
    assert capsys.readouterr().out == ""  # not before all is checked
    knobs.print_knobs(config)
    assert "knob max_steps = 7 (default 127000, from command line)" in capsys.readouterr().out


@pytest.mark.parametrize("argument, words", [
    ("--batchsize=3", "did you mean batch_size"),
    ("--batch_size=3.5", "3.5 is not an integer"),
    ("--batch_size=abc", "'abc' is not an integer"),
    ("--batch_size=True", "True is not an integer"),
    ("--resume=1", "1 is not True or False"),
    ("--learning_rate=inf", "not a finite number"),
    ("--learning_rate=1e999", "not a finite number"),
    ("--learning_rate=-1", "must be greater than 0"),
    ("--mask_prob=1.5", "between 0 and 1"),
    ("--num_heads=7", "embedding_dim = 256 cannot be shared among num_heads = 7"),
    (("--backbone=mamba", "--embedding_dim=66", "--dom_embed_dim=6", "--num_heads=3"),
     "an embedding_dim that 4 divides"),
    (("--mup_base_width=64", "--mup_base_heads=3"), "mup_base_heads = 3: must divide mup_base_width = 64"),
    (("--mup_base_width=64", "--optimizer=muon"), "put sample_config/ablation/adamw.py after"),
    ("--backbone=transfomer", "choose one of"),
    ("--schedule=cosin", "did you mean 'cosine'"),
    ("--dom_embed_dim=256", "smaller than"),
    ("--micro_batch_size=-1", "must not be negative"),
    ("--max_steps={[1]:2}", "not an integer"),
    ("--max_steps", "--key=value"),
    ("-max_steps=3", "--key=value"),
    ("nothing.py", "no such config file"),
    ("config/base.py", "cp -r sample_config config"),
    ("import os", "assignments only"),
    ("x = y = 3 +", "not valid python"),
    ("max_steps = undefined", "undefined"),
    ("max_steps = '3'", "'3' is not an integer"),
])
def test_bad_configs_end_in_one_line(monkeypatch, tmp_path, argument, words):
    monkeypatch.chdir(tmp_path)
    if " " in argument:  # the text of a config file
        (tmp_path / "bad.py").write_text(argument)
        argument = "bad.py"
    with pytest.raises(SystemExit) as stop:
        load(monkeypatch, TrainConfig, *(argument if isinstance(argument, tuple) else [argument]))
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_a_bad_config_from_the_shell():
    assert "did you mean max_steps" in user_error("train.py", "--max_step=3")


@pytest.mark.parametrize("stage", CONFIGS | OTHERS)
def test_help_explains_every_knob(stage):
    text = run_ok(f"{stage}.py", "--help").stdout
    for field in dataclasses.fields((CONFIGS | OTHERS)[stage]):
        assert re.search(rf"--{field.name}=\S.* +\S{{2,}}",
                         text), f"{stage}: --help has no comment for {field.name}"


@pytest.mark.parametrize("stage", CONFIGS | OTHERS)
def test_every_knob_is_read(stage):
    others = {"train": ["common.py", "model.py", "optimizers.py", "runs.py"],
              "finetune": ["common.py", "model.py", "optimizers.py", "runs.py", "tasks.py", "train.py"],
              "evaluate": ["common.py"], "tools/prometheus": ["tools/layout.py"],
              "tools/graphnet": ["tools/layout.py"]}
    files = [f"{stage}.py", *others.get(stage, [])]
    source = "".join((ROOT / file).read_text() for file in files)
    for field in dataclasses.fields((CONFIGS | OTHERS)[stage]):
        is_weight = field.name.startswith("lambda_")  # read by total_loss, for the names in cls_target
        uses = is_weight or re.findall(rf"(?:config|self)\.{field.name}\b", source)
        assert uses, f"{stage}: nothing reads the knob {field.name}"


def test_every_sample_config_loads(monkeypatch):
    files = sorted([*(ROOT / "sample_config").glob("*.py"), *(ROOT / "sample_config/ablation").glob("*.py")])
    assert len(files) > 5
    for file in files:
        found = knobs.read_config_file(str(file))
        stages = [stage for stage, cls in CONFIGS.items()
                  if found.keys() <= {f.name for f in dataclasses.fields(cls)}]
        assert stages, f"{file.name}: no stage has all of its knobs"
        for stage in stages:
            args = ["--pretrained=x"] if stage == "finetune" and "pretrained" not in found else []
            if found.get("freeze_backbone"):
                args = ["--pretrained=x"]
            load(monkeypatch, CONFIGS[stage], *args, file)
        assert file.read_text().startswith("# "), f"{file.name} does not say what it changes"


def test_base_is_the_default(monkeypatch):
    config = load(monkeypatch, TrainConfig, ROOT / "sample_config/base.py")
    assert config.compile and dataclasses.replace(config, out_dir="", compile=False) == TrainConfig()


def test_the_demo_follows_the_best_recipe():
    demo, best = (knobs.read_config_file(ROOT / f"sample_config/{name}.py") for name in ("demo", "best"))
    assert best and best.items() <= demo.items()


def schedule_config(**knobs):
    return dataclasses.replace(TrainConfig(), learning_rate=0.1, max_steps=100, **knobs)


def test_learning_rate_agrees_with_torch():
    def rates(make):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        scheduler, seen = make(optimizer), []
        for _ in range(100):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen
    lr = torch.optim.lr_scheduler
    warm = lambda o: lr.LinearLR(o, start_factor=0.1, total_iters=9)  # 0.01, 0.02, ... 0.1 in steps 0..9
    trapezoid = rates(lambda o: lr.SequentialLR(
        o, [warm(o), lr.LinearLR(o, start_factor=1.0, end_factor=1e-12, total_iters=20)], milestones=[80]))
    cosine = rates(lambda o: lr.SequentialLR(o, [warm(o), lr.CosineAnnealingLR(o, T_max=90)],
                                             milestones=[10]))
    for schedule, expected in (("trapezoidal", trapezoid), ("cosine", cosine)):
        config = schedule_config(schedule=schedule, warmup_steps=10, cooldown_steps=20)
        assert [learning_rate(step, config) for step in range(100)] == pytest.approx(expected, abs=1e-9)


def test_warmup_follows_beta2_and_both_ends_are_finite():
    config = schedule_config(schedule="constant", beta2=0.95)
    assert learning_rate(9, config) == pytest.approx(0.05) and learning_rate(19, config) == 0.1
    for schedule in ("trapezoidal", "cosine", "constant"):  # a warm-up longer than the run
        config = schedule_config(schedule=schedule, warmup_steps=1000, cooldown_steps=0)
        assert all(0 < learning_rate(step, config) <= 0.1 for step in range(100))
    assert learning_rate(100, schedule_config(schedule="cosine", warmup_steps=100)) == 0.1  # a warm-up alone
    assert learning_rate(100, schedule_config(schedule="trapezoidal", beta2=0.9)) == 0


def test_checkpoints_survive_a_failed_save_and_refuse_damage(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    common.save_checkpoint(path, step=3, config={}, model={"w": torch.ones(2)})
    assert torch.equal(common.load_checkpoint(path)["model"]["w"], torch.ones(2))

    class Unpicklable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit, match="No space left"):
        common.save_checkpoint(path, step=4, config=Unpicklable(), model={})
    with pytest.raises(SystemExit, match="holds NaN"):
        common.save_checkpoint(path, step=5, config={}, model={"w": torch.tensor([1.0, float("nan")])})
    assert common.load_checkpoint(path)["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]

    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-50], b"hello" * 50):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match="not a readable checkpoint"):
            common.load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(SystemExit, match="format 99, need"):
        common.load_checkpoint(path)
    with pytest.raises(SystemExit, match="no such checkpoint"):
        common.load_checkpoint(tmp_path / "none.pt")


def test_log_is_cut_where_a_run_goes_on(tmp_path):
    config, columns = SimpleNamespace(out_dir=str(tmp_path), wandb_project=""), ["step", "loss", "val_loss"]
    log = common.start_log(config, columns, 0)
    for step in range(5):
        log({"step": step, "loss": 1 / 3, **({"val_loss": math.pi} if step == 2 else {})})
    common.start_log(config, columns, 3)({"step": 3, "loss": 2.0})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss,val_loss", "0,0.333333,", "1,0.333333,",
                                                          "2,0.333333,3.14159", "3,2,"]


def test_signals_are_noted_in_the_loop_and_end_the_process_after_it():
    done = subprocess.run([sys.executable, "-c", "import common, os, signal\ncaught = "
                                                 "common.catch_signals()\n"
                           "os.kill(os.getpid(), signal.SIGTERM)\nprint(caught == [signal.SIGTERM], "
                           "flush=True)\n"
                           "common.release_signals()\nos.kill(os.getpid(), signal.SIGTERM)\nprint('still "
                           "here')"],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n"), done.stderr


def test_a_folder_that_cannot_be_written_is_one_line(demo_data, tmp_path):
    (tmp_path / "file").write_text("")
    line = user_error("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/file/run",
                      "--val_events=0", "--device=cpu")
    assert f"{tmp_path}/file/run" in line and run("train.py", "--out_dir=x",
                                                  "--device=cuda").returncode in (0, 1)


# ------------------------------------------------------------------------------------------------------------
# errors, ranks, devices
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("who, said, launcher", [("all", ["error: no such thing"], torchrun(2)),
                                                 ("one", ["error: rank 1: no such thing"], forked_ranks(2))])
def test_what_all_ranks_say_is_printed_once(tmp_path, monkeypatch, who, said, launcher):
    (tmp_path / "stage.py").write_text(
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import common\n"
        "def main():\n"
        f"    if {who!r} == 'all' or os.environ['RANK'] == '1':\n"
        "        common.fail('no such thing')\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    common.run_stage(main)\n")
    monkeypatch.syspath_prepend(tmp_path)  # where forked ranks find it
    done = run("stage.py" if callable(launcher) else tmp_path / "stage.py", launcher=launcher)
    assert done.returncode != 0 and [line for line in done.stderr.splitlines()
                                     if line.startswith("error: ")] == said


def test_an_error_stands_on_a_line_of_its_own(capsys):
    def main():
        with common.progress_bar(10, "outer", "step") as outer:
            outer.update(3)
            with common.progress_bar(10, "inner", "event") as inner:
                inner.update(2)
            outer.update()
            common.fail("no such thing")
    with pytest.raises(SystemExit) as end:
        common.run_stage(main)
    assert end.value.code == 1 and "\nerror: no such thing\n" in capsys.readouterr().err


def test_ctrl_c_is_heard_again_after_an_error():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(ZeroDivisionError), common.holding_back_ctrl_c():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        1 / 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_config_file_that_changes_nothing_is_an_error(tmp_path):
    (tmp_path / "one.py").write_text("seed = 1\n")
    (tmp_path / "two.py").write_text("seed = 2\nmax_steps = 5\n")
    line = user_error("train.py", tmp_path / "one.py", tmp_path / "two.py")
    assert f"{tmp_path}/one.py changes nothing: {tmp_path}/two.py sets it again" in line
    told = user_error("train.py", tmp_path / "one.py", "--seed=3", f"--data_dir={tmp_path}/no")
    assert "changes nothing" not in told and f"{tmp_path}/no" in told  # a flag may set all of a file again


def test_ctrl_c_does_not_cut_what_a_finished_job_leads_to():
    found, before = [], signal.getsignal(signal.SIGINT)

    def done(job, result):
        os.kill(os.getpid(), signal.SIGINT)
        found.append(result)
    with common.progress_bar(3, "jobs", "event") as bar, pytest.raises(KeyboardInterrupt):
        common.run_in_workers(abs, [(-1,), (-2,), (-3,)], 1, bar, done)
    assert found and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("amx, avx512, dtype, why", [
    (True, True, "bfloat16", "AMX"), (False, True, "bfloat16", "AVX512-BF16"),
    (False, False, "float32", "no bfloat16")])
def test_auto_dtype_is_what_the_cpu_multiplies_in(monkeypatch, amx, avx512, dtype, why):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    found, reason = common.choose_dtype("auto", torch.device("cpu"))
    assert found == dtype and why in reason
    assert common.choose_dtype("float16", torch.device("cpu"))[0] == "float16"
