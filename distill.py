"""Distil a teacher into its pruned student, by its next-token distributions (arXiv 2407.14679 §3, best practice 5).

    uv run distill.py

Writes into OUTPUT_DIR: `model/` (the student in bfloat16, a plain Hugging Face folder with a model card),
`metrics.jsonl`, `curves.png`, and `checkpoints/`, from which the same command continues. Trains on one device; the
student's weights and the optimizer's state are float32.

Shapes: B batch, T tokens, H hidden, V vocabulary, N counted tokens.
"""

import importlib
import importlib.util
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

import common
import data
import losses
from common import PareError
from data import Batch, fetch

TEACHER: str = "allenai/Olmo-3-7B-Instruct"  # Hub id or local folder
REVISION: str | None = None  # commit, tag or branch of the teacher's Hub id
STUDENT: str = "pruned"  # what prune.py wrote: folder or Hub id
OUTPUT_DIR: str = "distilled"  # a folder of its own; an unfinished run in it is continued
DATASETS: str | list = [{"name": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"}]  # one source or several: README
EVAL_DATASETS: str | list | None = None  # held-out text like DATASETS; None holds out the first documents of DATASETS
SEQUENCE_LENGTH: int = 4096  # tokens per row
TRAIN_TOKENS: int = 500_000_000  # the papers use 94B; most of the recovery comes early
TOKENS_PER_STEP: int = 2**18  # per optimizer step
MICRO_BATCH_SIZE: int = 4  # rows per forward pass; the rest of a step is accumulated
LEARNING_RATE: float = 1e-4  # peak (arXiv 2408.11796 Table 4)
MIN_LEARNING_RATE: float = 1e-5  # at the end of the cosine
WARMUP_STEPS: int = 60  # linear
WEIGHT_DECAY: float = 0.1  # of matrices; norms and biases have none
LOSS: str = "forward_kl"  # one of losses.LOSSES; "cross_entropy" with STUDENT = TEACHER corrects the teacher
JSD_BETA: float = 0.5  # of LOSS = "jsd": towards 0 it acts as the forward KL, towards 1 as the reverse
TEMPERATURE: float = 1.0  # 1 was best (arXiv 2407.14679 §4.3)
GRADIENT_CHECKPOINTING: bool = True  # a third more compute for much less memory
LOSS_CHUNK_BYTES: int | None = None  # memory of the loss beside its gradients; None is 2**30 on a GPU, 2**28 elsewhere
COMPILE: bool = False  # torch.compile of the loss: fewer passes over the logits, a minute more at the start
EVAL_EVERY: int = 100  # steps
EVAL_TOKENS: int = 2**20  # held-out tokens, in whole rows
SAVE_EVERY: int = 100  # steps
KEEP_CHECKPOINTS: int = 2  # the newest ones; at least two, so that a kill while saving leaves one
REPORT_TO: str | None = None  # None | "wandb" | "trackio"
SEED: int = 0  # order of the rows
DEVICE: str = "auto"  # auto | cuda | mps | cpu
DTYPE: str = "auto"  # auto | bfloat16 | float32: of the teacher and of the student's compute; auto is bfloat16 on a GPU

MAY_CHANGE_ON_RESUME = {"OUTPUT_DIR", "EVAL_EVERY", "SAVE_EVERY", "KEEP_CHECKPOINTS", "REPORT_TO"}


# ---------------------------------------------------------------------------------------------------------------------
# States, loss and evaluation


def hidden_states(model, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """(B, T, H) after the final norm. Documents of a row do not see each other: position_ids restart, no attention
    mask, and no cache, which would switch the separation off."""
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state


def student_states(student, batch: "Batch", settings) -> torch.Tensor:
    """(N, H) states of the counted tokens in the compute dtype; the weights stay float32."""
    # Under checkpointing a cache of converted weights would only keep all of them alive.
    cache = not settings.gradient_checkpointing
    enabled = settings.dtype != torch.float32
    with torch.autocast(settings.device.type, settings.dtype, enabled=enabled, cache_enabled=cache):
        states = hidden_states(student, batch.input_ids, batch.position_ids)
    return states.flatten(0, 1)[batch.counted].to(settings.dtype)


@torch.no_grad()
def teacher_states(teacher, batch: "Batch") -> torch.Tensor:
    """(N, H) states of the counted tokens in the teacher's dtype."""
    return hidden_states(teacher, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.counted]


def next_tokens(batch: Batch) -> torch.Tensor:
    """(N,) the tokens that the counted ones are to predict."""
    return batch.input_ids.flatten()[batch.counted + 1]


@torch.no_grad()
def evaluate(student, teacher, rows, settings) -> dict:
    """What student and teacher say of held-out rows; means over counted tokens, in nats.

    KL of student to teacher, also by the token's place in its document; both losses and the student's perplexity; the
    teacher's entropy, which is what remains of its loss where it knows the text's source exactly; the share of tokens
    where both find the same next token the most likely; and the probability that each gives to the end of the text
    where it ends.
    """
    student.eval()
    starts = torch.tensor(position_buckets(settings.sequence_length), device=settings.device)
    sums = torch.zeros(len(starts) + 7, 2, dtype=torch.float64)  # of a figure, and how many tokens it is of
    for start in range(0, len(rows), settings.micro_batch_size):
        batch = fetch(rows, range(start, min(start + settings.micro_batch_size, len(rows))), settings.device)
        labels, positions = next_tokens(batch), batch.position_ids.flatten()[batch.counted]
        buckets = torch.bucketize(positions, starts, right=True) - 1
        states, targets = student_states(student, batch, settings), teacher_states(teacher, batch)
        weight = student.get_output_embeddings().weight.to(states.dtype)
        teacher_weight = teacher.get_output_embeddings().weight
        step = losses.chunk_rows(settings.loss_chunk_bytes, len(weight), torch.float32, 4)
        for first in range(0, len(labels), step):
            chunk = slice(first, first + step)
            q_log = torch.log_softmax(losses.project(targets[chunk], teacher_weight, torch.float32), dim=-1)
            p_log = torch.log_softmax(losses.project(states[chunk], weight, torch.float32), dim=-1)
            ends = labels[chunk] == settings.end_of_text
            agreed = p_log.argmax(-1) == q_log.argmax(-1)
            of_labels = [log.gather(1, labels[chunk, None]).squeeze(1) for log in (p_log, q_log)]
            q = q_log.exp()
            entropy = -torch.sum(q_log.clamp_(min=losses.FLOOR).mul(q), dim=1)
            kl = torch.sum(q_log.sub_(p_log).mul_(q), dim=1)
            figures = [kl, -of_labels[0], -of_labels[1], entropy, agreed, *(log.exp()[ends] for log in of_labels)]
            figures += [kl[buckets[chunk] == bucket] for bucket in range(len(starts))]
            sums[:, 0] += torch.stack([x.double().sum() for x in figures]).cpu()
            sums[:, 1] += torch.tensor([len(x) for x in figures])
    student.train()
    kl, loss, teacher_loss, entropy, agreement, end, teacher_end, *by_position = (
        total / count if count else None for total, count in sums.tolist()
    )
    return {
        "held_out_kl": kl,
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(min(loss, 700)),
        "held_out_agreement": agreement,
        "held_out_end_of_text": end,
        "held_out_kl_by_position": dict(zip(map(str, starts.tolist()), by_position, strict=True)),
        "teacher_loss": teacher_loss,
        "teacher_entropy": entropy,
        "teacher_end_of_text": teacher_end,
    }


def position_buckets(length: int) -> list[int]:
    """Where the buckets of places in a document start: 0, 16, 64, 256, … below `length`."""
    return [0, *itertools.takewhile(lambda start: start < length, (16 * 4**i for i in itertools.count()))]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: verified folders


def write_manifest(folder: Path) -> None:
    files = {path.name: [path.stat().st_size, common.hash_file(path)] for path in sorted(folder.iterdir())}
    common.write_json(folder / "MANIFEST.json", files)


def verifies(folder: Path) -> bool:
    """True where every file is there with the size and hash of the manifest."""
    try:
        files = json.loads((folder / "MANIFEST.json").read_text())
        return all(
            (folder / n).stat().st_size == size and common.hash_file(folder / n) == h for n, (size, h) in files.items()
        )
    except (OSError, ValueError):
        return False


def save_checkpoint(root: Path, step: int, student, optimizer, record: dict, metrics: Path, keep: int) -> None:
    """Write `root/step-…`: float32 weights, optimizer state, random state, record and metrics so far.

    Then the oldest go, and any that a run from an older checkpoint has overtaken.
    """
    parameters = {name: parameter.detach().contiguous() for name, parameter in student.named_parameters()}
    state = {"rng.cpu": torch.get_rng_state()}
    if student.device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(student.device)
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{key}"] = value.contiguous()
    target = root / f"step-{step:08d}"
    if target.exists():
        shutil.rmtree(target)  # damaged, or this run would have started from it
    with common.new_folder(target, "distill.py") as folder:
        save_file(parameters, folder / "model.safetensors")
        save_file(state, folder / "optimizer.safetensors")
        shutil.copyfile(metrics, folder / "metrics.jsonl")
        common.write_json(folder / "pare.json", record | {"step": step})
        write_manifest(folder)
    checkpoints = sorted(root.glob("step-*"))
    older = checkpoints.index(target) + 1
    for folder in checkpoints[: max(0, older - keep)] + checkpoints[older:]:
        shutil.rmtree(folder)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is named and passed over. None where there is none at all."""
    folders = sorted(root.glob("step-*"), reverse=True)
    for folder in folders:
        if verifies(folder):
            return folder
        print(f"{folder} is damaged; trying the one before it")
    if folders:
        raise PareError(f"OUTPUT_DIR = {str(root.parent)!r}: no checkpoint verifies. Choose another OUTPUT_DIR.")
    return None


def check_same_run(folder: Path, record: dict) -> None:
    """Refuse to continue from a checkpoint of a run with other constants or other models."""
    saved = json.loads((folder / "pare.json").read_text())
    differences = [
        f"{name} = {record['constants'].get(name)!r} (was {saved['constants'].get(name)!r})"
        for name in sorted(record["constants"].keys() | saved["constants"].keys())
        if name not in MAY_CHANGE_ON_RESUME and record["constants"].get(name) != saved["constants"].get(name)
    ]
    for key in ("device", "dtype"):
        if saved[key] != record[key]:
            differences.append(f"{key} {record[key]} (was {saved[key]})")
    for constant in ("teacher", "student"):
        if saved[constant]["weights_hash"] != record[constant]["weights_hash"]:
            differences.append(f"weights in {constant.upper()} = {record[constant]['name']!r}")
    if differences:
        raise PareError(
            f"OUTPUT_DIR = {record['constants']['OUTPUT_DIR']!r} holds a run with other {', '.join(differences)}.\n"
            "Put that back to continue it, or choose another OUTPUT_DIR."
        )
    if saved["versions"] != record["versions"]:
        print(f"the run was started with other versions ({saved['versions']}); its last bits may differ")


def check_same_text(folder: Path, record: dict) -> None:
    if json.loads((folder / "pare.json").read_text())["data"] != record["data"]:
        raise PareError(
            f"DATASETS = {record['constants']['DATASETS']!r}: not the text that OUTPUT_DIR was started with.\n"
            "Put that back to continue it, or choose another OUTPUT_DIR."
        )


def load_checkpoint(folder: Path, student, optimizer) -> int:
    """Restore weights, optimizer and random state in place; return the step."""
    weights = load_file(folder / "model.safetensors")
    state = load_file(folder / "optimizer.safetensors")
    names = {}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(weights[name])
            names[parameter] = name
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(order)
        if f"{name}.step" in state
    }
    # The optimizer puts each tensor where it wants it (a fused `step` on the device, any other on the CPU).
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], student.device)
    return json.loads((folder / "pare.json").read_text())["step"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, settings) -> float:
    """Linear warm-up, then a cosine from LEARNING_RATE to MIN_LEARNING_RATE at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - 1 - settings.warmup_steps)
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(student, settings) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in student.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=settings.device.type != "mps")


def train_step(student, teacher, rows, optimizer, step: int, settings) -> tuple[float, float]:
    """One optimizer step; returns loss and gradient norm. One denominator: the counted tokens of the whole step."""
    indices = data.row_indices(step, settings.rows_per_step, len(rows), settings.seed)
    batches = [
        fetch(rows, indices[start : start + settings.micro_batch_size], settings.device)
        for start in range(0, len(indices), settings.micro_batch_size)
    ]
    denominator = max(1, sum(len(batch.counted) for batch in batches))
    total = torch.zeros((), device=settings.device)
    for batch in batches:
        loss = losses.logit_loss(
            settings.loss,
            student_states(student, batch, settings),
            student.get_output_embeddings().weight,
            teacher_states(teacher, batch) if losses.LOSSES[settings.loss].has_teacher else None,
            teacher.get_output_embeddings().weight,
            next_tokens(batch),
            denominator=denominator,
            temperature=settings.temperature,
            beta=settings.jsd_beta,
            chunk_bytes=settings.loss_chunk_bytes,
            compile=settings.compile,
        )
        loss.backward()
        total += loss.detach()
    gradient_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    loss, gradient_norm = torch.stack([total.float(), gradient_norm.float()]).tolist()  # the step's one synchronisation
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise PareError(
            f"loss or gradient is not finite at step {step}; it did not reach the weights; checkpoints are intact.\n"
            f"Start again in another OUTPUT_DIR with less than LEARNING_RATE = {settings.learning_rate}."
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, gradient_norm


def train(student, teacher, held_out, rows, optimizer, first_step: int, log, save, settings) -> None:
    """Train from `first_step` to the end; `log(step, metrics)` records and `save(step)` writes a checkpoint."""
    student.train()
    if first_step == 0:
        log(0, evaluate(student, teacher, held_out, settings))
    progress = common.Progress(settings.num_steps, "steps", "distilling", done=first_step)
    for step in range(first_step, settings.num_steps):
        start = time.monotonic()
        try:
            loss, gradient_norm = train_step(student, teacher, rows, optimizer, step, settings)
        except torch.OutOfMemoryError:
            size = settings.micro_batch_size
            advice = f"Set MICRO_BATCH_SIZE = {size // 2}." if size > 1 else "Lower SEQUENCE_LENGTH."
            raise PareError(f"MICRO_BATCH_SIZE = {size} does not fit on {settings.device}. {advice}") from None
        tokens_per_second = settings.tokens_per_step / (time.monotonic() - start)
        done, last = step + 1, step + 1 == settings.num_steps
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate(step, settings),
            "tokens_per_second": tokens_per_second,
        }
        text = f"loss {loss:.4f}, lr {metrics['learning_rate']:.1e}, {tokens_per_second:,.0f} tokens/s"
        if settings.device.type == "cuda":
            text += f", {torch.cuda.max_memory_allocated(settings.device) / 1e9:.1f} GB"
        if done % settings.eval_every == 0 or last:
            metrics |= evaluate(student, teacher, held_out, settings)
        log(done, metrics)
        if done % settings.save_every == 0 or last:
            save(done)
        progress.update(1, text)
    progress.close()


def open_log(path: Path, checkpoint: Path | None, report_to: str | None, settings, constants: dict):
    """A function `log(step, metrics)` that appends to metrics.jsonl and to the tracker that REPORT_TO names.

    A resumed run starts from the lines in its checkpoint.
    """
    lines = (checkpoint / "metrics.jsonl").read_bytes() if checkpoint else b""
    common.replace_file(path, lambda temporary: temporary.write_bytes(lines))
    tracker = None
    if report_to is not None:
        tracker = importlib.import_module(report_to)
        tracker.init(project="pare", name=path.parent.name, config=constants)

    def log(step: int, metrics: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "tokens": step * settings.tokens_per_step} | metrics) + "\n")
        if tracker is not None:
            tracker.log(metrics, step=step)

    return log


