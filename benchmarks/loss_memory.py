"""Peak memory of the distillation loss with its gradients, chunked and naive, at the vocabulary of Olmo 3 (100,278).

    uv run benchmarks/loss_memory.py

Each row is a process of its own on the CPU: peak resident memory less what was resident with the inputs in place, and
the time of loss plus gradients. The naive way builds the float32 logits of all tokens under autograd. Prints the table
that is kept in loss_memory.md.
"""

import os
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import losses

VOCAB_SIZE, HIDDEN_SIZE = 100_278, 64
TOKENS = (512, 1024, 2048, 4096)


def naive(hidden, weight, teacher_hidden, teacher_weight):
    p_log = torch.log_softmax(hidden @ weight.T, dim=-1)
    with torch.no_grad():
        q_log = torch.log_softmax(teacher_hidden @ teacher_weight.T, dim=-1)
    return (q_log.exp() * (q_log - p_log)).sum() / len(hidden)


def chunked(*inputs):
    return losses.forward_kl(*inputs, denominator=len(inputs[0]), chunk_bytes=distill.LOSS_CHUNK_BYTES)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, num_tokens: int) -> None:
    """Print peak bytes above the inputs, seconds and the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, requires_grad=True)
    inputs = (hidden, weight, torch.randn(num_tokens, HIDDEN_SIZE), torch.randn(VOCAB_SIZE, HIDDEN_SIZE))
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    loss = {"naive": naive, "chunked": chunked}[name](*inputs)
    loss.backward()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(peak[0] - before, seconds, loss.item())


def main() -> None:
    print(f"V = {VOCAB_SIZE:,}, H = {HIDDEN_SIZE}, float32, chunks of {distill.LOSS_CHUNK_BYTES / 2**20:.0f} MiB")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| tokens | tokens × V in float32 | naive, peak | chunked, peak | naive, s | chunked, s |")
    print("|---|---|---|---|---|---|")
    for num_tokens in TOKENS:
        results = {}
        for name in ("naive", "chunked"):
            command = [sys.executable, __file__, name, str(num_tokens)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[name] = [float(part) for part in output.split()]
        (naive_peak, naive_seconds, naive_loss), (peak, seconds, loss) = results["naive"], results["chunked"]
        assert abs(loss - naive_loss) < 1e-4 * naive_loss, (loss, naive_loss)
        print(
            f"| {num_tokens} | {num_tokens * VOCAB_SIZE * 4 / 1e9:.2f} GB | {naive_peak / 1e9:.2f} GB "
            f"| {peak / 1e9:.2f} GB | {naive_seconds:.2f} | {seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main()
