"""Write a fine-tuned model to one file that needs torch, but not this repository.

    python -m tools.export --checkpoint=out/demo_finetune/best.pt --out=out/model.pt2

It is used as torch.export.load("out/model.pt2").module()(pulses, valid). pulses: dict of time [ns], charge
[p.e.] float32, dom int64 (sensor_id), aux bool, each (B, L); valid bool (B, L). It gives what
model.Reconstructor gives, in float32, for any B and L. Takes some 10 seconds. A GRU cannot be exported (torch
2.13 takes it for events of one length only).
"""
import common  # first: it sets how torch's threads wait

from dataclasses import dataclass

import torch

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
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pulses, valid):
        return {name: value.detach() for name, value in self.model({**pulses, "valid": valid}).items()}


def main():
    config = knobs.load_config(ExportConfig, __doc__)
    model, run, _ = evaluate.load_model(config.checkpoint)
    if not hasattr(run, "task"):
        common.fail(f"{config.checkpoint} is a pretrained checkpoint; export one of finetune.py")
    if run.backbone == "gru":
        common.fail("torch.export cannot take a GRU for events of any length (torch 2.13); transformer and mamba can")
    kinds = {"time": torch.float32, "charge": torch.float32, "dom": torch.int64, "aux": torch.bool}
    pulses = {name: torch.zeros(2, 3, dtype=kind) for name, kind in kinds.items()}  # any shape does
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Exported(model).eval(), (pulses, torch.ones(2, 3, dtype=torch.bool)),
                                  dynamic_shapes={"pulses": {name: shape for name in pulses}, "valid": shape})

    def write(part):
        with open(part, "wb") as file:
            torch.export.save(program, file)
    common.write_atomic(config.out, write)
    print(f"exported to {config.out}")


if __name__ == "__main__":
    common.run_stage(main)
