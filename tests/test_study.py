"""study.py: which runs a study needs, and real small studies, stopped and gone on."""
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from conftest import ROOT, TINY_RUN, Fork, run_ok, user_error
from tools import study


@contextmanager
def forked_starts():
    """tools.study starts an interpreter for each run; here this one forks, which has loaded torch already."""
    def start(command, stdout, n_threads):
        process = Fork(command[1], *command[2:], output=stdout)
        process.communicate()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "start_script", start)
        yield


@pytest.fixture
def quick_starts():
    with forked_starts():
        yield


def row(arm, rate, seed, end, step="600"):
    return dict.fromkeys(study.RESULTS, "") | {"study": "s", "arm": arm, "learning_rate": str(rate),
                                               "seed": str(seed), "step": step, "val_dom_loss": str(end),
                                               "metric": "val_dom_loss"}


def needed(rows, **knobs):
    config = study.StudyConfig(arms={"a": ""}, learning_rates="1,2,4", out_dir="out/s", **knobs)
    return study.missing_runs(config, study.final_rows(rows, "s"))


def test_tuning_comes_first_then_the_other_seeds():
    tuned = [row("a", 1, 1, 5.0), row("a", 2, 1, 4.0), row("a", 4, 1, 4.5)]
    assert needed([]) == [("a", 1.0, 1), ("a", 2.0, 1), ("a", 4.0, 1)]
    assert needed(tuned[:2]) == [("a", 4.0, 1)]
    assert needed(tuned) == [("a", 2.0, 2), ("a", 2.0, 3)]
    assert needed([*tuned, row("a", 2, 3, 4.1)]) == [("a", 2.0, 2)]
    assert needed(tuned, seeds=1) == []


def test_range_grows_while_the_best_lies_at_its_end():
    falling = [row("a", 1, 1, 5.0), row("a", 2, 1, 4.5), row("a", 4, 1, 4.0)]
    assert needed(falling) == [("a", 8.0, 1)]
    assert needed([*falling, row("a", 8, 1, 4.2)]) == [("a", 4.0, 2), ("a", 4.0, 3)]
    assert needed([*falling, row("a", 8, 1, 3.0)]) == [("a", 16.0, 1)]
    # widen = 2
    assert needed([*falling, row("a", 8, 1, 3.0), row("a", 16, 1, 2.0)]) == [("a", 16.0, 2), ("a", 16.0, 3)]
    assert needed(falling, widen=0) == [("a", 4.0, 2), ("a", 4.0, 3)]
    rising = [row("a", 1, 1, 4.0), row("a", 2, 1, 4.5), row("a", 4, 1, "")]
    assert needed(rising) == [("a", 0.5, 1)]
    assert needed([*rising, row("a", 0.01, 1, 6.0), row("a", 0.02, 1, 6.0)]) == [("a", 1.0, 2), ("a", 1.0, 3)]
    with pytest.raises(SystemExit, match="arm a has diverged with every learning rate, 1, 2, 4"):
        needed([row("a", rate, 1, "") for rate in (4, 1, 2)])


def test_learning_rates_are_those_of_the_results():
    config = study.StudyConfig(learning_rates="0.1,0.00033333333,0.1,1e-3")
    assert study.learning_rates(config) == [0.000333333, 0.001, 0.1]


def test_a_run_that_diverged_is_never_the_best_and_only_its_last_evaluation_counts():
    rows = [row("a", 1, 1, 4.0), row("a", 1, 1, 9.0, step="100"), row("a", 2, 1, ""), row("a", 4, 1, 4.5)]
    assert study.best_rate(study.final_rows(rows, "s"), "a") == 1.0
    assert study.final_rows(rows, "another") == {}


def test_wide_table_has_a_column_for_what_follows_the_last_slash():
    rows = [row(arm, 1, seed, value + seed)
            for arm, value in (("a/b/500", 1.0), ("a/b/2000", 0.5), ("c/500", 4.0)) for seed in (1, 2)]
    config = study.StudyConfig(arms=dict.fromkeys(["a/b/500", "a/b/2000", "c/500"], ""), wide="val_dom_loss")
    assert list(study.wide_table(config, study.final_rows(rows, "s"))) == [
        "| val_dom_loss | 500 | 2000 |", "|---|---|---|", "| a/b | 2.5 +- 0.71 | 2 +- 0.71 |",
        "| c | 5.5 +- 0.71 |  |"]
    rows.append(row("c/500", 1, 3, "", step="0"))  # one that diverged is no empty cell
    assert list(study.wide_table(config, study.final_rows(rows, "s")))[-1] == "| c | diverged (1 of 3) |  |"


