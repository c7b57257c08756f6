"""Losses on next-token distributions from hidden states and LM heads, without the logits of more than a chunk; and the
distance of hidden states.

    loss = losses.logit_loss("forward_kl", hidden, weight, teacher_hidden, teacher_weight, denominator=num_tokens)
    loss.backward()  # the gradients are there already

Shapes: N counted tokens, n those of a chunk, H hidden, V vocabulary. p is the student's distribution, q the teacher's,
both at temperature T; z = logits / T.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import common
from checkpoints import read_json
from common import PareError
from data import Batch

LAYER = -3  # (last - 2), whose output HIDDEN_LOSS compares (arXiv 2407.14679 Table 18)
FLOOR = -1e30  # instead of a log-probability of -inf, where it is multiplied by a probability of 0


# ---------------------------------------------------------------------------------------------------------------------
# One chunk: the sum of the losses and its gradient dL/dz (n, V), from log-probabilities (n, V) in float32 or better.
# Both are overwritten, and so is `spare` (n, V), if given: memory that the system need not find first.


def forward_kl(p_log: torch.Tensor, q_log: torch.Tensor, labels, beta, spare=None) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q ‖ p), arXiv 2407.14679 §3. dL/dz = p - q."""
    q = torch.exp(q_log, out=spare)
    loss = q_log.clamp_(min=FLOOR).sub_(p_log).mul_(q).sum()
    return loss, p_log.exp_().sub_(q)


def reverse_kl(p_log: torch.Tensor, q_log: torch.Tensor, labels, beta, spare=None) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p ‖ q). dL/dz = p (log p - log q - KL(p ‖ q)). Infinite where the teacher rules out an entry."""
    p = torch.exp(p_log, out=spare)
    difference = p_log.sub_(q_log)
    kl = torch.mul(p, difference, out=q_log).sum(-1, keepdim=True)
    return kl.sum(), difference.sub_(kl).mul_(p)


def jsd(p_log: torch.Tensor, q_log: torch.Tensor, labels, beta: float, spare=None) -> tuple[torch.Tensor, torch.Tensor]:
    """β KL(q ‖ m) + (1 - β) KL(p ‖ m) with the mixture m = β q + (1 - β) p, 0 < β < 1 (arXiv 2306.13649 eq. 1).

    With u = log p - log m: dL/dz = (1 - β) p (u - Σ p u). The mixture is never formed: with d = log q - log p,
    u = -log(1 + β (e^d - 1)) and log q - log m = u + d, each computed from the side where e^d does not overflow; so
    both are exact where p and q nearly agree.
    """
    p, q = torch.exp(p_log, out=spare), q_log.exp()
    d = q_log.clamp_(min=FLOOR).sub_(p_log)
    weight = (d > 0).to(d.dtype).mul_(1 - 2 * beta).add_(beta)
    near = torch.abs(d, out=p_log).neg_().expm1_().mul_(weight).log1p_().neg_()
    u = near - d.clamp(min=0)
    of_student = torch.mul(p, u, out=weight).sum(-1, keepdim=True)
    of_teacher = near.add_(d.clamp_(max=0)).mul_(q).sum()
    return (1 - beta) * of_student.sum() + beta * of_teacher, u.sub_(of_student).mul_(p).mul_(1 - beta)


def cross_entropy(p_log: torch.Tensor, q_log, labels: torch.Tensor, beta, spare) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of the labels (n,). dL/dz = p - onehot."""
    here = torch.arange(len(labels), device=labels.device), labels
    loss = -p_log[here].sum()
    gradient = p_log.exp_()
    gradient[here] -= 1
    return loss, gradient


def forward_kl_and_cross_entropy(p_log: torch.Tensor, q_log: torch.Tensor, labels: torch.Tensor, beta, spare) -> tuple:
    """Their sum, which arXiv 2407.14679 Table 15 found worse than the KL alone. dL/dz = 2 p - q - onehot."""
    here = torch.arange(len(labels), device=labels.device), labels
    q, loss = torch.exp(q_log, out=spare), -p_log[here].sum()
    loss += q_log.clamp_(min=FLOOR).sub_(p_log).mul_(q).sum()
    gradient = p_log.exp_().mul_(2).sub_(q)
    gradient[here] -= 1
    return loss, gradient


