"""Scoring and pruning a model of Olmo 3 7B's true shapes on one GPU: seconds and peak memory, stage by stage.

    uv run benchmarks/olmo3_7b.py [FOLDER]

Writes 14.6 GB of random bfloat16, runs importance_analysis.py and prune.py on it with their default constants but for
fewer calibration rows, and prints a table, with what the default numbers of rows would take; each stage's seconds as it
ends. Random weights change nothing in the time of a stage. Needs 52 GB of disk, removes what it made.
"""

import json
import os
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
from prune_cost import OLMO_3_7B, write_teacher  # noqa: E402

import common  # noqa: E402
import demo  # noqa: E402
import importance_analysis  # noqa: E402
import prune  # noqa: E402

LAYERS, LENGTH = 32, 4096
SAMPLES, PERPLEXITY_SAMPLES, MOMENT_SAMPLES, REFIT_SAMPLES = 64, 4, 32, 8
# function -> stage, its rows here, its rows by default
STAGES = {
    importance_analysis: {
        "load_model": ("the model, read, checked and moved to the GPU", None, None),
        "measure": ("scores", SAMPLES, importance_analysis.NUM_SAMPLES),
        "measure_perplexity": (
            "perplexity without each layer",
            PERPLEXITY_SAMPLES,
            importance_analysis.LAYER_PERPLEXITY_SAMPLES,
        ),
        "write_moments": ("second moments, summed", MOMENT_SAMPLES, importance_analysis.SECOND_MOMENT_SAMPLES),
        "save_moments": ("... hashing and writing them, 26 GB", None, None),
    },
    prune: {
        "choose_neurons": ("GREEDY_NEURONS", None, None),
        "principal_directions": ("ROTATE", None, None),
        "write_weights": ("REFIT, cutting and writing", None, None),
        "refit_in_sequence": ("REFIT_SAMPLES", REFIT_SAMPLES, prune.REFIT_SAMPLES),
    },
}


def time_stages(script) -> dict[str, list[float]]:
    """Wrap the functions of a script that are stages; the result fills with seconds and peak GiB on the GPU. What one
    stage calls another for counts there alone."""
    results = {name: [0.0, 0.0] for name in STAGES[script]}
    running: list[str] = []

    def wrap(home, name: str) -> None:
        function = getattr(home, name)

        def timed(*args, **kwargs):
            if not running:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                seconds, result = time.perf_counter() - start, results[running.pop()]
                result[:] = result[0] + seconds, max(result[1], torch.cuda.max_memory_allocated() / 2**30)
                print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)  # a run may be cut short
                if running:
                    results[running[-1]][0] -= seconds

        setattr(home, name, timed)

    for name in STAGES[script]:
        wrap(common if name == "load_model" else script, name)
    return results


def run(script, constants: dict, path: Path) -> None:
    """Run a script's main() with constants; write its stages, the whole, and this process's own peak as JSON."""
    results = time_stages(script)
    demo.configure(script, **constants)
    start = time.perf_counter()
    script.main()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    whole = [time.perf_counter() - start, int(peak.split()[1]) / 2**20]
    path.write_text(json.dumps({"stages": results, "whole": whole}))


def in_process(name: str, constants: dict, path: Path) -> dict:
    command = [sys.executable, __file__, "--run", name, json.dumps(constants), str(path)]
    subprocess.run(command, stdout=sys.stderr, check=True)
    return json.loads(path.read_text())


def main(parent: str | None) -> None:
    root = Path(tempfile.mkdtemp(dir=parent))
    try:
        OLMO_3_7B.update(num_hidden_layers=LAYERS, layer_types=OLMO_3_7B["layer_types"][:LAYERS])
        OLMO_3_7B.update(eos_token_id=0, pad_token_id=1)  # of the bundled tokenizer
        write_teacher(root / "teacher")
        for path in demo.TEACHER.glob("*token*"):
            shutil.copy(path, root / "teacher")
        (root / "text").mkdir()
        shared = {"MODEL": str(root / "teacher"), "SCORES_PATH": str(root / "scores.pt")}
        text = {"DATASET": demo.write_text(root / "text")["train"], "DATASET_CONFIG": None, "SEQUENCE_LENGTH": LENGTH}
        samples = {"NUM_SAMPLES": SAMPLES, "LAYER_PERPLEXITY_SAMPLES": PERPLEXITY_SAMPLES}
        samples["SECOND_MOMENT_SAMPLES"] = MOMENT_SAMPLES
        found = {"importance_analysis": in_process("importance_analysis", shared | text | samples, root / "times")}
        cut = {"OUTPUT_DIR": str(root / "out"), "REFIT_SAMPLES": REFIT_SAMPLES}
        found["prune"] = in_process("prune", shared | cut, root / "times")
    finally:
        shutil.rmtree(root)
    print("`uv run benchmarks/olmo3_7b.py`\n")
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__},", end=" ")
    print(f"transformers {transformers.__version__}; rows of {LENGTH} tokens\n")
    print("| stage | rows | seconds | rows by default | *computed:* seconds | peak on the GPU, GiB |")
    print("|---|---|---|---|---|---|")
    for script, stages in STAGES.items():
        result = found[script.__name__]
        for name, (title, rows, default) in stages.items():
            seconds, peak = result["stages"][name]
            computed = f"{seconds * default / rows:.0f}" if rows else ""
            print(f"| {title} | {rows or ''} | {seconds:.1f} | {default or ''} | {computed} | {peak:.1f} |")
        seconds, memory = result["whole"]
        print(f"| **{script.__name__}.py, all of it** ({memory:.1f} GiB of RAM) | | {seconds:.0f} | | | |")


if __name__ == "__main__":
    if "--run" in sys.argv:
        name, constants, path = sys.argv[2:]
        run({script.__name__: script for script in STAGES}[name], json.loads(constants), Path(path))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