def test_a_run_is_complete_at_its_last_step_or_out_of_patience():
    def is_complete(script, step, **knobs):
        return study.is_complete(study.StudyConfig(script=script), {
            "step": step, "best_step": 40, "ended": True,
            "config": {"max_steps": 100, "eval_interval": 10, **knobs}})
    assert is_complete("train.py", 100) and not is_complete("train.py", 99)
    assert is_complete("finetune.py", 60, patience=2) and not is_complete("finetune.py", 50, patience=2)
    assert not is_complete("finetune.py", 60, patience=0)


@pytest.fixture(scope="module")
def small_study(demo_data, tmp_path_factory):
    """A config of a study with two arms, and the command that runs it."""
    folder = tmp_path_factory.mktemp("study")
    shared = " ".join([f"--data_dir={demo_data}", *TINY_RUN])
    arms = {"charge": "", "centre/2": "--cls_target=center"}
    (folder / "small.py").write_text(f"shared = {shared!r}\narms = {arms!r}\n"
                                     "learning_rates = '0.001,0.004,0.016'\nwiden = 0\nseeds = 2\nout_dir = "
                                     f"'{folder}/small'\n"
                                     f"results = '{folder}/results.csv'\n")
    with forked_starts():
        done = run_ok("tools/study.py", folder / "small.py", "--jobs=2")
    return folder, done


def test_small_study(small_study):
    folder, done = small_study
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # 3 learning rates and one more seed, evaluated at steps 3 and 6
    assert len(rows) == 2 * 4 * 2 and {row["step"] for row in rows} == {"3", "6"}
    for line in rows:
        assert float(line["val_dom_loss"]) < 10 and int(line["parameters"]) > 100_000
        assert "cpu (1 threads)" in line["hardware"]
        assert bool(line["val_center_rms"]) == (line["arm"] == "centre/2") == (not line["val_charge_rms"])
    with open(folder / "small/charge/lr0.004_seed1/log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    result, = (line for line in rows if (line["arm"], line["learning_rate"], line["seed"], line["step"])
               == ("charge", "0.004", "1", "6"))
    assert result["val_dom_loss"] == last["val_dom_loss"]
    assert result["val_charge_rms"] == last["val_charge_rms"]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 3 and "val_dom_loss" in table[0] and table[2].startswith("| centre/2 |")
    assert " +- " in table[2]
    assert all((folder / f"small/{arm}/seed{seed}/ckpt.pt").is_file() for arm in ("charge", "centre/2")
               for seed in (1, 2))


def test_a_complete_study_runs_nothing_and_refuses_other_arguments(small_study, demo_data):
    folder, done = small_study
    before, log = (folder / "results.csv").read_bytes(), folder / "small/charge/lr0.004_seed1/output.txt"
    written = log.stat().st_mtime_ns
    again = run_ok("tools/study.py", folder / "small.py")
    changed = user_error("tools/study.py", folder / "small.py", f"--shared=--data_dir={demo_data} "
                                                                "--max_steps=7")
    assert "arm charge of small was run with other knobs" in changed
    assert "or another report or metric" in user_error("tools/study.py", folder / "small.py",
                                                       "--metric=val_charge_loss")
    assert "choose one of" in user_error("tools/study.py", folder / "small.py", "--metric=coverage_50")
    assert "lacks runs" not in again.stdout
    copy = folder / "small/charge/seed1/config.json"
    rate = json.loads(copy.read_text())["learning_rate"]
    copy.write_text(copy.read_text().replace(f'"learning_rate": {rate}', '"learning_rate": 0.7'))
    assert "lacks runs with the best learning rate" in run_ok("tools/study.py", folder / "small.py").stdout
    copy.write_text(copy.read_text().replace("0.7", str(rate)))
    assert (folder / "results.csv").read_bytes() == before and log.stat().st_mtime_ns == written
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]


