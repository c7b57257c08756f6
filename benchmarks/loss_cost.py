"""What the distillation loss with its gradients costs, and how far its gradients are off, at Olmo 3's vocabulary.

    uv run benchmarks/loss_cost.py
    uv run --group peers benchmarks/loss_cost.py  # where there is a GPU: Liger's losses too

Forward KL of a student close to its teacher, V = 100,278, with gradients of hidden states and head. Ways: Pare's
(losses.logit_loss); `naive`, full logits and softmax in float32 under autograd; `checkpoint`, the same in chunks of 256
tokens that torch.utils.checkpoint computes again in backward; on a GPU also Pare's with compile=True, Liger's chunked
loss and its Triton kernel. Prints the tables that are kept in loss_cost.md.

Time: all ways in turn, several rounds after a warm-up, the medians, and the median of each over naive's. Memory: the
peak above what the inputs and the gradients take; on the CPU resident memory of a process for each way. In float32 on
the CPU and in bfloat16, with a float32 head, on a GPU.

Errors: ‖gradient - exact‖ / ‖exact‖ for hidden states and for the head, in bfloat16, against float64 on the same
inputs. Noise is the standard deviation of what was added to the teacher's logits, which is about what student and
teacher differ by.
"""

import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses

VOCAB_SIZE = 100_278
CUDA = torch.cuda.is_available()
TOKENS, HIDDEN_SIZE, ROUNDS = (8192, 4096, 5) if CUDA else (2048, 512, 3)
CHUNK_BYTES = 2**30 if CUDA else 2**28  # distill.py's defaults
ERROR_TOKENS, ERROR_HIDDEN_SIZE = 128, 512
NOISE = (1.0, 0.1, 0.01)


def pare(hidden, weight, teacher_hidden, teacher_weight, compile=False):
    options = {"denominator": len(hidden), "chunk_bytes": CHUNK_BYTES, "compile": compile}
    return losses.logit_loss("forward_kl", hidden, weight, teacher_hidden, teacher_weight, **options)


def compiled(*inputs):
    return pare(*inputs, compile=True)


def naive(hidden, weight, teacher_hidden, teacher_weight):
    p_log = torch.log_softmax((hidden @ weight.to(hidden.dtype).T).float(), dim=-1)
    with torch.no_grad():
        q_log = torch.log_softmax((teacher_hidden @ teacher_weight.T).float(), dim=-1)
    return (q_log.exp() * (q_log - p_log)).sum() / len(hidden)


def checkpointed(hidden, weight, teacher_hidden, teacher_weight):
    chunks = zip(hidden.split(256), teacher_hidden.split(256), strict=True)
    parts = [
        checkpoint(naive, part, weight, teacher_part, teacher_weight, use_reentrant=False) * len(part)
        for part, teacher_part in chunks
    ]
    return torch.stack(parts).sum() / len(hidden)


def liger_chunked(hidden, weight, teacher_hidden, teacher_weight):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    return loss(hidden, weight.to(hidden.dtype), teacher_hidden, teacher_weight, labels)


def liger_triton(hidden, weight, teacher_hidden, teacher_weight):
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return loss(hidden, weight.to(hidden.dtype), teacher_hidden, teacher_weight, None)


WAYS = {"Pare": pare, "naive": naive, "checkpoint": checkpointed}
if CUDA:
    WAYS |= {"Pare, compiled": compiled, "Liger, chunked": liger_chunked, "Liger, Triton": liger_triton}


def make_inputs(num_tokens, hidden_size, noise, dtype, master_dtype, device) -> list[torch.Tensor]:
    """Hidden states, head, and the teacher's: logits of standard deviation 3, the student's with noise on them."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, device=device)
    teacher_weight = torch.randn(VOCAB_SIZE, hidden_size, device=device) * (3 / hidden_size**0.5)
    weight = teacher_weight + torch.randn_like(teacher_weight) * (noise / hidden_size**0.5)
    student = hidden.to(dtype).requires_grad_(), weight.to(dtype).to(master_dtype).requires_grad_()
    return [*student, hidden.to(dtype), teacher_weight.to(dtype)]


def run(way, inputs) -> float:
    """Seconds of loss and gradients, which are then dropped."""
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    synchronize()
    start = time.perf_counter()
    way(*inputs).backward()
    synchronize()
    seconds = time.perf_counter() - start
    for leaf in inputs[:2]:
        leaf.grad = None
    return seconds


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(name: str) -> int:
    """Bytes above the inputs and the gradients."""
    inputs = cost_inputs()
    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in inputs[:2])
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(WAYS[name], inputs)
        return torch.cuda.max_memory_allocated() - before - gradient_bytes
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run(WAYS[name], inputs)
    done.set()
    watcher.join()
    return peak[0] - before - gradient_bytes


def cost_inputs() -> list[torch.Tensor]:
    dtype, device = (torch.bfloat16, "cuda") if CUDA else (torch.float32, "cpu")
    return make_inputs(TOKENS, HIDDEN_SIZE, 0.1, dtype, torch.float32, device)


def errors_of(way, noise: float) -> list[float]:
    """Of the gradients of the hidden states and of the head."""
    device = "cuda" if CUDA else "cpu"
    master = torch.bfloat16 if way is naive else torch.float32
    inputs = make_inputs(ERROR_TOKENS, ERROR_HIDDEN_SIZE, noise, torch.bfloat16, master, device)
    way(*inputs).backward()
    hidden, weight, *teacher = (tensor.detach().double() for tensor in inputs)
    q, p = (torch.softmax(h @ w.T, dim=-1) for h, w in (teacher, (hidden, weight)))
    exact = (p - q) @ weight / len(hidden), (p - q).T @ hidden / len(hidden)
    return [((leaf.grad.double() - e).norm() / e.norm()).item() for leaf, e in zip(inputs, exact, strict=False)]


def main() -> None:
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"`uv run benchmarks/loss_cost.py`\n\n{machine}, torch {torch.__version__}\n")
    inputs = cost_inputs()
    for way in WAYS.values():
        run(way, inputs)
    seconds = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            seconds[name].append(run(way, inputs))
    dtype = str(inputs[0].dtype)[6:]
    del inputs
    print(f"{TOKENS} tokens, hidden {HIDDEN_SIZE}, {dtype}, {CHUNK_BYTES / 2**20:.0f} MiB for Pare\n")
    print("| | seconds | over naive | peak memory beside the gradients |")
    print("|---|---|---|---|")
    for name in WAYS:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["naive"], strict=True))
        command = [sys.executable, __file__, name]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        cells = f"{statistics.median(seconds[name]):.3f}", f"{ratio:.2f}", f"{peak / 1e9:.2f} GB"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\nGradient error in bfloat16, of hidden states / head; {ERROR_TOKENS} tokens, hidden {ERROR_HIDDEN_SIZE}\n")
    print("| noise on the logits |", " | ".join(map(str, NOISE)), "|")
    print("|---|" + "---|" * len(NOISE))
    for name, way in WAYS.items():
        cells = [" / ".join(f"{error:.2%}" for error in errors_of(way, noise)) for noise in NOISE]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_of(sys.argv[1]))
    else:
        main()
