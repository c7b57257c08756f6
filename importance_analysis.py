"""Score every MLP neuron, attention head, hidden channel and layer of a model on calibration text.

    uv run importance_analysis.py

Writes SCORES_PATH, which prune.py reads, and a picture of the scores beside it. One forward pass of the base model,
without its LM head. The scores are Minitron's (arXiv 2407.14679 §2.2): activations averaged over the sequence, then
the L2 norm over samples.

Shapes: B batch, T tokens, H hidden, F intermediate, Q query heads, D head dim, L layers.
"""

import hashlib
import math
import sys
from pathlib import Path

import torch

import common
from common import PareError

MODEL: str = "allenai/Olmo-3-7B-Instruct"  # the teacher: Hub id or local folder
REVISION: str | None = None  # commit, tag or branch of a Hub id
DATASET: str = "HuggingFaceFW/fineweb-edu"  # Hub id, .jsonl, .json, .parquet or .txt file, folder, or saved dataset
DATASET_CONFIG: str | None = "sample-10BT"  # configuration of a Hub dataset, None for local files
DATASET_SPLIT: str = "train"  # local files have this one only
TEXT_COLUMN: str = "text"  # the column of DATASET that holds the documents
NUM_SAMPLES: int = 1024  # calibration rows (arXiv 2407.14679 §4)
SEQUENCE_LENGTH: int = 4096  # tokens per row
BATCH_SIZE: int = 4  # rows per forward pass; the scores do not depend on it
SCORES_PATH: str = "importance_scores.pt"  # the picture lies beside it, as .png
SEED: int = 0  # order in which documents are drawn
DEVICE: str = "auto"  # auto | cuda | mps | cpu
DTYPE: str = "auto"  # auto | bfloat16 | float32; auto is bfloat16 on a GPU

ENOUGH_CORRELATION = 0.95  # between two halves of the samples; below it, more samples would still change the choice


