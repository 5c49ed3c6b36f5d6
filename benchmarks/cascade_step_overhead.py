"""What a training step of stage C of Stable Cascade costs beyond its arithmetic.

Compares the toolkit's whole update (loader, noise, loss, adaptive weights, clipping, optimizer, bookkeeping) with
forward and backward of stage C and fused AdamW on tensors that are in memory already, and shows where the rest goes.
Stage C has the structure of the released ones at an eighth of their width, and pictures of 768 pixels (24x24 latents).

stable_cascade_train_stage_c.py runs as a person runs it, in float32. After each of its updates the bare loop makes one
with the same model, optimizer and memory, so that whatever else the machine does meets both alike. Medians of CPU
seconds of the whole process with one thread of torch.

    python benchmarks/cascade_step_overhead.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from benchmarks.step_overhead import BareLoop, Times, compare, medians, train, watch_training  # noqa: E402

PIXELS, UPDATES, LIMIT = 768, 30, 1.05
SCRIPT = "stable_cascade_train_stage_c.py"


class BareCascadeLoop(BareLoop):
    """The arithmetic alone, of text encoder and stage C."""

    def predict(self) -> Any:
        """Run text encoder and stage C."""
        import torch

        from library.models.cascade.unet import StageInputs

        with torch.no_grad():
            text = self.family.encode_text((self.ids,))
        return self.family.unet(self.latents, self.timestep / 1000, StageInputs(text.pooled, text.hidden))


def measure(updates: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return median seconds of each part of an update, of the bare loop and of the script."""
    import torch

    import stable_cascade_train_stage_c
    from library.models.cascade.stage_c import StageC
    from library.models.random_cascade import TINY_C, make_random_cascade
    from library.training.objective_cascade import GDFObjective

    torch.set_num_threads(1)
    bare: Times = defaultdict(list)
    ours: Times = defaultdict(list)
    watch_training(ours, bare, PIXELS, StageC, GDFObjective, BareCascadeLoop)
    config = replace(TINY_C, c_hidden=(256, 256), heads=(4, 4), c_cond=256, blocks_down=(2, 6), blocks_up=(6, 2))
    with tempfile.TemporaryDirectory() as folder:
        files = make_random_cascade(Path(folder), config_c=config)
        models = {
            "stage_c_checkpoint_path": files.stage_c,
            "effnet_checkpoint_path": files.effnet,
            "text_model_checkpoint_path": files.text,
        }
        train(stable_cascade_train_stage_c, models, PIXELS, updates, "--adaptive_loss_weight", "--learning_rate=1e-6")
    return medians(bare), medians(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--output")
    args = parser.parse_args()
    report("cascade_step_overhead", compare(*measure(args.updates), SCRIPT, LIMIT), args.output)


if __name__ == "__main__":
    main()
