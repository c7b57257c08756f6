"""Attention within documents, for rows that hold several of them; the models' own, in transformers' interface.

Left alone, transformers looks for documents on the device, so that the host waits for it in every forward pass, and
masks whatever is longer than a sliding window. Here the documents are known before they are on the device. Two
implementations, to be named to `set_attn_implementation`: VARLEN, PyTorch's kernel for sequences of any lengths, which
reads and computes nothing outside of a document or its window; MASKED, the ordinary one, with a mask only where a row
holds several documents, or one that is longer than the window. Nothing here is a setting.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common import Checkpoint, PareError, first_line

VARLEN, MASKED = "documents_varlen", "documents_masked"
CHOICES = ("auto", "flash", "sdpa")
TOLERANCE = 0.02  # relative error in bfloat16: right implementations differ by 0.006, by 0.07 with a window one wider


@dataclass(frozen=True)
class Documents:
    """The documents of B rows of T tokens, one after the other."""

    bounds: torch.Tensor  # (n + 1,) int32: where each starts among the B·T tokens, and B·T
    longest: int  # tokens
    shape: tuple[int, int]  # B, T

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """To be added to attention scores: (B, 1, T, T), 0 within document and window, else -inf. None where each row
        is one document, and the window no shorter: causality is then all there is to it."""
        B, T = self.shape
        if window is None and len(self.bounds) == B + 1:
            return None
        place = torch.arange(B * T, device=self.bounds.device)
        document = torch.bucketize(place, self.bounds, right=True).view(B, T)
        query, key = place[:T, None], place[None, :T]
        visible = (key <= query) & (key > query - (window or T)) & (document[:, :, None] == document[:, None, :])
        return torch.zeros((), dtype=dtype, device=place.device).where(visible, -torch.inf)[:, None]


def find_documents(position_ids: torch.Tensor, device: torch.device) -> Documents:
    """From positions (B, T) on the CPU: a document starts with each row, and where they do not go on by one."""
    B, T = position_ids.shape
    starts = torch.ones(B, T, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    bounds = torch.cat([starts.flatten().nonzero().squeeze(1), torch.tensor([B * T])]).int()
    return Documents(to_device(bounds, device), int(bounds.diff().max()), (B, T))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From the CPU, without waiting for a GPU's work so far."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def narrow(window: int | None, longest: int) -> int | None:
    """A layer's sliding window (tokens, its own included), if the longest document is longer."""
    return window if window and window < longest else None


def windows(config, longest: int) -> set[int | None]:
    """The windows of a model's layers, None for those that see all of a document."""
    window = narrow(getattr(config, "sliding_window", None), longest)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # of all layers, if there is a window
    return {window if kind == "sliding_attention" else None for kind in kinds}


def attend_varlen(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, *, bounds, longest, **kwargs
) -> tuple:
    """Query (B, heads, T, head_dim), keys and values maybe of fewer heads -> (B, T, heads, head_dim), None."""
    B, heads, T, _ = query.shape
    tokens = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B·T, heads, head_dim)
    window = (sliding_window - 1 if narrow(sliding_window, longest) else -1, 0)
    grouped = {"enable_gqa": True} if heads != key.shape[1] else {}
    output = varlen_attn(*tokens, bounds, bounds, longest, longest, scale=scaling, window_size=window, **grouped)
    return output.unflatten(0, (B, T)), None


def attend_masked(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, *, masks, longest, **kwargs
) -> tuple:
    """As attend_varlen."""
    mask = masks[narrow(sliding_window, longest)]
    groups, dtype = query.shape[1] // key.shape[1], value.dtype
    if mask is None and groups > 1 and value.is_cuda and dtype == torch.float32:
        # No kernel but the one that makes all scores at once shares keys between heads in float32.
        module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return sdpa_attention_forward(module, *(x.to(dtype) for x in (query, key, value)), mask, scaling=scaling)


transformers.AttentionInterface.register(VARLEN, attend_varlen)
transformers.AttentionInterface.register(MASKED, attend_masked)


def arguments(documents: Documents, config, dtype: torch.dtype) -> dict:
    """What the base model's forward pass in `dtype` is given beside ids and positions; masks are shared by layers."""
    places = {"bounds": documents.bounds, "longest": documents.longest}
    if config._attn_implementation == VARLEN:
        return places
    return places | {"masks": {window: documents.mask(window, dtype) for window in windows(config, documents.longest)}}


def choose(wanted: str, models: list[Checkpoint], device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that ATTENTION = `wanted` names; "auto" is the fast one where it passes a trial.

    Raises PareError where "flash" cannot be had.
    """
    if wanted == "sdpa":
        return MASKED
    problem = f"it needs a GPU of NVIDIA's and bfloat16, not {device.type} and {str(dtype)[6:]}"
    if device.type == "cuda" and dtype == torch.bfloat16:
        problem = next(filter(None, (trial(model, device, dtype) for model in models)), None)
        if problem and wanted == "auto":
            print(f"attention by masks, as flash attention failed its trial here: {problem}")
    if problem and wanted == "flash":
        raise PareError(f"ATTENTION = 'flash' cannot be had: {problem}.\nSet ATTENTION = 'sdpa', or 'auto'.")
    return MASKED if problem else VARLEN


def trial(model: Checkpoint, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with attend_varlen for a model's heads, outputs and gradients, on a small row; or None."""
    heads, kv_heads, head_dim = model.config.num_attention_heads, model.config.num_key_value_heads, model.head_dim
    module = SimpleNamespace(is_causal=True, num_key_value_groups=heads // kv_heads)
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in (150, 50, 1, 55, 256)]).view(2, 256)
    shapes = [(2, n, 256, head_dim) for n in (heads, kv_heads, kv_heads)] + [(2, 256, heads, head_dim)]
    try:
        documents = find_documents(positions, device)
        *inputs, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        places = {"bounds": documents.bounds, "longest": documents.longest}
        for window in (None, 64):
            places["masks"] = {window: documents.mask(window, dtype)}
            results = []
            for attend in (attend_varlen, attend_masked):
                tensors = [x.detach().requires_grad_() for x in inputs]
                output, _ = attend(module, *tensors, None, sliding_window=window, **places)
                results.append([output, *torch.autograd.grad(output, tensors, upstream)])
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
            if not error < TOLERANCE:
                return f"it differs from masks by {error:.2g}"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # no such kernel, or another interface
        return first_line(error)
    return None
