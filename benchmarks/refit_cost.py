"""What the refit costs at the true widths of Olmo 3 7B: seconds and peak memory, by its parts.

    uv run benchmarks/refit_cost.py [FOLDER]

Writes random models of Olmo 3 7B's widths and vocabulary with 1 and with 3 layers, scores them with second moments on
16 rows of 512 tokens, prunes them to the default target, and prints the table that is kept in refit_cost.md: what an
added layer takes (half of the difference), what everything else takes (with one layer, less that), and what 32 layers
would take. The random weights and few tokens change nothing in the time of a solution; REFIT_SAMPLES = 16 costs in
proportion to its tokens. Each run is a process of its own. Needs 12 GB of disk and 12 GB of memory, removes what it
made. About an hour on two cores.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
from prune_cost import OLMO_3_7B  # noqa: E402

import demo  # noqa: E402
import importance_analysis  # noqa: E402
import prune  # noqa: E402

LAYERS = (1, 3)
SAMPLES, LENGTH = 16, 512
OFF = {"REFIT": False, "ROTATE": False, "GREEDY_NEURONS": False, "REFIT_SAMPLES": 0}
STEPS = {
    "sliced only": OFF,
    "+ REFIT, single channels": OFF | {"REFIT": True},
    "+ GREEDY_NEURONS": OFF | {"REFIT": True, "GREEDY_NEURONS": True},
    "+ ROTATE": OFF | {"REFIT": True, "GREEDY_NEURONS": True, "ROTATE": True},
    f"+ in sequence, {SAMPLES * LENGTH} tokens": {
        "REFIT": True,
        "GREEDY_NEURONS": True,
        "ROTATE": True,
        "REFIT_SAMPLES": SAMPLES,
    },
}


def write_teacher(folder: Path, num_layers: int) -> None:
    layers = {"num_hidden_layers": num_layers, "layer_types": OLMO_3_7B["layer_types"][:num_layers]}
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLMO_3_7B | layers | {"eos_token_id": 0, "pad_token_id": 1}))
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in demo.TEACHER.glob("*token*"):
        shutil.copy(path, folder)


def score(root: Path, num_layers: int) -> None:
    text = root / "text"
    text.mkdir(exist_ok=True)
    demo.configure(
        importance_analysis,
        MODEL=str(root / f"teacher-{num_layers}"),
        DATASET=demo.write_text(text)["train"],
        DATASET_CONFIG=None,
        NUM_SAMPLES=SAMPLES,
        SEQUENCE_LENGTH=LENGTH,
        BATCH_SIZE=4,
        LAYER_PERPLEXITY=False,
        SCORES_PATH=str(root / f"scores-{num_layers}.pt"),
        DEVICE="cpu",
    )
    importance_analysis.main()


def cut(root: Path, num_layers: int, constants: dict) -> None:
    sizes = {"TARGET_PARAMS": None, "HIDDEN_SIZE": 3072, "INTERMEDIATE_SIZE": 6144, "NUM_ATTENTION_HEADS": 24}
    paths = {"MODEL": str(root / f"teacher-{num_layers}"), "SCORES_PATH": str(root / f"scores-{num_layers}.pt")}
    demo.configure(prune, OUTPUT_DIR=str(root / "out"), DEVICE="cpu", **sizes | paths | constants)
    started = time.perf_counter()
    prune.main()
    seconds = time.perf_counter() - started
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"RESULT {seconds} {int(peak.split()[1]) * 1024}")


def in_process(*arguments) -> str:
    """Run this script's `cut` or `score` in a process of its own; what it printed."""
    command = [sys.executable, __file__, "--run", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(parent: str | None) -> None:
    root = Path(tempfile.mkdtemp(dir=parent))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS}
    try:
        for num_layers in LAYERS:
            write_teacher(root / f"teacher-{num_layers}", num_layers)
            in_process("score", root, num_layers)
            for name in STEPS:
                printed = in_process("cut", root, num_layers, name)
                seconds, peak = map(float, printed.split("RESULT ")[1].split())
                results[name].append((seconds, peak))
                print(f"{num_layers} layers, {name}: {seconds:.0f} s, {peak / 2**30:.1f} GiB", file=sys.stderr)
            shutil.rmtree(root / f"teacher-{num_layers}")
            shutil.rmtree(root / f"scores-{num_layers}.moments")
    finally:
        shutil.rmtree(root)
    print("`uv run benchmarks/refit_cost.py`\n")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float64 on the CPU\n")
    print("| Olmo 3 7B → 3.64B | s a layer | s outside | s for 32 layers | peak memory, GiB |\n|---|---|---|---|---|")
    for name, ((first, _), (last, peak)) in results.items():
        layer = (last - first) / (LAYERS[1] - LAYERS[0])
        outside = first - LAYERS[0] * layer
        print(f"| {name} | {layer:.0f} | {outside:.0f} | {outside + 32 * layer:.0f} | {peak / 2**30:.1f} |")


if __name__ == "__main__":
    if "--run" in sys.argv:
        what, folder, layers, *step = sys.argv[2:]
        if what == "score":
            score(Path(folder), int(layers))
        else:
            cut(Path(folder), int(layers), STEPS[step[0]])
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
