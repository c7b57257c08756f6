"""Time and memory of prune.py on a checkpoint of Olmo 3 7B's true shapes, beside `cp` and beside the usual way.

    uv run benchmarks/prune_cost.py [FOLDER]

Writes 14.6 GB of random bfloat16 in shards of 3 GB, prunes them to the default target without second moments (REFIT
off), and prints the table that is kept in prune_cost.md. Needs 35 GB of disk in FOLDER (the system's temporary folder
by default) and removes what it made. Each line is the median of runs in processes of their own, one after the other:

- prune.py: the whole script with its default constants, but for a score file without second moments.
- cp: as many bytes as the student has, from the teacher's first shards to a new folder, then `sync`; and the remaining
  bytes that pruning needs, from the shards after those to /dev/null. Pruning needs whole rows: all rows of a matrix
  whose columns it cuts, only the kept rows of one whose rows it cuts. (Where more than half of the rows in a stretch
  are kept it reads the stretch, which is faster than leaving gaps of a row or two; `cp` does not pay for that.)
- the usual way: from_pretrained in bfloat16, the same tensors indexed in memory, save_pretrained (in 5 GB shards).

Before each, the teacher's files are written to disk and evicted from the page cache; each ends with a `sync`. Peak
memory is the process's own resident peak (VmHWM; getrusage's is inherited from the parent). Python's imports are not
counted: some six seconds with bytecode at hand, twenty without, of prune.py and the usual way alike.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.olmo3 import modeling_olmo3  # noqa: E402, F401 (else imported while the time is measured)

import common  # noqa: E402
import prune  # noqa: E402

OLMO_3_7B = {  # config.json of allenai/Olmo-3-7B-Instruct, what shapes depend on
    "architectures": ["Olmo3ForCausalLM"],
    "dtype": "bfloat16",
    "eos_token_id": 100257,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
SHARD_BYTES = 3_000_000_000
POOL = 2**27  # random values; the files are stretches of them from random places
ROUNDS = 3  # of prune.py and cp, alternating; the usual way runs once


def write_teacher(folder: Path) -> None:
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
    torch.manual_seed(0)
    pool = torch.empty(POOL, dtype=torch.bfloat16).uniform_(-0.03, 0.03).view(torch.uint8).numpy()
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + 2 * shape.numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as output:
            output.write(len(encoded).to_bytes(8, "little") + encoded)
            while offset:
                start = 2 * torch.randint(POOL, ()).item()
                offset -= output.write(memoryview(pool[start : start + offset]))
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_scores(folder: Path, path: Path) -> None:
    """A score file without second moments: random scores, norms whose channels all have their mean share."""
    checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
    torch.manual_seed(0)
    hashes = {
        "config_hash": common.hash_config(checkpoint),
        "weights_hash": common.hash_checkpoint(checkpoint, "MODEL"),
    }
    spans = ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    shares = {name: torch.rand(32, 4096) for name in spans} | {common.FINAL_NORM: torch.rand(1, 4096)}
    scores = {
        "mlp": torch.rand(32, 11008),
        "attention": torch.rand(32, 32),
        "attn_ln": torch.rand(4096),
        "ffn_ln": torch.rand(4096),
        "hidden": torch.rand(4096),
        "layer": {i: (i + 1) / 32 for i in range(32)},
        "layer_perplexity": {i: 10 + i / 32 for i in range(32)},
        "angular_distance": torch.rand(33, 33),
        "norms": {name: share / share.mean(1, keepdim=True) for name, share in shares.items()},
        "meta": {"model": str(folder), "revision": None, "dataset": {}, "moments": None} | hashes,
    }
    common.save_scores(scores, path)


def run_prune(root: Path) -> None:
    prune.MODEL, prune.SCORES_PATH = str(root / "teacher"), str(root / "scores.pt")
    prune.OUTPUT_DIR, prune.DEVICE = str(root / "out"), "cpu"
    prune.main()


def run_usual_way(root: Path) -> None:
    """Load the model, replace every tensor by its kept part, save; each old tensor is freed as soon as it is cut."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.bfloat16)
    kept = {4096: torch.randperm(4096)[:3072].sort().values, 11008: torch.randperm(11008)[:6144].sort().values}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            x = parameter.data
            for axis in range(x.ndim):
                if x.shape[axis] in kept:
                    x = x.index_select(axis, kept[x.shape[axis]])
            setattr(module, name, torch.nn.Parameter(x, requires_grad=False))  # the old tensor is freed here
    sizes = {"hidden_size": 3072, "intermediate_size": 6144, "num_attention_heads": 24, "num_key_value_heads": 24}
    for name, value in sizes.items():
        setattr(model.config, name, value)
    model.config.head_dim = 128
    model.save_pretrained(root / "out", max_shard_size="5GB")


