"""Distil a teacher into its pruned student, by its next-token distributions (arXiv 2407.14679 §3, best practice 5).

    uv run distill.py

Writes into OUTPUT_DIR: `model/` (the student in bfloat16, a plain Hugging Face folder with a model card),
`metrics.jsonl`, `curves.png`, and `checkpoints/`, from which the same command continues. Trains on one device, or
sharded over the processes of `accelerate launch`; the student's weights and the optimizer's state are float32.

Shapes: B batch, T tokens, H hidden, V vocabulary, N counted tokens.
"""

import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import attention
import common
import data
import losses
import preflight
import quantization
import sharding
from checkpoints import (
    SaveError,
    check_finite,
    check_nothing_in_the_way,
    check_room,
    checkpoints_in,
    latest_checkpoint,
    load_checkpoint,
    read_json,
    save_checkpoint,
    step_of,
    sweep,
    whole_on_cpu,
)
from common import PareError
from data import Batch, fetch

TEACHER: str = "allenai/Olmo-3-7B-Instruct"  # Hub id or local folder
REVISION: str | None = None  # commit, tag or branch of the teacher's Hub id
STUDENT: str = "pruned"  # what prune.py wrote: folder or Hub id
OUTPUT_DIR: str = "distilled"  # a folder of its own; an unfinished run in it is continued
DATASETS: str | list = [{"name": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"}]  # one source or several: README
EVAL_DATASETS: str | list | None = None  # held-out text like DATASETS; None holds out the first documents of DATASETS
SEQUENCE_LENGTH: int = 4096  # tokens per row
TRAIN_TOKENS: int = 500_000_000  # the papers use 94B to 380B; most of the recovery comes early
TOKENS_PER_STEP: int = 2**18  # per optimizer step, of all processes together
MICRO_BATCH_SIZE: int = 2  # rows per forward pass of each process; the rest of a step is accumulated
LEARNING_RATE: float = 1e-4  # peak (arXiv 2408.11796 Table 4)
MIN_LEARNING_RATE: float = 1e-5  # at the end of the cosine
WARMUP_STEPS: int = 60  # linear
WEIGHT_DECAY: float = 0.1  # of matrices; norms and biases have none
LOSS: str = "forward_kl"  # forward_kl | reverse_kl | jsd | cross_entropy | forward_kl_and_cross_entropy
JSD_BETA: float = 0.5  # of LOSS = "jsd": towards 0 it acts as the forward KL, towards 1 as the reverse
HIDDEN_LOSS: bool = False  # beside LOSS, states within the models; for students that lost depth
TEACHER_QUANTIZATION: str | None = None  # None | "8bit": the teacher's linear layers by torchao, half their memory
TEMPERATURE: float = 1.0  # 1 was best (arXiv 2407.14679 §4.3)
GRADIENT_CHECKPOINTING: bool = True  # a third more compute for the student, much less memory
LOSS_CHUNK_BYTES: int | None = None  # of logits and what is made of them; None is 2**30 on a GPU, 2**28 elsewhere
ATTENTION: str = "auto"  # flash: needs a GPU of NVIDIA's and bfloat16 | sdpa: by masks | auto: flash where it works
COMPILE: bool = False  # torch.compile of layers and loss: fewer passes over memory, minutes more at the start
EVAL_EVERY: int = 100  # steps
EVAL_TOKENS: int = 2**20  # held-out tokens, in whole rows
SAVE_EVERY: int = 100  # steps
KEEP_CHECKPOINTS: int = 2  # the newest ones; at least two, so that a kill while saving leaves one
MAX_BAD_STEPS: int = 3  # this many in a row without a finite loss and gradient stop the run; fewer are skipped
REPORT_TO: str | None = None  # None | "wandb" | "trackio"
SEED: int = 0  # order of the rows
DETERMINISTIC: bool = True  # on a GPU: the same bits in every run, by slower kernels
DEVICE: str = "auto"  # auto | cuda | mps | cpu
DTYPE: str = "auto"  # auto | bfloat16 | float32: of the teacher and of the student's compute; auto is bfloat16 on a GPU

MAY_CHANGE_ON_RESUME = {"OUTPUT_DIR", "EVAL_EVERY", "SAVE_EVERY", "KEEP_CHECKPOINTS", "MAX_BAD_STEPS", "REPORT_TO"}
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds from a signal to the launcher's kill; 30 are too few to save in
LAUNCH = f"{SHUTDOWN}=1800 uv run accelerate launch"
ONE_CTRL_C = 0.5  # seconds: `uv run` may pass on a signal that the process has received itself
LARGEST_SEED = 2**32 - 1  # times a million and the epoch, it still fits into 64 bits


# ---------------------------------------------------------------------------------------------------------------------
# States, loss and evaluation


def hidden_states(model, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """(B, T, H) after the final norm, computed in `dtype`. Documents of a row do not see each other."""
    arguments = attention.arguments(batch.documents, model.config, dtype)
    output = model.base_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **arguments)
    return output.last_hidden_state


def student_states(student, batch: Batch, settings) -> torch.Tensor:
    """(N, H) states of the counted tokens in the compute dtype; the weights stay float32."""
    # Under checkpointing a cache of converted weights would only keep all of them alive.
    cache = not settings.gradient_checkpointing
    enabled = settings.dtype != torch.float32
    with torch.autocast(settings.device.type, settings.dtype, enabled=enabled, cache_enabled=cache):
        states = hidden_states(student, batch, settings.dtype)
    return states.flatten(0, 1)[batch.counted].to(settings.dtype)


@torch.no_grad()
def teacher_states(teacher, batch: Batch) -> torch.Tensor:
    """(N, H) states of the counted tokens in the teacher's dtype."""
    return hidden_states(teacher, batch, teacher.dtype).flatten(0, 1)[batch.counted]


def next_tokens(batch: Batch) -> torch.Tensor:
    """(N,) the tokens that the counted ones are to predict."""
    return batch.input_ids.flatten()[batch.counted + 1]


@torch.no_grad()
def evaluate(student, teacher, rows, settings, signals: list) -> dict | None:
    """What student and teacher say of held-out rows; means over counted tokens, in nats. None where a process received
    one of the `signals` meanwhile.

    KL of student to teacher, also by the token's place in its document; both losses and the student's perplexity; the
    teacher's entropy, which is what remains of its loss where it knows the text's source exactly; the share of tokens
    where both find the same next token the most likely; and the probability that each gives to the end of the text
    where it ends.
    """
    student.eval()
    starts = torch.tensor(position_buckets(settings.sequence_length), device=settings.device)
    wide = torch.float32 if settings.device.type == "mps" else torch.float64  # which mps has not
    sums = torch.zeros(len(starts) + 7, 2, dtype=torch.float64)  # of a figure, and how many tokens it is of
    rank, world = common.rank_and_world()
    size = settings.micro_batch_size
    for first_of_all in range(0, len(rows), world * size):  # all processes make equally many passes
        if any_process(signals):
            student.train()
            return None
        start = first_of_all + rank * size
        batch = fetch(rows, range(start, min(start + size, len(rows))) or range(1), settings.device)
        if start >= len(rows):
            batch = replace(batch, counted=batch.counted[:0])
        labels, positions = next_tokens(batch), batch.position_ids.flatten()[batch.counted]
        buckets = torch.bucketize(positions, starts, right=True) - 1
        states, targets = student_states(student, batch, settings), teacher_states(teacher, batch)
        with sharding.unsharded_heads(student, teacher):
            weight, teacher_weight = sharding.head_weight(student).to(states.dtype), sharding.head_weight(teacher)
            step = losses.chunk_rows(settings.loss_chunk_bytes, len(weight), torch.float32, 4)
            for first in range(0, len(labels), step):
                chunk = slice(first, first + step)
                p_log = torch.log_softmax(losses.project(states[chunk], weight, torch.float32), dim=-1)
                q_log = torch.log_softmax(losses.project(targets[chunk], teacher_weight, torch.float32), dim=-1)
                figures = figures_of(p_log, q_log, labels[chunk], settings.end_of_text)
                figures += [figures[0][buckets[chunk] == bucket] for bucket in range(len(starts))]
                sums[:, 0] += torch.stack([x.sum(dtype=wide) for x in figures]).cpu()
                sums[:, 1] += torch.tensor([len(x) for x in figures])
    sums = common.sum_over_processes(sums)
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


def figures_of(p_log: torch.Tensor, q_log: torch.Tensor, labels: torch.Tensor, end_of_text: int) -> list[torch.Tensor]:
    """From log-probabilities (n, V) of student and teacher, of which the teacher's are overwritten: KL, both losses,
    the teacher's entropy and agreement, each (n,), and both probabilities of the end of the text where it is due."""
    agreed, ends = p_log.argmax(-1) == q_log.argmax(-1), labels == end_of_text
    of_labels = [log.gather(1, labels[:, None]).squeeze(1) for log in (p_log, q_log)]
    q = q_log.exp()
    entropy = -torch.sum(q_log.clamp_(min=losses.FLOOR).mul(q), dim=1)
    kl = torch.sum(q_log.sub_(p_log).mul_(q), dim=1)
    return [kl, -of_labels[0], -of_labels[1], entropy, agreed, *(log.exp()[ends] for log in of_labels)]


def position_buckets(length: int) -> list[int]:
    """Where the buckets of places in a document start: 0, 16, 64, 256, … below `length`."""
    return [0, *itertools.takewhile(lambda start: start < length, (16 * 4**i for i in itertools.count()))]


# ---------------------------------------------------------------------------------------------------------------------
# Continuing


def check_same_run(saved: dict, record: dict) -> None:
    """Refuse to continue a run with other constants or other models."""
    differences = [
        f"{name} = {record['constants'].get(name)!r} (was {saved['constants'].get(name)!r})"
        for name in sorted(record["constants"].keys() | saved["constants"].keys())
        if name not in MAY_CHANGE_ON_RESUME and record["constants"].get(name) != saved["constants"].get(name)
    ]
    for key in ("device", "dtype", "attention"):
        if saved.get(key) != record[key]:
            differences.append(f"{key} {record[key]} (was {saved.get(key)})")
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


def check_same_text(saved: dict, record: dict) -> None:
    if saved["data"] != record["data"]:
        raise PareError(
            f"DATASETS = {record['constants']['DATASETS']!r}: not the text that OUTPUT_DIR was started with.\n"
            "Put that back to continue it, or choose another OUTPUT_DIR."
        )


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


def backward(student, teacher, batch: Batch, denominator: torch.Tensor | int, settings) -> torch.Tensor:
    """Add a micro-batch's gradients to the student's; returns its part of the loss, and of L_hidden or 0: (2,)."""
    hidden, has_teacher = settings.hidden, losses.LOSSES[settings.loss].has_teacher
    with losses.compared_states(student, losses.LAYER if hidden else None) as compared:
        states = student_states(student, batch, settings)
    with losses.compared_states(teacher, hidden.teacher_layer if hidden else None) as compared_targets:
        targets = teacher_states(teacher, batch) if hidden or has_teacher else None

    def loss_of(states, weight):
        return losses.logit_loss(
            settings.loss,
            states,
            weight,
            targets,
            sharding.head_weight(teacher) if has_teacher else None,
            next_tokens(batch),
            denominator=denominator,
            temperature=settings.temperature,
            beta=settings.jsd_beta,
            chunk_bytes=settings.loss_chunk_bytes,
            compile=settings.compile,
        )

    with sharding.unsharded_heads(*[teacher] * has_teacher):
        loss = sharding.call_with_head(student, states, loss_of)
    distance = hidden(student, compared, compared_targets, batch, denominator) if hidden else torch.zeros_like(loss)
    (loss + hidden.weight * distance if hidden else loss).backward()
    return torch.stack([loss, distance]).detach()


def step_batches(rows, step: int, settings) -> list[Batch]:
    """The micro-batches of a step that are this process's: processes take them in turn."""
    indices = data.row_indices(step, settings.rows_per_step, len(rows), settings.seed)
    rank, world = common.rank_and_world()
    size = settings.micro_batch_size
    starts = range(rank * size, len(indices), world * size)
    return [fetch(rows, indices[start : start + size], settings.device) for start in starts]


def train_step(student, teacher, batches: list[Batch], optimizer, step: int, settings, signals=()) -> tuple:
    """One optimizer step; returns loss and gradient norm, and leaves the weights alone where one is not finite. Third,
    whether a process had received one of the `signals` when the losses were summed: later ones are the next step's.

    One denominator: the counted tokens of the whole step, in all processes.
    """
    count = torch.full((), float(sum(len(batch.counted) for batch in batches)), device=settings.device)
    denominator = common.sum_over_processes(count).clamp(min=1)
    total = torch.zeros(2, device=settings.device)  # of the loss, and of L_hidden
    for batch in batches:
        total += backward(student, teacher, batch, denominator, settings)
    parameters = [parameter for parameter in student.parameters() if parameter.grad is not None]
    norm = sharding.whole(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    total = common.sum_over_processes(torch.stack([*total, torch.full_like(total[0], len(signals))]))
    loss, distance, received, gradient_norm = torch.stack([*total, norm.float()]).tolist()  # the one synchronisation
    finite = math.isfinite(loss) and math.isfinite(gradient_norm)
    if settings.hidden:
        settings.hidden.finish_step(loss, distance, finite)
    if finite:  # before clipping, which would spread one NaN over all
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, gradient_norm, received > 0


def rehearse(student, teacher, optimizer, settings) -> None:
    """The largest micro-batch forward and backward, beside all that a step keeps, so that memory that runs out does so
    in the first minute, before the text is packed. Weights, optimizer and random state stay as they are."""
    student.train()  # else it does not checkpoint
    shape = settings.micro_batch_size, settings.sequence_length
    input_ids = torch.arange(math.prod(shape)).reshape(shape) % student.config.vocab_size
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    positions[:, -1] = 0  # two documents a row, which may need masks
    counted = torch.ones_like(positions, dtype=torch.bool)
    counted[:, -1] = False  # nothing follows
    batch = data.make_batch(input_ids, positions, counted, settings.device)
    to_come = [parameter for parameter in student.parameters() if parameter not in optimizer.state]
    moments = [torch.empty_like(parameter) for parameter in [*to_come, *to_come]]
    if settings.rows_per_step > settings.micro_batch_size:  # every micro-batch but the first finds gradients there
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
    with torch.random.fork_rng([settings.device] if settings.device.type == "cuda" else []):
        backward(student, teacher, batch, len(batch.counted), settings)
    optimizer.zero_grad(set_to_none=True)
    del moments


@contextmanager
def enough_memory(teacher: common.Checkpoint, student: common.Checkpoint, settings, world: int) -> Iterator[None]:
    """A device that is too small becomes a message with the constants that would fit it."""
    free = common.available_bytes(settings.device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = sum(preflight.memory_parts(teacher, student, settings, world).values())
        below = min(free, int(preflight.SAFE * needed))  # where the forecast said that it fits, it was short
        begun = bool(checkpoints_in(settings.checkpoints))
        raise PareError(
            f"MICRO_BATCH_SIZE = {settings.micro_batch_size} rows of SEQUENCE_LENGTH = {settings.sequence_length}, "
            f"STUDENT and TEACHER do not fit on {settings.device} ({common.first_line(error)}).\n"
            f"{preflight.advice(teacher, student, settings, world, below, begun)}"
        ) from None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM, the first Ctrl-C and the end of a terminal instead of dying of them; a second Ctrl-C quits at
    once. A signal that is ignored (nohup) stays so."""
    received, first = [], [0.0]

    def receive(number, frame):
        if number == signal.SIGINT and received:
            if time.monotonic() - first[0] > ONE_CTRL_C:
                raise KeyboardInterrupt
            return
        first[:] = [time.monotonic()]
        received.append(number)
        try:
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C (again) quits at once\n")  # print is not reentrant
        except OSError:  # the terminal is gone: whatever else is printed would raise this too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)

    if threading.current_thread() is not threading.main_thread():  # others may not have handlers
        yield received
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(student, teacher, held_out, rows, optimizer, first_step: int, bad_steps: int, log, save, settings) -> bool:
    """Train from `first_step`, after `bad_steps` in a row, to the end, or to a signal; True at the end.

    `log(step, metrics)` records, `save(step, bad_steps)` writes a checkpoint.
    """
    student.train()
    progress = common.Progress(settings.num_steps, "steps", "distilling", done=first_step)
    on_disk, saved = first_step, True  # the newest checkpoint's step; whether the last save succeeded
    stopped, seconds, alone = False, [], common.rank_and_world()[1] == 1
    with stop_signals() as signals, ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(step_batches, rows, first_step, settings)
        for step in range(first_step, settings.num_steps + 1):
            last = step == settings.num_steps
            # A step's checkpoint is older than its evaluation, which a run that continues from there makes again.
            if is_evaluated(step, settings):
                figures = evaluate(student, teacher, held_out, settings, signals)
                if figures:
                    log(step, figures)
                stopped = any_process(signals)
            stopped = stopped or (alone and bool(signals))  # several agree in the sums of a step
            if stopped and on_disk < step:
                try_to_save(save, step, bad_steps, must=True)
            if stopped or last:
                break
            start = time.monotonic()
            batches, done = ahead.result(), step + 1
            if done < settings.num_steps:
                ahead = thread.submit(step_batches, rows, done, settings)
            loss, gradient_norm, stopped = train_step(student, teacher, batches, optimizer, step, settings, signals)
            seconds.append(time.monotonic() - start)
            tokens_per_second = settings.tokens_per_step / seconds[-1]
            metrics = {
                "loss": loss,
                "gradient_norm": gradient_norm,
                "learning_rate": learning_rate(step, settings),
                "tokens_per_second": tokens_per_second,
            } | (settings.hidden.figures if settings.hidden else {})
            if math.isfinite(loss) and math.isfinite(gradient_norm):
                bad_steps = 0
            else:
                bad_steps += 1
                indices = data.row_indices(step, settings.rows_per_step, len(rows), settings.seed)
                metrics |= {"bad_steps": bad_steps, "rows": indices}
            text = f"loss {loss:.4f}, lr {metrics['learning_rate']:.1e}, {tokens_per_second:,.0f} tokens/s"
            if settings.device.type == "cuda":
                text += f", {torch.cuda.max_memory_allocated(settings.device) / 1e9:.1f} GB"
            log(done, metrics)
            check_bad_steps(bad_steps, done, settings)
            progress.update(1, text)
            if len(seconds) == 3:
                progress.note(preflight.speed(seconds, settings.num_steps - done, settings))
            if done % settings.save_every == 0 or done == settings.num_steps:
                saved = try_to_save(save, done, bad_steps, must=done == settings.num_steps or not saved)
                on_disk = done if saved else on_disk
    progress.close()
    return not stopped


def try_to_save(save, step: int, bad_steps: int, must: bool) -> bool:
    """Save; False where the disk did not take it. Where it `must`, that is the end, as weights that may not be saved
    always are."""
    error = None
    try:
        save(step, bad_steps)
    except PareError as refused:
        error = refused
    error = common.from_rank_0(error)  # the process that writes
    if error and (must or not isinstance(error, SaveError)):
        raise error
    if error:
        print(f"{error}\nTraining goes on to the next save.", flush=True)
    return not error


def is_evaluated(step: int, settings) -> bool:
    return step % settings.eval_every == 0 or step == settings.num_steps


def any_process(received: list) -> bool:
    """True where one of the processes received a signal."""
    return bool(common.sum_over_processes(torch.tensor(len(received))))


def check_bad_steps(bad_steps: int, step: int, settings) -> None:
    if bad_steps >= settings.max_bad_steps:
        last = latest_checkpoint(settings.checkpoints)
        raise PareError(
            f"loss or gradient was not finite in MAX_BAD_STEPS = {settings.max_bad_steps} steps in a row, up to step "
            f"{step}. None reached the weights; the last good checkpoint is {last or 'the student itself'}.\n"
            f"Start again in another OUTPUT_DIR with less than LEARNING_RATE = {settings.learning_rate}; metrics.jsonl "
            "names the rows."
        )


def without_nan(metrics: dict) -> dict:
    """For JSON, which has no NaN: None in place of what is not finite."""

    def cleaned(value):
        if isinstance(value, dict):
            return {key: cleaned(x) for key, x in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return cleaned(metrics)


def with_nan(metrics: dict) -> dict:
    return {key: math.nan if value is None else value for key, value in metrics.items()}


def open_log(path: Path, checkpoint: Path | None, settings, record: dict):
    """A function `log(step, metrics)` that appends to metrics.jsonl and to the tracker that REPORT_TO names.

    A resumed run starts from the lines in its checkpoint, but for an evaluation at its very end if it is made again.
    """
    lines = (checkpoint / "metrics.jsonl").read_text().splitlines(keepends=True) if checkpoint else []
    if lines and "held_out_kl" in (last := json.loads(lines[-1])) and is_evaluated(last["step"], settings):
        lines.pop()
    common.replace_file(path, lambda temporary: temporary.write_text("".join(lines)))
    tracker = None
    if settings.report_to is not None:
        tracker = importlib.import_module(settings.report_to)
        # By its own name a run goes on there too; wandb knows it by an id, of these characters.
        name = re.sub(r"[^\w.-]", "-", f"{path.parent.name}-{record['created']}")[-100:]
        more = {"id": name} if settings.report_to == "wandb" else {}
        resume = "allow" if checkpoint else "never"
        tracker.init(project="pare", name=name, config=record["constants"], resume=resume, **more)

    def log(step: int, metrics: dict) -> None:
        metrics = without_nan(metrics)
        line = json.dumps({"step": step, "tokens": step * settings.tokens_per_step} | metrics, allow_nan=False)
        try:
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise PareError(
                f"OUTPUT_DIR = {settings.output_dir!r}: {path.name} could not be written "
                f"({common.first_line(error)}).\nCheckpoints are intact: make room, and the same command continues."
            ) from None
        if tracker is not None:
            tracker.log(metrics, step=step)

    return log


# ---------------------------------------------------------------------------------------------------------------------
# Results


def plot(metrics: list[dict], loss: str, path: Path) -> None:
    metrics = [with_nan(line) for line in metrics]
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


def export(folder: Path, student, weights: dict, checkpoint: common.Checkpoint, card: str, record: dict) -> None:
    """Write the student in bfloat16 as a plain Hugging Face folder, with the student's tokenizer and config."""
    with common.new_folder(folder, "distill.py") as temporary:
        trained = {name: tensor for name, tensor in weights.items() if name != "hidden_projection.weight"}
        check_finite(trained, str(folder))
        student.save_pretrained(temporary, state_dict=trained, max_shard_size="5GB")
        common.copy_companions(checkpoint.folder, temporary)
        raw = {key: value for key, value in checkpoint.raw.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
        common.write_json(temporary / "config.json", raw)
        (temporary / "README.md").write_text(card)
        hashes = {file: common.hash_file(temporary / file) for file in common.files_in(temporary)}
        common.write_record(temporary, record | {"sha256": hashes})
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


def derive_settings(constants: dict, world: int = 1) -> SimpleNamespace:
    """The constants in lower case, checked, and what follows from them."""
    positive = (
        "SEQUENCE_LENGTH",
        "TRAIN_TOKENS",
        "TOKENS_PER_STEP",
        "MICRO_BATCH_SIZE",
        "LEARNING_RATE",
        "TEMPERATURE",
    )
    common.check_positive(constants, *positive, "EVAL_EVERY", "EVAL_TOKENS", "SAVE_EVERY", "MAX_BAD_STEPS")
    common.check_not_negative(constants, "MIN_LEARNING_RATE", "WARMUP_STEPS", "WEIGHT_DECAY", "SEED")
    settings = SimpleNamespace(**{name.lower(): value for name, value in constants.items()})
    if settings.seed > LARGEST_SEED:
        raise PareError(f"SEED = {settings.seed} must be from 0 to {LARGEST_SEED}.")
    if settings.sequence_length < 2:
        raise PareError("SEQUENCE_LENGTH = 1 leaves no next token to predict; set it to 2 or more.")
    if settings.min_learning_rate > settings.learning_rate:
        raise PareError(
            f"MIN_LEARNING_RATE = {settings.min_learning_rate} is above LEARNING_RATE = {settings.learning_rate}."
        )
    if settings.keep_checkpoints < 2:
        raise PareError(f"KEEP_CHECKPOINTS = {settings.keep_checkpoints} must be at least 2.")
    common.check_choice("LOSS", settings.loss, losses.LOSSES)
    common.check_choice("ATTENTION", settings.attention, attention.CHOICES)
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
        data.check_held_out(settings.datasets, settings.eval_datasets)
    micro_batch_tokens = settings.micro_batch_size * settings.sequence_length * world
    if settings.tokens_per_step % micro_batch_tokens:
        nearest = max(1, round(settings.tokens_per_step / micro_batch_tokens)) * micro_batch_tokens
        each = f" x {world} processes" * (world > 1)
        raise PareError(
            f"TOKENS_PER_STEP = {settings.tokens_per_step} must be a multiple of MICRO_BATCH_SIZE x SEQUENCE_LENGTH"
            f"{each} = {micro_batch_tokens}; the nearest is {nearest}."
        )
    if settings.train_tokens < settings.tokens_per_step:
        raise PareError(
            f"TRAIN_TOKENS = {settings.train_tokens} is less than one step; set it to TOKENS_PER_STEP = "
            f"{settings.tokens_per_step} or more."
        )
    settings.checkpoints = common.output_path("OUTPUT_DIR", settings.output_dir) / "checkpoints"
    settings.num_steps = settings.train_tokens // settings.tokens_per_step
    settings.rows_per_step = settings.tokens_per_step // settings.sequence_length
    settings.device = common.pick_device(settings.device)
    settings.dtype = common.pick_dtype(settings.dtype, settings.device)
    if settings.loss_chunk_bytes is None:
        settings.loss_chunk_bytes = 2**30 if settings.device.type == "cuda" else 2**28
    common.check_positive({"LOSS_CHUNK_BYTES": settings.loss_chunk_bytes}, "LOSS_CHUNK_BYTES")
    settings.quantization = quantization.config_of("TEACHER_QUANTIZATION", settings.teacher_quantization, world)
    settings.implementation = attention.MASKED  # or what choose_attention finds
    settings.hidden = None  # a HiddenLoss in a run with HIDDEN_LOSS
    settings.expected_bytes = math.nan  # of memory, which preflight.print_preflight computes
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
        if checkpoint.folder.resolve().is_relative_to(output.resolve()):
            raise PareError(f"OUTPUT_DIR = {settings.output_dir!r} is, or holds, {constant} itself; choose another.")
        common.check_outside(output, checkpoint.folder, "OUTPUT_DIR", constant)
        common.check_length(checkpoint, settings.sequence_length, constant)
        if settings.hidden_loss and checkpoint.config.num_hidden_layers < 4:
            what = f"{constant} = {checkpoint.name!r} has {checkpoint.config.num_hidden_layers} layers"
            raise PareError(f"HIDDEN_LOSS = True needs 4 layers or more: {what}. Set HIDDEN_LOSS = False.")
    check_same_vocabulary(teacher, student)
    return teacher, student


def choose_attention(teacher: common.Checkpoint, student: common.Checkpoint, settings) -> None:
    """Set the implementation that all processes use: a trial on the GPU of rank 0."""
    # It would be preferred, but its gradients are not deterministic, and it makes a plan for every batch's shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    models, rank = [teacher, student], common.rank_and_world()[0]
    chosen = attention.choose(settings.attention, models, settings.device, settings.dtype) if rank == 0 else None
    settings.implementation = common.from_rank_0(chosen)


def model_record(checkpoint: common.Checkpoint, constant: str) -> dict:
    weights_hash = common.hash_checkpoint(checkpoint, constant)
    return {"name": checkpoint.name, "revision": checkpoint.revision, "weights_hash": weights_hash}


def check_output(output: Path) -> None:
    """Refuse, before any work, an OUTPUT_DIR where something would not be ours to replace, or cannot be written."""
    for folder in (output, output / "checkpoints"):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise PareError(f"OUTPUT_DIR = {str(output)!r}: {folder} cannot be written. Choose another.")
    for folder in (output, output / "model", output / "data"):
        common.check_own_folder(folder, "OUTPUT_DIR", "distill.py")


def open_output(output: Path, record: dict) -> Path | None:
    """Make OUTPUT_DIR ours and return the checkpoint to continue from, if the run in it is the same one."""
    latest = latest_checkpoint(output / "checkpoints")
    saved = read_json(output / "pare.json")
    if latest:
        check_same_run(read_json(latest / "pare.json"), record)
    elif "step" in saved:
        raise PareError(
            f"OUTPUT_DIR = {str(output)!r} holds a run of {saved['step']} steps whose checkpoints are gone. Put them "
            "back to continue it, or choose another OUTPUT_DIR."
        )
    check_nothing_in_the_way(output / "checkpoints", step_of(latest) if latest else 0)
    output.mkdir(parents=True, exist_ok=True)
    if not saved:
        common.write_json(output / "pare.json", record)
    return latest


def finished_record(output: Path, teacher: common.Checkpoint, record: dict, settings) -> dict | None:
    """The record of the exported model, where it is there, whole, and of this run."""
    saved = read_json(output / "model" / "pare.json")
    if "sha256" not in saved:
        return None
    check_same_run(saved, record)
    if (output / "data").is_dir():
        pack = data.prepare_data(output / "data", teacher, settings, saved["data"])
        check_same_text(saved, record | {"data": pack()})
    files = {output / "model" / name: digest for name, digest in saved["sha256"].items()}
    whole = all(file.is_file() and common.hash_file(file) == digest for file, digest in files.items())
    return saved if whole else None


@contextmanager
def deterministic(on: bool, device: torch.device) -> Iterator[None]:
    """On a GPU, kernels whose sums have one order. cuBLAS reads the variable when it is first used."""
    if not on or device.type != "cuda":
        yield
        return
    name, before = "CUBLAS_WORKSPACE_CONFIG", torch.are_deterministic_algorithms_enabled()
    was_set, fills = name in os.environ, torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault(name, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it; filling it costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        if not was_set:
            del os.environ[name]


def switch_off_dropout(model) -> None:
    """In the modules; the config, which is exported, stays as it is. The teacher is to be matched, without noise."""
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        for name in [*rates, *(["p"] if isinstance(module, torch.nn.Dropout) else [])]:
            setattr(module, name, 0.0)


def load_pair(teacher_checkpoint, student_checkpoint, settings) -> tuple:
    """Teacher in the compute dtype, student in float32, on the device."""
    if settings.compile:
        torch._dynamo.config.recompile_limit = 64  # one function's: both models, sliding and not, training and not
    teacher = load(teacher_checkpoint, settings.dtype, "TEACHER", settings, settings.quantization)
    teacher.requires_grad_(False)
    teacher = sharding.shard(teacher, settings.dtype, settings.device)  # before the other takes its room
    student = load(student_checkpoint, torch.float32, "STUDENT", settings)
    switch_off_dropout(student)
    if settings.gradient_checkpointing:
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)  # renamed
        enable({"use_reentrant": False})
    return teacher, sharding.shard(student, settings.dtype, settings.device)


def load(checkpoint: common.Checkpoint, dtype: torch.dtype, constant: str, settings, scheme=None):
    """A model that computes as the constants say; where one to be sharded does not fit on a GPU whole, on the CPU."""
    whole = common.rank_and_world()[1] == 1 or common.fits_whole(checkpoint, dtype, settings.device, constant)
    device = settings.device if whole else torch.device("cpu")
    model = common.load_model(checkpoint, dtype, device, constant, scheme)
    model.set_attn_implementation(settings.implementation)
    for layer in model.base_model.layers if settings.compile else []:
        layer.compile()
    return model


def unquantized_states(checkpoint: common.Checkpoint, held_out, settings) -> tuple[Batch, torch.Tensor]:
    """The first held-out micro-batch, and the teacher's states (N, H) of it before it is loaded again and quantised;
    computed on the CPU where the GPU is too small for it whole."""
    fits = common.fits_whole(checkpoint, settings.dtype, settings.device, "TEACHER")
    device = settings.device if fits else torch.device("cpu")
    teacher = common.load_model(checkpoint, settings.dtype, device, "TEACHER")
    teacher.set_attn_implementation(settings.implementation if fits else attention.MASKED)
    rows = range(min(settings.micro_batch_size, len(held_out)))
    states = teacher_states(teacher, fetch(held_out, rows, device)).to(settings.device)
    del teacher
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return fetch(held_out, rows, settings.device), states


def quantization_kl(teacher, batch: Batch, targets: torch.Tensor, settings) -> float:
    """Mean KL of the quantised teacher to what it was, whose states (N, H) `targets` are, in nats per token; printed.
    The LM head is the same in both."""
    head, count = sharding.head_weight(teacher), len(targets)
    options = {"denominator": max(1, count), "chunk_bytes": settings.loss_chunk_bytes}
    kl = losses.logit_loss("forward_kl", teacher_states(teacher, batch), head, targets, head, **options).item()
    dtype = str(settings.dtype)[6:]
    print(f"teacher in {settings.teacher_quantization}: KL {kl:.5f} to the {dtype} one, on one batch of {count} tokens")
    return kl


def run(output: Path, teacher_checkpoint, student_checkpoint, record: dict, settings) -> dict:
    """Distil from the newest checkpoint or from the start, and export; returns the exported model's record."""
    rank, world = common.rank_and_world()
    kept, layer = losses.what_was_kept(teacher_checkpoint, student_checkpoint) if settings.hidden_loss else (None, 0)
    if settings.hidden_loss and kept is None and world > 1:
        raise PareError(
            f"HIDDEN_LOSS = True: prune.py did not make STUDENT = {settings.student!r}, so it learns a projection: "
            "one process can do that, not several. Set HIDDEN_LOSS = False."
        )
    metrics_path = output / "metrics.jsonl"
    latest = common.from_rank_0(open_output(output, record) if rank == 0 else None)
    torch.manual_seed(settings.seed)
    begun = read_json(latest / "pare.json") if latest else {}
    record["created"] = begun.get("created", record["created"])
    # Sources are opened now, so that a mistake is found; they are packed, which can take long, after the rehearsal.
    pack = data.prepare_data(output / "data", teacher_checkpoint, settings, begun.get("data")) if rank == 0 else None
    settings.end_of_text = common.load_tokenizer(teacher_checkpoint, "TEACHER").eos_token_id
    if settings.quantization:  # in one process; its KL is that on held-out text
        record["data"] = pack()
        before = unquantized_states(teacher_checkpoint, data.open_rows(output / "data")[0], settings)
    teacher, student = load_pair(teacher_checkpoint, student_checkpoint, settings)
    if settings.quantization:
        record["teacher"]["quantization_kl"] = quantization_kl(teacher, *before, settings)
        del before  # its memory
    if settings.hidden_loss:
        if kept is None:
            losses.add_projection(student, teacher.config.hidden_size, settings)
        weight = read_json(latest / "pare.json")["hidden_weight"] if latest else 0.0
        settings.hidden = losses.HiddenLoss(kept if kept is None else kept.to(settings.device), layer, weight)
    optimizer = build_optimizer(student, settings)
    first_step, bad_steps = load_checkpoint(latest, student, optimizer) if latest else (0, 0)
    rehearse(student, teacher, optimizer, settings)
    record["data"] = common.from_rank_0(pack() if rank == 0 else None)
    held_out, rows = data.open_rows(output / "data")
    if latest:
        check_same_text(begun, record)
    print_plan(rows, first_step, settings)

    log = lambda step, metrics: None  # noqa: E731
    if rank == 0:
        common.write_json(output / "pare.json", record | ({"step": first_step} if latest else {}))
        log = open_log(metrics_path, latest, settings, record)

    def save(step: int, bad_steps: int) -> None:
        more = record | {"bad_steps": bad_steps, "hidden_weight": settings.hidden and settings.hidden.weight}
        save_checkpoint(settings.checkpoints, step, student, optimizer, more, metrics_path, settings.keep_checkpoints)
        if rank == 0:
            with suppress(PareError):  # says that there is something to lose; a full disk is no reason to stop
                common.write_json(output / "pare.json", record | {"step": step})

    if not train(student, teacher, held_out, rows, optimizer, first_step, bad_steps, log, save, settings):
        print(f"\nStopped; everything is saved. To continue{continue_command(world)}", flush=True)
        sys.exit(0)

    weights = {
        name: whole_on_cpu(tensor, torch.bfloat16) for name, tensor in sharding.named_parameters(student).items()
    }
    if rank == 0:
        metrics = [json.loads(line) for line in metrics_path.read_text().splitlines()]
        evaluations = [line for line in metrics if "held_out_kl" in line]
        before, after = evaluations[0], evaluations[-1]
        plot(metrics, settings.loss, output / "curves.png")
        card = model_card(teacher_checkpoint, student_checkpoint, with_nan(before), with_nan(after), record)
        record |= {"before": before, "after": after}
        export(output / "model", student, weights, student_checkpoint, card, record)
    return common.from_rank_0(record)


def main() -> Path:
    with common.processes(DEVICE) as (rank, world):
        constants = common.read_constants(sys.modules[__name__])
        settings = derive_settings(constants, world)
        output = common.output_path("OUTPUT_DIR", OUTPUT_DIR)
        if rank == 0:
            check_output(output)
        teacher, student = find_pair(output, settings)
        with (
            common.lock(output, "OUTPUT_DIR", rank),
            deterministic(DETERMINISTIC, settings.device),
            enough_memory(teacher, student, settings, world),
        ):
            choose_attention(teacher, student, settings)
            record = common.from_rank_0(make_record(teacher, student, settings) if rank == 0 else None)
            finished = common.from_rank_0(finished_record(output, teacher, record, settings) if rank == 0 else None)
            if finished:
                print(f"{output}/model is finished already, and whole.")
            else:
                if rank == 0:
                    sweep(settings.checkpoints)
                    shapes = {name: info.shape for name, info in common.tensor_infos(student, "STUDENT").items()}
                    to_pack = 0 if (output / "data").is_dir() else preflight.text_bytes(settings)
                    check_room(settings.checkpoints, common.count_parameters(shapes)[0], KEEP_CHECKPOINTS, to_pack)
                settings.expected_bytes = preflight.print_preflight(teacher, student, settings, world)
                finished = run(output, teacher, student, record, settings)
        print_results(with_nan(finished["before"]), with_nan(finished["after"]))
        print(f"\nWrote {output}/model, {output}/curves.png and {output}/metrics.jsonl.", end=" ")
        width = student.config.num_attention_heads * student.head_dim
        print(f"Next: {common.serve_command(output / 'model', student.family, student.config.hidden_size, width)}")
    return output / "model"


def continue_command(world: int) -> str:
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        return ", give each machine the command that it was started with."
    launch = f"{LAUNCH} --num_processes {world}" if world > 1 else "uv run"
    return f":\n\n    {launch} {shlex.join(sys.argv)}"


def make_record(teacher: common.Checkpoint, student: common.Checkpoint, settings) -> dict:
    return common.run_record(
        sys.modules[__name__],
        teacher=model_record(teacher, "TEACHER"),
        student=model_record(student, "STUDENT"),
        tokens=settings.num_steps * settings.tokens_per_step,
        device=settings.device.type,
        dtype=str(settings.dtype)[6:],
        attention=settings.implementation,
    )


def print_plan(rows, first_step: int, settings) -> None:
    if common.rank_and_world()[1] > 1 and SHUTDOWN not in os.environ:
        print(f"a stop by SIGTERM or Ctrl-C has 30 seconds to save, then the launcher kills; `{LAUNCH}` gives 1800")
    epochs = settings.num_steps * settings.rows_per_step / len(rows)
    if epochs > 1:
        print(f"the text gives {len(rows)} rows, so training goes over it {epochs:.1f} times")
    if settings.warmup_steps >= settings.num_steps:
        print(f"WARMUP_STEPS = {settings.warmup_steps} of {settings.num_steps} steps: LEARNING_RATE is never reached")
    if first_step:
        print(f"continuing after step {first_step}")


if __name__ == "__main__":
    common.run(sys.modules[__name__])
