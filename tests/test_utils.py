"""utils.py and the schedule: config files, workers, checkpoints, log.csv."""
import importlib
import os
import re
import signal

import pytest
import torch

import utils
from conftest import ROOT, start
from model import Encoder, ModelConfig
from optim import get_lr
from train import TrainConfig

SCRIPTS = ("simulate", "prepare", "train", "finetune", "evaluate", "tools.bench", "tools.export",
           "tools.graphnet", "tools.import_published", "tools.plot", "tools.prometheus",
           "tools.sweep")
CONFIGS = {script: x for script in SCRIPTS
           for name, x in vars(importlib.import_module(script)).items()
           if name.endswith("Config") and x.__module__ == script}
SAMPLES = ROOT / "sample_config"

def load(cls, *args):
    return utils.load_config(cls, args=[str(arg) for arg in args])

# ---- config -------------------------------------------------------------------------------------

def test_files_and_options_apply_left_to_right(tmp_path, capsys):
    a, b = (tmp_path / f"{name}.py" for name in "ab")
    a.write_text("# one\nmax_steps = 5 * 100\nbatch_size = 64\nlearning_rate = 1\n")
    b.write_text("batch_size = 32\n")
    config = load(TrainConfig, a, "--max_steps=7", b, "--batch_size=1.6e1")
    values = config.max_steps, config.batch_size, config.learning_rate, config.out_dir
    assert repr(values) == "(7, 16, 1.0, 'out/a+b')"
    assert config.given == {"max_steps", "batch_size", "learning_rate"}
    output = capsys.readouterr().out
    assert "max_steps = 7, " in output and "seed = " not in output

@pytest.mark.parametrize("argument, words", [
    ("--batchsize=3", "did you mean batch_size"), ("--zzz=3", "no option zzz"),
    ("--batch_size=3.5", "not of type int"), ("--seed=-1", "0 or more"),
    ("--batch_size=abc", "ValueError"), ("--learning_rate=1e999", "finite"),
    ("--mask_prob=1.5", "between 0 and 1"), ("--schedule=cosin", "choose one"),
    ("x = y = 3 +", "SyntaxError"), ("seed = '3'", "not of type int"),
    ("--max_steps", "--key=value"), ("nothing.py", "nothing.py: FileNotFoundError"),
    ("--num_heads=7", "multiple of num_heads"), ("--cls_target=charge+size", "join some"),
    ("--dom_embed_dim=256", "larger than"), ("backbone = 'mamba'\nqk_norm = True", "are for"),
    ("backbone = 'gru'\nembedding_dim = 264", "multiple of 4 num_heads")])
def test_bad_configs_end_in_one_line(tmp_path, capsys, argument, words):
    if " " in argument:  # the text of a config file
        (tmp_path / "bad.py").write_text(argument)
        argument = tmp_path / "bad.py"
    with pytest.raises(SystemExit):
        Encoder(load(TrainConfig, argument), None)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1

@pytest.mark.parametrize("script, cls", CONFIGS.items())
def test_help_explains_every_option_and_each_is_read(script, cls):
    files, text = {script, "utils", "tools.kaggle_layout"}, utils.help_text(cls, "")
    if issubclass(cls, ModelConfig):
        files |= {"model", "recurrent", "optim", "data", "evaluate"}
    source = "".join((ROOT / f"{name.replace('.', '/')}.py").read_text() for name in files)
    for name in cls.__dataclass_fields__:
        assert re.search(rf"--{name}=[^<\s].* +\S", text), f"{name}: no comment or default"
        if not name.startswith("lambda_"):  # total_loss reads those of cls_target
            assert re.search(rf"(config|self|run)\.{name}\b", source), name