def test_later_study_begins_from_an_earlier_one_and_is_drawn(small_study, demo_data, tmp_path, quick_starts):
    pytest.importorskip("matplotlib")
    folder, _ = small_study
    tune = ["--head_hidden_size=8", "--batch_size=16", "--micro_batch_size=8", "--max_steps=3",
            "--warmup_steps=1", "--log_interval=1", "--direction_loss=vmf", "--eval_interval=3"]
    arms = {f"labels/{n}": f"--pretrained={folder}/small/charge/seed{{seed}}/ckpt.pt --train_events={n}"
            for n in (50, 100, 150)}
    (tmp_path / "labels.py").write_text(
        f"script = 'finetune.py'\nshared = {' '.join([f'--data_dir={demo_data}', *tune])!r}\narms = "
        f"{arms}\nlearning_rates = '0.001'\n"
        f"seeds = 2\nmetric = 'val_angle_mean'\nreport = 'pretrain'\nwide = 'report_angle_mean'\n"
        f"out_dir = '{tmp_path}/labels'\nresults = '{folder}/results.csv'\n")
    done = run_ok("tools/study.py", tmp_path / "labels.py")
    rows = [row for row in study.read_results(folder / "results.csv") if row["study"] == "labels"]
    assert len(rows) == 6 and all(0 < float(row["val_angle_mean"]) < 3.2
                                  and 0 <= float(row["coverage_90"]) <= 1 for row in rows)
    assert len({row["val_angle_mean"] for row in rows}) == 6  # other seeds and sizes are other runs
    for row in rows:  # what is reported is of the split that tunes nothing
        run = tmp_path / f"labels/{row['arm']}/seed{row['seed']}"
        found = json.loads((run / "evaluation_pretrain.json").read_text())
        assert found["n_events"] == 300 and found["rows"][0]["mean"] == pytest.approx(
            float(row["report_angle_mean"]), rel=1e-5)
        assert row["report_angle_mean"] != row["val_angle_mean"]
    mean = np.mean([float(row["report_angle_mean"]) for row in rows if row["arm"] == "labels/50"])
    assert f"| labels | {mean:.4g} +- " in done.stdout
    for x, y, name, more in (("learning_rate", "val_dom_loss", "small", []),
                             ("events", "val_loss", "small,labels", []),
                             ("seconds", "val_dom_loss", "small", []),
                             ("parameters", "val_dom_loss", "small", []),
                             ("number", "val_angle_mean", "labels",
                              ["--fit=True", "--x_label=labels", "--baselines={'guessing': 1.57}"])):
        path = tmp_path / "study.png"
        run_ok("tools/plot.py", "--what=study", f"--study={name}", f"--x={x}", f"--y={y}", f"--out={path}",
               f"--results={folder}/results.csv", *more)
        assert path.stat().st_size > 10_000
        path.unlink()
    where = f"--results={folder}/results.csv"
    assert "has no study lables; it has labels, small" in user_error("tools/plot.py", "--what=study",
                                                                     "--study=lables", where)
    assert "arm charge of small has no number" in user_error("tools/plot.py", "--what=study", "--study=small",
                                                             "--x=number", where)
    assert "did you mean 'val_loss'" in user_error("tools/plot.py", "--what=study", "--study=small",
                                                   "--y=val_los", where)
    assert "a power law is for runs that have ended" in user_error("tools/plot.py", "--what=study",
                                                                   "--study=small", "--fit=True", where)
    assert "val_angle_mean is empty in small" in user_error("tools/plot.py", "--what=study", "--study=small",
                                                            "--y=val_angle_mean", where)


