"""What a run of distill.py will take, said before anything is loaded: memory by part, whether it fits, disk; and, after
the first steps, the speed and the hours to go.

The memory is that of the moment of a step when most is alive, on one device, counted from the shapes of both models as
PyTorch's autograd keeps them: the residual stream is float32, as the embeddings are; linear layers compute in `dtype`.
What kernels, allocator and driver take for themselves comes on top. Evaluation keeps no gradients and no activations,
so it is never the peak. Nothing here is a setting, and importing it does nothing.

Shapes: B rows, T tokens of a row, H hidden, F intermediate, V vocabulary.
"""

import itertools
import math
import os
import statistics
from types import SimpleNamespace

import torch

import attention
import checkpoints
import common
import data
import losses
import quantization
from common import HIDDEN, KEY_VALUE, NEURONS, QUERY

FLOAT32 = 4  # bytes
NORM_WIDTHS = {"self_attn.q_norm": QUERY, "self_attn.k_norm": KEY_VALUE}  # of activations; any other: HIDDEN
SHORTEST = 256  # tokens of the shortest row that is proposed
SAFE = 0.9  # of the device: what the estimate may be off by is left


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of one model


def widths(model: common.Checkpoint) -> dict[str, int]:
    """Channels of the axes that common.FAMILIES names."""
    config, head_dim = model.config, model.head_dim
    return {
        HIDDEN: config.hidden_size,
        NEURONS: config.intermediate_size,
        QUERY: config.num_attention_heads * head_dim,
        KEY_VALUE: config.num_key_value_heads * head_dim,
        common.WHOLE: head_dim,
    }


def linear_weights(model: common.Checkpoint) -> int:
    """Weights of one decoder layer's linear layers; biases and norms, a ten-thousandth of them, are left out."""
    width = widths(model)
    return sum(width[rows] * width[columns] for rows, columns in common.LINEARS.values())


def head_weights(model: common.Checkpoint) -> int:
    return model.config.vocab_size * model.config.hidden_size


def outside_weights(model: common.Checkpoint) -> int:
    """Of embeddings and LM head."""
    return head_weights(model) * (1 if model.config.tie_word_embeddings else 2)


def layer_activations(model: common.Checkpoint, settings) -> int:
    """Bytes for each token that autograd keeps of a decoder layer."""
    dtype = settings.dtype
    width, size = widths(model), dtype.itemsize
    # Under autocast each linear layer has a copy of its input in the compute dtype.
    readers = {place: 1 if size == FLOAT32 else len(linears) for place, linears in common.PLACES.items()}
    inputs = sum(number * width[common.LINEARS[place][1]] for place, number in readers.items())
    norms = sum(width[NORM_WIDTHS.get(name, HIDDEN)] for name in model.family.norms)  # each its input and the quotient
    varlen = settings.implementation == attention.VARLEN
    heads = width[QUERY] + 2 * width[KEY_VALUE if varlen else QUERY]  # masks go with keys and values repeated
    mlp = 3 * width[NEURONS]  # gate, its activation, up
    return size * (inputs + heads + mlp) + 2 * FLOAT32 * norms + FLOAT32 * model.config.num_attention_heads


def working_bytes(model: common.Checkpoint, dtype: torch.dtype) -> int:
    """Bytes for each token that a forward pass without gradients works with: where keys are rotated, in float32, or
    between the feed-forward part's linear layers; beside the residual stream and what was made of it."""
    width, size = widths(model), dtype.itemsize
    rotation = (size + FLOAT32) * width[QUERY] + (2 * size + 3 * FLOAT32) * width[KEY_VALUE]
    return size * 2 * width[HIDDEN] + max(rotation, size * (2 * width[HIDDEN] + 3 * width[NEURONS]))


def mask_bytes(model: common.Checkpoint, settings) -> int:
    """Masks (B, 1, T, T) of a forward pass: rows hold several documents, or are longer than the window."""
    if settings.implementation == attention.VARLEN:
        return 0
    kinds = len(attention.windows(model.config, settings.sequence_length))
    return kinds * settings.micro_batch_size * settings.sequence_length**2 * settings.dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of a step


