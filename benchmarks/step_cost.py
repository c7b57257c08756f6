"""What whole training steps of distill.py cost, beside the floor: their matrix products at the measured matrix rate.

    uv run benchmarks/step_cost.py

Where there is a GPU: Olmo 3 7B -> prune.py's default target at true shapes, rows of 8192 tokens, one at a time, 2**17
tokens a step, the other constants as distill.py has them; *computed* six minutes on an H100 or H200. Else a small pair
on the CPU in float32, two minutes. Weights and text are random; models and optimizer are made by distill.load_pair and
build_optimizer, and a step is distill.train_step: all micro-batches, clipping, AdamW. Every line of the table, which is
kept in step_cost.md, is a process of its own. Seconds: the median of steps after a warm-up, in brackets the fastest,
which on a machine shared with others is the one to compare with the floor.

FLOP of a step: 2 for each weight of a linear layer and token, of the student three times (forward, and backward twice
as much), of the teacher once; attention's products for the pairs of tokens that see each other in their document and
window, likewise; the loss's four products for counted tokens. The floor has also the student's second forward pass
under GRADIENT_CHECKPOINTING; MFU has not. Floor: at the rate of a square product in the compute dtype, the fastest of
several before and after the steps. MFU: of that rate on a CPU, of the nominal dense bfloat16 peak on a GPU. Peak:
what PyTorch allocated on the GPU; on a CPU what was resident, Python and its packages included. Preflight: what
distill.py expects, which is bytes of tensors alone. TFLOP/s: of a square product.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from prune_cost import OLMO_3_7B  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import demo  # noqa: E402
import distill  # noqa: E402
import preflight  # noqa: E402
import prune  # noqa: E402

SMALL = OLMO_3_7B | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "layer_types": OLMO_3_7B["layer_types"][:8],
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 256,
    "vocab_size": 8192,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
SMALL_STUDENT = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6}
ON_CPU = {"SEQUENCE_LENGTH": 512, "MICRO_BATCH_SIZE": 2, "TOKENS_PER_STEP": 2**11}
ON_GPU = {"SEQUENCE_LENGTH": 8192, "MICRO_BATCH_SIZE": 1, "TOKENS_PER_STEP": 2**17}
LINES = {
    "cpu": {
        "GRADIENT_CHECKPOINTING": ON_CPU,
        "without it": ON_CPU | {"GRADIENT_CHECKPOINTING": False},
        "COMPILE": ON_CPU | {"COMPILE": True},
        "COMPILE, without it": ON_CPU | {"COMPILE": True, "GRADIENT_CHECKPOINTING": False},
    },
    "cuda": {
        "default constants": ON_GPU,
        "ATTENTION = 'sdpa'": ON_GPU | {"ATTENTION": "sdpa"},
        "COMPILE": ON_GPU | {"COMPILE": True},
        "not DETERMINISTIC": ON_GPU | {"DETERMINISTIC": False},
        "COMPILE, not DETERMINISTIC": ON_GPU | {"COMPILE": True, "DETERMINISTIC": False},
    },
}
STEPS = {"cpu": 4, "cuda": 2}  # timed
NUM_ROWS = 64  # of random text
DOCUMENTS = 4  # in a row, of random lengths
SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product gives the rate
PRODUCTS = 20
PEAKS = {  # FLOP/s, dense bfloat16, from NVIDIA's data sheets (half of the figures with sparsity)
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class RandomRows:
    """Packed rows of random tokens in memory, as data.fetch reads them."""

    def __init__(self, num_rows: int, length: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(2, vocab_size, (num_rows, length), generator=generator)
        starts = torch.zeros(num_rows, length, dtype=torch.bool)
        for row in starts:
            row[torch.randperm(length - 1, generator=generator)[: DOCUMENTS - 1] + 1] = True
        starts[:, 0] = True
        where = torch.arange(length).expand(num_rows, length)
        self.position_ids = where - torch.where(starts, where, 0).cummax(1).values
        self.counted = torch.cat([~starts[:, 1:], torch.zeros(num_rows, 1, dtype=torch.bool)], dim=1)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, indices: list[int]) -> dict:
        names = ("input_ids", "position_ids", "counted")
        return {name: getattr(self, name)[indices] for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# FLOP


def forward_flop(config, layers, position_ids: torch.Tensor) -> int:
    """Of the decoder layers' matrix products: 2 for each weight and token; and for each pair of tokens, head and
    channel 4, in queries times keys and in weights times values. position_ids (B, T)."""
    weights = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    pairs = sum(attended_pairs(position_ids, window) for window in windows)
    return 2 * weights * position_ids.numel() + 4 * width * pairs


def attended_pairs(position_ids: torch.Tensor, window: int | None) -> int:
    """Pairs of a token and itself or one before it in its document, at most `window` of them."""
    seen = position_ids + 1
    return (seen if window is None else seen.clamp(max=window)).sum().item()


def loss_flop(num_tokens: int, vocab_size: int, hidden_size: int, teacher_hidden_size: int) -> int:
    """Of the four products: both logits, and the gradients of the student's hidden states and head."""
    return 2 * num_tokens * vocab_size * (3 * hidden_size + teacher_hidden_size)


def step_flop(student, teacher, rows: RandomRows, indices: list[int]) -> tuple[int, int]:
    """(FLOP of a step without recomputation, FLOP of one forward pass of the student's layers)."""
    batch = rows[indices]
    once, of_teacher = (
        forward_flop(model.config, model.base_model.layers, batch["position_ids"]) for model in (student, teacher)
    )
    sizes = student.config.vocab_size, student.config.hidden_size, teacher.config.hidden_size
    return 3 * once + of_teacher + loss_flop(batch["counted"].sum().item(), *sizes), once