# ---------------------------------------------------------------------------------------------------------------------
# Results


def plot(metrics: list[dict], loss: str, path: Path) -> None:
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "held_out_kl" in line]
    tokens = [line["tokens"] for line in evaluations]
    figure, axes = common.new_figure(1, 3, (14, 4))
    axes[0].plot([line["tokens"] for line in steps], [line["loss"] for line in steps], alpha=0.5, label=loss)
    axes[0].plot(tokens, [line["held_out_kl"] for line in evaluations], marker="o", label="held-out KL")
    axes[0].set(title="loss, and KL to the teacher (nats per token)", xlabel="tokens", yscale="log")
    axes[0].legend()
    axes[1].plot(tokens, [line["held_out_loss"] for line in evaluations], marker="o", label="student")
    axes[1].plot(tokens, [line["teacher_loss"] for line in evaluations], linestyle="--", label="teacher")
    axes[1].set(title="held-out loss (nats per token)", xlabel="tokens")
    axes[1].legend()
    axes[2].plot(tokens, [line["held_out_agreement"] for line in evaluations], marker="o")
    axes[2].set(title="next-token agreement with the teacher", xlabel="tokens", ylim=(0, 1))
    common.save_figure(figure, path)


CARD = """\
---
{base_model}library_name: transformers
tags: [pruned, distilled, pare]
---

# {title}

`{teacher}` pruned and distilled with Pare, after Minitron (arXiv 2407.14679, 2408.11796): {tokens:,} tokens of
`{dataset}`, LOSS = `{loss}`.

{sizes}

| on held-out text | before | after |
|---|---|---|
{figures}

The teacher's own loss on this text is {teacher_loss:.4f}. Every constant of the run:

```json
{constants}
```
"""