def run_cp(root: Path) -> None:
    """cp of the bytes that pruning writes, and of those that it only reads; counted in write_plan()."""
    plan = json.loads((root / "plan.json").read_text())
    (root / "out").mkdir()
    for source, start, size, target in plan["copies"]:
        command = ["dd", f"if={source}", f"of={target}", "bs=16M", "iflag=skip_bytes,count_bytes", "status=none"]
        if start == 0 and size == os.path.getsize(source):
            command = ["cp", source, target]
        else:
            command += [f"skip={start}", f"count={size}"]
        subprocess.run(command, check=True)


def write_plan(root: Path) -> dict:
    """What pruning reads and writes, by the shapes: whole shards by cp, the two where the limits fall in part by dd."""
    read = written = 0
    checkpoint = common.find_checkpoint(str(root / "teacher"), None, "MODEL")
    kept = {common.HIDDEN: 3072, common.NEURONS: 6144, common.QUERY: 3072, common.KEY_VALUE: 3072}
    for name, info in common.tensor_infos(checkpoint, "MODEL").items():
        axes, _ = prune.axes_of(checkpoint.family, name)
        rows, *columns = (kept.get(axis, size) for axis, size in zip(axes, info.shape, strict=True))
        if columns:
            read += 2 * rows * info.shape[1]
            written += 2 * rows * columns[0]
        else:
            read += 2 * info.shape[0]
            written += 2 * rows
    copies, at = [], 0
    for path in sorted((root / "teacher").glob("*.safetensors")):
        size, done = path.stat().st_size, 0
        for limit, target in ((written, root / "out" / path.name), (read, "/dev/null")):
            part = min(size - done, max(0, limit - at))
            if part:
                copies.append([str(path), done, part, str(target)])
                at, done = at + part, done + part
    plan = {"read": read, "written": written, "copies": copies}
    (root / "plan.json").write_text(json.dumps(plan))
    return plan


WAYS = {"prune.py": run_prune, "cp": run_cp, "usual": run_usual_way}


def measure(way: str, root: Path) -> None:
    """Print seconds and peak bytes of this process; `sync` is part of the time."""
    before = time.perf_counter()
    WAYS[way](root)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - before
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"RESULT {seconds} {int(peak.split()[1]) * 1024}")


def evict(folder: Path) -> None:
    """Write a folder's files to disk and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(way: str, root: Path) -> tuple[float, float]:
    """(seconds, peak bytes) of one run in a process of its own."""
    shutil.rmtree(root / "out", ignore_errors=True)
    subprocess.run(["sync"], check=True)
    evict(root / "teacher")
    command = [sys.executable, __file__, "--measure", way, str(root)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        print(f"{way}: ended with {result.returncode} (-9: killed, out of memory)", flush=True)
        return float("nan"), float("nan")
    seconds, peak = (float(part) for part in result.stdout.split("RESULT ")[1].split())
    print(f"{way}: {seconds:.1f} s, {peak / 2**30:.2f} GiB", flush=True)
    return seconds, peak


def main(parent: str | None) -> None:
    root = Path(tempfile.mkdtemp(dir=parent))
    try:
        write_teacher(root / "teacher")
        write_scores(root / "teacher", root / "scores.pt")
        plan = write_plan(root)
        load = os.getloadavg()[0]
        ways = ["prune.py", "cp"] * ROUNDS + ["usual"]
        runs = [(way, *timed(way, root)) for way in ways]
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        print(f"\n{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {versions}, load before {load:.1f}\n")
        print(f"Pruning needs {plan['read'] / 1e9:.2f} GB and writes {plan['written'] / 1e9:.2f} GB.\n")
        print("| Olmo 3 7B → 3.64B, random bfloat16 | seconds (median) | of cp | peak memory, GiB |\n|---|---|---|---|")
        titles = {"prune.py": "prune.py", "cp": "cp of the same bytes", "usual": "load, index, save_pretrained"}
        seconds = {way: statistics.median(run[1] for run in runs if run[0] == way) for way in titles}
        for way, title in titles.items():
            peak = statistics.median(run[2] for run in runs if run[0] == way) / 2**30
            shown = "" if way == "cp" else f"{peak:.2f}"
            print(f"| {title} | {seconds[way]:.0f} | {seconds[way] / seconds['cp']:.2f} | {shown} |")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