class ScoreSums:
    """Running sums of the scores, one row for each half of the samples, fed by hooks on the decoder layers.

    Each hook reads an activation once. Sums are float64 (float32 where the device has none), whatever the model's
    dtype: in bfloat16 late samples would be rounded away.
    """

    def __init__(self, model, family: common.Family):
        self.half: torch.Tensor | None = None  # (B,) which half each row of the batch belongs to
        self.sums: dict[str, list[torch.Tensor]] = {}  # score -> per layer (2, channels)
        self.counts = torch.zeros(2, dtype=torch.int64)
        self.accumulate_in = torch.float32 if model.device.type == "mps" else torch.float64
        self.handles = []
        for index, layer in enumerate(model.layers):
            modules = dict(layer.named_modules())
            self.watch_input("mlp", index, modules[family.neurons_at])
            self.watch_input("attention", index, modules[family.heads_at])
            self.watch_output("attn_ln", index, modules[family.attention_norm])
            self.watch_output("ffn_ln", index, modules[family.feedforward_norm])
            self.watch_layer("layer", index, layer)

    def start_batch(self, half: torch.Tensor) -> None:
        self.half = half
        self.counts += half.bincount(minlength=2).cpu()

    def add(self, score: str, index: int, values: torch.Tensor) -> None:
        """Add values (B, channels) to the sums of a layer."""
        per_layer = self.sums.setdefault(score, [])
        if index == len(per_layer):
            per_layer.append(torch.zeros(2, values.shape[-1], dtype=self.accumulate_in, device=values.device))
        per_layer[index].index_add_(0, self.half.to(values.device), values.to(self.accumulate_in))

    def add_activation(self, score: str, index: int, activation: torch.Tensor) -> None:
        """Add (mean over T of |x|)² for an activation x of shape (B, T, channels)."""
        absolute_sum = torch.linalg.vector_norm(activation, ord=1, dim=1, dtype=torch.float32)
        self.add(score, index, (absolute_sum / activation.shape[1]).square())

    def watch_input(self, score: str, index: int, module: torch.nn.Module) -> None:
        hook = lambda module, args: self.add_activation(score, index, args[0])  # noqa: E731
        self.handles.append(module.register_forward_pre_hook(hook))

    def watch_output(self, score: str, index: int, module: torch.nn.Module) -> None:
        hook = lambda module, args, output: self.add_activation(score, index, output)  # noqa: E731
        self.handles.append(module.register_forward_hook(hook))

    def watch_layer(self, score: str, index: int, layer: torch.nn.Module) -> None:
        """Block importance: 1 − cosine of the layer's input and output, mean over tokens (arXiv 2403.03853 eq. 1)."""

        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(args[0].float(), output.float(), dim=-1)  # (B, T)
            self.add(score, index, 1 - cosine.mean(dim=1, keepdim=True))

        self.handles.append(layer.register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def scores(self, head_dim: int, halves: tuple[int, ...] = (0, 1)) -> dict:
        """The score file's keys (DESIGN: mlp, attention, attn_ln, ffn_ln, layer), float32 on CPU, from some halves."""
        halves = list(halves)
        sums = {score: torch.stack(per_layer).cpu()[:, halves].sum(1) for score, per_layer in self.sums.items()}
        heads = sums["attention"].unflatten(1, (-1, head_dim)).sum(-1)  # (L, Q): the L2 norm over head_dim, squared
        block_importance = sums["layer"].squeeze(1) / self.counts[halves].sum()
        return {
            "mlp": sums["mlp"].sqrt().float(),
            "attention": heads.sqrt().float(),
            "attn_ln": sums["attn_ln"].sqrt().sum(0).float(),
            "ffn_ln": sums["ffn_ln"].sqrt().sum(0).float(),
            "layer": {index: value for index, value in enumerate(block_importance.tolist())},
        }


@torch.inference_mode()
def measure(model, family: common.Family, rows: torch.Tensor, batch_size: int) -> ScoreSums:
    """One pass of the base model `model` over calibration rows (num_samples, T)."""
    sums = ScoreSums(model, family)
    half = torch.arange(len(rows)) % 2
    progress = common.Progress(len(rows), "samples", "scoring")
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(model.device)
            sums.start_batch(half[start : start + batch_size].to(model.device))
            model(input_ids=batch, use_cache=False)
            progress.update(len(batch))
    finally:
        progress.close()
        sums.remove()
    return sums


def hash_rows(rows: torch.Tensor) -> str:
    """The fingerprint of token ids: sha256 of their int32 bytes."""
    return hashlib.sha256(rows.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def calibration_rows(documents, tokenizer, num_samples: int, length: int, vocab_size: int, what: str) -> torch.Tensor:
    """(num_samples, T) token ids: documents joined with the end-of-text token and cut into rows."""
    rows = []
    for input_ids, _ in common.pack_rows(documents, tokenizer, length, vocab_size):
        rows.append(input_ids)
        if len(rows) == num_samples:
            return torch.tensor(rows)
    raise PareError(
        f"NUM_SAMPLES = {num_samples}: {what} has text for {len(rows)} rows of SEQUENCE_LENGTH = {length} only. "
        f"Set NUM_SAMPLES = {len(rows)} or a smaller SEQUENCE_LENGTH."
        if rows
        else f"SEQUENCE_LENGTH = {length}: {what} has too little text for a single row. Give it more, or lower it."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a user wants to know next


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation along the last axis, averaged over the others; 1 for a single entry."""
    if a.shape[-1] < 2:
        return 1.0
    ranks = [x.argsort(dim=-1).argsort(dim=-1).double() for x in (a, b)]
    centred = [rank - rank.mean(dim=-1, keepdim=True) for rank in ranks]
    return torch.nn.functional.cosine_similarity(*centred, dim=-1).mean().item()


def layer_values(scores: dict) -> torch.Tensor:
    return torch.tensor([scores["layer"][index] for index in range(len(scores["layer"]))])


def report(scores: dict, halves: list[dict], layer_types: list[str], num_samples: int) -> None:
    """Print the least important layers, sliding against full attention, and whether the samples were enough."""
    importance = layer_values(scores)
    order = importance.argsort().tolist()
    print("\nLeast important layers (block importance = 1 - cosine of a layer's input and output):")
    for index in order[: max(3, len(order) // 4)]:
        print(f"  layer {index:3d}  {importance[index]:.4f}  {layer_types[index]}")

    kinds = sorted(set(layer_types))
    if len(kinds) > 1:
        print("\nAttention kinds (mean over their layers):")
        table = [["", "layers", "block importance", "head score", "neuron score"]]
        for kind in kinds:
            members = [index for index, layer_type in enumerate(layer_types) if layer_type == kind]
            means = [importance[members].mean(), scores["attention"][members].mean(), scores["mlp"][members].mean()]
            table.append([kind, len(members), *(f"{mean:.4g}" for mean in means)])
        common.print_table(table)

    correlations = {
        "neurons": rank_correlation(halves[0]["mlp"], halves[1]["mlp"]),
        "heads": rank_correlation(halves[0]["attention"], halves[1]["attention"]),
        "hidden channels": rank_correlation(*(half["attn_ln"] + half["ffn_ln"] for half in halves)),
        "layers": rank_correlation(*(layer_values(half) for half in halves)),
    }
    print(f"\nRank correlation of the scores between the two halves of the {num_samples} samples:")
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in correlations.items()))
    unsure = [name for name, value in correlations.items() if value < ENOUGH_CORRELATION]
    if unsure:
        print(
            f"  More samples would still change the choice of {', '.join(unsure)}: try NUM_SAMPLES={2 * num_samples}."
        )
    else:
        print(f"  {num_samples} samples were enough.")


def plot(scores: dict, layer_types: list[str], path: Path) -> None:
    figure, axes = common.new_figure(2, 2, (13, 8))
    num_layers = len(layer_types)
    for axis, key, units in ((axes[0, 0], "mlp", "neuron"), (axes[0, 1], "attention", "head")):
        relative = scores[key] / scores[key].mean(dim=1, keepdim=True).clamp(min=1e-30)
        shown = relative.sort(dim=1, descending=True).values if key == "mlp" else relative
        image = axis.imshow(shown.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=3)
        ordered = ", most important first" if key == "mlp" else ""
        axis.set(title=f"{units} importance / mean of its layer", xlabel=f"{units}{ordered}", ylabel="layer")
        figure.colorbar(image, ax=axis)
    for key in ("attn_ln", "ffn_ln"):
        axes[1, 0].plot(scores[key].sort(descending=True).values.numpy(), label=key)
    axes[1, 0].set(title="hidden importance, sorted", xlabel="hidden channel (by rank)", ylabel="score", yscale="log")
    axes[1, 0].legend()
    for kind, colour in (("full_attention", "tab:orange"), ("sliding_attention", "tab:blue")):
        members = [index for index in range(num_layers) if layer_types[index] == kind]
        if members:
            axes[1, 1].bar(members, layer_values(scores)[members].numpy(), color=colour, label=kind.replace("_", " "))
    axes[1, 1].set(title="block importance", xlabel="layer", ylabel="1 - cos(input, output)")
    axes[1, 1].legend()
    common.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------


def check_scores_path(path: Path) -> None:
    """Refuse a path that cannot be written, or where a score file or its picture would replace something else."""
    if path.suffix != ".pt" or path.is_dir():
        raise PareError(f"SCORES_PATH = {str(path)!r} must name a file that ends in .pt.")
    if path.exists():
        common.load_scores(path)
    elif path.with_suffix(".png").exists():
        raise PareError(
            f"SCORES_PATH = {str(path)!r}: {path.with_suffix('.png')} is in the way of the picture; rename it."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        common.replace_file(path.with_suffix(".tmp"), lambda temporary: temporary.write_text(""))
        path.with_suffix(".tmp").unlink()
    except OSError as error:
        raise PareError(f"SCORES_PATH = {str(path)!r} cannot be written ({common.first_line(error)}).") from None


def main() -> Path:
    script = sys.modules[__name__]
    constants = common.read_constants(script)
    common.check_positive(constants, "NUM_SAMPLES", "SEQUENCE_LENGTH", "BATCH_SIZE")
    common.check_not_negative(constants, "SEED")
    scores_path = common.output_path(SCORES_PATH)
    check_scores_path(scores_path)
    device = common.pick_device(DEVICE)
    dtype = common.pick_dtype(DTYPE, device)

    checkpoint = common.find_checkpoint(MODEL, REVISION, "MODEL")
    config = checkpoint.config
    common.check_length(checkpoint, SEQUENCE_LENGTH, "MODEL")
    tokenizer = common.load_tokenizer(checkpoint, "MODEL")
    documents = common.open_text(DATASET, DATASET_CONFIG, DATASET_SPLIT, TEXT_COLUMN, shuffle_seed=SEED)
    what = f"DATASET = {DATASET!r}"
    rows = calibration_rows(documents, tokenizer, NUM_SAMPLES, SEQUENCE_LENGTH, config.vocab_size, what)

    model = common.load_model(checkpoint, dtype, device, "MODEL").base_model
    print(f"scoring {MODEL}: {NUM_SAMPLES} x {SEQUENCE_LENGTH} tokens on {device} in {str(dtype)[6:]}")
    try:
        sums = measure(model, checkpoint.family, rows, BATCH_SIZE)
    except torch.OutOfMemoryError:
        advice = f"Set BATCH_SIZE = {BATCH_SIZE // 2}." if BATCH_SIZE > 1 else "Lower SEQUENCE_LENGTH."
        raise PareError(f"BATCH_SIZE = {BATCH_SIZE} does not fit on {device}. {advice}") from None
    scores = sums.scores(checkpoint.head_dim)
    if not all(math.isfinite(value) for value in scores["layer"].values()):
        raise PareError(f"MODEL = {MODEL!r} gives activations that are not finite in {dtype}; try DTYPE = 'float32'.")
    scores["meta"] = common.run_record(
        script,
        model=MODEL,
        revision=checkpoint.revision,
        config_hash=common.hash_config(checkpoint),
        weights_hash=common.hash_checkpoint(checkpoint, "MODEL"),
        dataset={"name": DATASET, "fingerprint": hash_rows(rows)},
        num_samples=NUM_SAMPLES,
        num_tokens=rows.numel(),
        seed=SEED,
    )
    layer_types = common.layer_types_of(config)
    common.replace_file(scores_path, lambda temporary: torch.save(scores, temporary))
    plot(scores, layer_types, scores_path.with_suffix(".png"))
    report(scores, [sums.scores(checkpoint.head_dim, (half,)) for half in (0, 1)], layer_types, NUM_SAMPLES)
    print(f"\nWrote {scores_path} and {scores_path.with_suffix('.png')}. Next: uv run prune.py")
    return scores_path


if __name__ == "__main__":
    common.run(sys.modules[__name__])
