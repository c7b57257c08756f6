"""What a run of distill.py will take, said before anything is loaded: memory by part, whether it fits, disk; and, after
the first steps, the speed and the hours to go.

The memory is that of the moment of a step when most is alive, on one device, counted from the shapes of both models as
PyTorch's autograd keeps them: the residual stream is float32, as the embeddings are; linear layers compute in `dtype`.
What kernels, allocator and driver take for themselves comes on top. Evaluation keeps no gradients and no activations,
so it is never the peak. Nothing here is a setting, and importing it does nothing.

Shapes: B rows, T tokens of a row, H hidden, F intermediate, V vocabulary.
"""

import copy
import itertools
import math
import statistics

import torch

import checkpoints
import common
import data
import losses
from common import HIDDEN, KEY_VALUE, NEURONS, QUERY

FLOAT32 = 4  # bytes
NORM_WIDTHS = {"self_attn.q_norm": QUERY, "self_attn.k_norm": KEY_VALUE}  # of activations; any other: HIDDEN
SHORTEST = 256  # tokens of the shortest row that is proposed


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


def layer_activations(model: common.Checkpoint, dtype: torch.dtype) -> int:
    """Bytes for each token that autograd keeps of a decoder layer."""
    width, size = widths(model), dtype.itemsize
    # Under autocast each linear layer has a copy of its input in the compute dtype.
    readers = {place: 1 if size == FLOAT32 else len(linears) for place, linears in common.PLACES.items()}
    inputs = sum(number * width[common.LINEARS[place][1]] for place, number in readers.items())
    norms = sum(width[NORM_WIDTHS.get(name, HIDDEN)] for name in model.family.norms)  # each its input and the quotient
    attention = 3 * width[QUERY]  # queries, and keys and values repeated for them
    mlp = 3 * width[NEURONS]  # gate, its activation, up
    return size * (inputs + attention + mlp) + 2 * FLOAT32 * norms + FLOAT32 * model.config.num_attention_heads


def working_bytes(model: common.Checkpoint, dtype: torch.dtype) -> int:
    """Bytes for each token that a layer of a forward pass without gradients works with: the rotation of keys, or the
    feed-forward part, beside the residual stream and its predecessor."""
    width, size = widths(model), dtype.itemsize
    rotation = (size + FLOAT32) * width[QUERY] + (2 * size + 3 * FLOAT32) * width[KEY_VALUE]
    return 2 * size * width[HIDDEN] + max(rotation, 3 * size * width[NEURONS])


def mask_bytes(model: common.Checkpoint, rows: int, length: int) -> int:
    """Dense masks (B, 1, T, T), bool, one for each kind of layer: rows hold several documents."""
    return len({*common.layer_types_of(model.config)}) * rows * length**2


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


def memory_parts(teacher, student, settings, world: int, teacher_linear_bytes: float | None = None) -> dict[str, int]:
    """Bytes on one device, by part, at the peak of an optimizer step; their sum is the peak.

    teacher, student: checkpoints, of which only the configs are read. `teacher_linear_bytes`: of one weight of the
    linear layers in the teacher's decoder; None: as `dtype` has.
    """
    dtype, size, checkpointing = settings.dtype, settings.dtype.itemsize, settings.gradient_checkpointing
    rows, length = settings.micro_batch_size, settings.sequence_length
    tokens, hidden, teacher_hidden = rows * length, student.config.hidden_size, teacher.config.hidden_size
    layers, linears = student.config.num_hidden_layers, linear_weights(student)
    parameters = layers * linears + outside_weights(student)
    of_teacher = teacher.config.num_hidden_layers * linear_weights(teacher) * (teacher_linear_bytes or size)

    numbers = rows * length**2 * size  # a mask as SDPA adds it to the scores, in every layer
    copies = linears * size if size < FLOAT32 and world == 1 else 0  # weights as autocast converts them
    layer = tokens * layer_activations(student, dtype) + numbers + copies
    residuals = layers * tokens * hidden * FLOAT32 + mask_bytes(student, rows, length)
    outputs = tokens * hidden * (2 * FLOAT32 + size)  # the final norm and its output
    activations = outputs + (residuals if checkpointing else layers * layer)

    has_teacher = settings.hidden_loss or losses.LOSSES[settings.loss].has_teacher
    targets = tokens * teacher_hidden * size * has_teacher
    targets += 2 * tokens * (2 * FLOAT32 * hidden + size * teacher_hidden) * settings.hidden_loss
    forward = tokens * working_bytes(teacher, dtype) + numbers + mask_bytes(teacher, rows, length)
    backward = tokens * hidden * 5 * FLOAT32 + layer * checkpointing  # of a norm, in a layer computed once more
    of_all = FLOAT32 * parameters // world
    before = of_all if settings.rows_per_step > rows * world else 0  # gradients that a micro-batch finds
    moments = {  # of a step -> the gradients there, the activations, and what is at work
        "the teacher's forward pass": (before, activations, forward * has_teacher),
        "the loss": (before, activations, targets + loss_bytes(student, settings)),
        "a layer's backward pass": (before or FLOAT32 * head_weights(student), activations, targets + backward),
        "the optimizer": (of_all, 0, 0),
    }
    peak = max(moments, key=lambda moment: sum(moments[moment]))
    gradients, activations, at_work = moments[peak]
    return {
        "student's weights": of_all,
        "gradients": gradients,
        "AdamW's moments": 2 * of_all,
        "teacher's weights": int(of_teacher + outside_weights(teacher) * size) // world,
        "layers gathered": gathered_bytes(teacher, student, dtype) if world > 1 else 0,
        "activations": activations,
        f"at the peak: {peak}": at_work,
    }
