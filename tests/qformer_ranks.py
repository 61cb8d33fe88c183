"""A process of two that computes stage 1's loss on its half of the golden batch (started by tests/test_qformer.py)."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_qformer import load_golden, made, pairs_of

from llm_stage.qformer_losses import stage1_loss

if __name__ == "__main__":
    rank, port, out, ids = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "ids"
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    golden = load_golden()
    model, inputs, mine = made(golden), golden["inputs"], slice(3 * rank, 3 * rank + 3)
    prefix = "ids_" if ids else ""
    drawn = (inputs[f"{prefix}neg_image_idx"][mine], inputs[f"{prefix}neg_text_idx"][mine])
    words = float(inputs["attention_mask"][:, 1:].sum()) / 2  # of both ranks, their mean
    loss, terms = stage1_loss(
        model, pairs_of(golden, inputs["image_ids"] if ids else None, mine), torch.Generator(), words=words, negatives=drawn
    )
    loss.backward()
    found = {"losses": torch.stack([*(terms[name] for name in ("itc", "itm", "itg")), loss]).detach()}
    for name, parameter in model.named_parameters():
        torch.distributed.all_reduce(parameter.grad)
        found[f"grad/{name}"] = parameter.grad / 2
    save_file(found, out / f"{prefix}{rank}.safetensors")
    torch.distributed.destroy_process_group()
