"""Time and memory of prune.py on a checkpoint of Olmo 3 7B's true shapes (14.6 GB of random bfloat16).

    uv run benchmarks/prune_cost.py [FOLDER]

Needs 25 GB of disk in FOLDER (the system's temporary folder by default) and removes what it made. Prints the table that
is kept in prune_cost.md: wall time and peak resident memory of slicing alone, and of the whole script with its strict
load and forward pass of the result.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_prune import OLMO_3_7B  # noqa: E402

import common  # noqa: E402
import prune  # noqa: E402

SHARD_BYTES = 3_000_000_000


def write_teacher(folder: Path) -> None:
    """Random weights of the true shapes, in shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLMO_3_7B))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    shards, size = [{}], 0
    for name, tensor in model.state_dict().items():
        if size + 2 * tensor.numel() > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.shape
        size += 2 * tensor.numel()
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
            for name, shape in shard.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_scores(folder: Path, path: Path) -> None:
    checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
    torch.manual_seed(0)
    meta = {"model": str(folder), "dataset": {}, "config_hash": common.hash_config(checkpoint)}
    meta["weights_hash"] = common.hash_checkpoint(checkpoint, "MODEL")
    layer = {i: i / 32 for i in range(32)}
    scores = {"mlp": torch.rand(32, 11008), "attention": torch.rand(32, 32), "layer": layer, "meta": meta}
    torch.save(scores | {"attn_ln": torch.rand(4096), "ffn_ln": torch.rand(4096)}, path)


def measure(root: Path, try_it: bool) -> None:
    """Prune with the default constants; print seconds and peak bytes of this process."""
    prune.MODEL, prune.SCORES_PATH = str(root / "teacher"), str(root / "scores.pt")
    prune.OUTPUT_DIR, prune.DEVICE, prune.DTYPE = str(root / "pruned"), "cpu", "bfloat16"
    if not try_it:
        prune.try_checkpoint = lambda *arguments: None
    start = time.perf_counter()
    prune.main()
    seconds = time.perf_counter() - start
    # Not getrusage: its peak is inherited from the parent, which held whole shards.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"RESULT {seconds} {int(peak.split()[1]) * 1024}")


def main(parent: str | None) -> None:
    root = Path(tempfile.mkdtemp(dir=parent))
    try:
        write_teacher(root / "teacher")
        write_scores(root / "teacher", root / "scores.pt")
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
        print("| Olmo 3 7B → 3.64B, random bfloat16 | seconds | peak memory |\n|---|---|---|")
        for title, try_it in (("slicing alone", False), ("with the strict load and forward pass", True)):
            command = [sys.executable, __file__, "--measure", str(root), str(int(try_it))]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, peak = (float(part) for part in output.split("RESULT ")[1].split())
            print(f"| {title} | {seconds:.0f} | {peak / 1e9:.1f} GB |", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(Path(sys.argv[2]), sys.argv[3] == "1")
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
