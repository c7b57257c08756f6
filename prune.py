"""Prune a Hugging Face checkpoint by the scores of importance_analysis.py.

    uv run prune.py

Keeps the most important hidden channels, MLP neurons, attention heads and layers, corrects what is left for what went
(NORM_RESCALE, REFIT), and writes a smaller Hugging Face checkpoint into OUTPUT_DIR. Slicing streams: byte ranges of
the teacher in, rows of the student out, in memory that does not grow with the model. REFIT works on one layer's second
moments at a time; REFIT_SAMPLES holds one decoder layer of each model, and the residual stream of its rows. A killed
run leaves nothing behind but a temporary folder, which the next run clears.

Shapes: H hidden, F intermediate, Q query heads, G key-value heads, D head dim, L layers, V vocabulary, S kept and R
removed inputs of a linear layer.
"""

import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import common
from common import HIDDEN, KEY_VALUE, NEURONS, QUERY, WHOLE, PareError, Source
from refit import Moments, Refit, greedy_neurons, principal_directions, read_finite, refit_in_sequence

MODEL: str = "allenai/Olmo-3-7B-Instruct"  # the teacher: Hub id or local folder
REVISION: str | None = None  # commit, tag or branch of a Hub id
SCORES_PATH: str = "importance_scores.pt"  # written by importance_analysis.py for the same MODEL
OUTPUT_DIR: str = "pruned"  # a folder of its own; replaced when the new result is complete
TARGET_PARAMS: str | None = "3.6B"  # chooses the sizes that are None below, width only; None keeps the teacher's
HIDDEN_SIZE: int | None = None  # hidden channels kept; 3.6B gives 3072 of 4096
INTERMEDIATE_SIZE: int | None = None  # MLP neurons kept in each layer; 3.6B gives 6144 of 11008
NUM_ATTENTION_HEADS: int | None = None  # query heads kept in each layer; 3.6B gives 24 of 32
NUM_KEY_VALUE_HEADS: int | None = None  # None: follow the query heads; fewer than the groups allow are averaged
NUM_HIDDEN_LAYERS: int | None = None  # layers kept, the least important dropped (teacher: 32)
LAYERS_TO_DROP: list[int] | None = None  # these layers instead, counted from 0
HIDDEN_METRIC: str = "block_inputs"  # block_inputs | norm_outputs (the paper's): where ROTATE does not choose
LAYER_METRIC: str = "perplexity"  # block_importance | perplexity | angular_distance
CONTIGUOUS_LAYERS: bool = False  # drop one block of layers, never the first or the last (arXiv 2403.17887)
PROTECT_FULL_ATTENTION: bool = True  # never choose a full-attention layer to drop, unless inside a block
NORM_RESCALE: bool = True  # scale cut norms so that their outputs keep their size or, with REFIT_SAMPLES, fit best
REFIT: bool | None = None  # least squares for what lost inputs; None: where the second moments are there
ROTATE: bool = True  # with REFIT: keep the directions of the residual stream that are read most, not single channels
GREEDY_NEURONS: bool = True  # with REFIT: keep the neurons that it cannot restore, not those of highest score
REQUIRE_PORTABLE: bool = False  # refuse shapes that vLLM or llama.cpp load wrongly or not at all
REFIT_SAMPLES: int = 256  # calibration rows of a second REFIT, on the student's own activations; 0: none
DEVICE: str = "auto"  # auto | cuda | cpu: where REFIT solves, in float64

SHARD_BYTES = 5_000_000_000  # largest output file
PIECE_BYTES = 2_000_000  # read, cut and written at once; larger ones leave the processor's cache
SYNC_BYTES = 16_000_000  # written between two syncs: the disk is never idle
SIZE_NAMES = ("HIDDEN_SIZE", "INTERMEDIATE_SIZE", "NUM_ATTENTION_HEADS", "NUM_KEY_VALUE_HEADS", "NUM_HIDDEN_LAYERS")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BASIS = "pare/directions.safetensors"  # in a folder of its own: vLLM loads every safetensors file beside the weights


# ---------------------------------------------------------------------------------------------------------------------
# Targets


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, under their names in config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int


def sizes_text(sizes: Sizes) -> str:
    """The sizes as constants, to paste behind `uv run prune.py`."""
    return " ".join(f"{name.upper()}={value}" for name, value in vars(sizes).items())


def sizes_of(config) -> Sizes:
    return Sizes(**{name: getattr(config, name) for name in Sizes.__dataclass_fields__})


def check_sizes(teacher: Sizes, targets: dict) -> None:
    for name in SIZE_NAMES:
        value, largest = targets[name], getattr(teacher, name.lower())
        if value is not None and not 1 <= value <= largest:
            raise PareError(
                f"{name} = {value}: the teacher has {largest}. Set it from 1 to {largest}, or None for all."
            )


def target_sizes(teacher: Sizes, targets: dict, layers_to_drop: list[int] | None) -> Sizes:
    """The student's sizes from the constants. Raises PareError with the nearest legal values."""
    check_sizes(teacher, targets)
    heads, key_value_heads = target_heads(teacher, targets["NUM_ATTENTION_HEADS"], targets["NUM_KEY_VALUE_HEADS"])
    return Sizes(
        hidden_size=targets["HIDDEN_SIZE"] or teacher.hidden_size,
        intermediate_size=targets["INTERMEDIATE_SIZE"] or teacher.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=target_layers(teacher.num_hidden_layers, targets["NUM_HIDDEN_LAYERS"], layers_to_drop),
    )


def target_heads(teacher: Sizes, heads: int | None, key_value_heads: int | None) -> tuple[int, int]:
    """Query and key-value heads: every key-value head of the student serves the same number of query heads."""
    group = teacher.num_attention_heads // teacher.num_key_value_heads  # query heads per key-value head
    if heads is None:
        heads = teacher.num_attention_heads
    if key_value_heads is None:
        key_value_heads = heads if group == 1 else teacher.num_key_value_heads
    if heads % key_value_heads or not kept_before_merging(teacher, heads, key_value_heads):
        legal = [i for i in range(1, teacher.num_attention_heads + 1) if i % key_value_heads == 0]
        legal = [i for i in legal if kept_before_merging(teacher, i, key_value_heads)]
        nearest = sorted(sorted(legal, key=lambda value: abs(value - heads))[:2])
        raise PareError(
            f"NUM_ATTENTION_HEADS = {heads} does not fit NUM_KEY_VALUE_HEADS = {key_value_heads} (the teacher has "
            f"{teacher.num_attention_heads} and {teacher.num_key_value_heads}).\n"
            f"Set NUM_ATTENTION_HEADS = {' or '.join(map(str, nearest))}, or change NUM_KEY_VALUE_HEADS."
        )
    return heads, key_value_heads


