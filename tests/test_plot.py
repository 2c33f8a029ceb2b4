"""plot.py draws from what real runs left behind. How a figure looks is for people to judge."""
import pytest

from conftest import run_ok, user_error
from test_finetune import KNOBS

pytest.importorskip("matplotlib")


def test_every_figure(demo_data, pretrained, tmp_path):
    for n in (50, 150):
        run_ok("finetune.py", f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}/{n}", f"--pretrained={pretrained[0]}/ckpt.pt",
               f"--train_events={n}", "--direction_loss=vmf", "--max_steps=3")
    tuned = f"{tmp_path}/50,{tmp_path}/150"
    for what, runs, more in (("curves", f"{pretrained[0]},{tmp_path}/50", []), ("errors", tuned, []), ("calibration", tuned, []),
                             ("labels", tuned, []), ("scaling", tuned, ["--y=val_loss"]),
                             ("scaling", str(pretrained[0]), ["--x=parameters"]),
                             ("event", f"{pretrained[0]},{tmp_path}/50", [f"--data_dir={demo_data}", "--event=3"]),
                             ("event", f"{tmp_path}/50", [f"--data_dir={demo_data}", "--split=test"])):
        path = tmp_path / f"{what}.png"
        run_ok("plot.py", f"--what={what}", f"--runs={runs}", f"--out={path}", *more)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
        path.unlink()


def test_user_errors(demo_data, pretrained, tmp_path):
    runs = f"--runs={pretrained[0]}"
    assert "evaluation_val.json" in user_error("plot.py", "--what=errors", runs)
    assert "log.csv: no such file" in user_error("plot.py", "--what=curves", f"--runs={tmp_path}")
    assert "has no val_los" in user_error("plot.py", "--what=scaling", runs, "--y=val_los")
    assert "there is no event 999" in user_error("plot.py", "--what=event", f"--data_dir={demo_data}", "--event=999")
    assert "did you mean 'curves'" in user_error("plot.py", "--what=curve", runs)
