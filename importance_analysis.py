"""Score every MLP neuron, attention head, hidden channel and layer of a model on calibration text.

    uv run importance_analysis.py
    uv run accelerate launch importance_analysis.py    # the samples spread over several GPUs, the same scores

Writes SCORES_PATH, which prune.py reads, a picture of the scores beside it and, with SECOND_MOMENTS, the folder
`<name>.moments` from which prune.py refits what it cuts. One forward pass of the base model, without its LM head, for
the scores, which are Minitron's (arXiv 2407.14679 §2.2); a few more over fewer samples for what LAYER_PERPLEXITY and
SECOND_MOMENTS ask for. A killed run continues with the same command and ends with the same scores.

Shapes: B batch, T tokens, H hidden, F intermediate, Q query heads, D head dim, L layers.
"""

import ctypes
import glob
import hashlib
import json
import math
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
from common import HIDDEN, WHOLE, PareError

MODEL: str = "allenai/Olmo-3-7B-Instruct"  # the teacher: Hub id or local folder
REVISION: str | None = None  # commit, tag or branch of a Hub id
DATASET: str = "HuggingFaceFW/fineweb-edu"  # Hub id, .jsonl, .json, .parquet or .txt file, folder, or saved dataset
DATASET_CONFIG: str | None = "sample-10BT"  # configuration of a Hub dataset, None for local files
DATASET_SPLIT: str = "train"  # local files have this one only
TEXT_COLUMN: str = "text"  # the column of DATASET that holds the documents
NUM_SAMPLES: int = 1024  # calibration rows (arXiv 2407.14679 §4)
SEQUENCE_LENGTH: int = 4096  # tokens per row
BATCH_SIZE: int = 4  # rows per forward pass; the scores depend on it by rounding only
LAYER_PERPLEXITY: bool = True  # also the perplexity without each layer: half a pass per layer, and the LM head
LAYER_PERPLEXITY_SAMPLES: int = 32  # of the calibration rows, for that
SECOND_MOMENTS: bool = True  # also what prune.py needs to refit what it cuts: 26 GB on disk for a 7B model
SECOND_MOMENT_SAMPLES: int = 256  # of the calibration rows, for that: 95 tokens per neuron of a 7B model
SCORES_PATH: str = "importance_scores.pt"  # beside it the picture, as .png, and the folder .moments
SAVE_MINUTES: float = 5.0  # unfinished sums are saved this often
SEED: int = 0  # order in which documents are drawn
DEVICE: str = "auto"  # auto | cuda | mps | cpu; auto spreads a model that is too large for one GPU over all
DTYPE: str = "auto"  # auto | bfloat16 | float32; auto is bfloat16 on a GPU

ENOUGH_CORRELATION = 0.95  # between two halves of the samples; below it, more samples would still change the choice
STRIDE = 16  # mean squares, norm statistics and angles are read at every 16th token, counted back from a row's last
LOSS_TOKENS = 1024  # tokens whose logits exist at once


# ---------------------------------------------------------------------------------------------------------------------
# Sums that survive a kill


class Sums:
    """Named running sums, saved beside the score file while they grow. `done[stage]` counts the rows that a stage has
    finished.

    What `add` adds is one row for each half of the samples, in float64 (float32 where the device has none), whatever
    the model's dtype: in bfloat16 late samples would be rounded away. MomentHooks puts float32 matrices here itself.
    """

    def __init__(self, path: Path, identity: str, save_seconds: float):
        self.path, self.identity, self.save_seconds = path, identity, save_seconds
        self.sums: dict[str, torch.Tensor] = {}
        self.done: dict[str, int] = {}
        self.saved = time.monotonic()
        if path.is_file():
            self.restore()

    def add(self, values: dict[str, torch.Tensor], half: torch.Tensor) -> None:
        """Add values (B, channels) to the sums of their names; `half` (B,) says which half each row belongs to."""
        dtype = torch.float32 if half.device.type == "mps" else torch.float64
        joined = torch.cat([value.to(half.device) for value in values.values()], dim=1).to(dtype)
        sums = torch.stack([1 - half, half]).to(dtype) @ joined
        for name, part in zip(values, sums.split([value.shape[1] for value in values.values()], dim=1), strict=True):
            total = self.sums.get(name)
            self.sums[name] = part.clone() if total is None else total.to(half.device, dtype) + part

    def digest(self, done: str, tensors: dict[str, torch.Tensor]) -> str:
        digest = hashlib.sha256(f"{self.identity} {done}".encode())
        for name in sorted(tensors):
            digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
            digest.update(tensors[name].numpy().tobytes())
        return digest.hexdigest()

    def save_if_due(self) -> None:
        if time.monotonic() - self.saved >= self.save_seconds:
            tensors = {name: total.cpu() for name, total in self.sums.items()}
            done = json.dumps(self.done)
            record = {"identity": self.identity, "done": done, "sha256": self.digest(done, tensors)}
            common.replace_file(self.path, lambda temporary: save_file(tensors, temporary, record))
            self.saved = time.monotonic()

    def restore(self) -> None:
        """Take up saved sums of the same run; a damaged file or one of another run is left aside."""
        record = common.metadata_of(self.path) or {}
        tensors = {name: total.clone() for name, total in load_file(self.path).items()} if record else {}
        same = record.get("identity") == self.identity
        if same and record.get("sha256") == self.digest(record.get("done", ""), tensors):
            self.sums, self.done = tensors, json.loads(record["done"])
            print(f"continuing after {', '.join(f'{done} rows of {stage}' for stage, done in self.done.items())}")
        else:
            print(f"{self.path} is of another run, or damaged: starting anew")

    def reduce(self) -> None:
        """Add up the sums of all processes; all then hold the same."""
        for name in sorted(self.sums):
            self.sums[name] = common.sum_over_processes(self.sums[name])


