"""Turn a published checkpoint (timinar/PolarBERT, flash variant) into ours.

    python -m tools.import_published --checkpoint=weights.pth --out=out/published.pt
    python finetune.py sample_config/finetune.py --pretrained=out/published.pt

Reads a state_dict (.pth) or Lightning's file (.ckpt), without muP.
"""
import utils  # before torch

from dataclasses import asdict, dataclass
from typing import Literal

import torch

import data
from model import POSITION_SCALE, PolarBERT
from train import TrainConfig

# upstream's src/polarbert/embedding.py, flash_model.py, base_model.py
RENAMED = {"features_embedding": "features", "position_embedding": "position",
           "mask_token_embedding": "mask", "cls_embedding": "cls",
           "dom_positions": "geometry", "dom_embedding": "dom_table",
           "transformer_blocks": "blocks", "final_layer_norm": "final_norm",
           "attention.wo": "mixer.out", "attention.w": "mixer.w",
           "feed_forward.0": "mlp.up", "feed_forward.2": "mlp.down",
           ".layer_norm": ".norm", "charge_prediction": "cls_heads.charge",
           "unembedding": "dom_head"}
GEOMETRY, TABLE = "encoder.embedding.geometry", "encoder.embedding.dom_table.weight"
CLS, MASK = "encoder.embedding.cls", "encoder.embedding.mask"

@dataclass
class ImportConfig:
    checkpoint: str = "weights.pth"  # of the published code
    data_dir: str = "data/icecube"  # of the same detector
    out: str = "out/published.pt"  # checkpoint to write
    num_heads: int = 8  # of the published model
    mlp: Literal["relu", "gelu"] = "relu"  # its activation

def from_published(state):
    """Rename the weights of a state_dict -> our weights, their options."""
    weights = {}
    for name, x in state.items():
        name = name.removeprefix("model.")
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if not name.startswith(("dom_head", "cls_heads")):
            name = f"encoder.{name}"
        # its ids: 0 padding, which is dropped, sensor_id + 1, then the mask
        is_padded = name in (GEOMETRY, TABLE) or name.startswith("dom_head")
        weights[name] = x.float()[1:] if is_padded else x.float()
    n_layers = sum(name.endswith("norm1.weight") for name in weights)
    for i in range(n_layers):
        mixer = f"encoder.blocks.{i}.mixer"
        qkv = [weights.pop(f"{mixer}.w{x}.weight") for x in "qkv"]
        weights[f"{mixer}.qkv.weight"] = torch.cat(qkv)
    cls = weights[CLS] = weights[CLS].flatten()
    if GEOMETRY in weights:
        weights[GEOMETRY] *= POSITION_SCALE
    elif MASK in weights:
        weights[TABLE] = torch.cat([weights[TABLE], weights.pop(MASK)])
    n_features = len(weights["encoder.embedding.features.weight"])
    return weights, {"embedding_dim": len(cls), "dom_embed_dim": len(cls) - n_features,
                     "hidden_size": len(weights["encoder.blocks.0.mlp.up.weight"]),
                     "num_layers": n_layers, "use_dom_positions": GEOMETRY in weights,
                     "final_norm": "encoder.final_norm.weight" in weights}

def main():
    config = utils.load_config(ImportConfig, __doc__)
    path, file = config.checkpoint, open(config.checkpoint, "rb")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything
        if "GLOBAL" not in str(error):
            utils.fail(f"{path}: damaged, or not a checkpoint")
        load = f"torch.load({path!r}, 'cpu', weights_only=False)"
        save = f"torch.save({load}['state_dict'], {path + '.pth'!r})"
        utils.fail(f"{path}: holds python objects; if you trust it, run "
                   f'python -c "import torch; {save}"')
    _, geometry = data.read_folder(config.data_dir)
    position = torch.from_numpy(geometry["position"].copy())  # (V, 3) [m]
    try:
        weights, options = from_published(state.get("state_dict", state))
        run = TrainConfig(**options, num_heads=config.num_heads, mlp=config.mlp)
        old = weights.get(GEOMETRY, position)  # published: rounded, or none
        if len(old) != len(position) or (old - position).abs().max() > 0.01:
            utils.fail(f"{path}: of another detector than {config.data_dir}")
        weights[GEOMETRY] = position
        PolarBERT(run, geometry).load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError) as error:
        utils.fail(f"{path}: not the published flash variant ({error!r:.200})")
    rule = {"keep": "random", "max_pulses": 127}  # upstream's
    checkpoint = {"format": utils.CHECKPOINT_FORMAT, "model": weights,
                  "config": asdict(run), "data": {"rule": rule}}
    utils.write_atomic(config.out, lambda part: torch.save(checkpoint, part))
    print(f"written {config.out}")

if __name__ == "__main__":
    utils.run_main(main)
