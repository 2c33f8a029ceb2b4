"""The toy model, the notebook and the code in docs/own_data.md run as they are."""
import json
import re
from pathlib import Path

import pytest

from conftest import run_ok

def test_the_toy_model_is_scored_right_after_installation(tmp_path):
    done = run_ok("evaluate.py", "--checkpoint=assets/toy/direction.pt",
                  f"--predictions={tmp_path}/x.parquet", "--suffix=_pred")
    angles = re.search(r"mean error ([\d.]+) rad .* a line fit has ([\d.]+)", done.stdout)
    assert float(angles[1]) < float(angles[2]) < 1.3 and "warning" not in done.stdout
    assert sum(path.stat().st_size for path in Path("assets/toy").iterdir()) < 2_100_000

def test_the_notebook_says_what_its_cells_give(capsys):
    pytest.importorskip("matplotlib").use("Agg")
    shared, words = {}, lambda text: re.sub(r"[-\d.\s]+", " ", text)  # numbers may differ a little
    for cell in json.loads(Path("walkthrough.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), shared)
            saved = "".join("".join(x.get("text", "")) for x in cell["outputs"])
            assert words(saved) == words(capsys.readouterr().out)
    shared["torch"].set_grad_enabled(True)

def test_the_writer_of_own_data_writes_what_prepare_reads(tmp_path):
    writer = Path("docs/own_data.md").read_text().split("```python\n")[1].split("```")[0]
    exec(writer.replace("data/own_raw", f"{tmp_path}/raw"))
    done = run_ok("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/own",
                  "--splits={'pretrain': (1, 1), 'val': (2, 2)}", "--workers=1")
    assert "val: 1 batches, n_events 100" in done.stdout