@pytest.mark.parametrize("path", sorted(SAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_every_sample_config_loads(path):
    values, before = {}, dict.fromkeys(CONFIGS, [])
    if path.parent.name == "ablation":
        before = {"train": [SAMPLES / "demo.py"], "finetune": [SAMPLES / "demo_finetune.py"]}
    exec(path.read_text(), {}, values)
    fits = [script for script in before
            if values.keys() <= CONFIGS[script].__dataclass_fields__.keys()]
    for script in fits:
        config = load(CONFIGS[script], *before[script], path)
        assert values.items() <= vars(config).items()
    assert fits and path.read_text().startswith("# ")

@pytest.mark.parametrize("name, script", [
    ("base", "train"), ("finetune", "finetune"), ("kaggle_prepare", "prepare")])
def test_a_sample_config_spells_out_the_defaults(name, script, capsys):
    config = load(CONFIGS[script], SAMPLES / f"{name}.py")
    defaults = vars(CONFIGS[script]())
    assert {x for x in defaults if getattr(config, x) != defaults[x]} <= {"out_dir", "compile"}

@pytest.mark.parametrize("schedule, lrs", [
    ("trapezoidal", {0: 0.1, 4: 0.5, 9: 1, 80: 1, 90: 0.5, 99: 0.05}),
    ("cosine", {0: 0.1, 4: 0.5, 9: 1, 10: 1, 40: 0.75, 55: 0.5, 70: 0.25, 100: 0}),
    ("constant", {0: 0.1, 4: 0.5, 9: 1, 99: 1})])
def test_learning_rate_warms_up_and_follows_the_schedule(schedule, lrs):
    config = TrainConfig(schedule=schedule, learning_rate=1.0, max_steps=100, warmup_steps=10,
                         cooldown_steps=20)
    assert {step: get_lr(step, config) for step in lrs} == pytest.approx(lrs)
    config.warmup_steps, config.beta2 = 0, 0.95  # 20 steps
    assert get_lr(9, config) == pytest.approx(0.5)

# ---- checkpoints, log, precision ----------------------------------------------------------------

def test_checkpoints_survive_a_failed_save_and_refuse_damage(tmp_path, capsys):
    path, good = tmp_path / "ckpt.pt", {"format": utils.CHECKPOINT_FORMAT, "step": 3}
    utils.write_atomic(path, lambda part: torch.save(good, part))
    def full_disk(part):
        torch.save({"format": 99}, part)
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit):
        utils.write_atomic(path, full_disk)
    assert "No space left on device); the file that was there" in capsys.readouterr().err
    assert utils.load_checkpoint(path) == good and os.listdir(tmp_path) == ["ckpt.pt"]
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-50], b"hello" * 50):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit):
            utils.load_checkpoint(path)
        assert "ckpt.pt: damaged, or not a checkpoint" in capsys.readouterr().err

def test_log_is_cut_where_a_run_resumes(tmp_path):
    config = TrainConfig(out_dir=str(tmp_path))
    log = utils.start_log(config, start_step=0)
    for step in range(5):
        log({"step": step, "loss": 1 / 3})
    utils.start_log(config, start_step=2)({"step": 2, "val_loss": 3.14159265})
    rows = ["step,loss,seconds,val_loss", "0,0.333333,0,", "1,0.333333,0,", "2,0.333333,0,3.14159"]
    assert re.sub(r"0\.[0-2],", "0,", (tmp_path / "log.csv").read_text()).split() == rows

@pytest.mark.parametrize("has_bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_what_the_cpu_multiplies_in(monkeypatch, has_bf16, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert utils.init_distributed(TrainConfig(device="cpu"))[1] == dtype

# ---- how scripts and workers end ----------------------------------------------------------------

@pytest.mark.parametrize("main, words", [
    (lambda: open("/none/x"), "error: [Errno 2] No such file or directory: '/none/x'"),
    (lambda: bytes(2**60), "error: out of memory; lower micro_batch_size or workers")])
def test_a_script_ends_in_one_line(main, words, capsys):
    with pytest.raises(SystemExit) as end:
        utils.run_main(main)
    error = capsys.readouterr().err
    assert end.value.code == 1 and words in error and error.count("\n") == 1

def test_what_ends_a_worker_ends_the_call(capfd):
    with pytest.raises(ValueError, match="no number"):
        utils.run_in_workers(int, [("no number",)] * 9, 2, print)
    with pytest.raises(SystemExit):
        utils.run_in_workers(signal.raise_signal, [(signal.SIGKILL,)], 1, print)
    assert "a worker was killed" in capfd.readouterr().err

def test_ctrl_c_ends_busy_workers(tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text(
        "import os, time, utils\n"
        "def job(i):\n    os.write(1, b'at work\\n')\n    time.sleep(60)\n"
        "main = lambda: utils.run_in_workers(job, [(i,) for i in range(2000)], 2, print)\n"
        "if __name__ == '__main__':\n    utils.run_main(main)\n")
    process = start(script, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for _ in range(2):  # until both workers are at work
        assert process.stdout.readline() == "at work\n"
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)  # until no worker holds the pipe any more
    assert process.returncode == 130 and "stopped; the same command resumes" in output