@dataclass(frozen=True)
class Loss:
    chunk: Callable
    arrays: int  # of (n, V), that exist at once
    has_teacher: bool = True
    has_labels: bool = False  # then the temperature is 1


LOSSES = {
    "forward_kl": Loss(forward_kl, 3),
    "reverse_kl": Loss(reverse_kl, 3),
    "jsd": Loss(jsd, 7),
    "cross_entropy": Loss(cross_entropy, 2, has_teacher=False, has_labels=True),
    "forward_kl_and_cross_entropy": Loss(forward_kl_and_cross_entropy, 3, has_labels=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# All tokens


def operand(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `project` multiplies it: CUDA multiplies bfloat16 and returns float32; elsewhere the factors are converted."""
    return tensor if tensor.is_cuda else tensor.to(dtype)


def project(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, out=None) -> torch.Tensor:
    """hidden (n, H) @ weight (V, H)ᵀ in `dtype`, not rounded to a lower precision between; in `out`, if given."""
    if hidden.dtype == weight.dtype == dtype:
        return torch.mm(hidden, weight.T, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
    return torch.mm(hidden.to(dtype), weight.to(dtype).T, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (V, H) += a (n, V)ᵀ @ b (n, H), summed in the precision of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a.T, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.T.to(total.dtype), b.to(total.dtype))


def chunk_rows(chunk_bytes: int, vocab_size: int, dtype: torch.dtype, arrays: int) -> int:
    """Tokens per chunk; in whole 128s, which fill the tiles of a matrix product, where that many fit."""
    rows = max(1, chunk_bytes // (arrays * vocab_size * dtype.itemsize))
    return rows // 128 * 128 or rows


def chunk_gradient(z, teacher_z, spare, labels, chunk: Callable, temperature: float, beta: float, scale, out) -> tuple:
    """Sum of the losses of a chunk from its logits (n, V) of student and teacher; its gradient times `scale` in `out`.

    With `spare`, as large as the logits, all but jsd's is made in these three: on a CPU new memory costs a third of a
    matrix product. Without it, as compiled code does best, what is made is new.
    """
    reuse = spare is not None
    p_log = torch.log_softmax(z if temperature == 1 else z.div_(temperature), dim=-1, out=spare)
    q_log = None
    if teacher_z is not None:
        teacher_z = teacher_z if temperature == 1 else teacher_z.div_(temperature)
        q_log = torch.log_softmax(teacher_z, dim=-1, out=z if reuse else None)
    total, gradient = chunk(p_log, q_log, labels, beta, teacher_z if reuse else None)
    if reuse:
        torch.mul(gradient, scale, out=out)
    else:  # an `out` with gaps between its rows would cut the compiled graph in two
        out.copy_(gradient.mul_(scale))
    return total


# On a GPU such passes cost what the memory costs that they move; fused, they are two or three.
compiled_chunk_gradient = functools.cache(lambda: torch.compile(chunk_gradient, dynamic=True))


class LogitLoss(torch.autograd.Function):
    """T²/M Σ loss of all tokens; the gradients are made in the same pass, and only scaled in backward (once).

    Four matrix products: two for logits, one for the gradient of the hidden states, one for that of the head. Chunks
    have two levels: logits and what is made of them exist in float32 for the tokens of a small chunk; their gradients
    T/M dL/dz in the compute dtype for those of a large one, after which the head's float32 gradient, as large as the
    head, is read and written once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, loss: Loss, options: dict):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        low_weight = weight.to(hidden.dtype)
        head = operand(low_weight, dtype)
        if loss.has_teacher:
            teacher_head = operand(teacher_weight.to(teacher_hidden.dtype), dtype)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        total = torch.zeros((), dtype=dtype, device=hidden.device)

        gradient_of = compiled_chunk_gradient() if options["compile"] else chunk_gradient
        temperature, half = options["temperature"], options["chunk_bytes"] // 2
        scale = temperature / options["denominator"]
        small = chunk_rows(half, len(weight), dtype, loss.arrays)
        width = -(-len(weight) // 64) * 64  # cuBLAS is slow with rows that do not start at whole 16 bytes
        large = max(small, chunk_rows(half, width, hidden.dtype, 1) // small * small)
        buffer = hidden.new_empty(min(large, len(hidden)), width)[:, : len(weight)]
        z, teacher_z, spare = (
            hidden.new_empty(min(small, len(hidden)), len(weight), dtype=dtype) if wanted else None
            for wanted in (True, loss.has_teacher, not options["compile"])
        )
        for first in range(0, len(hidden), large):
            rows = slice(first, min(first + large, len(hidden)))
            gradients = buffer[: rows.stop - first]
            for start in range(first, rows.stop, small):
                part = slice(start, min(start + small, rows.stop))
                size = part.stop - part.start
                total += gradient_of(
                    project(hidden[part], head, dtype, z[:size]),
                    project(teacher_hidden[part], teacher_head, dtype, teacher_z[:size]) if loss.has_teacher else None,
                    None if spare is None else spare[:size],
                    labels[part] if loss.has_labels else None,
                    loss.chunk,
                    temperature,
                    options["beta"],
                    scale,
                    gradients[start - first : part.stop - first],
                )
            if needs_hidden:
                torch.mm(gradients, low_weight, out=grad_hidden[rows])
            if needs_weight:
                add_product(grad_weight, gradients, hidden[rows])
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total * (temperature**2 / options["denominator"])

    @staticmethod
    def backward(ctx, grad_output):
        gradients = ctx.saved_tensors
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_output)  # in place: one is as large as the head
        return (*gradients, None, None, None, None, None)


def logit_loss(
    kind: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    *,
    denominator: float,
    temperature: float = 1.0,
    beta: float = 0.5,
    chunk_bytes: int = 2**30,
    compile: bool = False,
) -> torch.Tensor:
    """T²/M Σ of the loss LOSSES[kind] over N tokens that count; a scalar in float32 or better.

    hidden (N, H) in the compute dtype, weight (V, H) of the student's LM head, usually a float32 master;
    teacher_hidden (N, H_t), teacher_weight (V, H_t) and labels (N,), the next tokens, where the loss needs them.
    `denominator` M is the number of counted tokens of the whole optimizer step; `chunk_bytes` the memory of all that is
    made of a chunk, beside the gradients and the heads in the dtype that multiplies. Gradients flow to `hidden` and
    `weight` where they are wanted, for one backward pass.
    """
    loss = LOSSES[kind]
    others = [*[teacher_hidden] * loss.has_teacher, *[labels] * loss.has_labels]
    assert all(len(other) == len(hidden) for other in others), (hidden.shape, [other.shape for other in others])
    assert not loss.has_teacher or len(weight) == len(teacher_weight), (weight.shape, teacher_weight.shape)
    assert not loss.has_labels or temperature == 1, (kind, temperature)
    options = {"temperature": temperature, "denominator": denominator, "beta": beta, "chunk_bytes": chunk_bytes}
    return LogitLoss.apply(hidden, weight, teacher_hidden, teacher_weight, labels, loss, options | {"compile": compile})


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states


def cosine_distance(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - cos(state, target) of each token, (N,) from two (N, H); 1, without a gradient, where one is all zeros."""
    assert states.shape == targets.shape, (states.shape, targets.shape)
    lengths = torch.linalg.vector_norm(states, dim=-1) * torch.linalg.vector_norm(targets, dim=-1)
    return 1 - (states * targets).sum(-1) / torch.where(lengths > 0, lengths, torch.inf)


@contextmanager
def compared_states(model, layer: int | None) -> Iterator[list[torch.Tensor]]:
    """Collects the states (B, T, H) that HIDDEN_LOSS compares from the forward pass in the block: the embedding's
    output, and that of `layer`; none for None. The hooks go with the block: checkpointing runs layers again."""
    base, states = model.base_model, []
    with ExitStack() as hooks:
        for module in [] if layer is None else [base.embed_tokens, base.layers[layer]]:
            hooks.enter_context(module.register_forward_hook(lambda module, x, output: states.append(output)))
        yield states


@dataclass
class HiddenLoss:
    """L_hidden of arXiv 2407.14679 §3: the mean over two places and all counted tokens of 1 - cos(student, teacher).

    The places are the embedding's output, and that of the student's layer (last - 2) beside that of `teacher_layer`.
    `kept`: what of the teacher's state x the student's is compared with, channels x[kept] for indices (H',), directions
    kept @ x for (H', H); None: all of it, by way of a learned projection, as in the paper. `weight`: L_logits/L_hidden
    of the optimizer step before (0 in the first), not of this micro-batch: one number for a whole step is exact in any
    split of it, without a pass of its own. States are taken before their norm: its division changes no cosine; its
    weight (Olmo has none there) is of channels, not directions, and the student could lower the loss by it alone.
    """

    kept: torch.Tensor | None
    teacher_layer: int = LAYER
    weight: float = 0.0
    figures: dict = field(default_factory=dict)  # of the last step, for metrics.jsonl

    def __call__(
        self, student, states: list, targets: list, batch: Batch, denominator: torch.Tensor | int
    ) -> torch.Tensor:
        """A micro-batch's part, from states (B, T, H) of student and teacher."""
        total = 0
        for pair in zip(states, targets, strict=True):
            state, target = (x.flatten(0, 1)[batch.counted.to(x.device)].float().to(student.device) for x in pair)
            if self.kept is None:
                state = student.hidden_projection(state)
            else:
                target = target[:, self.kept] if self.kept.ndim == 1 else target @ self.kept.T
            total = total + cosine_distance(state, target).sum()
        return total / (len(states) * denominator)

    def finish_step(self, loss: float, distance: float, finite: bool) -> None:
        self.figures = {"hidden_loss": distance, "hidden_weight": self.weight}
        if finite:
            self.weight = max(0.0, loss / distance) if distance > 0 else 0.0


def what_was_kept(teacher: common.Checkpoint, student: common.Checkpoint) -> tuple[torch.Tensor | None, int]:
    """What the student kept of the teacher's hidden channels, by prune.py's record: int64 indices (H',), or float32
    directions (H', H); and the teacher's layer that hands its output to the one that follows the student's LAYER.

    (None, LAYER) without such a record, or for a teacher of another size; one trained since will do.
    """
    path = student.folder / "pare.json"
    record = read_json(path)
    if not path.is_file() or record.get("script", "prune.py") != "prune.py":
        return None, LAYER
    try:
        kept, file, layers = record["kept"]["hidden"], record["kept"].get("directions"), record["kept"]["layers"]
        intact = not file or common.hash_file(student.folder / file) == record["sha256"][file]
        kept = load_file(student.folder / file)["basis"] if file else torch.tensor(kept, dtype=torch.int64)
        intact = intact and len(kept) == student.config.hidden_size and kept.ndim == (2 if file else 1)
        intact = intact and (file or kept.min() >= 0) and len(layers) == student.config.num_hidden_layers
        intact = intact and all(isinstance(layer, int) for layer in layers) and layers == sorted({*layers})
        intact = intact and layers[0] >= 0
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError, SafetensorError):
        intact = False
    if not intact:
        what = f"STUDENT = {student.name!r}: pare.json, or the file of directions that it names, is damaged"
        raise PareError(f"{what}, and HIDDEN_LOSS = True reads them.\nRun prune.py again.")
    width = teacher.config.hidden_size
    fits = layers[-1] < teacher.config.num_hidden_layers and (kept.shape[1] == width if file else kept.max() < width)
    return (kept, layers[LAYER + 1] - 1) if fits else (None, LAYER)


def add_projection(student, width: int, settings) -> None:
    """Give the student a linear layer to the teacher's `width`: orthogonal, or the identity where widths agree."""
    projection = torch.nn.Linear(student.config.hidden_size, width, bias=False)
    torch.nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(settings.seed))
    if width == student.config.hidden_size:
        torch.nn.init.eye_(projection.weight)
    student.hidden_projection = projection.to(settings.device)