def kept_before_merging(teacher: Sizes, heads: int, key_value_heads: int) -> int:
    """How many of the teacher's key-value heads stay, before equal numbers of them are averaged into
    `key_value_heads`: as few as serve `heads` query heads; 0 where it does not come out even."""
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    counts = range(key_value_heads, teacher.num_key_value_heads + 1, key_value_heads)
    return next((count for count in counts if heads % count == 0 and heads // count <= group), 0)


def target_layers(num_layers: int, target: int | None, layers_to_drop: list[int] | None) -> int:
    if layers_to_drop is None:
        return target or num_layers
    if len(set(layers_to_drop)) != len(layers_to_drop) or not all(0 <= layer < num_layers for layer in layers_to_drop):
        raise PareError(f"LAYERS_TO_DROP = {layers_to_drop} must be different numbers from 0 to {num_layers - 1}.")
    left = num_layers - len(layers_to_drop)
    if left < 1:
        raise PareError(f"LAYERS_TO_DROP = {layers_to_drop} leaves no layer; keep at least one.")
    if target not in (None, left):
        raise PareError(
            f"NUM_HIDDEN_LAYERS = {target}, but LAYERS_TO_DROP leaves {left}. Set NUM_HIDDEN_LAYERS = {left} or None."
        )
    return left


def student_sizes(checkpoint: common.Checkpoint, targets: dict) -> Sizes:
    """The student's sizes. Raises PareError for impossible ones, by config.json alone, before a large download."""
    teacher, divisible = sizes_of(checkpoint.config), checkpoint.family.divisible
    if targets["TARGET_PARAMS"] is not None:
        count = parameter_counter(shapes_of(checkpoint.config), checkpoint)
        targets = derive_targets(teacher, targets, count, checkpoint.head_dim, divisible)
    sizes = target_sizes(teacher, targets, targets["LAYERS_TO_DROP"])
    heads, hidden = sizes.num_attention_heads, sizes.hidden_size
    if divisible and hidden % heads:
        legal = [
            size for size in (hidden // heads * heads, hidden - hidden % -heads) if 0 < size <= teacher.hidden_size
        ]
        raise PareError(
            f"HIDDEN_SIZE = {hidden} must be a multiple of NUM_ATTENTION_HEADS = {heads} in this family: "
            f"{' or '.join(map(str, legal))}."
        )
    return sizes


def parse_params(text: str) -> float:
    """ "3.6B", "900M", "12K" or a plain number."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([BMK]?)", text.strip(), re.IGNORECASE)
    try:
        count = float(match[1]) * {"B": 1e9, "M": 1e6, "K": 1e3, "": 1}[match[2].upper()]
    except (TypeError, ValueError):
        count = 0
    if not 1000 <= count < math.inf:
        raise PareError(f"TARGET_PARAMS = {text!r} must be a number of parameters such as '3.6B' or '900M'.")
    return count


def parameter_counter(shapes: dict[str, tuple], checkpoint: common.Checkpoint):
    """A function from Sizes to the number of parameters of such a model, by the axes of the teacher's tensors."""
    head_dim, counts = checkpoint.head_dim, {}
    for name, shape in shapes.items():
        axes, layer = axes_of(checkpoint.family, name)
        fixed = math.prod(size for size, axis in zip(shape, axes, strict=True) if axis is WHOLE)
        key = tuple(axis for axis in axes if axis is not WHOLE), layer is not None
        counts[key] = counts.get(key, 0) + fixed

    def count(sizes: Sizes) -> int:
        widths = {
            HIDDEN: sizes.hidden_size,
            NEURONS: sizes.intermediate_size,
            QUERY: sizes.num_attention_heads * head_dim,
            KEY_VALUE: sizes.num_key_value_heads * head_dim,
        }
        layers = sizes.num_hidden_layers / checkpoint.config.num_hidden_layers
        return round(
            sum(
                fixed * math.prod(widths[axis] for axis in axes) * (layers if in_layer else 1)
                for (axes, in_layer), fixed in counts.items()
            )
        )

    return count


def round_sizes(largest: int) -> list[int]:
    """The teacher's own size and the round ones below: multiples of 256 (of less in small models)."""
    step = next((step for step in (256, 128, 64, 32, 16, 8) if largest >= 8 * step), 1)
    return [*range(step, largest, step), largest]


def derive_targets(teacher: Sizes, targets: dict, count, head_dim: int, divisible: bool = False) -> dict:
    """Fill the widths that are None so that the model has TARGET_PARAMS parameters, or comes nearest to it with the
    sizes that are set; the depth stays.

    Of the round shapes within 1 % of the nearest, the one whose MLP shrinks most nearly with the square of its hidden
    size, as in the Minitron models (arXiv 2408.11796 Table 3). Where the teacher has hidden_size = heads x head_dim, so
    has the student: vLLM's and llama.cpp's code for Olmo want it. `divisible`: a hidden_size chosen here is a multiple
    of the heads.
    """
    check_sizes(teacher, targets)
    wanted = parse_params(targets["TARGET_PARAMS"])
    square = teacher.hidden_size == teacher.num_attention_heads * head_dim
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    by_hand = {name: [targets[name]] if targets[name] else None for name in SIZE_NAMES}
    found = []
    for hidden in by_hand["HIDDEN_SIZE"] or round_sizes(teacher.hidden_size):
        fitting = [hidden // head_dim] if square and hidden % head_dim == 0 else []
        any_number = [] if square and not by_hand["HIDDEN_SIZE"] else [teacher.num_attention_heads]
        for heads in by_hand["NUM_ATTENTION_HEADS"] or fitting + any_number:
            if divisible and not by_hand["HIDDEN_SIZE"] and hidden % heads:
                continue
            key_value = targets["NUM_KEY_VALUE_HEADS"]
            if key_value is None and heads % teacher.num_key_value_heads and heads % group == 0:
                key_value = heads // group
            shapes = []
            for neurons in by_hand["INTERMEDIATE_SIZE"] or round_sizes(teacher.intermediate_size):
                chosen = dict(zip(SIZE_NAMES, (hidden, neurons, heads, key_value), strict=False))
                try:
                    sizes = target_sizes(teacher, targets | chosen, targets["LAYERS_TO_DROP"])
                except PareError:
                    continue
                shrunk = math.log(neurons / teacher.intermediate_size) - 2 * math.log(hidden / teacher.hidden_size)
                shapes.append((abs(count(sizes) / wanted - 1), abs(shrunk), sizes))
            found += shapes
            if shapes:  # heads that fit come first
                break
    if not found:  # whatever is wrong with the sizes set by hand
        target_sizes(teacher, targets, targets["LAYERS_TO_DROP"])
        raise PareError(
            f"TARGET_PARAMS = {targets['TARGET_PARAMS']!r}: no round shape has these sizes. Set all by hand."
        )
    smallest, largest = (pick(count(sizes) for _, _, sizes in found) for pick in (min, max))
    free = not any(by_hand.values()) and targets["LAYERS_TO_DROP"] is None
    if free and not 0.98 * smallest <= wanted <= 1.02 * largest:
        raise PareError(
            f"TARGET_PARAMS = {targets['TARGET_PARAMS']!r}: this teacher gives from {parameters_text(smallest)} to "
            f"{parameters_text(largest)} parameters. Choose one between, or None."
        )
    nearest = min(error for error, _, _ in found)
    limit = min(nearest + 0.01, max(nearest, 0.02))
    sizes = min((choice for choice in found if choice[0] <= limit), key=lambda choice: choice[1])[2]
    return targets | {name: getattr(sizes, name.lower()) for name in SIZE_NAMES[:4]}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


@dataclass(frozen=True)
class Keep:
    """Indices of what is kept, int64, ascending but for heads that are averaged. Lists: one entry per teacher layer."""

    layers: list[int]
    hidden: torch.Tensor  # (H',)
    neurons: list[torch.Tensor]  # (F',) each
    query_heads: list[torch.Tensor]  # (Q',) each
    key_value_heads: list[torch.Tensor]  # (G', n) each: n of the teacher's heads are averaged into one


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The indices of the k highest scores, ascending; the first of equals."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def choose(scores: dict, teacher: Sizes, student: Sizes, layers: list[int], hidden_metric: str) -> Keep:
    """Top-k per layer for neurons and heads (arXiv 2407.14679 §2.2), one set of hidden channels for all layers."""
    heads = [choose_heads(layer_scores, teacher, student) for layer_scores in scores["attention"]]
    return Keep(
        layers=layers,
        hidden=top_k(HIDDEN_METRICS[hidden_metric](scores), student.hidden_size),
        neurons=[top_k(layer_scores, student.intermediate_size) for layer_scores in scores["mlp"]],
        query_heads=[query for query, _ in heads],
        key_value_heads=[key_value for _, key_value in heads],
    )


def choose_heads(scores: torch.Tensor, teacher: Sizes, student: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept query heads and key-value heads (count, 1) of a layer with head scores (Q,), before any averaging.

    The key-value heads whose query heads score highest together (L2) stay, and of each one's query heads the best,
    as many in every group, so that query head i still reads key-value head i // (query heads per key-value head).
    """
    groups = scores.view(teacher.num_key_value_heads, -1)  # (G, Q / G)
    count = kept_before_merging(teacher, student.num_attention_heads, student.num_key_value_heads)
    key_value_heads = top_k(groups.square().sum(1), count)
    per_group = student.num_attention_heads // count
    query_heads = [group * groups.shape[1] + top_k(groups[group], per_group) for group in key_value_heads.tolist()]
    return torch.cat(query_heads), key_value_heads[:, None]


def group_heads(distances: torch.Tensor, size: int) -> list[list[int]]:
    """Split heads into groups of `size` with small distances (n, n) inside: the closest pair, then its nearest."""
    left, groups = set(range(len(distances))), []
    while left:
        pairs = [(distances[i, j].item(), i, j) for i in left for j in left if i < j]
        group = list(min(pairs)[1:])[:size] if pairs else [left.pop()]
        while len(group) < size:
            others = left - set(group)
            group.append(min(others, key=lambda head: (distances[head, group].sum().item(), head)))
        groups.append(sorted(group))
        left -= set(group)
    return sorted(groups)


def head_distances(keys: torch.Tensor, values: torch.Tensor, moments: torch.Tensor | None) -> torch.Tensor:
    """(G, G) squared distances between the key-value heads of a layer: between their outputs, of keys and of values,
    each relative to its mean size. keys and values (G, D, H + 1), the bias last; moments (H + 1, H + 1) of their input
    and 1, None for white input."""
    total = 0
    for weights in (keys.double(), values.double()):
        moved = weights if moments is None else weights @ moments.double()
        products = torch.einsum("gdh,kdh->gk", moved, weights)
        squares = products.diagonal()
        total = total + (squares[:, None] + squares[None] - 2 * products) / squares.mean().clamp(min=1e-30)
    return total


def average_heads(keep: Keep, family, teacher: Sizes, student: Sizes, source: Source, moments: Moments | None) -> None:
    """Group similar key-value heads where the student has fewer than were kept, and let the query heads follow."""
    for layer in keep.layers:
        kept = keep.key_value_heads[layer][:, 0]
        size = len(kept) // student.num_key_value_heads
        if size == 1:
            continue
        prefix = f"model.layers.{layer}."
        scale, behind, moment = 1.0, family.modules.get("self_attn.k_norm"), None
        if norm := family.input_norms.get(common.ATTENTION_INPUT):  # the moments are of what it multiplies
            scale = source.whole(f"{prefix}{norm}.weight").double() + family.norm_offset
        if moments:
            moment, mean = moments.read(layer, common.ATTENTION_INPUT)
            moment = torch.cat([torch.cat([moment, mean[:, None]], 1), torch.cat([mean, torch.ones(1)])[None]])
        heads = []
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            weight, bias = source.whole(f"{prefix}{name}.weight").double() * scale, f"{prefix}{name}.bias"
            bias = source.whole(bias).double() if bias in source.infos else torch.zeros(len(weight)).double()
            heads.append(torch.cat([weight, bias[:, None]], 1))
        if behind == (KEY_VALUE,):  # a norm over all heads, with weights of each
            heads[0] *= source.whole(f"{prefix}self_attn.k_norm.weight").double()[:, None] + family.norm_offset
        keys, values = (head.unflatten(0, (teacher.num_key_value_heads, -1))[kept] for head in heads)
        groups = torch.tensor(group_heads(head_distances(keys, values, moment), size))  # (G', size)
        keep.key_value_heads[layer] = kept[groups]
        keep.query_heads[layer] = keep.query_heads[layer].view(len(kept), -1)[groups.flatten()].flatten()


def choose_neurons(keep: Keep, count: int, source: Source, moments: Moments, checkpoint, device) -> None:
    """Choose the neurons of every kept layer anew, by greedy_neurons."""
    progress = common.Progress(len(keep.layers), "layers", "choosing neurons")
    norm = checkpoint.family.output_norms.get(common.NEURONS_AT)
    for layer in keep.layers:
        weights = read_finite(source, f"model.layers.{layer}.{common.NEURONS_AT}.weight", device)
        if norm:
            scale = read_finite(source, f"model.layers.{layer}.{norm}.weight", device)
            weights = weights * (scale + checkpoint.family.norm_offset)[:, None]
        keep.neurons[layer] = greedy_neurons(moments.read(layer, common.NEURONS_AT)[0].to(device), weights, count)
        progress.update(1)
    progress.close()


HIDDEN_METRICS = {  # constant -> importance of each hidden channel (H,) from the score file
    "block_inputs": lambda scores: scores["hidden"],
    "norm_outputs": lambda scores: scores["attn_ln"] + scores["ffn_ln"],
}
LAYER_METRICS = {  # constant -> importance of each layer (L,) from the score file
    "block_importance": lambda scores: scores["layer"],
    "perplexity": lambda scores: {i: math.log(value) for i, value in scores["layer_perplexity"].items()},
    "angular_distance": lambda scores: dict(enumerate(scores["angular_distance"].diagonal(1).tolist())),
}


def layer_importance(scores: dict, metric: str) -> dict[int, float]:
    common.check_choice("LAYER_METRIC", metric, LAYER_METRICS)
    if metric == "perplexity" and "layer_perplexity" not in scores:
        raise PareError(
            "LAYER_METRIC = 'perplexity': the scores hold none; run importance_analysis.py with LAYER_PERPLEXITY = "
            "True, or set LAYER_METRIC = 'block_importance'."
        )
    return LAYER_METRICS[metric](scores)


def choose_layers(importance: dict[int, float], layer_types: list[str], num_layers: int, protect: bool) -> list[int]:
    """The layers to drop so that `num_layers` stay: the least important ones."""
    mixed = protect and len(set(layer_types)) > 1
    free = [layer for layer, kind in enumerate(layer_types) if not (mixed and kind == "full_attention")]
    num_drop, protected = len(layer_types) - num_layers, len(layer_types) - len(free)
    if num_drop > len(free):
        raise PareError(
            f"NUM_HIDDEN_LAYERS = {num_layers}: {protected} full-attention layers are protected.\n"
            f"Set it to {protected} or more, or PROTECT_FULL_ATTENTION = False."
        )
    return sorted(sorted(free, key=lambda layer: importance[layer])[:num_drop])


def choose_block(scores: dict, importance: dict[int, float], num_layers: int, metric: str) -> list[int]:
    """One block of layers to drop so that `num_layers` stay, without the first and the last."""
    total = len(importance)
    count = total - num_layers
    if num_layers < 2:
        raise PareError(
            f"NUM_HIDDEN_LAYERS = {num_layers}: CONTIGUOUS_LAYERS keeps the first and the last; set 2 or more."
        )
    costs = torch.zeros(total + 1, total + 1)
    for start in range(total):
        for end in range(start + 1, total + 1):
            costs[start, end] = sum(importance[layer] for layer in range(start, end))
    if metric == "angular_distance":
        costs = scores["angular_distance"]
    start = common.best_block(costs, count)
    return list(range(start, start + count))


def check_scores(scores: dict, checkpoint: common.Checkpoint, path: Path, weights: bool = True) -> None:
    """Refuse scores that were made for another model, by its shapes, its config and, where they are here, `weights`."""
    meta, config = scores["meta"], checkpoint.config
    shapes = {
        "mlp": (config.num_hidden_layers, config.intermediate_size),
        "attention": (config.num_hidden_layers, config.num_attention_heads),
        "attn_ln": (config.hidden_size,),
        "ffn_ln": (config.hidden_size,),
    }
    same = (
        all(tuple(scores[key].shape) == shape for key, shape in shapes.items())
        and meta["config_hash"] == common.hash_config(checkpoint)
        and (not weights or meta["weights_hash"] == common.hash_checkpoint(checkpoint, "MODEL"))
    )
    if not same:
        constants = [f"MODEL={checkpoint.name}", f"SCORES_PATH={path}"]
        constants += [f"REVISION={checkpoint.revision}"] if checkpoint.revision else []
        raise PareError(
            f"SCORES_PATH = {str(path)!r} was made for {meta['model']!r}, which is not the same as "
            f"MODEL = {checkpoint.name!r}.\nRun `uv run importance_analysis.py {shlex.join(constants)}` again."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Corrections for what slicing disturbs


def norm_factor(shares: torch.Tensor, kept: torch.Tensor) -> float:
    """c = rms over the kept channels / rms over all, root of the mean over tokens of its square.

    shares (channels): E[x_j² / mean over channels of x²] at the norm's input. An RMSNorm over the kept channels alone
    divides by the smaller or larger rms; with its weight times c its outputs keep their size, exactly so where the
    removed channels are zero (with ε times c², see student_config).
    """
    shares = shares.double()
    whole = shares.mean().item()  # 1 but for rounding; 0 where the input is zero for every token
    return math.sqrt(shares[kept.flatten()].mean().item() / whole) if whole else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The plan: every output tensor, before any is written


@dataclass(frozen=True)
class Planned:
    """One tensor of the student: where it comes from, what is kept along each axis, and how it is corrected."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None  # in the teacher's numbering
    rows: torch.Tensor  # (rows, n): n source rows are averaged into one
    columns: torch.Tensor | None  # (columns,) kept, None for all; a vector has rows only
    factor: float = 1.0
    offset: float = 0.0  # multiplied by `factor` are the values plus this
    # Refit:
    place: str | None = None  # whose inputs were cut
    removed: torch.Tensor | None = None  # the columns of the weight that went
    rotated: bool = False  # the inputs are directions, not channels
    input_norm: str | None = None  # weight of the norm in front
    biased: bool = False  # the linear layer has a bias
    weight: str | None = None  # of a bias: its linear layer's weight
    mixed: torch.Tensor | None = None  # (H,) weights of the norm behind, or ones: the rows are rotated
    constant: bool = False  # a norm over rotated channels

    @property
    def size(self) -> int:  # bytes
        return math.prod(self.shape) * common.DTYPE_BYTES[self.dtype]


def axes_of(family: common.Family, tensor: str) -> tuple[tuple, int | None]:
    """The axes of a tensor of a checkpoint and its layer's number (None outside the layers)."""
    module, _, kind = tensor.rpartition(".")
    parts = module.split(".")
    layer = int(parts[2]) if module.startswith("model.layers.") and parts[2].isdigit() else None
    axes = common.OUTSIDE_LAYERS.get(module) if layer is None else family.modules.get(".".join(parts[3:]))
    if kind == "bias" and axes and len(axes) == 2 and layer is not None:
        return axes[:1], layer
    if kind != "weight" or axes is None:
        raise PareError(
            f"MODEL holds a tensor that the table of model families does not know: {tensor}.\n"
            "Add its module with its axes to FAMILIES in common.py; nothing is cut by guess."
        )
    return axes, layer


def kept_channels(keep: Keep, axis: str | None, layer: int | None, head_dim: int) -> torch.Tensor | None:
    """The kept indices (channels,) along an axis of a tensor of a layer; (channels, n) where n are averaged."""
    if axis is WHOLE:
        return None
    if axis == HIDDEN:
        return keep.hidden
    if axis == NEURONS:
        return keep.neurons[layer]
    if axis == QUERY:
        return (keep.query_heads[layer][:, None] * head_dim + torch.arange(head_dim)).flatten()
    heads = keep.key_value_heads[layer][:, None]  # (G', 1, n)
    return (heads * head_dim + torch.arange(head_dim)[:, None]).flatten(0, 1)  # (G' D, n)


def plan_tensors(
    source: Source,
    keep: Keep,
    checkpoint: common.Checkpoint,
    norms: dict | None = None,
    refit: bool = False,
    rotate: bool = False,
) -> list[Planned]:
    """Every tensor of the student. Raises PareError for a tensor or dtype that is not in the table.

    `norms` are the score file's shares for norm_factor, None to leave norms as they are.
    """
    new_index = {layer: index for index, layer in enumerate(keep.layers)}
    planned = []
    for name, info in source.infos.items():
        axes, layer = axes_of(checkpoint.family, name)
        if info.dtype not in common.DTYPE_BYTES:
            known = ", ".join(common.DTYPE_BYTES)
            raise PareError(f"MODEL = {checkpoint.name!r}: {name} is {info.dtype}; Pare slices {known} only.")
        if layer is not None and layer not in new_index:
            continue
        rows, *columns = (kept_channels(keep, axis, layer, checkpoint.head_dim) for axis in axes)
        rows = torch.arange(info.shape[0]) if rows is None else rows
        columns = columns[0] if columns else None
        shape = (len(rows), *([] if len(axes) == 1 else [info.shape[1] if columns is None else len(columns)]))
        new_name = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{new_index[layer]}.", 1)
        more = norm_correction(name, checkpoint, keep, norms)
        if refit:
            more |= linear_correction(name, source, checkpoint, keep, rotate)
        if rotate:
            more |= rotation(name, source, checkpoint)
        rows = rows[:, None] if rows.ndim == 1 else rows
        planned.append(Planned(new_name, name, info.dtype, shape, layer, rows, **{"columns": columns} | more))
    return planned


def local_name(module: str, layer: int | None) -> str:
    """The name of a module as the family table has it: within its layer."""
    return module if layer is None else module.split(".", 3)[3]


def norm_correction(name: str, checkpoint: common.Checkpoint, keep: Keep, norms: dict | None) -> dict:
    """The factor of a norm that spans what is cut, and of embeddings that the model multiplies by √H."""
    family, module = checkpoint.family, name.rpartition(".")[0]
    axes, layer = axes_of(family, name)
    # Gemma multiplies its embeddings by √H: by less with fewer channels. Where they are the LM head too, it sees the
    # same correction, which the final norm takes back.
    scale = math.sqrt(checkpoint.config.hidden_size / len(keep.hidden)) if family.scaled_embedding else 1.0
    if module == common.EMBEDDING:
        return {"factor": scale}
    if len(axes) > 1 or name.endswith("bias") or axes[0] is WHOLE:
        return {}
    kept = kept_channels(keep, axes[0], layer, checkpoint.head_dim)
    factor = norm_factor(norms[local_name(module, layer)][layer or 0], kept) if norms else 1.0
    if module == common.FINAL_NORM and checkpoint.config.tie_word_embeddings:
        factor /= scale
    return {"factor": factor, "offset": family.norm_offset}


def linear_correction(name: str, source: Source, checkpoint: common.Checkpoint, keep: Keep, rotate: bool) -> dict:
    """What the refit needs to know of a linear layer that lost inputs, or of its bias."""
    family, (module, _, kind) = checkpoint.family, name.rpartition(".")
    _, layer = axes_of(family, name)
    places = {linear: place for place, linears in common.PLACES.items() for linear in linears}
    place = places.get(local_name(module, layer))
    if module == common.LM_HEAD and not checkpoint.config.tie_word_embeddings:
        place = common.LM_HEAD
    if place is None:
        return {}
    axis = axes_of(family, f"{module}.weight")[0][1]
    kept = kept_channels(keep, axis, layer, checkpoint.head_dim)
    removed = torch.ones(source.infos[f"{module}.weight"].shape[1], dtype=torch.bool)
    removed[kept] = False
    removed = removed.nonzero().flatten()
    if not len(removed):
        return {}
    norm = common.FINAL_NORM if layer is None else family.input_norms.get(place)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return {
        "place": place,
        "removed": removed,
        "columns": kept,
        "rotated": rotate and axis == HIDDEN,
        "input_norm": f"{prefix}{norm}.weight" if norm else None,
        "offset": family.norm_offset,
        "biased": f"{module}.bias" in source.infos,
        "weight": f"{module}.weight" if kind == "bias" else None,
    }


def rotation(name: str, source: Source, checkpoint: common.Checkpoint) -> dict:
    """What a rotation of the residual stream changes in a tensor that writes to it or norms it."""
    family, module = checkpoint.family, name.rpartition(".")[0]
    axes, layer = axes_of(family, name)
    local, prefix = local_name(module, layer), "" if layer is None else f"model.layers.{layer}."
    behind = {norm: place for place, norm in family.output_norms.items()}
    front = {norm: place for place, norm in family.input_norms.items()} | {common.FINAL_NORM: common.LM_HEAD}

    def norm_weights(norm: str) -> torch.Tensor:
        return read_finite(source, f"{prefix}{norm}.weight", torch.device("cpu")) + family.norm_offset

    if module == common.EMBEDDING:
        return {"rotated": True}
    if local in front:
        return {"constant": True, "place": front[local], "offset": family.norm_offset, "factor": 1.0}
    if local in behind:
        return {"constant": True, "place": f"{behind[local]}.output", "mixed": norm_weights(local), "factor": 1.0}
    if axes[0] == HIDDEN:  # a linear layer that writes to the stream, or its bias
        norm = family.output_norms.get(local)
        return {"mixed": norm_weights(norm) if norm else torch.ones(checkpoint.config.hidden_size, dtype=torch.float64)}
    return {}


def shapes_of(config) -> dict[str, tuple]:
    """Names and shapes of the tensors that transformers would build from a config, without a tied LM head."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except common.REFUSALS as error:
        raise PareError(f"MODEL: transformers builds none from config.json ({common.first_line(error)}).") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[f"{common.LM_HEAD}.weight"]
    return shapes


def check_shapes(config, shapes: dict[str, tuple], what: str) -> None:
    """Names and shapes must be those that transformers would build from the config."""
    expected = shapes_of(config)
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        named = [f"{name} ({expected.get(name, 'none')} and {shapes.get(name, 'none')})" for name in wrong]
        raise PareError(
            f"{what}: config.json and weights disagree on {common.first_names(named)}. Download the model again."
        )


def portable_config(raw: dict, config) -> dict:
    """config.json that old and new readers agree on: nested rope_parameters and the legacy keys beside them.

    transformers before 5 and several runtimes read only `rope_theta` and `rope_scaling`.
    """
    rope = config.rope_parameters
    family = common.FAMILIES[config.model_type]
    main = rope[common.FULL] if family.rope_per_layer_type else rope
    scaling = {key: value for key, value in main.items() if key != "rope_theta"}
    legacy = {key: rope[kind]["rope_theta"] for key, kind in family.legacy_rope.items()}
    legacy |= {
        "rope_theta": main["rope_theta"],
        "rope_scaling": None if main.get("rope_type", "default") == "default" else scaling,
    }
    return raw | {"rope_parameters": rope} | legacy


def student_config(checkpoint: common.Checkpoint, sizes: Sizes, keep: Keep, norms: dict | None = None) -> dict:
    """config.json of the student: the teacher's with new sizes, head_dim and the lists over layers always written out.

    With `norms`, ε follows the mean of c² over the norms that span the hidden channels.
    """
    raw = portable_config(checkpoint.raw, checkpoint.config) | vars(sizes)
    raw["head_dim"] = checkpoint.head_dim
    for key in checkpoint.family.per_layer:
        values = getattr(checkpoint.config, key, None)
        if values is not None:
            raw[key] = [values[layer] for layer in keep.layers]
    if norms is not None and len(keep.hidden) < checkpoint.config.hidden_size:
        spanning = [name for name, axis in checkpoint.family.norms.items() if axis == HIDDEN]
        shares = [norms[name][keep.layers] for name in spanning] + [norms[common.FINAL_NORM]]
        raw["rms_norm_eps"] = checkpoint.config.rms_norm_eps * norm_factor(torch.cat(shares).mean(0), keep.hidden) ** 2
    return raw


# ---------------------------------------------------------------------------------------------------------------------
# Reading, cutting and writing, a piece at a time


def gather_columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x[:, columns]; NumPy takes columns faster here than torch's index_select."""
    same_size = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return torch.from_numpy(np.take(same_size.numpy(), columns.numpy(), axis=1, mode="clip")).view(x.dtype)


def cut_rows(tensor: Planned, index: torch.Tensor, source: Source, refit: Refit | None) -> torch.Tensor:
    """Rows (n,) of the teacher's tensor with its columns cut, refitted or rotated; its dtype, or float64."""
    x = source.rows(tensor.source, index)
    if tensor.weight:  # a bias, whose weight lost inputs
        matrix, shift = refit.solution(tensor)
        lost = source.rows(tensor.weight, index)
        lost = lost if tensor.rotated else gather_columns(lost, tensor.removed)
        return x.double() + (lost.to(matrix.device, torch.float64) @ shift).cpu()
    if tensor.rotated:
        matrix = refit.solution(tensor)[0] if tensor.place else refit.basis.T
        return (x.to(matrix.device, torch.float64) @ matrix).cpu()
    y = x if tensor.columns is None else gather_columns(x, tensor.columns)
    if tensor.removed is not None:
        matrix = refit.solution(tensor)[0]
        lost = gather_columns(x, tensor.removed)
        y = y.double() + (lost.to(matrix.device, torch.float64) @ matrix).cpu()
    return y


def cut_piece(tensor: Planned, rows: torch.Tensor, source: Source, refit: Refit | None) -> torch.Tensor:
    """Rows (n, of a row) of a planned tensor: read, cut, averaged or rotated, scaled; in the teacher's dtype."""
    dtype = common.TORCH_DTYPES[tensor.dtype]
    if tensor.constant:
        y = torch.full((len(rows), 1), refit.norm_value(tensor) - tensor.offset)
    elif tensor.mixed is not None:
        y = 0
        for index in torch.arange(source.infos[tensor.source].shape[0]).split(256):
            part = cut_rows(tensor, index, source, refit).to(refit.device, torch.float64)
            y = y + (refit.basis[:, index] * tensor.mixed[index].to(refit.device)) @ part
        y = y.cpu()
    else:
        y = cut_rows(tensor, rows.flatten(), source, refit)
    if rows.shape[1] > 1:
        y = y.double().unflatten(0, rows.shape).mean(1)
    if tensor.factor != 1:
        y = (y.double() + tensor.offset) * tensor.factor - tensor.offset
    y = y.to(dtype).contiguous()
    if not y.sum(dtype=torch.float64 if dtype == torch.float64 else torch.float32).isfinite():
        if source.whole(tensor.source).isfinite().all():
            raise PareError(f"MODEL: {tensor.source} outgrows {tensor.dtype} once corrected; set REFIT = False.")
        raise PareError(f"MODEL: {tensor.source} holds values that are not finite. Download the model again.")
    return y


def pieces_of(tensor: Planned, source: Source) -> tuple[torch.Tensor, ...]:
    """The rows of a planned tensor in pieces that read about PIECE_BYTES each; rotated rows come all at once."""
    info = source.infos[tensor.weight or tensor.source]
    width = math.prod(info.shape[1:]) * common.DTYPE_BYTES[info.dtype] * tensor.rows.shape[1]
    return tensor.rows.split(len(tensor.rows) if tensor.mixed is not None else max(1, PIECE_BYTES // width))


def write_shard(path: Path, shard: list[Planned], source: Source, refit: Refit | None, progress) -> str:
    """Write a safetensors file: eight bytes of header length, the JSON header, then the pieces as they come.

    Other threads read and cut ahead of the writing, and sync behind it. Returns the file's sha256.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        offsets = [offset, offset + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, waiting, waiting_syncs, since = hashlib.sha256(), deque(), [], 0
    with path.open("wb") as file, ThreadPoolExecutor(3) as pool:

        def write(data) -> None:
            nonlocal since
            digest.update(data)
            since += file.write(data)
            if since > SYNC_BYTES:  # in the background, so that the disk works while we do
                file.flush()
                waiting_syncs.append(pool.submit(common.sync_and_forget, file.fileno()))
                since = 0

        def finish_one() -> None:
            piece = waiting.popleft().result().view(torch.uint8).numpy()
            write(piece)
            progress.update(piece.nbytes)

        write(len(encoded).to_bytes(8, "little") + encoded)
        try:
            for tensor in shard:
                for rows in pieces_of(tensor, source):
                    waiting.append(pool.submit(cut_piece, tensor, rows, source, refit))
                    if len(waiting) > 6:
                        finish_one()
                source.forget(tensor.source)
            while waiting:
                finish_one()
            for sync in waiting_syncs:
                sync.result()
        finally:
            for future in waiting:
                future.cancel()
    assert path.stat().st_size == 8 + len(encoded) + offset, path
    return digest.hexdigest()


def split_shards(planned: list[Planned]) -> dict[str, list[Planned]]:
    """Tensors by output file, in order, at most SHARD_BYTES each."""
    shards, size = [[]], 0
    for tensor in planned:
        if shards[-1] and size + tensor.size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_weights(folder: Path, planned: list[Planned], source: Source, refit: Refit | None = None) -> dict[str, str]:
    """Write the student's tensors; returns file name -> sha256."""
    total = sum(tensor.size for tensor in planned)
    progress = common.Progress(total, "bytes", "cutting")
    by_file = split_shards(planned)
    hashes = {file: write_shard(folder / file, shard, source, refit, progress) for file, shard in by_file.items()}
    progress.close()
    if len(by_file) > 1:
        weight_map = {tensor.name: file for file, shard in by_file.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return hashes


# ---------------------------------------------------------------------------------------------------------------------
# Who can load what was written


def portable_layers(
    layer_types: list, importance: dict[int, float], num_layers: int, pattern: tuple
) -> list[int] | None:
    """The layers to drop so that `num_layers` stay whose types repeat `pattern`, the most important ones that
    do; None where there is no such choice. By dynamic programming over (layers seen, layers kept)."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # layers kept -> importance, which
    for layer, kind in enumerate(layer_types):
        for kept in sorted(best, reverse=True):
            value = best[kept][0] + importance[layer]
            if (
                kept < num_layers
                and kind == pattern[kept % len(pattern)]
                and value > best.get(kept + 1, (-math.inf,))[0]
            ):
                best[kept + 1] = (value, [*best[kept][1], layer])
    if num_layers not in best:
        return None
    return sorted(set(range(len(layer_types))) - set(best[num_layers][1]))


def portability(raw: dict, family: common.Family, output: str, advice: str) -> list[tuple[str, str, str]]:
    """(runtime, "ok" or what goes wrong and which constant mends it, command) for the student's config.json.

    From the runtimes' sources as of 2026-09; nothing here runs them. `advice`: the nearest portable LAYERS_TO_DROP.
    """
    heads, head_dim, hidden = raw["num_attention_heads"], raw["head_dim"], raw["hidden_size"]
    name, gguf = shlex.quote(output), shlex.quote(f"{Path(output).name}.gguf")
    vllm = common.serve_command(output, family, hidden, heads * head_dim)
    llama = f"python convert_hf_to_gguf.py {name} --outtype bf16 --outfile {gguf}"
    vllm_problem = llama_problem = "ok"
    if family.square and hidden != heads * head_dim:
        fitting, key_value_heads = hidden // head_dim, raw["num_key_value_heads"]
        legal = hidden % head_dim == 0 and (fitting % key_value_heads == 0 or key_value_heads == heads)
        fit = f"; NUM_ATTENTION_HEADS = {fitting} would fit" if legal else ""
        llama_problem = f"cannot load HIDDEN_SIZE other than heads x {head_dim}{fit}"
        vllm_problem = f"its own code needs HIDDEN_SIZE = heads x {head_dim}{fit}; this command does without it"
    key = family.per_layer[-1]
    kinds = raw.get(key) or []
    period = len(family.pattern)
    if period and any(kind != family.pattern[index % period] for index, kind in enumerate(kinds)):
        llama_problem = f"WRONG OUTPUT: may assume that {key} repeats every {period} layers{advice}"
    if family.untied and raw.get("tie_word_embeddings"):
        llama_problem = "cannot load tied embeddings of this family"
    scalar = raw.get("query_pre_attn_scalar")
    assumed = hidden / heads if raw["num_hidden_layers"] == 62 else head_dim  # it knows Gemma 3 27B by its 62 layers
    if scalar not in (None, assumed):
        llama_problem = f"WRONG OUTPUT: assumes query_pre_attn_scalar = {assumed:g}, this model has {scalar}"
    odd = [
        f"{name} = {size}"
        for name, size in (
            ("HIDDEN_SIZE", hidden),
            ("INTERMEDIATE_SIZE", raw["intermediate_size"]),
            ("heads x head_dim", heads * head_dim),
        )
        if size % 256
    ]
    lm_eval = f'uvx "lm-eval[hf]" run --model hf --model_args pretrained={name},dtype=bfloat16 --tasks mmlu'
    return [
        ("transformers >= 5.13", "ok", f'AutoModelForCausalLM.from_pretrained("{output}")'),
        ("vLLM", vllm_problem, vllm),
        ("llama.cpp / GGUF", llama_problem, llama),
        (
            "GGUF K-quants",
            f"larger file: {', '.join(odd)} should be multiples of 256" if odd else "ok",
            f"llama-quantize {gguf} Q4_K_M",
        ),
        ("lm-eval", "ok", lm_eval),
    ]


def parameters_text(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


CARD = """\
---
{base_model}library_name: transformers
tags: [pruned, pare]
---

# {title}

`{teacher}` pruned with Pare after Minitron (arXiv 2407.14679, 2408.11796), not yet distilled: run distill.py before
using it.

{sizes}

| runtime | | command |
|---|---|---|
{runtimes}
"""


def model_card(checkpoint: common.Checkpoint, student: Sizes, runtimes: list[tuple]) -> str:
    sizes = [f"| {name} | {old} | {vars(student)[name]} |" for name, old in vars(sizes_of(checkpoint.config)).items()]
    return CARD.format(
        base_model=f"base_model: {checkpoint.name}\n" if checkpoint.revision else "",  # the Hub knows Hub ids only
        teacher=checkpoint.name,
        title=Path(OUTPUT_DIR).name,
        sizes="\n".join(["| | teacher | student |", "|---|---|---|", *sizes]),
        runtimes="\n".join(f"| {runtime} | {state} | `{command}` |" for runtime, state, command in runtimes),
    )


def drop_layers(scores: dict, layer_types: list[str], num_layers: int) -> list[int]:
    """The layers to drop, by LAYERS_TO_DROP, in one block, or one by one."""
    if LAYERS_TO_DROP is not None:
        return sorted(LAYERS_TO_DROP)
    if num_layers == len(layer_types):
        return []
    importance = layer_importance(scores, LAYER_METRIC)
    if CONTIGUOUS_LAYERS:
        return choose_block(scores, importance, num_layers, LAYER_METRIC)
    return choose_layers(importance, layer_types, num_layers, PROTECT_FULL_ATTENTION)


def nearby_choice(scores: dict, checkpoint: common.Checkpoint, student: Sizes, drop: list[int]) -> str:
    """Advice for the portability table: the most important layers of this number in the family's order."""
    family, kinds = checkpoint.family, getattr(checkpoint.config, checkpoint.family.per_layer[-1], None)
    if not drop or not family.pattern:
        return ""
    importance = layer_importance(scores, LAYER_METRIC if LAYERS_TO_DROP is None else "block_importance")
    portable = portable_layers(kinds, importance, student.num_hidden_layers, family.pattern)
    return f"; LAYERS_TO_DROP = {portable} keeps that" if portable is not None else ""


def decide(checkpoint: common.Checkpoint, student: Sizes, scores: dict) -> tuple[Keep, dict, list[tuple]]:
    """What is kept, the student's config.json, and who can load it. Raises PareError for what is not allowed."""
    drop = drop_layers(scores, common.layer_types_of(checkpoint.config), student.num_hidden_layers)
    stay = [layer for layer in range(checkpoint.config.num_hidden_layers) if layer not in drop]
    keep = choose(scores, sizes_of(checkpoint.config), student, stay, HIDDEN_METRIC)
    raw = student_config(checkpoint, student, keep, scores["norms"] if NORM_RESCALE else None)
    common.parse_config(type(checkpoint.config), raw, sizes_text(student))
    runtimes = portability(raw, checkpoint.family, OUTPUT_DIR, nearby_choice(scores, checkpoint, student, drop))
    if REQUIRE_PORTABLE:
        check_portable(runtimes)
    return keep, raw, runtimes


def open_moments(scores: dict, scores_path: Path) -> Moments | None:
    """The second moments for REFIT, or None. Raises PareError where they are asked for and missing."""
    identity, folder = scores["meta"].get("moments"), common.moments_folder(scores_path)
    if REFIT and not identity:
        raise PareError(
            f"REFIT = True: SCORES_PATH = {str(scores_path)!r} has no second moments. Run importance_analysis.py with "
            "SECOND_MOMENTS = True, or set REFIT = None."
        )
    aside = common.temporary_folder(folder), common.old_folder(folder)
    if identity and REFIT is not False and not folder.is_dir() and any(path.is_dir() for path in aside):
        raise PareError(
            f"SCORES_PATH = {str(scores_path)!r}: {folder} is not in place, a run was killed. Run "
            "importance_analysis.py again."
        )
    if REFIT is None and identity and not folder.is_dir():
        print(f"{folder}/ is not there: slicing without REFIT")
        return None
    return Moments(folder, identity) if identity and REFIT is not False else None


def write_student(
    folder: Path,
    planned: list[Planned],
    source: Source,
    moments: Moments | None,
    checkpoint: common.Checkpoint,
    keep: Keep,
    raw: dict,
    device: torch.device,
) -> dict[str, str]:
    """Write config.json `raw` and the weights, and check them; returns file name -> sha256 of all in `folder`."""
    basis = None
    if any(tensor.rotated for tensor in planned):
        size = len(keep.hidden)
        basis = principal_directions(moments, source, checkpoint.family, keep.layers, size, device)
        (folder / BASIS).parent.mkdir()
        save_file({"basis": basis.float().cpu()}, folder / BASIS)
    refit = Refit(moments, source, device, basis) if moments else None
    squares = [refit.norm_value(tensor) ** 2 for tensor in planned if tensor.constant]
    if squares:  # ε as in student_config, but of the directions
        raw = raw | {"rms_norm_eps": checkpoint.config.rms_norm_eps * statistics.mean(squares)}
    common.write_json(folder / "config.json", raw)
    files = write_weights(folder, planned, source, refit)
    if moments and REFIT_SAMPLES:
        rows = moments.rows()[:REFIT_SAMPLES]
        size = rows.numel() * token_bytes(checkpoint, len(keep.hidden), source)
        print(f"refitting in sequence: {size / 1e9:.1f} GB of residual streams on {device}", flush=True)
        refit_in_sequence(checkpoint.folder, folder, planned, basis, rows, device, NORM_RESCALE)
        files = {}  # changed in place
    written = common.find_checkpoint(str(folder), None, "OUTPUT_DIR")
    infos = common.tensor_infos(written, "OUTPUT_DIR")
    check_shapes(written.config, {name: info.shape for name, info in infos.items()}, "the student")
    return {file: files.get(file) or common.hash_file(folder / file) for file in common.files_in(folder)}


def print_sizes(before: dict, after: list[Planned], sizes: tuple[Sizes, Sizes]) -> None:
    """The before/after table: parameters, every size, bytes on disk."""
    rows = [["", "teacher", "student", "kept"]]
    shapes = {name: info.shape for name, info in before.items()}, {tensor.name: tensor.shape for tensor in after}
    counts = zip(*map(common.count_parameters, shapes), strict=True)
    for title, (old, new) in zip(("parameters", "without embeddings"), counts, strict=True):
        rows.append([title, parameters_text(old), parameters_text(new), f"{new / old:.0%}"])
    for name, old in vars(sizes[0]).items():
        new = vars(sizes[1])[name]
        rows.append([name, old, new, f"{new / old:.0%}"])
    old, new = (sum(tensor.size for tensor in tensors) for tensors in (before.values(), after))
    rows.append(["GB on disk", f"{old / 1e9:.3f}", f"{new / 1e9:.3f}", f"{new / old:.0%}"])
    common.print_table(rows)


def open_teacher(checkpoint: common.Checkpoint) -> Source:
    """The teacher's tensors. Raises PareError for one that the family table does not know, or of another shape."""
    infos = common.tensor_infos(checkpoint, "MODEL")
    if checkpoint.config.tie_word_embeddings:
        infos.pop(f"{common.LM_HEAD}.weight", None)  # a copy of the embedding that some trainers write
    for name in infos:
        axes_of(checkpoint.family, name)
    shapes = {name: info.shape for name, info in infos.items()}
    check_shapes(checkpoint.config, shapes, f"MODEL = {MODEL!r}")
    return Source(checkpoint.folder, infos)


def main() -> Path:
    script = sys.modules[__name__]
    targets = common.read_constants(script)
    output, scores_path = (common.output_path(name, targets[name]) for name in ("OUTPUT_DIR", "SCORES_PATH"))
    common.check_choice("LAYER_METRIC", LAYER_METRIC, LAYER_METRICS)
    common.check_choice("HIDDEN_METRIC", HIDDEN_METRIC, HIDDEN_METRICS)
    common.check_own_folder(output, "OUTPUT_DIR", "prune.py")
    common.check_not_negative(targets, "REFIT_SAMPLES")
    scores, device = common.load_scores(scores_path), common.pick_device(DEVICE)
    device = torch.device("cpu") if device.type == "mps" else device  # mps has no float64

    def check_config(found: common.Checkpoint) -> None:
        student = student_sizes(found, targets)
        if found.revision:  # of a Hub id, whose weights may not be here yet
            check_scores(scores, found, scores_path, weights=False)
            decide(found, student, scores)

    checkpoint = common.find_checkpoint(MODEL, REVISION, "MODEL", check_config)
    for constant, path in (("MODEL", checkpoint.folder), ("SCORES_PATH", scores_path)):
        if path.resolve().is_relative_to(output.resolve()):
            raise PareError(f"OUTPUT_DIR = {OUTPUT_DIR!r} is, or holds, {constant} itself; choose another.")
    common.check_outside(output, checkpoint.folder, "OUTPUT_DIR")
    with common.lock(output, "OUTPUT_DIR"), enough_memory(), closing(open_teacher(checkpoint)) as source:
        config, teacher = checkpoint.config, sizes_of(checkpoint.config)
        common.check_hashes(checkpoint, "MODEL")
        count = parameter_counter({name: info.shape for name, info in source.infos.items()}, checkpoint)
        student = student_sizes(checkpoint, targets)
        old, new = count(teacher), count(student)
        print(f"pruning {MODEL} from {parameters_text(old)} to {parameters_text(new)} parameters into {output}/:")
        print(sizes_text(student), flush=True)
        if TARGET_PARAMS is not None and abs(new / parse_params(TARGET_PARAMS) - 1) > 0.02:
            print(f"(the nearest to TARGET_PARAMS = {TARGET_PARAMS!r} with the sizes that are set)")
        check_scores(scores, checkpoint, scores_path)
        check_room(output, new / old * sum(info.size for info in source.infos.values()))
        moments = open_moments(scores, scores_path)
        if moments:
            moments.check(teacher.num_hidden_layers, not config.tie_word_embeddings)
            check_memory(moments, checkpoint, student, source, device)

        keep, raw, runtimes = decide(checkpoint, student, scores)
        norms = scores["norms"] if NORM_RESCALE else None
        average_heads(keep, checkpoint.family, teacher, student, source, moments)
        if moments and GREEDY_NEURONS and student.intermediate_size < teacher.intermediate_size:
            choose_neurons(keep, student.intermediate_size, source, moments, checkpoint, device)
        rotate = bool(moments and ROTATE and not config.tie_word_embeddings and len(keep.hidden) < teacher.hidden_size)
        planned = plan_tensors(source, keep, checkpoint, norms, moments is not None, rotate)
        corrections = (("norms rescaled", norms), ("refitted", moments), ("rotated", rotate))
        print(", ".join(name for name, on in corrections if on) or "sliced only", flush=True)

        with common.new_folder(output, "prune.py") as folder:
            common.copy_companions(checkpoint.folder, folder)
            (folder / "README.md").write_text(model_card(checkpoint, student, runtimes))
            files = write_student(folder, planned, source, moments, checkpoint, keep, raw, device)
            more = {"teacher": teacher_record(checkpoint, scores), "portability": runtimes, "sha256": files}
            common.write_record(folder, common.run_record(script, **more, kept=kept_record(keep, rotate)))
        print_sizes(source.infos, planned, (teacher, student))
    revision = [f"REVISION={REVISION}"] if REVISION else []
    print("\nWho can load it:")
    common.print_table([[runtime, *more] for runtime, *more in runtimes], right=False)
    following = [f"TEACHER={MODEL}", f"STUDENT={output}", *revision]
    print(f"\nWrote {output}/. Next: uv run distill.py {shlex.join(following)}")
    return output


@contextmanager
def enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise PareError(
            f"DEVICE = {DEVICE!r}: its memory is too small for the refit. Lower REFIT_SAMPLES = {REFIT_SAMPLES}, or "
            "set DEVICE = 'cpu'."
        ) from None


def check_portable(runtimes: list[tuple]) -> None:
    problems = [
        f"{runtime}: {state}" for runtime, state, _ in runtimes if state != "ok" and not state.startswith("larger")
    ]
    if problems:
        raise PareError("REQUIRE_PORTABLE = True refuses this shape. " + "\n".join(problems))


def token_bytes(checkpoint: common.Checkpoint, hidden_size: int, source: Source) -> int:
    """Of the residual streams of teacher and student, which refit_in_sequence keeps."""
    dtype = source.infos[f"{common.EMBEDDING}.weight"].dtype
    return (checkpoint.config.hidden_size + hidden_size) * common.DTYPE_BYTES[dtype]


def check_memory(moments: Moments, checkpoint: common.Checkpoint, student: Sizes, source: Source, device) -> None:
    """Refuse a device too small for the refit in sequence, before anything is done."""
    rows = moments.rows()[:REFIT_SAMPLES]
    of_row = rows.shape[1] * token_bytes(checkpoint, student.hidden_size, source)
    work = 6 * 8 * checkpoint.config.intermediate_size**2  # matrices of the neurons in float64
    free = common.available_bytes(device)
    if len(rows) * of_row + work > free and len(rows):
        raise PareError(
            f"REFIT_SAMPLES = {REFIT_SAMPLES}: {len(rows) * of_row / 1e9:.1f} GB of residual streams and "
            f"{work / 1e9:.1f} GB to work in do not fit on {device}, where {free / 1e9:.1f} GB are free.\n"
            f"Set REFIT_SAMPLES = {max(0, (free - work) // of_row)}, or another DEVICE."
        )


def check_room(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(common.existing_parent(output)).free
    needed = num_bytes + 100_000_000  # tokenizer and record
    if needed > free:
        raise PareError(
            f"OUTPUT_DIR = {OUTPUT_DIR!r} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there. Choose "
            "another disk."
        )


def teacher_record(checkpoint: common.Checkpoint, scores: dict) -> dict:
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "config_hash": scores["meta"]["config_hash"],
        "weights_hash": scores["meta"]["weights_hash"],
        "scores_dataset": scores["meta"]["dataset"],
    }


def kept_record(keep: Keep, rotate: bool) -> dict:
    """What was kept, in the teacher's numbering; the lists have one entry per kept layer. Where directions were kept,
    `hidden` is None and `directions` names the file with them, `basis` (H', H): the student's stream is basis @ x."""
    return {
        "layers": keep.layers,
        "hidden": None if rotate else keep.hidden.tolist(),
        "directions": BASIS if rotate else None,
        "neurons": [keep.neurons[layer].tolist() for layer in keep.layers],
        "query_heads": [keep.query_heads[layer].tolist() for layer in keep.layers],
        "key_value_heads": [keep.key_value_heads[layer].tolist() for layer in keep.layers],
    }


if __name__ == "__main__":
    common.run(sys.modules[__name__])
