"""Train the bundled teacher, assets/tiny-olmo3, from nothing: a 3.5M-parameter Olmo 3 on Python's own text.

    uv run assets/train_tiny_olmo3.py

Writes tokenizer, bf16 weights, `training.jsonl` (the loss curve) and `training.png` into OUTPUT_DIR, about an hour on
two cores (21M tokens, 6,000 tokens/s). The text is the language reference and the standard library of the Python that
runs it, so another Python version gives a slightly different model; the split by document (demo.is_held_out) is the
same everywhere. Every feature of Olmo 3 7B is there: sliding, sliding, sliding, full; q/k norms over all heads;
post-norms; YaRN on full attention only; an untied head.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from demo import is_held_out, python_documents  # noqa: E402

OUTPUT_DIR = ROOT / "assets" / "tiny-olmo3"
VOCAB_SIZE = 3072
HIDDEN_SIZE = 160
INTERMEDIATE_SIZE = 448
NUM_HIDDEN_LAYERS = 8
NUM_ATTENTION_HEADS = 10  # head_dim 16
SLIDING_WINDOW = 64
SEQUENCE_LENGTH = 256
TRAIN_TOKENS = 21_000_000
MICRO_BATCH_SIZE = 16  # rows; fits the caches of two cores
TOKENS_PER_STEP = 2**12  # four times as many gave a worse model for the same tokens
LEARNING_RATE = 3e-3
MIN_LEARNING_RATE = 1e-4
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
EVAL_EVERY = 256  # steps; the model is saved as often
EVAL_ROWS = 256  # held-out rows of an evaluation; the last one also takes all of them
SEED = 0
COMPILE = True  # 1.4 times faster; needs a C++ compiler on CPU


def train_tokenizer(texts: list[str]):
    """Byte-level BPE with the pre-tokenizer pattern of Olmo 3; `<|endoftext|>` is 0 and `<|pad|>` is 1."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=4 * SEQUENCE_LENGTH
    )


def build_model(tokenizer):
    """A random Olmo 3 of the sizes above, float32."""
    from transformers import AutoModelForCausalLM, Olmo3Config

    theta = 10_000.0
    config = Olmo3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_HIDDEN_LAYERS,
        num_attention_heads=NUM_ATTENTION_HEADS,
        num_key_value_heads=NUM_ATTENTION_HEADS,
        head_dim=HIDDEN_SIZE // NUM_ATTENTION_HEADS,
        sliding_window=SLIDING_WINDOW,
        max_position_embeddings=4 * SEQUENCE_LENGTH,
        layer_types=["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(NUM_HIDDEN_LAYERS)],
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": 4.0,
                "original_max_position_embeddings": SEQUENCE_LENGTH,
                "attention_factor": 0.1 * math.log(4.0) + 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rms_norm_eps=1e-6,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Post-norm layers write states of size 1 into the residual stream; an embedding of size 0.02 would drown in them.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    return model


def learning_rate(step: int, num_steps: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return MIN_LEARNING_RATE + 0.5 * (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * progress))


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of rows (B, T+1), in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, stream: torch.Tensor, max_rows: int | None = None) -> float:
    """Mean loss over the stream cut into rows, without overlap."""
    rows = stream[: len(stream) // (SEQUENCE_LENGTH + 1) * (SEQUENCE_LENGTH + 1)].view(-1, SEQUENCE_LENGTH + 1)
    rows = rows[:max_rows]
    rows = rows[: len(rows) // MICRO_BATCH_SIZE * MICRO_BATCH_SIZE]  # one shape, one compilation
    losses = [loss_of(model, batch).item() for batch in rows.split(MICRO_BATCH_SIZE)]
    return sum(losses) / len(losses)


def save(model, tokenizer, records: list[dict]) -> None:
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(OUTPUT_DIR, state_dict=state)
    config = json.loads((OUTPUT_DIR / "config.json").read_text()) | {"dtype": "bfloat16"}
    (OUTPUT_DIR / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(OUTPUT_DIR)
    (OUTPUT_DIR / "training.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def plot(records: list[dict]) -> None:
    figure, axes = common.new_figure(1, 1, (7, 4))
    tokens = [record["tokens"] for record in records]
    axes.plot(tokens, [record["train_loss"] for record in records], label="training (since the last point)")
    axes.plot(tokens, [record["held_out_loss"] for record in records], label="held out")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)", title="tiny-olmo3")
    axes.legend()
    common.save_figure(figure, OUTPUT_DIR / "training.png")


def main() -> None:
    torch.manual_seed(SEED)
    documents = list(python_documents())
    train = [text for name, text in documents if not is_held_out(name)]
    held_out = [text for name, text in documents if is_held_out(name)]
    tokenizer = train_tokenizer(train)

    def stream(texts):
        eos = [tokenizer.eos_token_id]
        return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids + eos])

    train_stream, held_out_stream = stream(train), stream(held_out)
    model = build_model(tokenizer)
    num_steps = TRAIN_TOKENS // TOKENS_PER_STEP
    micro_batches = TOKENS_PER_STEP // (MICRO_BATCH_SIZE * SEQUENCE_LENGTH)
    print(f"documents {len(train)} + {len(held_out)} held out, tokens {len(train_stream):,} + {len(held_out_stream):,}")
    print(f"{model.num_parameters():,} parameters, {num_steps} steps of {TOKENS_PER_STEP} tokens", flush=True)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model) if COMPILE else model
    records, since, start = [], [], time.time()
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        starts = torch.randint(
            len(train_stream) - SEQUENCE_LENGTH, (micro_batches * MICRO_BATCH_SIZE,), generator=generator
        )
        rows = torch.stack([train_stream[i : i + SEQUENCE_LENGTH + 1] for i in starts.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        for batch in rows.split(MICRO_BATCH_SIZE):
            loss = loss_of(compiled, batch) / micro_batches
            loss.backward()
            since.append(loss.item() * micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == num_steps:
            record = {
                "step": step + 1,
                "tokens": (step + 1) * TOKENS_PER_STEP,
                "train_loss": round(sum(since) / len(since), 4),
                "held_out_loss": round(evaluate(compiled, held_out_stream, EVAL_ROWS), 4),
                "seconds": round(time.time() - start),
            }
            if step + 1 == num_steps:
                record["held_out_loss_of_all_held_out_text"] = round(evaluate(compiled, held_out_stream), 4)
            records.append(record)
            since = []
            print(json.dumps(record), flush=True)
            save(model, tokenizer, records)
    plot(records)


if __name__ == "__main__":
    main()
