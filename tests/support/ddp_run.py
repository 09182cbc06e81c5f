"""One process of a distributed Trainer run; `torchrun` starts it. Writes what it saw as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from trainer_runs import make_trainer, tiny_lora

import glasstune as gt
from glasstune.core.errors import RunError


def main(folder: Path, what: str) -> None:
    model = tiny_lora()
    if what == "dead":
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        layer.register_forward_hook(lambda module, args, out: out.detach())
    callback = gt.GlasstuneCallback(every_n_steps=2)
    trainer = make_trainer(
        folder,
        model=model,
        callbacks=[callback] if what != "plain" else [],
        loss=gt.term_loss({"next_token": 1.0, "z_loss": 0.01}),
        max_steps=3,
        per_device_train_batch_size=1,
        ddp_backend="gloo",
        ddp_find_unused_parameters=True,
        max_grad_norm=0.01,
    )
    error = ""
    try:
        trainer.train()
    except RunError as caught:
        error = str(caught)
    weights = [value.detach() for value in model.parameters() if value.requires_grad]
    found = {
        "error": error,
        "log": trainer.state.log_history,
        "weights": torch.cat([value.flatten() for value in weights]).double().tolist(),
        "norm": sum((norm or 0.0) ** 2 for norm in callback.norms.values()) ** 0.5,
        "findings": [finding.code for finding in callback.findings],
        "audited": callback.report is not None,
    }
    rank = trainer.args.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
