"""Seconds, memory and labels of a job on a CUDA GPU beside the CPU (make gpu-check); says so where there is no GPU.

python benchmarks/gpu_check.py --out gpu.json                          # the embedded pair at the size of Table 5
python benchmarks/gpu_check.py --out gpu.json --dataset DATASET        # and the first two cases of a dataset, as Abd-MR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from atlassegfm.benchmark.timing import measure, scans_for
from atlassegfm.context import Context
from atlassegfm.core.dataset import load_dataset
from atlassegfm.core.image import load_image
from atlassegfm.core.overlap import dice_per_structure
from atlassegfm.segment import segment
from atlassegfm.settings import Settings

#: Voxels of a volume in the paper's Table 5.
TABLE_5 = (256, 256, 240)


def main() -> int:
    """Time both jobs on the GPU, compare labels with the CPU's, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--dataset", type=Path, help="nnU-Net dataset, as Abd-MR; its first two cases are taken")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU in this machine: nothing was measured, nothing is written")
        return 0
    card = torch.cuda.get_device_name()
    jobs = {"table 5": (None, TABLE_5)}
    if arguments.dataset is not None:
        query = load_dataset(arguments.dataset).cases[1]
        jobs[arguments.dataset.name] = (arguments.dataset, load_image(query.image).grid.shape)
    figures: dict[str, object] = {"card": card, "torch": torch.__version__, "jobs": {}}
    for name, (folder, shape) in jobs.items():
        atlas, query = scans_for(folder, shape, ())
        torch.cuda.reset_peak_memory_stats()
        timing = measure(atlas, query, Settings(), device="cuda", rounds=1)
        on_gpu, on_cpu = (segment(Context(atlas), query, device=device).labels.data for device in ("cuda", "cpu"))
        overlap = dice_per_structure(on_gpu, on_cpu, atlas.values)
        figures["jobs"][name] = {  # type: ignore[index]
            "seconds": {stage.name: round(stage.seconds, 2) for stage in timing.stages},
            "peak_memory_mb": timing.peak_memory_mb,
            "gpu_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20),
            "dice_with_cpu": {str(value): round(float(found), 4) for value, found in overlap.items()},
        }
        print(card, name, json.dumps(figures["jobs"][name]))  # type: ignore[index]
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
