"""Write a fine-tuned model to one file that needs torch, but not this
repository.

    python -m tools.export --checkpoint=out/demo_finetune/best.pt --out=out/model.pt2

Use it as torch.export.load("out/model.pt2").module()(pulses, counts):

    pulses   time [ns], charge [p.e.] float32, dom (sensor_id) int64, aux bool: a dict of (P,), the
             pulses of all events, one event after another
    counts   (B,) int64, pulses of each event: 1 to the max_pulses of the training

It returns what model.Reconstructor returns, (B, n) float32, for any B and
P. Wrong counts or ids raise RuntimeError. Takes 10 seconds.
"""
import utils  # first: it sets how torch's threads wait

import io
from dataclasses import dataclass

import torch

from evaluate import load_model

@dataclass
class ExportConfig:
    checkpoint: str = "out/demo_finetune/best.pt"  # of finetune.py
    out: str = "out/model.pt2"  # file to write

class Exported(torch.nn.Module):
    """Packs the pulses as data.micro_batches does, then calls the model."""

    def __init__(self, model, max_pulses):
        super().__init__()
        self.model, self.max_pulses = model, max_pulses

    def forward(self, pulses, counts):
        n_pulses, n_events = pulses["time"].shape[0], counts.shape[0]  # len() would fix them
        dom, n_doms = pulses["dom"], self.model.encoder.embedding.geometry.shape[0]
        check, n_max = torch._assert_async, self.max_pulses
        check((counts == counts.clamp(1, n_max)).all(), f"counts must be 1 to {n_max}")
        check(counts.sum() == n_pulses, "counts must add up to the number of pulses")
        check((dom == dom.clamp(0, n_doms - 1)).all(), f"dom must be 0 to {n_doms - 1}")
        pulse = torch.arange(n_pulses)
        # each comes after the [CLS] of its event and of those before it
        token = pulse + torch.searchsorted(counts.cumsum(0), pulse, right=True) + 1
        batch = {name: column.new_zeros(n_pulses + n_events).index_copy(0, token, column)
                 for name, column in pulses.items()}
        batch["cu_seqlens"] = torch.cat([counts.new_zeros(1), (counts + 1).cumsum(0)]).int()
        batch["max_seqlen"] = self.max_pulses + 1
        return self.model(batch).detach()

def main():
    config = utils.load_config(ExportConfig, __doc__)
    model, run, checkpoint = load_model(config.checkpoint)
    if not hasattr(run, "task"):
        utils.fail(f"{config.checkpoint}: a pretrained checkpoint; export one of finetune.py")
    kinds = {"time": torch.float32, "charge": torch.float32, "dom": torch.int64, "aux": torch.bool}
    pulses = {name: torch.zeros(7, dtype=kind) for name, kind in kinds.items()}  # any numbers do
    exported = Exported(model, checkpoint["data"]["rule"]["max_pulses"]).eval()
    size = {0: torch.export.Dim.DYNAMIC}
    sizes = {"pulses": dict.fromkeys(pulses, size), "counts": size}
    program = torch.export.export(exported, (pulses, torch.tensor([3, 4])), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    utils.write_atomic(config.out, lambda part: part.write_bytes(file.getvalue()))
    print(f"written {config.out}")

if __name__ == "__main__":
    utils.run_main(main)