def test_killed_study_goes_on(demo_data, tmp_path, quick_starts):
    (tmp_path / "s.py").write_text(f"shared = {' '.join([f'--data_dir={demo_data}', *TINY_RUN])!r}\narms = "
                                   f"{{'a': ''}}\n"
                                   "learning_rates = '0.001,0.004,0.016'\nwiden = 0\nseeds = 1\nout_dir = "
                                   f"'{tmp_path}/s'\n"
                                   f"results = '{tmp_path}/results.csv'\n")
    process = subprocess.Popen([sys.executable, "-m", "tools.study", tmp_path / "s.py"], cwd=ROOT,
                               start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "results.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = study.read_results(tmp_path / "results.csv")
    assert len({row["learning_rate"] for row in before}) < 3
    run_ok("tools/study.py", tmp_path / "s.py")
    after = study.read_results(tmp_path / "results.csv")
    assert after[:len(before)] == before and len(study.final_rows(after, "s")) == 3
    (tmp_path / "results.csv").unlink()  # the runs are all there: they are only read again
    run_ok("tools/study.py", tmp_path / "s.py")
    assert sorted(map(str, study.read_results(tmp_path / "results.csv"))) == sorted(map(str, after))


def test_run_that_is_stopped_is_not_taken_for_a_result(demo_data, tmp_path, quick_starts):
    shared = " ".join([f"--data_dir={demo_data}", *TINY_RUN, "--max_steps=2000"])
    (tmp_path / "s.py").write_text(f"shared = {shared!r}\n"
                                   f"arms = {{'a': ''}}\nlearning_rates = '0.001'\nseeds = 1\nout_dir = "
                                   f"'{tmp_path}/s'\n"
                                   f"results = '{tmp_path}/results.csv'\n")
    process = Fork("tools/study.py", tmp_path / "s.py")
    while not (tmp_path / "s/a/lr0.001_seed1/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    child = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True,
                           check=True)
    os.kill(int(child.stdout), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "was stopped at step" in output and "Traceback" not in output, output
    assert not (tmp_path / "results.csv").exists()


def test_two_studies_may_write_to_the_same_results(tmp_path):
    path, other = tmp_path / "results.csv", row("b", 1, 1, 3.0) | {"study": "t"}
    assert study.read_results(path) == []
    study.add_results(path, [row("a", 1, 1, 4.0)])
    study.add_results(path, [other])
    assert study.read_results(path) == [row("a", 1, 1, 4.0), other]


def test_failing_arm_keeps_what_is_finished(demo_data, tmp_path, quick_starts):
    arms = {"good": "", "bad": "--train_events=301"}
    (tmp_path / "s.py").write_text(f"shared = {' '.join([f'--data_dir={demo_data}', *TINY_RUN])!r}\narms = "
                                   f"{arms}\n"
                                   f"learning_rates = '0.001'\nseeds = 1\nout_dir = '{tmp_path}/s'\nresults "
                                   f"= '{tmp_path}/results.csv'\n")
    said = user_error("tools/study.py", tmp_path / "s.py")
    assert "holds 300 events" in said
    assert list(study.final_rows(study.read_results(tmp_path / "results.csv"), "s")) == [("good", 0.001, 1)]


def test_all_arms_are_checked_before_the_first_run(demo_data, tmp_path):
    for bad, words in (("--mask_prop=0.5", "did you mean mask_prob?"),
                       ("--data_dir=data/nowhere", "no such data folder"),
                       (f"--branch_from={tmp_path}/x{{seed}}.pt", f"{tmp_path}/x1.pt: no such checkpoint")):
        (tmp_path / "s.py").write_text(
            f"shared = {' '.join([f'--data_dir={demo_data}', *TINY_RUN])!r}\narms = {{'good': '', 'bad': "
            f"{bad!r}}}\n"
            f"learning_rates = '0.001'\nseeds = 1\nout_dir = '{tmp_path}/s'\nresults = "
            f"'{tmp_path}/results.csv'\n")
        said = user_error("tools/study.py", tmp_path / "s.py")
        assert "arm bad: " in said and words in said and not (tmp_path / "s").exists()


def test_a_fine_tuning_run_that_diverges_is_no_fault_of_the_study(demo_data, tmp_path, quick_starts):
    shared = [f"--data_dir={demo_data}", *TINY_RUN, "--pretrained=", "--warmup_steps=1", "--grad_clip=1e30"]
    (tmp_path / "s.py").write_text(
        f"script = 'finetune.py'\nshared = {' '.join(shared)!r}\narms = {{'a': ''}}\nmetric = "
        "'val_angle_mean'\nwiden = 0\n"
        f"learning_rates = '0.001,0.002,1e30'\nseeds = 1\nout_dir = '{tmp_path}/s'\nresults = "
        f"'{tmp_path}/results.csv'\n")
    run_ok("tools/study.py", tmp_path / "s.py")
    final = study.final_rows(study.read_results(tmp_path / "results.csv"), "s")
    assert final["a", 1e30, 1]["step"] == "0" and final["a", 1e30, 1]["val_angle_mean"] == ""
    assert 0 < float(final["a", 0.001, 1]["val_angle_mean"]) < 3.2


def test_diverging_run_is_recorded_and_not_chosen(demo_data, tmp_path, quick_starts):
    shared = " ".join([f"--data_dir={demo_data}", *TINY_RUN])
    (tmp_path / "s.py").write_text(
        f"shared = {shared!r}\narms = {{'a': '--grad_clip=1e30'}}\nlearning_rates = '0.001,0.002,1e25'\n"
        f"widen = 0\nseeds = 1\nout_dir = '{tmp_path}/s'\nresults = '{tmp_path}/results.csv'\n")
    done = run_ok("tools/study.py", tmp_path / "s.py")
    final = study.final_rows(study.read_results(tmp_path / "results.csv"), "s")
    assert final["a", 1e25, 1]["val_dom_loss"] == ""
    assert "lr 1e+25 seed 1 | val_dom_loss diverged" in done.stderr + done.stdout
    assert study.best_rate(final, "a") in (0.001, 0.002)


def test_user_errors(demo_data, tmp_path):
    assert "arms is empty" in user_error("tools/study.py")
    arms = "--arms={'a': ''}"
    assert "learning_rates = '1,2': one (not tuned), or three" in user_error("tools/study.py", arms,
                                                                             "--learning_rates=1,2")
    assert "learning_rates = 'fast'" in user_error("tools/study.py", arms, "--learning_rates=fast")
    assert "learning_rates = 'nan,1,2'" in user_error("tools/study.py", arms, "--learning_rates=nan,1,2")
    assert "arm 'a': No closing quotation" in user_error("tools/study.py", "--arms={'a': \"--mlp='relu\"}")
    assert "report = 'val': the run learns or tunes on it" in user_error(
        "tools/study.py", arms, "--script=finetune.py", "--report=val", f"--shared=--data_dir={demo_data} "
        "--pretrained=", f"--out_dir={tmp_path}/s", f"--results={tmp_path}/r.csv")
    assert "report is for script = 'finetune.py'" in user_error("tools/study.py", arms, "--report=val")
    assert "did you mean 'val_dom_loss'" in user_error("tools/study.py", arms, "--wide=val_dom_los")
    assert "did you mean 'train.py'" in user_error("tools/study.py", arms, "--script=trian.py")
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    line = user_error("tools/study.py", arms, f"--results={tmp_path}/results.csv", f"--out_dir={tmp_path}")
    assert "results.csv: not a file of results" in line


@pytest.mark.parametrize("path", sorted((ROOT / "sample_config/study").glob("*.py")),
                         ids=lambda path: path.stem)
def test_study_configs_load(path, monkeypatch):
    """Each is read, and what its arms add to the shared arguments are knobs of the script."""
    import knobs
    import finetune
    import prepare
    import simulate
    import train
    stages = {"simulate": simulate.SimulateConfig, "prepare": prepare.PrepareConfig,
              "train": train.TrainConfig, "finetune": finetune.FinetuneConfig,
              "other_detector": simulate.SimulateConfig, "other_prepare": prepare.PrepareConfig,
              "real_small": simulate.SimulateConfig, "real_large": simulate.SimulateConfig,
              "real_prepare": prepare.PrepareConfig}
    monkeypatch.chdir(ROOT)

    def load(stage, *args):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args)])
        return knobs.load_config(stage)
    if path.stem in stages:
        load(stages[path.stem], path)
        return
    config = load(study.StudyConfig, path)
    for arm in config.arms:
        load(stages[config.script.removesuffix(".py")], *study.arguments_of(config, arm, 1).split())
    assert dataclasses.asdict(config)["out_dir"] == f"out/study/{path.stem}"

    # assets/studies.csv, from which README's figures and answers come, is complete, and of these very knobs
    final = study.final_rows(study.read_results("assets/studies.csv"), path.stem)
    assert study.missing_runs(config, final) == []
    assert all(row["knobs"] == study.knobs_of(config, arm, seed) for (arm, _, seed), row in final.items()
               if arm in config.arms)
