"""What the refit costs at the true widths of Olmo 3 7B on a CPU: seconds and peak memory, by its stages.

    uv run benchmarks/refit_cost.py [FOLDER]

Writes random models of Olmo 3 7B's widths and vocabulary with 1 and with 2 layers, scores them with second moments on
16 rows of 512 tokens, prunes them to the default target, and prints the table that is kept in refit_cost.md: what an
added layer takes (the difference), what everything else takes, and what 32 layers would take. The random weights
change nothing in the time of a solution; the tokens of the refit in sequence do, which takes time in proportion to
them. Each run is a process of its own. Needs 11 GB of disk and 12 GB of memory, removes what it made. About half an
hour on two cores.
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

LAYERS = (1, 2)
SAMPLES, LENGTH = 16, 512
STAGES = {  # function of prune.py -> its row
    "choose_neurons": "GREEDY_NEURONS",
    "principal_directions": "ROTATE",
    "write_weights": "REFIT, cutting and writing",
    "refit_in_sequence": f"REFIT_SAMPLES, on {SAMPLES * LENGTH} tokens",
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


def timed(name: str, seconds: dict):
    function = getattr(prune, name)

    def wrapper(*args):
        start = time.perf_counter()
        result = function(*args)
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
        return result

    return wrapper


def cut(root: Path, num_layers: int) -> None:
    """Prune with the default constants; print the seconds of each stage and of all, and the peak, as JSON."""
    seconds = {}
    for name in STAGES:
        setattr(prune, name, timed(name, seconds))
    paths = {"MODEL": str(root / f"teacher-{num_layers}"), "SCORES_PATH": str(root / f"scores-{num_layers}.pt")}
    sizes = {"TARGET_PARAMS": None, "HIDDEN_SIZE": 3072, "INTERMEDIATE_SIZE": 6144, "NUM_ATTENTION_HEADS": 24}
    demo.configure(prune, OUTPUT_DIR=str(root / "out"), DEVICE="cpu", **paths | sizes)
    start = time.perf_counter()
    prune.main()
    seconds["all"] = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print("RESULT " + json.dumps([seconds, int(peak.split()[1]) / 2**20]))


def in_process(what: str, root: Path, num_layers: int) -> str:
    """Run this script's `cut` or `score` in a process of its own; what it printed."""
    command = [sys.executable, __file__, "--run", what, str(root), str(num_layers)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(parent: str | None) -> None:
    root = Path(tempfile.mkdtemp(dir=parent))
    results = []
    try:
        for num_layers in LAYERS:
            write_teacher(root / f"teacher-{num_layers}", num_layers)
            in_process("score", root, num_layers)
            results.append(json.loads(in_process("cut", root, num_layers).split("RESULT ")[1]))
            shutil.rmtree(root / f"teacher-{num_layers}")
            shutil.rmtree(root / f"scores-{num_layers}.moments")
    finally:
        shutil.rmtree(root)
    (first, _), (last, peak) = results
    print("`uv run benchmarks/refit_cost.py`\n")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float64 on the CPU\n")
    print("| Olmo 3 7B → 3.64B | s a layer | s outside | s for 32 layers |\n|---|---|---|---|")
    for name, title in (STAGES | {"all": "prune.py"}).items():
        layer = (last[name] - first[name]) / (LAYERS[1] - LAYERS[0])
        outside = first[name] - LAYERS[0] * layer
        print(f"| {title} | {layer:.0f} | {outside:.0f} | {outside + 32 * layer:.0f} |")
    print(f"\nPeak memory with {LAYERS[1]} layers: {peak:.1f} GiB.")


if __name__ == "__main__":
    if "--run" in sys.argv:
        what, folder, layers = sys.argv[2:]
        {"score": score, "cut": cut}[what](Path(folder), int(layers))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
