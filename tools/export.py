"""Write a fine-tuned model to one file that needs torch, but not this repository.

    python -m tools.export --checkpoint=out/demo_finetune/best.pt --out=out/model.pt2

It is used as torch.export.load("out/model.pt2").module()(pulses, counts). pulses: dict of time [ns], charge
[p.e.] float32, dom int64 (sensor_id), aux bool, each (P,), the pulses of all events one after another; counts
int64 (B,): how many are each event's, 1 to the max_pulses that the model was trained with. It gives what
model.Reconstructor gives, in float32, for any B and P. Takes some 10 seconds.
"""
import common  # first: it sets how torch's threads wait

from dataclasses import dataclass

import torch

import data
import evaluate
import knobs


@dataclass
class ExportConfig:
    checkpoint: str = "out/demo_finetune/best.pt"  # of finetune.py
    out: str = "out/model.pt2"  # file to write

    def check(self):
        if not self.out.endswith(".pt2"):
            yield f"out = {self.out!r}: the name must end in .pt2"
        yield from knobs.check_writable(self.out)


class Exported(torch.nn.Module):
    """Packs the pulses as data.micro_batches does, then calls the model."""

    def __init__(self, model, max_pulses):
        super().__init__()
        self.model, self.max_pulses = model, max_pulses

    def forward(self, pulses, counts):
        torch._assert_async((counts <= self.max_pulses).all(), f"an event has more than {self.max_pulses} "
                                                               "pulses")
        n_pulses, n_events = pulses["time"].shape[0], counts.shape[0]  # len() would fix them
        pulse = torch.arange(n_pulses)
        # behind the [CLS] of its event
        token = pulse + torch.searchsorted(counts.cumsum(0), pulse, right=True) + 1
        batch = {name: column.new_zeros(n_pulses + n_events).index_copy(0, token, column)
                 for name, column in pulses.items()}
        batch["starts"] = torch.cat([counts.new_zeros(1), (counts + 1).cumsum(0)]).int()
        batch["longest"] = self.max_pulses + 1
        return {name: value.detach() for name, value in self.model(batch).items()}


def main():
    config = knobs.load_config(ExportConfig, __doc__)
    model, run, _ = evaluate.load_model(config.checkpoint)
    if not hasattr(run, "task"):
        common.fail(f"{config.checkpoint} is a pretrained checkpoint; export one of finetune.py")
    max_pulses = data.read_meta(run.data_dir)["max_pulses"]
    kinds = {"time": torch.float32, "charge": torch.float32, "dom": torch.int64, "aux": torch.bool}
    pulses = {name: torch.zeros(7, dtype=kind) for name, kind in kinds.items()}  # any numbers do
    shape = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Exported(model, max_pulses).eval(), (pulses, torch.tensor([3, 4])),
                                  dynamic_shapes={"pulses": {name: shape for name in pulses},
                                                  "counts": shape})

    def write(part):
        with open(part, "wb") as file:
            torch.export.save(program, file)
    common.write_atomic(config.out, write)
    print(f"exported to {config.out}")


if __name__ == "__main__":
    common.run_stage(main)
