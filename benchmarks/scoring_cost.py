"""What scoring costs beside the bare forward pass, and what the perplexity without each layer costs.

    uv run benchmarks/scoring_cost.py

Prints the table that is kept in scoring_cost.md. Scoring is importance_analysis.measure with all its hooks, over the
same rows as the base model alone; what it sets up once counts too. The layer perplexity is
importance_analysis.measure_perplexity, over as many full passes with LM head and loss as the model has layers, which
is what removing each layer in turn would take. The two are timed one after the other, several times after a warm-up:
the figures are the medians of the pairs. In bfloat16 and at true sizes where there is a GPU (three minutes), else in
float32 on the CPU (five to ten minutes on two cores).

"At least" is the layer perplexity's ratio if multiplications by weights were all that counts: L layers are skipped or
run (L + 1) / 2 times on average, but the LM head L + 1 times.
"""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import YARN  # noqa: E402

import common  # noqa: E402
import importance_analysis  # noqa: E402

PAIRS = {"cuda": 5, "cpu": 15}  # a CPU shared with others is noisy
REMOVAL_PAIRS = 5


def tiny_model(device: torch.device, dtype: torch.dtype):
    checkpoint = common.find_checkpoint(str(ROOT / "assets" / "tiny-olmo3"), None, "MODEL")
    return common.load_model(checkpoint, dtype, device, "MODEL")


def random_model(
    num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int, window: int, vocab_size: int
):
    """A function of device and dtype that makes an Olmo 3 of this shape."""
    rope = {
        "full_attention": YARN | {"original_max_position_embeddings": window // 2},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = transformers.Olmo3Config(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        vocab_size=vocab_size,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        sliding_window=window,
        rope_parameters=rope,
        max_position_embeddings=2 * window,
    )

    def build(device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        with device:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    return build


# name -> model, tokens per row, batch size, rows of the scoring pass, rows of the layer perplexity (0: left out)
ON_CPU = {
    "tiny teacher: 8 layers, hidden 160": (tiny_model, 256, 16, 32, 16),
    "random: 4 layers, hidden 1024, 2816 neurons": (random_model(4, 1024, 2816, 16, 256, 8192), 512, 4, 4, 0),
    "random: 2 layers, hidden 2048, 5632 neurons": (random_model(2, 2048, 5632, 16, 256, 8192), 512, 4, 4, 0),
    "random: 16 layers, hidden 512, 1408 neurons": (random_model(16, 512, 1408, 8, 256, 8192), 512, 4, 4, 1),
}
ON_GPU = {
    "7B: 32 layers, hidden 4096, 11008 neurons": (random_model(32, 4096, 11008, 32, 4096, 100278), 4096, 4, 32, 1),
    "1B: 16 layers, hidden 2048, 8192 neurons": (random_model(16, 2048, 8192, 16, 4096, 100278), 4096, 4, 64, 4),
}


def seconds_of(call, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def compare(first, second, device: torch.device, pairs: int) -> tuple[float, float, float]:
    """Median seconds of both calls, and the median of second / first over the pairs."""
    first(), second()
    times = [(seconds_of(first, device), seconds_of(second, device)) for _ in range(pairs)]
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in times)


def least_ratio(model) -> float:
    """Of the layer perplexity, by weights multiplied."""
    num_layers, head = len(model.base_model.layers), model.get_output_embeddings().weight.numel()
    layer = sum(parameter.numel() for parameter in model.base_model.layers[0].parameters())
    once = num_layers * layer + head
    return (num_layers * (num_layers + 1) / 2 * layer + (num_layers + 1) * head) / (num_layers * once)


def row_of(build, length: int, batch_size: int, num_rows: int, num_removal_rows: int, device, dtype) -> list[str]:
    model = build(device, dtype)
    family, num_layers = common.FAMILIES[model.config.model_type], len(model.base_model.layers)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, model.config.vocab_size, (num_rows, length), generator=generator)
    half, some = torch.arange(num_rows) % 2, rows[:num_removal_rows]
    half_of_some = half[:num_removal_rows]

    def new_sums():
        return importance_analysis.Sums(Path("nowhere.safetensors"), "", 300)

    @torch.inference_mode()
    def bare():
        for batch in rows.split(batch_size):
            model.base_model(input_ids=batch.to(device), use_cache=False)

    def score():
        importance_analysis.measure(model.base_model, family, rows, half, batch_size, new_sums())

    @torch.inference_mode()
    def full():
        for batch in some.split(batch_size):
            batch = batch.to(device)
            model(input_ids=batch, labels=batch, use_cache=False)

    def remove():
        importance_analysis.measure_perplexity(model, some, half_of_some, batch_size, new_sums())

    with open(os.devnull, "w") as nowhere, common.redirect_stdout(nowhere):
        seconds, scoring, ratio = compare(bare, score, device, PAIRS[device.type])
        cells = [f"{seconds:.2f}", f"{scoring:.2f}", f"{ratio:.2f}"]
        if not num_removal_rows:
            return [*cells, "", "", "", ""]
        passes, removal, ratio = compare(lambda: [full() for _ in range(num_layers)], remove, device, REMOVAL_PAIRS)
    return [*cells, f"{passes:.2f}", f"{removal:.2f}", f"{ratio:.2f}", f"{least_ratio(model):.2f}"]


def main() -> None:
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    if not gpu:
        importance_analysis.keep_freed_memory()  # as the script does; the bare pass is faster with it too
    print("`uv run benchmarks/scoring_cost.py`\n")
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, {str(dtype)[6:]}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| Olmo 3 | bare pass, s | scoring, s | ratio | L full passes, s | removal, s | ratio | at least |")
    print("|---|---|---|---|---|---|---|---|")
    for name, settings in (ON_GPU if gpu else ON_CPU).items():
        print("|", " | ".join([name, *row_of(*settings, device, dtype)]), "|", flush=True)


if __name__ == "__main__":
    main()