def run_stage(
    stage: str, sums: Sums, rows: torch.Tensor, half: torch.Tensor, batch_size: int, step: Callable, more: str = ""
) -> None:
    """Call step(rows (B, T), half (B,)) on every batch that `sums` has not seen yet; `more` is for the eye."""
    first = sums.done.get(stage, 0)
    progress = common.Progress(len(rows), "samples", stage + more, done=first)
    for start in range(first, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        step(rows[batch], half[batch])
        sums.done[stage] = min(start + batch_size, len(rows))
        sums.save_if_due()
        progress.update(len(rows[batch]))
    progress.close()


# ---------------------------------------------------------------------------------------------------------------------
# One forward pass: width scores, block importance, angles, and the statistics of the norms


class Hooks:
    """Hooks that reduce the activations of the decoder layers to what the scores need, and add it to `sums`.

    Sums over samples, of all layers in a row: `mlp`, `attention` and the norms' outputs (mean over T of |x|)² (arXiv
    2407.14679 §2.2), `layer` 1 - cosine; of every STRIDE-th token `energy.…` mean squares of a block's input, `norm.…`
    mean squares of a norm's input relative to the whole, `angle…` distances. Hooks read an activation once and call as
    little as they can; the rest is done once a batch, for all layers.
    """

    def __init__(self, model, family: common.Family, sums: Sums):
        self.sums = sums
        # of the batch under way:
        self.magnitudes: dict[str, list[torch.Tensor]] = defaultdict(list)  # name -> sums over T, (B, channels) x L
        self.cosines: list[tuple[torch.Tensor, ...]] = []  # of each layer: input · output, |input| and |output|, (B, T)
        self.strided: dict[str, list[torch.Tensor]] = defaultdict(list)  # name -> some tokens, (B, 1 + T', H) x L
        # of what was just seen, with what was made of it:
        self.last = None, None  # a layer's output, which is the next layer's input, and its L2 norms
        self.kept = None, None  # an activation, and some of its tokens
        self.mask = None, None  # an attention mask, boolean and as the numbers added
        self.handles, self.tokens = [], {}
        for layer in model.layers:
            modules = dict(layer.named_modules())
            self.before(modules[common.NEURONS_AT], self.add_magnitudes, "mlp")
            self.before(modules[common.HEADS_AT], self.add_magnitudes, "attention")
            self.after(modules[family.attention_norm], self.add_magnitudes, "attn_ln")
            self.after(modules[family.feedforward_norm], self.add_magnitudes, "ffn_ln")
            for place in (common.ATTENTION_INPUT, common.FEEDFORWARD_INPUT):
                self.before(modules[place], self.add_strided, f"energy.{place}")
            for name, axis in family.norms.items():
                if axis is not WHOLE:
                    self.before(modules[name], self.add_strided, f"norm.{name}")
            self.handles.append(layer.register_forward_pre_hook(self.share_mask, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self.add_layer))
        self.before(model.norm, self.add_strided, f"norm.{common.FINAL_NORM}")

    def sum_of_magnitudes(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of |x|, float32: (B, T, channels) -> (B, channels)."""
        if x.is_cuda:
            return torch.linalg.vector_norm(x, 1, dim=1, dtype=torch.float32)
        return x.abs().sum(1, dtype=torch.float32)  # the norm over a dimension that is not the last is slow on a CPU

    def products(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sum over the channels of x y, float32: (B, T, channels) twice -> (B, T)."""
        if x.is_cuda:  # products of all pairs among 64 tokens, of which the diagonal is wanted: no copy in float32
            shape = x.shape[:2]
            x, y = (z.reshape(-1, math.gcd(shape.numel(), 64), z.shape[2]) for z in (x, y))
            return torch.bmm(x, y.mT, out_dtype=torch.float32).diagonal(dim1=1, dim2=2).reshape(shape)
        return (x.float() * y).sum(2)

    def share_mask(self, layer, inputs, kwargs):
        """Give the layer its boolean mask as the numbers that attention adds, made once a batch.

        Else attention makes them in each layer, for every row.
        """
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dtype != torch.bool or mask.stride(0) != 0:  # stride 0: all rows have the same
            return None
        if self.mask[0] is not mask:
            added = torch.zeros_like(mask[:1], dtype=inputs[0].dtype).masked_fill_(~mask[:1], -math.inf)
            self.mask = mask, added
        return inputs, kwargs | {"attention_mask": self.mask[1]}

    def before(self, module, add: Callable, *args) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda module, inputs: add(inputs[0], *args)))

    def after(self, module, add: Callable, *args) -> None:
        self.handles.append(module.register_forward_hook(lambda module, inputs, output: add(output, *args)))

    def add_magnitudes(self, x: torch.Tensor, name: str) -> None:
        """Sum over T of |x| of an activation (B, T, channels)."""
        self.magnitudes[name].append(self.sum_of_magnitudes(x))

    def add_strided(self, x: torch.Tensor, name: str) -> None:
        """Keep the first and every STRIDE-th token of (B, T, channels), counted back from the last."""
        length, device = x.shape[1], x.device
        if (length, device) not in self.tokens:
            tokens = [0, *range((length - 1) % STRIDE, length, STRIDE)]
            self.tokens[length, device] = torch.tensor(tokens, device=device)
        if self.kept[0] is not x:
            self.kept = x, x.index_select(1, self.tokens[length, device])
        self.strided[name].append(self.kept[1])

    def add_layer(self, layer, inputs, output) -> None:
        """What block importance needs: 1 - cosine of input and output, mean over tokens (arXiv 2403.03853 eq. 1)."""
        x, y = inputs[0], output[0] if isinstance(output, tuple) else output
        known = self.last[1] if self.last[0] is x else norms_of(x)
        self.last = (y, norms_of(y))
        self.cosines.append((self.products(x, y.to(x.device)), known, self.last[1]))
        if not self.strided["stream"]:
            self.add_strided(x, "stream")
        self.add_strided(y, "stream")

    def end_batch(self, half: torch.Tensor) -> None:
        """Add up what the hooks saw of a batch."""
        device, length = self.strided["stream"][0].device, self.cosines[0][0].shape[1]
        values = {"rows": torch.ones(len(half), 1, device=device)}
        for name, sums in self.magnitudes.items():
            means = torch.cat([total.to(device) for total in sums], dim=1) / length  # (B, L · channels)
            values[name] = means.square()
        layers = zip(*self.cosines, strict=True)
        products, before, after = (torch.stack([x.to(device) for x in part], 1) for part in layers)  # (B, L, T)
        values["layer"] = 1 - (products / (before * after).clamp(min=1e-30)).mean(dim=2)  # (B, L)
        stream = torch.stack([x[:, 1:].to(device) for x in self.strided.pop("stream")], dim=2)  # (B, T', L + 1, H)
        distances = angular_distances(stream)
        values["angle_last"], values["angle_mean"] = distances[:, -1].flatten(1), distances.mean(1).flatten(1)
        for name, layers in self.strided.items():
            squares = torch.stack([x.to(device) for x in layers], dim=1).float().square_()  # (B, L, 1 + T', channels)
            first, squares = squares[:, :, 0], squares[:, :, 1:]
            if name.startswith("norm."):
                # Relative to its own token: the few tokens of enormous activations count as one each. A sub-layer may
                # give only zeros.
                means = squares.div_(squares.mean(dim=3, keepdim=True).clamp(min=1e-30)).mean(dim=2)
            else:  # the first token, on which attention rests what it does not need, is enormous in a few channels
                means = squares.mean(dim=2).lerp(first, 1 / length)
            values[name] = means.flatten(1)  # (B, L · channels)
        self.sums.add(values, half)
        self.magnitudes.clear()
        self.strided.clear()
        self.cosines.clear()
        self.last = self.kept = self.mask = None, None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def norms_of(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def angular_distances(stream: torch.Tensor) -> torch.Tensor:
    """arccos(cosine) / π of every pair of layer boundaries at each token, float (arXiv 2403.17887 eq. 7).

    (B, T', L + 1, H) -> (B, T', L + 1, L + 1).
    """
    if stream.is_cuda:
        flat = stream.flatten(0, 1)
        products = torch.bmm(flat, flat.mT, out_dtype=torch.float32).unflatten(0, stream.shape[:2])
    else:
        stream = stream.to(torch.float32 if stream.device.type == "mps" else torch.float64)
        products = stream @ stream.mT
    sizes = products.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=1e-15)
    distances = torch.arccos((products / (sizes[..., None] * sizes[..., None, :])).clamp(-1, 1)) / math.pi
    distances.diagonal(dim1=-2, dim2=-1).zero_()  # rounding leaves it at arccos(1 - 1e-7)
    return distances


