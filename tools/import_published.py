"""A checkpoint of the published PolarBERT code (timinar/PolarBERT, flash variant) -> one of ours.

    mkdir -p out
    python -m tools.import_published --checkpoint=weights.pth --data_dir=data/icecube --out=out/published.pt
    python finetune.py sample_config/finetune.py --pretrained=out/published.pt

Reads a state_dict (.pth) or a file of Lightning (.ckpt). The shapes tell the architecture, but for the number
of heads and the activation, which are knobs here. The model gives the same logits as its own code.
"""
import common  # first: it sets how torch's threads wait

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import data
import knobs
from model import Pretrainer
from tasks import POSITION_SCALE
from train import TrainConfig


@dataclass
class ImportConfig:
    checkpoint: str = ""  # of the published code
    data_dir: str = "data/icecube"  # folder made by prepare.py, of the same detector
    out: str = "out/published.pt"  # checkpoint to write
    num_heads: int = 8  # of the published model
    mlp: str = "relu"  # its activation; or "gelu"

    def check(self):
        yield from knobs.check_choice(self, "mlp", ("relu", "gelu"))
        yield from knobs.check_positive(self, "num_heads")
        yield from knobs.check_writable(self.out)


def from_published(state):
    """A state dict of the published code -> knobs of our ModelConfig as read off the shapes, our state dict.

    Its ids: 0 is padding, sensor_id + 1 the DOM, and 5161, or later a vector of its own, the mask. Positions
    are scaled as ours are. Its logit and its vector for padding are dropped. KeyError if a name is missing or
    left over. Source: its src/polarbert/embedding.py, flash_model.py, base_model.py.
    """
    state = {name.removeprefix("model."): value.float() for name, value in state.items()}
    n_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    cls = state.pop("embedding.cls_embedding").flatten()
    D, E = len(cls), len(cls) - len(state["embedding.features_embedding.weight"])
    shape = {"embedding_dim": D, "dom_embed_dim": E, "num_layers": n_layers,
             "hidden_size": len(state["transformer_blocks.0.feed_forward.0.weight"]),
             "use_dom_positions": "embedding.position_embedding.weight" in state,
             "final_norm": "final_layer_norm.weight" in state}
    ours, mask = {"encoder.embedding.cls": cls}, state.pop("embedding.mask_token_embedding",
                                                           torch.zeros(0, E))
    if shape["use_dom_positions"]:
        ours["encoder.embedding.geometry"] = state.pop("embedding.dom_positions")[1:] * POSITION_SCALE
        ours["encoder.embedding.mask"] = mask
    else:
        table = state.pop("embedding.dom_embedding.weight")[1:]
        ours["encoder.embedding.dom_table.weight"] = torch.cat([table, mask])
    renamed = {"embedding.features_embedding": "encoder.embedding.features",
               "final_layer_norm": "encoder.final_norm",
               "embedding.position_embedding": "encoder.embedding.position",
               "charge_prediction": "cls_heads.charge", "unembedding": "dom_head"}
    for i in range(n_layers):
        theirs, block = f"transformer_blocks.{i}", f"encoder.backbone.blocks.{i}"
        ours[f"{block}.mixer.qkv.weight"] = torch.cat([state.pop(f"{theirs}.attention.w{x}.weight")
                                                       for x in "qkv"])
        renamed |= {f"{theirs}.attention.wo": f"{block}.mixer.out",
                    f"{theirs}.feed_forward.0": f"{block}.mlp.up",
                    f"{theirs}.feed_forward.2": f"{block}.mlp.down",
                    f"{theirs}.layer_norm1": f"{block}.norm1", f"{theirs}.layer_norm2": f"{block}.norm2"}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        ours[f"{renamed[module]}.{kind}"] = value[1:] if module == "unembedding" else value
    return shape, ours


def main():
    config = knobs.load_config(ImportConfig, __doc__)
    published = common.read_checkpoint(config.checkpoint)
    if not common.is_published(published):
        common.fail(f"{config.checkpoint}: these are no weights of the published PolarBERT code; ours need "
                    "no conversion")
    geometry = data.read_geometry(config.data_dir)
    position = torch.from_numpy(geometry["position"].copy())
    try:
        shape, weights = from_published(published.get("state_dict", published))
        run = TrainConfig(**shape, num_heads=config.num_heads, mlp=config.mlp, data_dir=config.data_dir)
        for complaint in run.check():
            common.fail(complaint)
        # without positions it does not tell its detector: it is IceCube. With them they are scaled, and
        # rounded to float32
        known = weights.setdefault("encoder.embedding.geometry", position)
        if known.shape == position.shape and (known - position).abs().max() < 0.01:
            weights["encoder.embedding.geometry"] = position
        Pretrainer(run, geometry).load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        common.fail(f"{config.checkpoint}: published PolarBERT weights, but not of the plain flash variant: "
                    f"{' '.join(str(error).split())[:200]}; not supported")
    common.check_geometry({"model": weights}, geometry, config.checkpoint, config.data_dir)
    common.save_checkpoint(config.out, model=weights, config=asdict(run), step=0, n_train=0, optimizer=[],
                           scaler={}, bad_steps=0, best_val=float("inf"))
    print(f"written {config.out}: {common.count_parameters(weights) / 1e6:.2f} M parameters, for "
          f"--pretrained={Path(config.out)}")


if __name__ == "__main__":
    common.run_stage(main)