FIGURES = {
    "held_out_kl": "KL to the teacher (nats per token)",
    "held_out_loss": "loss (nats per token)",
    "held_out_perplexity": "perplexity",
    "held_out_agreement": "next-token agreement with the teacher",
}


def model_card(teacher: common.Checkpoint, student: common.Checkpoint, before: dict, after: dict, record: dict) -> str:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    sizes = [f"| {name} | {getattr(teacher.config, name)} | {getattr(student.config, name)} |" for name in names]
    return CARD.format(
        base_model=f"base_model: {teacher.name}\n" if teacher.revision else "",  # the Hub knows Hub ids only
        teacher=teacher.name,
        title=Path(student.name).name,
        tokens=record["tokens"],
        dataset="`, `".join(source.name for source in data.read_sources(record["constants"]["DATASETS"], "DATASETS")),
        loss=record["constants"]["LOSS"],
        sizes="\n".join(["| | teacher | student |", "|---|---|---|", *sizes]),
        figures="\n".join(f"| {title} | {before[key]:.4f} | {after[key]:.4f} |" for key, title in FIGURES.items()),
        teacher_loss=after["teacher_loss"],
        constants=json.dumps(record["constants"], indent=2),
    )


def export(folder: Path, student, checkpoint: common.Checkpoint, card: str, record: dict) -> None:
    """Write the student in bfloat16 as a plain Hugging Face folder, with the student's tokenizer and config."""
    with common.new_folder(folder, "distill.py") as temporary:
        state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in student.state_dict().items()}
        student.save_pretrained(temporary, state_dict=state, max_shard_size="5GB")
        common.copy_companions(checkpoint.folder, temporary)
        raw = {key: value for key, value in checkpoint.raw.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
        common.write_json(temporary / "config.json", raw)
        (temporary / "README.md").write_text(card)
        common.write_record(temporary, record)
        exported = common.find_checkpoint(str(temporary), None, "OUTPUT_DIR")
        common.load_model(exported, torch.bfloat16, torch.device("cpu"), "OUTPUT_DIR")


# ---------------------------------------------------------------------------------------------------------------------


def check_same_vocabulary(teacher: common.Checkpoint, student: common.Checkpoint) -> None:
    sizes = teacher.config.vocab_size, student.config.vocab_size
    same = sizes[0] == sizes[1]
    if same and (student.folder / "tokenizer.json").is_file():
        vocabularies = [
            common.load_tokenizer(*pair).get_vocab() for pair in ((teacher, "TEACHER"), (student, "STUDENT"))
        ]
        same = vocabularies[0] == vocabularies[1]
    if not same:
        raise PareError(
            f"STUDENT = {student.name!r} and TEACHER = {teacher.name!r} have different vocabularies ({sizes[1]} and "
            f"{sizes[0]} entries); logits can only be compared in the same one.\n"
            "Set TEACHER to the model that STUDENT was cut from."
        )


def derive_settings(constants: dict) -> SimpleNamespace:
    """The constants in lower case, checked, and what follows from them."""
    positive = (
        "SEQUENCE_LENGTH",
        "TRAIN_TOKENS",
        "TOKENS_PER_STEP",
        "MICRO_BATCH_SIZE",
        "LEARNING_RATE",
        "TEMPERATURE",
    )
    common.check_positive(constants, *positive, "EVAL_EVERY", "EVAL_TOKENS", "SAVE_EVERY")
    common.check_not_negative(constants, "MIN_LEARNING_RATE", "WARMUP_STEPS", "WEIGHT_DECAY", "SEED")
    settings = SimpleNamespace(**{name.lower(): value for name, value in constants.items()})
    if settings.sequence_length < 2:
        raise PareError("SEQUENCE_LENGTH = 1 leaves no next token to predict; set it to 2 or more.")
    if settings.min_learning_rate > settings.learning_rate:
        raise PareError(
            f"MIN_LEARNING_RATE = {settings.min_learning_rate} is above LEARNING_RATE = {settings.learning_rate}."
        )
    if settings.keep_checkpoints < 2:
        raise PareError(f"KEEP_CHECKPOINTS = {settings.keep_checkpoints} must be at least 2.")
    common.check_choice("LOSS", settings.loss, losses.LOSSES)
    if losses.LOSSES[settings.loss].has_labels and settings.temperature != 1:
        raise PareError(f"LOSS = {settings.loss!r} is on the text itself: set TEMPERATURE = 1.")
    if not 0 < settings.jsd_beta < 1:
        raise PareError(
            f"JSD_BETA = {settings.jsd_beta} must lie between 0 and 1; LOSS has both ends as names of their own."
        )
    common.check_choice("REPORT_TO", settings.report_to, [None, "wandb", "trackio"])
    if settings.report_to and importlib.util.find_spec(settings.report_to) is None:
        raise PareError(f"REPORT_TO = {settings.report_to!r} is not installed: run `uv add {settings.report_to}`.")
    settings.datasets = data.read_sources(settings.datasets, "DATASETS")
    if settings.eval_datasets is not None:
        settings.eval_datasets = data.read_sources(settings.eval_datasets, "EVAL_DATASETS")
    micro_batch_tokens = settings.micro_batch_size * settings.sequence_length
    if settings.tokens_per_step % micro_batch_tokens:
        nearest = max(1, round(settings.tokens_per_step / micro_batch_tokens)) * micro_batch_tokens
        raise PareError(
            f"TOKENS_PER_STEP = {settings.tokens_per_step} must be a multiple of MICRO_BATCH_SIZE x SEQUENCE_LENGTH = "
            f"{micro_batch_tokens}; the nearest is {nearest}."
        )
    if settings.train_tokens < settings.tokens_per_step:
        raise PareError(
            f"TRAIN_TOKENS = {settings.train_tokens} is less than one step; set it to TOKENS_PER_STEP = "
            f"{settings.tokens_per_step} or more."
        )
    settings.num_steps = settings.train_tokens // settings.tokens_per_step
    settings.rows_per_step = settings.tokens_per_step // settings.sequence_length
    settings.device = common.pick_device(settings.device)
    settings.dtype = common.pick_dtype(settings.dtype, settings.device)
    if settings.loss_chunk_bytes is None:
        settings.loss_chunk_bytes = 2**30 if settings.device.type == "cuda" else 2**28
    common.check_positive({"LOSS_CHUNK_BYTES": settings.loss_chunk_bytes}, "LOSS_CHUNK_BYTES")
    return settings


def print_results(before: dict, after: dict) -> None:
    print("\nOn held-out text:")
    rows = [[title, f"{before[key]:.4f}", f"{after[key]:.4f}"] for key, title in FIGURES.items()]
    common.print_table([["", "before", "after"], *rows])
    print(f"  the teacher's own loss is {after['teacher_loss']:.4f}")


def find_pair(output: Path, settings) -> tuple[common.Checkpoint, common.Checkpoint]:
    """Teacher and student checkpoints that fit each other and the settings."""
    teacher = common.find_checkpoint(settings.teacher, settings.revision, "TEACHER")
    student = common.find_checkpoint(settings.student, None, "STUDENT")
    for constant, checkpoint in (("TEACHER", teacher), ("STUDENT", student)):
        if output.resolve() == checkpoint.folder.resolve():
            raise PareError(f"OUTPUT_DIR = {settings.output_dir!r} is the folder of {constant} itself; choose another.")
        common.check_length(checkpoint, settings.sequence_length, constant)
    check_same_vocabulary(teacher, student)
    return teacher, student


def model_record(checkpoint: common.Checkpoint, constant: str) -> dict:
    weights_hash = common.hash_checkpoint(checkpoint, constant)
    return {"name": checkpoint.name, "revision": checkpoint.revision, "weights_hash": weights_hash}


def open_output(output: Path, record: dict) -> Path | None:
    """Make OUTPUT_DIR ours and return the checkpoint to continue from, if the run in it is the same one."""
    for debris in (output / "checkpoints").glob(".step-*.tmp"):  # of a save that was killed
        shutil.rmtree(debris)
    latest = latest_checkpoint(output / "checkpoints")
    if latest:
        check_same_run(latest, record)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "pare.json").exists():
        common.write_json(output / "pare.json", record)
    return latest