# ---------------------------------------------------------------------------------------------------------------------
# One line of the table, in a process of its own


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products."""
    side, fastest = SQUARE[device.type], float("inf")
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    for _ in range(PRODUCTS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def configs(gpu: bool) -> tuple:
    """Teacher's and student's. On a GPU prune.py's default target, chosen by prune.py itself."""
    teacher = transformers.Olmo3Config(**(OLMO_3_7B if gpu else SMALL))
    if not gpu:
        return teacher, transformers.Olmo3Config(**SMALL | SMALL_STUDENT)
    checkpoint = SimpleNamespace(config=teacher, family=common.FAMILIES["olmo3"], head_dim=128)
    sizes = prune.student_sizes(checkpoint, common.read_constants(prune))
    return teacher, transformers.Olmo3Config(**OLMO_3_7B | vars(sizes) | {"head_dim": 128})


def build(config, dtype: torch.dtype, device: torch.device, constant: str, quantization=None):
    """A random model in place of common.load_model, which reads one."""
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def as_checkpoint(config) -> SimpleNamespace:
    return SimpleNamespace(config=config, family=common.FAMILIES[config.model_type], head_dim=config.head_dim)


def measure(constants: dict) -> dict:
    """Time, FLOP and memory of steps of one pair."""
    demo.configure(distill, **constants)
    settings = distill.derive_settings(common.read_constants(distill))
    device = settings.device
    torch.manual_seed(0)
    common.load_model = build  # so that distill.load_pair makes random models, and does the rest as ever
    teacher_config, student_config = configs(device.type == "cuda")
    models = [teacher_config, student_config]
    distill.choose_attention(*map(as_checkpoint, models), settings)
    with distill.deterministic(settings.deterministic, device):
        teacher, student = distill.load_pair(teacher_config, student_config, settings)
        optimizer = distill.build_optimizer(student, settings)
        rows = RandomRows(NUM_ROWS, settings.sequence_length, teacher_config.vocab_size)
        rate = matrix_rate(device, settings.dtype)
        student.train()
        seconds, flop = [], []
        for step in range(1 + STEPS[device.type]):
            batches = distill.step_batches(rows, step, settings)  # in a run, beside the step before
            synchronize(device)
            start = time.perf_counter()
            distill.train_step(student, teacher, batches, optimizer, step, settings)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            indices = data.row_indices(step, settings.rows_per_step, len(rows), settings.seed)
            flop.append(step_flop(student, teacher, rows, indices))
            print(f"step {step}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        memory = peak_bytes(device)
        rate = max(rate, matrix_rate(device, settings.dtype))
    needed, again = (statistics.mean(part) for part in zip(*flop[1:], strict=True))
    parameters = [model.num_parameters() for model in (teacher, student)]
    return {
        "seconds": seconds[1:],
        "tokens": settings.tokens_per_step,
        "micro_batch": [settings.micro_batch_size, settings.sequence_length],
        "needed_flop": needed,
        "floor_flop": needed + again * settings.gradient_checkpointing,
        "rate": rate,
        "memory": memory,
        "expected": sum(preflight.memory_parts(*map(as_checkpoint, models), settings, 1).values()),
        "parameters": parameters,
        "dtype": str(settings.dtype)[6:],
    }


def cells(result: dict, peak: float | None) -> list[str]:
    median, fastest = statistics.median(result["seconds"]), min(result["seconds"])
    floor, tokens = result["floor_flop"] / result["rate"], result["tokens"]
    mfu = f"{result['needed_flop'] / median / peak:.1%}" if peak else "peak unknown"
    share = f"{floor / median:.1%} ({floor / fastest:.1%})"
    memory = [f"{result[name] / 2**30:.2f}" for name in ("memory", "expected")]
    return [f"{median:.2f} ({fastest:.2f})", f"{tokens / median:,.0f}", f"{floor:.2f}", share, mfu, *memory]


def main() -> None:
    gpu = torch.cuda.is_available()
    kind, device = ("cuda", torch.cuda.get_device_name()) if gpu else ("cpu", f"{platform.machine()}, ")
    machine = device if gpu else f"{device}{torch.get_num_threads()} threads, load before {os.getloadavg()[0]:.1f}"
    print("`uv run benchmarks/step_cost.py`\n")
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    result = None
    for name in LINES[kind]:
        command = [sys.executable, __file__, name]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if process.returncode:
            print(f"| {name} | ended with {process.returncode} (-9: killed, out of memory) | | | | | |", flush=True)
            continue
        first, result = result is None, json.loads(process.stdout.splitlines()[-1])
        if first:
            teacher, student = (f"{count / 1e6:,.0f}M" for count in result["parameters"])
            rows, length = result["micro_batch"]
            print(
                f"\n{teacher} -> {student} parameters, {result['dtype']}, {result['tokens']:,} tokens a step in ",
                end="",
            )
            print(f"micro-batches of {rows} x {length}, {result['needed_flop']:.3g} FLOP without recomputation\n")
            print("| | s a step | tokens/s | floor, s | of the floor | MFU | peak, GiB | preflight, GiB | TFLOP/s |")
            print("|---|---|---|---|---|---|---|---|---|")
        peak = PEAKS.get(device) if gpu else result["rate"]
        print("|", " | ".join([name, *cells(result, peak), f"{result['rate'] / 1e12:.3g}"]), "|", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(LINES["cuda" if torch.cuda.is_available() else "cpu"][sys.argv[1]])))
    else:
        main()