@torch.inference_mode()
def measure(model, family: common.Family, rows: torch.Tensor, half: torch.Tensor, batch_size: int, sums: Sums) -> None:
    """One pass of the base model `model` over calibration rows (num_samples, T)."""
    hooks = Hooks(model, family, sums)

    def step(batch, batch_half):
        batch, batch_half = batch.to(model.device), batch_half.to(model.device)  # before, not to wait for the pass
        model(input_ids=batch, use_cache=False)
        hooks.end_batch(batch_half)

    try:
        run_stage("scoring", sums, rows, half, batch_size, step)
    finally:
        hooks.remove()


def scores_of(sums: dict[str, torch.Tensor], family: common.Family, head_dim: int, halves=(0, 1)) -> dict:
    """The score file's keys, float32 on CPU, from the sums of some halves of the samples."""
    halves = list(halves)
    sums = {name: total[halves].sum(0).cpu() for name, total in sums.items()}
    samples, num_layers = sums["rows"].item(), len(sums["layer"])

    def stack(name):
        return sums[name].view(num_layers, -1)  # (L, channels)

    heads = stack("attention").unflatten(1, (-1, head_dim)).sum(-1)  # (L, Q): the L2 norm over head_dim, squared
    energy = torch.cat([stack(f"energy.{place}") for place in (common.ATTENTION_INPUT, common.FEEDFORWARD_INPUT)])
    norms = {name: stack(f"norm.{name}") / samples for name, axis in family.norms.items() if axis is not WHOLE}
    norms[common.FINAL_NORM] = sums[f"norm.{common.FINAL_NORM}"][None] / samples
    angles = {name: sums[name].view(num_layers + 1, -1) / samples for name in ("angle_last", "angle_mean")}
    return {
        "mlp": stack("mlp").sqrt().float(),
        "attention": heads.sqrt().float(),
        "attn_ln": stack("attn_ln").sqrt().sum(0).float(),
        "ffn_ln": stack("ffn_ln").sqrt().sum(0).float(),
        "hidden": (energy / energy.sum(1, keepdim=True).clamp(min=1e-30)).sum(0).float(),
        "layer": dict(enumerate((sums["layer"] / samples).tolist())),
        "angular_distance": angles["angle_last"].float(),
        "angular_distance_mean": angles["angle_mean"].float(),
        "norms": {name: shares.float() for name, shares in norms.items()},
    }


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what is freed for the next activation: fetching every batch's pages anew from the
    system costs a CPU up to a fifth of the pass."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # as in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)  # the largest it takes