def load_pair(teacher_checkpoint, student_checkpoint, settings) -> tuple:
    """Teacher in the compute dtype, student in float32, on the device."""
    teacher = common.load_model(teacher_checkpoint, settings.dtype, settings.device, "TEACHER")
    student = common.load_model(student_checkpoint, torch.float32, settings.device, "STUDENT")
    if settings.gradient_checkpointing:
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)  # renamed
        enable({"use_reentrant": False})
    return teacher, student


def main() -> Path:
    constants = common.read_constants(sys.modules[__name__])
    settings = derive_settings(constants)
    output = common.output_path("OUTPUT_DIR", OUTPUT_DIR)
    metrics_path = output / "metrics.jsonl"
    common.check_own_folder(output, "OUTPUT_DIR", "distill.py")
    teacher_checkpoint, student_checkpoint = find_pair(output, settings)
    record = common.run_record(
        sys.modules[__name__],
        teacher=model_record(teacher_checkpoint, "TEACHER"),
        student=model_record(student_checkpoint, "STUDENT"),
        tokens=settings.num_steps * settings.tokens_per_step,
        device=settings.device.type,
        dtype=str(settings.dtype)[6:],
    )
    latest = open_output(output, record)

    torch.manual_seed(SEED)
    held_out, rows, record["data"] = data.prepare_data(output / "data", teacher_checkpoint, settings)
    if latest:
        check_same_text(latest, record)
    settings.end_of_text = common.load_tokenizer(teacher_checkpoint, "TEACHER").eos_token_id
    teacher, student = load_pair(teacher_checkpoint, student_checkpoint, settings)
    optimizer = build_optimizer(student, settings)
    first_step = load_checkpoint(latest, student, optimizer) if latest else 0
    common.write_json(output / "pare.json", record)
    print_plan(student, rows, first_step, settings)

    log = open_log(metrics_path, latest, REPORT_TO, settings, constants)

    def save(step):
        checkpoints = output / "checkpoints"
        save_checkpoint(checkpoints, step, student, optimizer, record, metrics_path, KEEP_CHECKPOINTS)

    train(student, teacher, held_out, rows, optimizer, first_step, log, save, settings)

    metrics = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    evaluations = [line for line in metrics if "held_out_kl" in line]
    before, after = evaluations[0], evaluations[-1]
    plot(metrics, LOSS, output / "curves.png")
    card = model_card(teacher_checkpoint, student_checkpoint, before, after, record)
    export(output / "model", student, student_checkpoint, card, record | {"before": before, "after": after})
    print_results(before, after)
    print(f"\nWrote {output}/model, {output}/curves.png and {output}/metrics.jsonl. Next: vllm serve {output}/model")
    return output / "model"


def print_plan(student, rows, first_step: int, settings) -> None:
    num_tokens = settings.num_steps * settings.tokens_per_step
    epochs = settings.num_steps * settings.rows_per_step / len(rows)
    accumulation = settings.rows_per_step // settings.micro_batch_size
    print(
        f"{student.num_parameters():,} parameters on {settings.device}, compute in {str(settings.dtype)[6:]}\n"
        f"{settings.num_steps} steps of {settings.tokens_per_step} tokens ({accumulation} micro-batches of "
        f"{settings.micro_batch_size} x {settings.sequence_length}), {num_tokens:,} tokens"
    )
    if epochs > 1:
        print(f"the text gives {len(rows)} rows, so training goes over it {epochs:.1f} times")
    if first_step:
        print(f"continuing after step {first_step}")


if __name__ == "__main__":
    common.run(sys.modules[__name__])