def loss_bytes(student: common.Checkpoint, settings) -> int:
    """What losses.LogitLoss works with: chunks, the head in the compute dtype, and both gradients."""
    loss, dtype, vocab_size = losses.LOSSES[settings.loss], settings.dtype, student.config.vocab_size
    tokens, half = settings.micro_batch_size * settings.sequence_length, settings.loss_chunk_bytes // 2
    small = losses.chunk_rows(half, vocab_size, torch.float32, loss.arrays)
    large = max(small, losses.chunk_rows(half, vocab_size, dtype, 1) // small * small)
    chunks = min(large, tokens) * dtype.itemsize + min(small, tokens) * loss.arrays * FLOAT32
    head = FLOAT32 + (dtype.itemsize if dtype.itemsize < FLOAT32 else 0)
    return vocab_size * chunks + head_weights(student) * head + tokens * student.config.hidden_size * dtype.itemsize


def gathered_bytes(teacher: common.Checkpoint, student: common.Checkpoint, dtype: torch.dtype) -> int:
    """Of shards that `fully_shard` makes whole: two layers of each model, embeddings and heads, a layer's gradient."""
    layers = 2 * dtype.itemsize * (linear_weights(teacher) + linear_weights(student))
    outside = dtype.itemsize * outside_weights(teacher) + FLOAT32 * outside_weights(student)
    return layers + outside + FLOAT32 * linear_weights(student)


def memory_parts(teacher, student, settings, world: int) -> dict[str, int]:
    """Bytes on one device, by part, at the peak of an optimizer step; their sum is the peak.

    teacher, student: checkpoints, of which only the configs are read.
    """
    dtype, size, checkpointing = settings.dtype, settings.dtype.itemsize, settings.gradient_checkpointing
    rows, length = settings.micro_batch_size, settings.sequence_length
    tokens, hidden, teacher_hidden = rows * length, student.config.hidden_size, teacher.config.hidden_size
    layers, linears = student.config.num_hidden_layers, linear_weights(student)
    parameters = layers * linears + outside_weights(student)
    *_, bytes_of_one = quantization.SCHEMES.get(settings.teacher_quantization, (size,))
    of_teacher = teacher.config.num_hidden_layers * linear_weights(teacher) * bytes_of_one

    copies = linears * size if size < FLOAT32 and world == 1 else 0  # weights as autocast converts them
    layer = tokens * layer_activations(student, settings) + copies
    residuals = layers * tokens * hidden * FLOAT32
    outputs = tokens * hidden * (2 * FLOAT32 + size)  # the final norm and its output
    activations = outputs + mask_bytes(student, settings) + (residuals if checkpointing else layers * layer)

    has_teacher = settings.hidden_loss or losses.LOSSES[settings.loss].has_teacher
    targets = tokens * teacher_hidden * size * has_teacher
    targets += 2 * tokens * (2 * FLOAT32 * hidden + size * teacher_hidden) * settings.hidden_loss
    forward = tokens * working_bytes(teacher, dtype) + mask_bytes(teacher, settings)
    # Of the final norm; or of a layer computed once more, when that has let go of two such arrays.
    backward = layer + tokens * hidden * 3 * FLOAT32 if checkpointing else tokens * hidden * 5 * FLOAT32
    head = FLOAT32 * head_weights(student)
    tied = head * student.config.tie_word_embeddings  # the head's gradient waits for that of the embeddings
    of_all = FLOAT32 * parameters // world
    before = of_all if settings.rows_per_step > rows else 0  # gradients that a micro-batch finds
    moments = {  # of a step -> the gradients there, the activations, and what is at work
        "the teacher's forward pass": (before, activations, forward * has_teacher),
        "the loss": (before, activations, targets + loss_bytes(student, settings)),
        "a layer's backward pass": (before or head, activations, targets + backward + tied),
        "the embeddings' gradients": (of_all, 0, head + 2 * tied),
        "the optimizer": (of_all, 0, 0),
    }
    peak = max(moments, key=lambda moment: sum(moments[moment]))
    gradients, activations, at_work = moments[peak]
    return {
        "student's weights": of_all,
        "gradients": gradients,
        "AdamW's moments": 2 * of_all,
        "teacher's weights": (of_teacher + outside_weights(teacher) * size) // world,
        "layers gathered": gathered_bytes(teacher, student, dtype) if world > 1 else 0,
        "activations": activations,
        f"at the peak: {peak}": at_work,
    }


def what_fits(teacher, student, settings, world: int, free: int, continued: bool = False) -> str | None:
    """The first constants with which the peak is at most `free` bytes: smaller micro-batches, checkpointing, a teacher
    in fewer bits or more processes, shorter rows, each tried with those before it; a step keeps its tokens. A run that
    is `continued` keeps its constants where more processes alone will do. None where nothing fits."""
    rows, length, given = settings.micro_batch_size, settings.sequence_length, settings.teacher_quantization
    projected = settings.hidden_loss and losses.what_was_kept(teacher, student)[0] is None
    numbers = [world * 2**i for i in range(4 if settings.device.type == "cuda" and not projected else 1)]
    tries = itertools.product(  # the last varies first
        [length, *(length // 2**i for i in range(1, 9) if length // 2**i >= SHORTEST)],
        numbers,
        [given, "8bit" if given is None else None],
        sorted({settings.gradient_checkpointing, True}),
        [n for n in range(rows, 0, -1) if rows % n == 0],
    )
    unchanged = [(length, number, given, settings.gradient_checkpointing, rows) for number in numbers * continued]
    for tried_length, processes, bits, checkpointing, size in [*unchanged, *tries]:
        constants = {
            "MICRO_BATCH_SIZE": size,
            "GRADIENT_CHECKPOINTING": checkpointing,
            "TEACHER_QUANTIZATION": bits,
            "SEQUENCE_LENGTH": tried_length,
        }
        tried = SimpleNamespace(**vars(settings) | {name.lower(): value for name, value in constants.items()})
        tried.rows_per_step = settings.tokens_per_step // tried_length
        possible = settings.tokens_per_step % (size * tried_length * processes) == 0 and not (bits and processes > 1)
        if possible and sum(memory_parts(teacher, student, tried, processes).values()) <= free:
            changed = [f"{n} = {value!r}" for n, value in constants.items() if value != getattr(settings, n.lower())]
            launch = f"{processes} GPUs (`uv run accelerate launch --num_processes {processes} distill.py`)"
            elsewhere = ", in another OUTPUT_DIR, or free the device: a run continues with its own constants"
            return " and ".join(changed + [launch] * (processes > world)) + elsewhere * bool(continued and changed)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def disk_parts(num_parameters: int, settings) -> dict[str, int]:
    """Bytes that a run writes at most, by part."""
    number = settings.keep_checkpoints + 1
    return {
        f"{number} checkpoints, one being written": number * checkpoints.BYTES_PER_PARAMETER * num_parameters,
        "the model in bfloat16": 2 * num_parameters,
        "the packed text": text_bytes(settings),
    }


def text_bytes(settings) -> int:
    rows = settings.num_steps * settings.rows_per_step + max(1, settings.eval_tokens // settings.sequence_length)
    return math.ceil(rows * settings.sequence_length * data.BYTES_PER_TOKEN)


def verdict(teacher, student, settings, world: int, needed: int, free: int, continued: bool = False) -> str:
    if needed <= free:
        return "fits" if needed <= SAFE * free else "fits, with less than a tenth to spare"
    return f"does not fit. {advice(teacher, student, settings, world, free, continued)}"


def advice(teacher, student, settings, world: int, free: int, continued: bool) -> str:
    """What to change where `free` bytes are not enough; a run that is `continued` may not change it."""
    text = what_fits(teacher, student, settings, world, free, continued)
    return f"This would: {text}." if text else "Take a larger device, or a smaller STUDENT or TEACHER."


def print_preflight(teacher: common.Checkpoint, student: common.Checkpoint, settings, world: int) -> int:
    """Say what the run will take, before anything is loaded; returns the peak in bytes on one device."""
    sizes = [
        common.count_parameters({name: info.shape for name, info in common.tensor_infos(model, constant).items()})[0]
        for model, constant in ((teacher, "TEACHER"), (student, "STUDENT"))
    ]
    memory, disk = memory_parts(teacher, student, settings, world), disk_parts(sizes[1], settings)
    num_tokens, accumulation = settings.tokens_per_step, settings.rows_per_step // settings.micro_batch_size
    print(
        f"{sizes[0]:,} -> {sizes[1]:,} parameters on {settings.device}, compute in {str(settings.dtype)[6:]}\n"
        f"{settings.num_steps} steps of {num_tokens} tokens ({accumulation} micro-batches of "
        f"{settings.micro_batch_size} x {settings.sequence_length}), {settings.num_steps * num_tokens:,} tokens"
    )
    needed, free = sum(memory.values()), common.available_bytes(settings.device)
    free_disk = checkpoints.free_bytes(settings.checkpoints)
    rows = [*memory.items(), ("memory" + " of each process" * (world > 1), needed), ("free there", free)]
    copied, free_host = 0, common.available_bytes(torch.device("cpu")) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if settings.device.type == "cuda":  # the process of rank 0 saves
        copied = checkpoints.BYTES_PER_PARAMETER * sizes[1]
        rows += [("a checkpoint in the host's memory", copied), ("free there", free_host)]
    rows += [*disk.items(), ("disk", sum(disk.values())), ("free there", free_disk)]
    common.print_table([[part, f"{size / 1e9:.2f} GB"] for part, size in rows if size])
    continued = bool(checkpoints.checkpoints_in(settings.checkpoints))
    print(f"memory {verdict(teacher, student, settings, world, needed, free, continued)}", flush=True)
    if copied > free_host:
        print("the host's memory is too small to save a checkpoint: take a machine with more")
    return needed


def speed(seconds: list[float], steps_left: int, settings) -> str:
    """From the seconds of the first steps, of which the very first is left out: it warms up."""
    median = statistics.median(seconds[1:])
    text = f"{settings.tokens_per_step / median:,.0f} tokens/s: {steps_left * median / 3600:.3g} hours to go"
    if settings.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(settings.device)
        text += f"; at most {peak / 1e9:.1f} GB so far, {settings.expected_bytes / 1e9:.1f} GB expected"
    return text
