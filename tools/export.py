"""Write a fine-tuned model to one file that needs torch alone.

    python -m tools.export --checkpoint=out/demo_finetune/best.pt --out=out/model.pt2

torch.export.load("out/model.pt2").module()(pulses, counts) returns what
model.Reconstructor returns. pulses: a dict of (P,), one event after another:
time [ns], charge [p.e.] float32, dom (sensor_id) int64, aux bool. counts:
pulses of each event, (B,) int64, 1 to the max_pulses of training.
"""
import utils  # before torch

import io
from dataclasses import dataclass

import torch

from evaluate import load_model

@dataclass
class ExportConfig:
    checkpoint: str = "out/demo_finetune/best.pt"  # of finetune.py
    out: str = "out/model.pt2"  # file to write

class Exported(torch.nn.Module):
    """Pack the pulses as data.micro_batches does, then call the model."""

    def __init__(self, model, max_pulses):
        super().__init__()
        self.model, self.max_pulses = model, max_pulses

    def forward(self, pulses, counts):
        n_pulses, n_events = pulses["time"].shape[0], counts.shape[0]  # len() would fix them
        n_doms = len(self.model.encoder.embedding.geometry)
        dom, most, check = pulses["dom"], self.max_pulses, torch._assert_async
        check((counts == counts.clamp(1, most)).all(), f"counts must be 1 to {most}")
        check(counts.sum() == n_pulses, "counts must add up to the number of pulses")
        check((dom == dom.clamp(0, n_doms - 1)).all(), f"dom must be 0 to {n_doms - 1}")
        pulse = torch.arange(n_pulses)
        # each comes after the [CLS] of its event and of those before it
        token = pulse + torch.searchsorted(counts.cumsum(0), pulse, right=True) + 1
        batch = {"max_seqlen": most + 1}
        for name, x in pulses.items():
            batch[name] = x.new_zeros(n_pulses + n_events).index_copy(0, token, x)
        batch["cu_seqlens"] = torch.cat([counts.new_zeros(1), (counts + 1).cumsum(0)]).int()
        return self.model(batch).detach()

def main():
    config = utils.load_config(ExportConfig, __doc__)
    model, run, checkpoint = load_model(config.checkpoint)
    if not hasattr(run, "task"):
        utils.fail(f"{config.checkpoint}: not fine-tuned; export one of finetune.py")
    pulses = {"time": torch.zeros(7), "charge": torch.zeros(7),
              "dom": torch.zeros(7, dtype=int), "aux": torch.zeros(7, dtype=bool)}
    exported = Exported(model, checkpoint["data"]["rule"]["max_pulses"]).eval()
    size = {0: torch.export.Dim.DYNAMIC}
    sizes = {"pulses": dict.fromkeys(pulses, size), "counts": size}
    example = pulses, torch.tensor([3, 4])
    program = torch.export.export(exported, example, dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    utils.write_atomic(config.out, lambda part: part.write_bytes(file.getvalue()))
    print(f"written {config.out}")

if __name__ == "__main__":
    utils.run_main(main)
