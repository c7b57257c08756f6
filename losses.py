"""Distillation losses from hidden states and LM heads, without the logits of more than a chunk of tokens.

Shapes: N counted tokens, H hidden, V vocabulary.
"""

import torch


def project(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """hidden (N, H) @ weight (V, H)ᵀ, multiplied in their own dtype and returned in `dtype` without a rounding between.

    Where the device cannot do that (CPU), the operands are converted first.
    """
    if hidden.dtype == dtype:
        return hidden @ weight.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return hidden.to(dtype) @ weight.T.to(dtype)


def chunk_rows(chunk_bytes: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Tokens per chunk: about four arrays (rows, V) are alive at once."""
    return max(1, chunk_bytes // (4 * vocab_size * dtype.itemsize))


class ForwardKL(torch.autograd.Function):
    """T²/M · Σ KL(teacher ‖ student) of next-token distributions at temperature T, from hidden states and LM heads.

    Logits exist for a chunk of tokens at a time; the gradients of the student's hidden states and head are computed
    in the same pass: with p, q the student's and teacher's probabilities, dL/dlogits = T/M · (p − q).
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, temperature, denominator, chunk_bytes):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        compute_weight, teacher_weight = weight.to(hidden.dtype), teacher_weight.to(teacher_hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        rows = chunk_rows(chunk_bytes, len(weight), dtype)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            q_log = torch.log_softmax(project(teacher_hidden[chunk], teacher_weight, dtype).div_(temperature), dim=-1)
            p_log = torch.log_softmax(project(hidden[chunk], compute_weight, dtype).div_(temperature), dim=-1)
            q = q_log.exp()
            loss += torch.sum(q * q_log.sub_(p_log))
            grad = p_log.exp_().sub_(q).mul_(temperature / denominator).to(hidden.dtype)  # (rows, V), of the logits
            grad_hidden[chunk] = grad @ compute_weight
            if grad_weight is not None:
                grad_weight += project(grad.T, hidden[chunk].T, dtype)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss * (temperature**2 / denominator)

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight.mul_(grad_output)  # in place: it is as large as the head
        return grad_hidden * grad_output.to(grad_hidden.dtype), grad_weight, None, None, None, None, None


def forward_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    denominator: float,
    temperature: float = 1.0,
    chunk_bytes: int = 2**29,
) -> torch.Tensor:
    """The distillation loss of counted tokens.

    hidden (N, H), weight (V, H), teacher_hidden (N, H_t), teacher_weight (V, H_t); `denominator` is the number of
    counted tokens of the whole optimizer step. Returns a scalar, float32 or better. (arXiv 2407.14679 §3.)
    """
    assert hidden.shape[0] == teacher_hidden.shape[0], (hidden.shape, teacher_hidden.shape)
    assert weight.shape[0] == teacher_weight.shape[0], (weight.shape, teacher_weight.shape)
    return ForwardKL.apply(hidden, weight, teacher_hidden, teacher_weight, temperature, denominator, chunk_bytes)
