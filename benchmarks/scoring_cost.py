"""What scoring costs beside the bare forward pass, and what the perplexity without each layer costs.

    uv run benchmarks/scoring_cost.py

Prints the table that is kept in scoring_cost.md. Scoring is importance_analysis.measure with all its hooks, over the
same rows as the base model alone. The layer perplexity is importance_analysis.measure_perplexity, over as many full
passes with LM head and loss as the model has layers, which is what removing each layer in turn would take. The two
are timed one after the other, fifteen times after a warm-up: the figures are the medians of the pairs. In float32 on
the CPU, and in bfloat16 on a GPU if there is one. About five minutes on two cores.

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

PAIRS = 15


def tiny_model():
    checkpoint = common.find_checkpoint(str(ROOT / "assets" / "tiny-olmo3"), None, "MODEL")
    return common.load_model(checkpoint, torch.float32, torch.device("cpu"), "MODEL")


def random_model(num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int):
    torch.manual_seed(0)
    rope = {
        "full_attention": YARN | {"original_max_position_embeddings": 128},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = transformers.Olmo3Config(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        vocab_size=8192,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        sliding_window=256,
        rope_parameters=rope,
        max_position_embeddings=512,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


# name -> model, tokens per row, batch size, rows of the scoring pass, rows of the layer perplexity (0: left out)
MODELS = {
    "tiny teacher: 8 layers, hidden 160": (tiny_model, 256, 16, 32, 16),
    "random: 4 layers, hidden 1024, 2816 neurons": (lambda: random_model(4, 1024, 2816, 16), 512, 4, 4, 0),
    "random: 2 layers, hidden 2048, 5632 neurons": (lambda: random_model(2, 2048, 5632, 16), 512, 4, 4, 0),
    "random: 16 layers, hidden 512, 1408 neurons": (lambda: random_model(16, 512, 1408, 8), 512, 4, 4, 1),
}


def seconds_of(call, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def compare(first, second, device: torch.device) -> tuple[float, float, float]:
    """Median seconds of both calls, and the median of second / first over the pairs."""
    first(), second()
    pairs = [(seconds_of(first, device), seconds_of(second, device)) for _ in range(PAIRS)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def least_ratio(model) -> float:
    """Of the layer perplexity, by weights multiplied."""
    num_layers, head = len(model.base_model.layers), model.get_output_embeddings().weight.numel()
    layer = sum(parameter.numel() for parameter in model.base_model.layers[0].parameters())
    once = num_layers * layer + head
    return (num_layers * (num_layers + 1) / 2 * layer + (num_layers + 1) * head) / (num_layers * once)


def row_of(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    build, length, batch_size, num_rows, num_removal_rows = MODELS[name]
    model = build().to(device, dtype)
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
        seconds, scoring, ratio = compare(bare, score, device)
        cells = [f"{seconds:.2f}", f"{scoring:.2f}", f"{ratio:.2f}"]
        if not num_removal_rows:
            return [*cells, "", "", "", ""]
        passes, removal, ratio = compare(lambda: [full() for _ in range(num_layers)], remove, device)
    return [*cells, f"{passes:.2f}", f"{removal:.2f}", f"{ratio:.2f}", f"{least_ratio(model):.2f}"]


def main() -> None:
    devices = [("cpu", torch.float32), *([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])]
    print("`uv run benchmarks/scoring_cost.py`\n")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,", end=" ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| Olmo 3 | on | bare pass, s | scoring, s | ratio | L full passes, s | removal, s | ratio | at least |")
    print("|---|---|---|---|---|---|---|---|---|")
    for device, dtype in devices:
        for name in MODELS:
            cells = row_of(name, torch.device(device), dtype)
            print("|", " | ".join([name, f"{device}, {str(dtype)[6:]}", *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