# ---------------------------------------------------------------------------------------------------------------------
# The perplexity without each layer


@torch.inference_mode()
def row_losses(model, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss (B,), float32, of hidden states (B, T, H) after the last layer."""
    normed, head = model.base_model.norm(hidden), model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma's
    total = torch.zeros(len(rows), device=rows.device)
    step = max(1, LOSS_TOKENS // len(rows))
    for start in range(0, rows.shape[1] - 1, step):
        targets = rows[:, start + 1 : start + 1 + step]
        logits = head(normed[:, start : start + targets.shape[1]]).float()  # (B, t, V)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="none"
        )
        total += losses.view_as(targets).sum(1).to(total.device)
    return total / (rows.shape[1] - 1)


@torch.inference_mode()
def removal_losses(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss (B, 1 + L) of rows (B, T): with every layer, then without each one in turn.

    Everything before the removed layer comes from the one full pass, so that L removals cost about L / 2 passes.
    """
    layers, calls = model.base_model.layers, []
    hook = lambda module, args, kwargs: calls.append((args, kwargs))  # noqa: E731
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    handles.append(model.base_model.norm.register_forward_pre_hook(lambda module, args: calls.append((args, {}))))
    try:
        model.base_model(input_ids=rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    losses = [row_losses(model, calls[-1][0][0], rows)]
    for removed in range(len(layers)):
        hidden = calls[removed][0][0]
        for index in range(removed + 1, len(layers)):
            args, kwargs = calls[index]
            output = layers[index](hidden, *args[1:], **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        losses.append(row_losses(model, hidden, rows))
    return torch.stack(losses, dim=1)


def measure_perplexity(model, rows: torch.Tensor, half: torch.Tensor, batch_size: int, sums: Sums) -> None:
    def step(batch, batch_half):
        losses = removal_losses(model, batch.to(model.device))
        values = {"removal": torch.cat([losses, torch.ones_like(losses[:, :1])], dim=1)}
        sums.add(values, batch_half.to(losses.device))

    run_stage("layer perplexity", sums, rows, half, batch_size, step)


@torch.inference_mode()
def print_perplexity(model, rows: torch.Tensor) -> None:
    """Of the model before all else: damaged weights may be finite."""
    rows = rows.to(model.device)
    perplexity = model(input_ids=rows, labels=rows, use_cache=False).loss.exp().item()
    print(f"perplexity of the first {rows.numel()} tokens: {perplexity:.4g} (of sound models on text: 3 to 100)")


def perplexities_of(sums: dict[str, torch.Tensor]) -> dict:
    """`perplexity` of the model and `layer_perplexity` without each layer."""
    *losses, count = sums["removal"].sum(0).tolist()
    perplexity, *removed = (math.exp(min(loss / count, 700)) for loss in losses)
    return {"perplexity": perplexity, "layer_perplexity": dict(enumerate(removed))}


# ---------------------------------------------------------------------------------------------------------------------
# Second moments: what the inputs of every cut linear layer have in common


def moment_files(config, checkpoint: common.Checkpoint) -> dict[int | None, dict[str, int]]:
    """Layer -> matrix -> channels, a file each; None for the LM head's input, where it is not tied."""
    heads = config.num_attention_heads * checkpoint.head_dim
    widths = {HIDDEN: config.hidden_size, common.NEURONS: config.intermediate_size, common.QUERY: heads}
    places = {place: widths[checkpoint.family.modules[place][1]] for place in common.PLACES}
    places |= {f"{place}.output": config.hidden_size for place in checkpoint.family.output_norms}
    files = dict.fromkeys(range(config.num_hidden_layers), places)
    return files if config.tie_word_embeddings else files | {None: {common.LM_HEAD: config.hidden_size}}


def moment_bytes(places: dict[str, int]) -> int:
    return sum(4 * channels * (channels + 1) for channels in places.values())


def free_memory(device: torch.device) -> int:
    """Bytes for second moments beside the model: four fifths of what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return int(0.8 * common.available_bytes(device))


def plan_passes(files: dict, budget: int) -> list[dict]:
    """Files in turns, each turn's matrices at most `budget` bytes (but at least one file)."""
    turns, size = [{}], 0
    for layer, places in files.items():
        if turns[-1] and size + moment_bytes(places) > budget:
            turns.append({})
            size = 0
        turns[-1][layer] = places
        size += moment_bytes(places)
    return turns


class MomentHooks:
    """Hooks that add up Σ w x xᵀ and Σ w x over tokens, float32, for the matrices of one file.

    A sub-layer's error counts relative to what the next norm divides by, so tokens are weighted: the residual stream
    (what attention and MLP read, before the norm in front of them) by 1 / its mean square, the inputs of o_proj and
    down_proj by 1 / the mean square of that layer's output where a norm follows it, else of the residual stream. The
    few tokens of enormous activations that language models have would otherwise be all that is fitted.
    """

    def __init__(self, model, family: common.Family, index: int | None, matrices: dict[str, int], sums: dict):
        self.index, self.matrices, self.sums, self.handles = index, matrices, sums, []
        if index is None:
            self.hook(model.norm, self.stream(common.LM_HEAD, relative=True), before=True)
            return
        layer, self.stream_weight = model.layers[index], None
        for stream, output in (
            (common.ATTENTION_INPUT, common.HEADS_AT),
            (common.FEEDFORWARD_INPUT, common.NEURONS_AT),
        ):
            norm = family.input_norms.get(stream)
            self.hook(layer.get_submodule(norm or stream), self.stream(stream, relative=norm is not None), before=True)
            self.hook(layer.get_submodule(output), self.output(output, normed=output in family.output_norms))

    def hook(self, module, add: Callable, before: bool = False) -> None:
        if before:
            self.handles.append(module.register_forward_pre_hook(lambda module, args: add(args[0])))
        else:
            self.handles.append(module.register_forward_hook(lambda module, args, output: add(args[0], output)))

    def stream(self, name: str, relative: bool) -> Callable:
        """`relative`: a norm follows, and what is added is x / rms with weight 1."""

        def add(x: torch.Tensor) -> None:
            self.stream_weight = weight = weight_of(x)
            if relative:
                x, weight = x * weight.sqrt().to(x.dtype)[..., None], torch.ones_like(weight)
            self.add(name, x, weight)

        return add

    def output(self, name: str, normed: bool) -> Callable:
        def add(x: torch.Tensor, y: torch.Tensor) -> None:
            weight = weight_of(y) if normed else self.stream_weight.to(x.device)
            self.add(name, x, weight)
            if normed:
                self.add(f"{name}.output", y, weight)

        return add

    def add(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add tokens x (B, T, channels) with weights (B, T)."""
        x, weight = x.flatten(0, 1), weight.flatten()
        matrix, mean, total = (
            self.total(f"{name}{kind}", shape, x.device)
            for kind, shape in (("", (x.shape[1], x.shape[1])), (".mean", (x.shape[1],)), (".weight", (1,)))
        )
        root = x * weight.sqrt().to(x.dtype)[:, None]
        if x.is_cuda and x.dtype != torch.float32:
            matrix += torch.mm(root.T, root, out_dtype=torch.float32)
        else:
            matrix.addmm_(root.float().T, root.float())
        mean += weight @ x.float()
        total += weight.sum()

    def total(self, name: str, shape: tuple, device: torch.device) -> torch.Tensor:
        """The running sum of a name, float32, zeros at first, on the device; in `sums` under its layer and name."""
        key = f"{self.index} {name}"
        self.sums[key] = self.sums[key].to(device) if key in self.sums else torch.zeros(shape, device=device)
        return self.sums[key]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def means(self) -> dict[str, torch.Tensor]:
        """E[x xᵀ] and E[x] under the weights, over all processes, float32 on CPU."""
        means = {}
        for name in self.matrices:
            keys = [f"{self.index} {name}{kind}" for kind in ("", ".mean", ".weight")]
            matrix, mean, total = (common.sum_over_processes(self.sums.pop(key)) for key in keys)
            means |= {name: (matrix / total).cpu(), f"{name}.mean": (mean / total).cpu()}
        return means


def weight_of(x: torch.Tensor) -> torch.Tensor:
    """1 / mean square of each token (B, T), float32."""
    return 1 / x.float().square().mean(-1).clamp(min=1e-20)


def save_moments(path: Path, tensors: dict[str, torch.Tensor], identity: str) -> None:
    """With the run's identity and each tensor's hash, which prune.py checks."""
    hashes = {name: common.hash_scores(tensor) for name, tensor in tensors.items()}
    record = {"pare": json.dumps({"fingerprint": identity, "sha256": hashes})}
    common.replace_file(path, lambda temporary: save_file(tensors, temporary, record))


@torch.inference_mode()
def moments_seconds(model, files: dict, rows: torch.Tensor, batch_size: int, passes: int) -> float:
    """What write_moments will take, from one batch: a pass costs what it costs, each product what the model's cost."""
    batch = rows[:batch_size].to(model.device)
    start = time.perf_counter()
    model.base_model(input_ids=batch, use_cache=False).last_hidden_state.sum().item()  # which waits for a GPU
    seconds = time.perf_counter() - start
    products = sum(channels**2 for places in files.values() for channels in places.values())
    weights = sum(parameter.numel() for parameter in model.base_model.layers.parameters())
    return seconds * len(rows) / len(batch) * (passes + products / weights)


def is_finished(path: Path, identity: str) -> bool:
    """Whether a file of save_moments is there, of this run and whole."""
    record = common.pare_metadata(path)
    if record.get("fingerprint") != identity:
        return False
    return all(common.hash_scores(tensor) == record["sha256"].get(name) for name, tensor in load_file(path).items())


def write_moments(
    model,
    family: common.Family,
    files: dict,
    rows: torch.Tensor,
    batch_size: int,
    folder: Path,
    identity: str,
    begun: list,
    open_sums: Callable[[list], Sums],
) -> None:
    """Write one safetensors file per entry of `files`: E[x xᵀ] and E[x] at every place (see MomentHooks), float32.

    As many files per pass over `rows` as fit into memory beside the model; files of the same `identity` that are
    complete already are not made again. A killed pass was over the files `begun`: it is ended first, as it was.
    `open_sums(layers)` gives the unfinished sums of a pass over these.
    """
    paths, rank = {layer: folder / common.moments_file(layer) for layer in files}, common.rank_and_world()[0]
    missing = [layer for layer in files if rank == 0 and not is_finished(paths[layer], identity)]
    missing, begun = common.from_rank_0((missing, begun))
    turns = [{layer: files[layer] for layer in begun}] if set(begun) & set(missing) else []
    missing = {layer: files[layer] for layer in missing if not turns or layer not in begun}
    turns += common.from_rank_0(plan_passes(missing, free_memory(model.device)) if missing else [])
    if turns:
        made = {layer: places for turn in turns for layer, places in turn.items()}
        minutes = moments_seconds(model, made, rows, batch_size, len(turns)) / 60
        print(f"second moments: about {minutes:.0f} minutes" if minutes >= 1 else "second moments: less than a minute")
    for number, turn in enumerate(turns, 1):
        sums = open_sums(list(turn))
        hooks = {layer: MomentHooks(model.base_model, family, layer, turn[layer], sums.sums) for layer in turn}

        def step(batch, half):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)

        try:
            with torch.inference_mode():
                which = f", pass {number} of {len(turns)}"
                run_stage("second moments", sums, rows, rows, batch_size, step, which)
        finally:
            for hook in hooks.values():
                hook.remove()
        for layer, hook in hooks.items():
            means = hook.means()
            if rank == 0:
                save_moments(paths[layer], means, identity)
        sums.path.unlink(missing_ok=True)


def check_moments_room(files: dict, folder: Path, temporary: Path) -> bool:
    """Print what the second moments take, and refuse where the disk is too small or the folder holds other things.
    Returns whether there is room for unfinished ones beside them."""
    ours = re.compile(r"layer-\d+\.safetensors|outside\.safetensors|rows\.safetensors")
    if folder.exists() and not (folder.is_dir() and all(ours.fullmatch(path.name) for path in folder.iterdir())):
        raise PareError(f"SCORES_PATH = {SCORES_PATH!r}: {folder} is in the way of the second moments; rename it.")
    done = sum(path.stat().st_size for path in temporary.glob("*.safetensors"))  # by a run that was killed
    needed, free = max(0, sum(map(moment_bytes, files.values())) - done), shutil.disk_usage(folder.parent).free
    print(f"second moments: {needed / 1e9:.1f} GB more on disk in {folder}/ ({free / 1e9:.1f} GB are free)")
    if needed > free:
        raise PareError(
            f"SECOND_MOMENTS = True needs {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are "
            "free. Set SCORES_PATH on a larger disk, or SECOND_MOMENTS = False."
        )
    return free > 2 * common.rank_and_world()[1] * needed  # each process has its own, and the old while it writes


def clear_leftovers(folder: Path, names: set[str]) -> None:
    """Make the folder, without files of a killed run over another model."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Calibration text


def hash_rows(rows: torch.Tensor) -> str:
    """The fingerprint of token ids: sha256 of their shape and int32 bytes."""
    content = f"{tuple(rows.shape)}".encode() + rows.to(torch.int32).contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def calibration_rows(documents, tokenizer, num_samples: int, length: int, vocab_size: int, what: str) -> torch.Tensor:
    """(num_samples, T) token ids: documents joined with the end-of-text token and cut into rows."""
    rows = []
    for input_ids in data.pack_rows(documents, tokenizer, length, vocab_size):
        rows.append(input_ids)
        if len(rows) == num_samples:
            return torch.tensor(rows)
    raise PareError(
        f"NUM_SAMPLES = {num_samples}: {what} has text for {len(rows)} rows of SEQUENCE_LENGTH = {length} only. "
        f"Set NUM_SAMPLES = {len(rows)} or a smaller SEQUENCE_LENGTH."
        if len(rows) > 1
        else f"SEQUENCE_LENGTH = {length}: {what} has too little text for two rows. Give it more, or lower it."
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


def neurons_kept_globally(mlp: torch.Tensor, share: float = 0.5) -> list[int]:
    """How many neurons each layer keeps if the best `share` of all are kept, scores (L, F) relative to their layer."""
    relative = mlp / mlp.mean(dim=1, keepdim=True).clamp(min=1e-30)
    keep = relative.flatten().argsort(descending=True)[: round(share * mlp.numel())]
    return (keep // mlp.shape[1]).bincount(minlength=len(mlp)).tolist()


def report_layers(scores: dict, layer_types: list[str]) -> None:
    """One line a layer: block importance, perplexity without it, angular distance, neurons; and where they agree."""
    num_layers = len(layer_types)
    measures = {"block importance": layer_values(scores)}
    if "layer_perplexity" in scores:
        measures["perplexity without"] = torch.tensor([scores["layer_perplexity"][i] for i in range(num_layers)])
    neurons = torch.tensor(neurons_kept_globally(scores["mlp"]))
    angles = scores["angular_distance"].diagonal(1)
    weak = torch.stack([value.argsort().argsort() < max(1, num_layers // 3) for value in [*measures.values(), neurons]])
    rows = [["layer", *measures, "angular distance", "neurons of half", "attention", ""]]
    for i, layer_type in enumerate(layer_types):
        values = [f"{value[i]:.4g}" for value in [*measures.values(), angles]]
        rows.append([i, *values, neurons[i].item(), layer_type.split("_")[0], "weak" if weak[:, i].all() else ""])
    print("\nLayers (neurons of half: how many a layer keeps of the best half of all neurons;")
    print(f"weak: in the lowest third by {', '.join(measures)} and neurons at once):")
    common.print_table(rows)
    if "perplexity" in scores:
        print(f"  perplexity with all layers: {scores['perplexity']:.4g}")
    for count in sorted({1, max(1, num_layers // 8), max(1, num_layers // 4)}):
        start = common.best_block(scores["angular_distance"], count)
        if start is not None:
            distance = scores["angular_distance"][start, start + count]
            print(f"  least angular distance over {count} layers: from {start} to {start + count - 1} ({distance:.3f})")


def report(scores: dict, halves: list[dict], layer_types: list[str], num_samples: int) -> None:
    """Print the layers, sliding against full attention, and whether the samples were enough."""
    report_layers(scores, layer_types)
    importance = layer_values(scores)
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
        "hidden channels": rank_correlation(*(half["hidden"] for half in halves)),
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
    for key in ("hidden", "attn_ln", "ffn_ln"):
        relative = scores[key] / scores[key].mean().clamp(min=1e-30)
        axes[1, 0].plot(relative.sort(descending=True).values.numpy(), label=key)
    axes[1, 0].set(title="hidden importance / mean, sorted", xlabel="hidden channel (by rank)", yscale="log")
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
        try:
            common.load_scores(path)
        except PareError:
            raise PareError(
                f"SCORES_PATH = {str(path)!r} is not a score file of this version, or damaged: rename or delete it."
            ) from None
    elif path.with_suffix(".png").exists():
        raise PareError(
            f"SCORES_PATH = {str(path)!r}: {path.with_suffix('.png')} is in the way of the picture; rename it."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PareError(f"SCORES_PATH = {str(path)!r} cannot be written ({common.first_line(error)}).") from None


def fingerprint(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def score(checkpoint, rows: torch.Tensor, meta: dict, scores_path: Path, device, dtype) -> list[dict]:
    """Run every stage over `rows`; return the scores of all samples and of each half, the same in all processes."""
    rank, world = common.rank_and_world()
    family, config = checkpoint.family, checkpoint.config
    moments, files = common.moments_folder(scores_path), moment_files(config, checkpoint)
    temporary = common.temporary_folder(moments)
    room = SECOND_MOMENTS and check_moments_room(files, moments, temporary)
    spread = world == 1 and ":" not in DEVICE and not common.fits_whole(checkpoint, dtype, device, "MODEL")
    try:
        model = common.load_model(checkpoint, dtype, device, "MODEL", spread=spread)
    except torch.OutOfMemoryError:
        raise PareError(
            f"MODEL = {MODEL!r} does not fit on {device} in {str(dtype)[6:]}. Take a larger device, or start one "
            "process with DEVICE = 'auto', which spreads the model over all GPUs."
        ) from None
    common.widen_window(model.config, SEQUENCE_LENGTH)
    run = meta | {"moments": None, "rank": rank, "world": world, "batch_size": BATCH_SIZE, "device": device.type}
    partial = scores_path.with_name(f".{scores_path.stem}.partial-{rank}-of-{world}.safetensors")
    sums = Sums(partial, fingerprint(run | {"depth": LAYER_PERPLEXITY and LAYER_PERPLEXITY_SAMPLES}), 60 * SAVE_MINUTES)

    partial_moments = partial.with_name(f"{partial.stem}-moments.safetensors")

    def identity_over(layers: list) -> str:
        return fingerprint(run | {"moments": meta["moments"], "layers": layers})

    def begun_moments() -> list:
        """The layers that a killed pass was over; none if it was another run's."""
        record = common.metadata_of(partial_moments)
        if not record:
            return []
        with safe_open(partial_moments, framework="pt") as file:
            begun = {name.split(" ")[0] for name in file.keys()}
        layers = [layer for layer in files if str(layer) in begun]
        return layers if record.get("identity") == identity_over(layers) else []

    def open_moments(layers: list) -> Sums:
        return Sums(partial_moments, identity_over(layers), 60 * SAVE_MINUTES if room else math.inf)

    mine, half = rows[rank::world], (torch.arange(len(rows)) % 2)[rank::world]

    if LAYER_PERPLEXITY:
        print_perplexity(model, rows[:1, :LOSS_TOKENS])
    measure(model.base_model, family, mine, half, BATCH_SIZE, sums)
    if LAYER_PERPLEXITY:
        depth = rows[:LAYER_PERPLEXITY_SAMPLES][rank::world]
        measure_perplexity(model, depth, half[: len(depth)], BATCH_SIZE, sums)
    if SECOND_MOMENTS:
        some = rows[:SECOND_MOMENT_SAMPLES][rank::world]
        if rank == 0:
            clear_leftovers(temporary, {*map(common.moments_file, files), common.MOMENTS_ROWS})
        begun = begun_moments()
        write_moments(model, family, files, some, BATCH_SIZE, temporary, meta["moments"], begun, open_moments)
        if rank == 0:
            save_moments(temporary / common.MOMENTS_ROWS, {"rows": rows[:SECOND_MOMENT_SAMPLES].int()}, meta["moments"])
    sums.reduce()
    results = [scores_of(sums.sums, family, checkpoint.head_dim, halves) for halves in ((0, 1), (0,), (1,))]
    if LAYER_PERPLEXITY:
        results[0] |= perplexities_of(sums.sums)
    return results


def main() -> Path:
    with common.processes(DEVICE) as (rank, world):
        script = sys.modules[__name__]
        constants = common.read_constants(script)
        samples = ("NUM_SAMPLES", "LAYER_PERPLEXITY_SAMPLES", "SECOND_MOMENT_SAMPLES")
        common.check_positive(constants, *samples, "SEQUENCE_LENGTH", "BATCH_SIZE")
        common.check_not_negative(constants, "SEED", "SAVE_MINUTES")
        for name in ("NUM_SAMPLES", "SEQUENCE_LENGTH"):  # two halves to compare; a next token to predict
            if constants[name] < 2:
                raise PareError(f"{name} = {constants[name]} must be 2 or more.")
        for name in samples:
            if constants[name] < world:
                raise PareError(f"{name} = {constants[name]}: each of the {world} processes needs at least one.")
        scores_path = common.output_path("SCORES_PATH", SCORES_PATH)
        common.check_outside(scores_path, common.user_path("MODEL", MODEL), "SCORES_PATH")
        with common.lock(scores_path, "SCORES_PATH", rank):
            return analyse(script, scores_path, rank)


def analyse(script, scores_path: Path, rank: int) -> Path:
    """Check everything, score, and write; only the process of rank 0 writes."""
    if rank == 0:
        check_scores_path(scores_path)
    device = common.pick_device(DEVICE)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = common.pick_dtype(DTYPE, device)
    check_length = lambda found: common.check_length(found, SEQUENCE_LENGTH, "MODEL")  # noqa: E731
    checkpoint = common.find_checkpoint(MODEL, REVISION, "MODEL", check_length)
    common.check_outside(scores_path, checkpoint.folder, "SCORES_PATH")
    config = checkpoint.config
    tokenizer = common.load_tokenizer(checkpoint, "MODEL")
    documents = data.open_text(DATASET, DATASET_CONFIG, DATASET_SPLIT, TEXT_COLUMN, shuffle_seed=SEED)
    what = f"DATASET = {DATASET!r}"
    rows = calibration_rows(documents, tokenizer, NUM_SAMPLES, SEQUENCE_LENGTH, config.vocab_size, what)
    dataset = {"name": DATASET, "fingerprint": hash_rows(rows)}
    hashes = {
        "config_hash": common.hash_config(checkpoint),
        "weights_hash": common.hash_checkpoint(checkpoint, "MODEL"),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    identity = hashes | {"rows": dataset["fingerprint"], "dtype": str(dtype)} | versions
    moments = fingerprint(identity | {"samples": SECOND_MOMENT_SAMPLES}) if SECOND_MOMENTS else None

    print(f"scoring {MODEL}: {NUM_SAMPLES} x {SEQUENCE_LENGTH} tokens on {device} in {str(dtype)[6:]}")
    try:
        scores, *halves = score(checkpoint, rows, identity | {"moments": moments}, scores_path, device, dtype)
    except torch.OutOfMemoryError:
        advice = f"Set BATCH_SIZE = {BATCH_SIZE // 2}." if BATCH_SIZE > 1 else "Lower SEQUENCE_LENGTH."
        raise PareError(f"BATCH_SIZE = {BATCH_SIZE} does not fit on {device}. {advice}") from None
    if not all_finite(scores):
        advice = "try DTYPE = 'float32'" if dtype != torch.float32 else "its weights are damaged"
        raise PareError(f"MODEL = {MODEL!r} gives activations that are not finite in {dtype}; {advice}.")
    scores["meta"] = common.run_record(
        script,
        model=MODEL,
        revision=checkpoint.revision,
        **hashes,
        dataset=dataset,
        num_samples=NUM_SAMPLES,
        num_tokens=rows.numel(),
        seed=SEED,
        moments=moments,
    )
    if rank == 0:
        write(scores, halves, common.layer_types_of(config), scores_path)
    return scores_path


def all_finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return bool(torch.as_tensor(value).isfinite().all())


def write(scores: dict, halves: list[dict], layer_types: list[str], scores_path: Path) -> None:
    """Put everything in place and report. The old moments stay until the score file is new: if a kill comes between
    the two, the same command puts the finished new ones in their place."""
    moments = common.moments_folder(scores_path)
    common.save_scores(scores, scores_path)
    temporary = common.temporary_folder(moments)
    if scores["meta"]["moments"]:
        common.replace_folder(temporary, moments)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    common.discard_old(moments)
    for partial in scores_path.parent.glob(f".{glob.escape(scores_path.stem)}.partial-*.safetensors"):
        partial.unlink()
    plot(scores, layer_types, scores_path.with_suffix(".png"))
    report(scores, halves, layer_types, scores["meta"]["num_samples"])
    print(f"\nWrote {scores_path} and {scores_path.with_suffix('.png')}.", end=" ")
    revision = [f"REVISION={REVISION}"] if REVISION else []
    print("Next: uv run prune.py", shlex.join([f"MODEL={MODEL}", f"SCORES_PATH={scores_path}", *revision]))


if __name__ == "__main__":
    common.run(sys.modules[__name__])
