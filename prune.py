"""Prune a Hugging Face checkpoint by the scores of importance_analysis.py.

    uv run prune.py

Keeps the most important hidden channels, MLP neurons, attention heads and layers, and writes a smaller Hugging Face
checkpoint into OUTPUT_DIR. Tensors are read, sliced and written one at a time; the teacher is never built. Minutes
and a few gigabytes of memory, whatever the model's size; the last step loads what was written.

Shapes: H hidden, F intermediate, Q query heads, G key-value heads, D head dim, L layers, V vocabulary.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

import common
from common import HIDDEN, KEY_VALUE, NEURONS, QUERY, PareError

MODEL: str = "allenai/Olmo-3-7B-Instruct"  # the teacher: Hub id or local folder
REVISION: str | None = None  # commit, tag or branch of a Hub id
SCORES_PATH: str = "importance_scores.pt"  # written by importance_analysis.py for the same MODEL
OUTPUT_DIR: str = "pruned"  # a folder of its own; replaced when the new result is complete
HIDDEN_SIZE: int | None = 3072  # hidden channels kept (teacher: 4096); None keeps all, as below
INTERMEDIATE_SIZE: int | None = 6144  # MLP neurons kept in each layer (teacher: 11008)
NUM_ATTENTION_HEADS: int | None = 24  # query heads kept in each layer (teacher: 32); hidden / 128 loads everywhere
NUM_KEY_VALUE_HEADS: int | None = None  # None: follow the query heads where each has its own, else keep all
NUM_HIDDEN_LAYERS: int | None = None  # layers kept, the least important dropped (teacher: 32)
LAYERS_TO_DROP: list[int] | None = None  # these layers instead, counted from 0
PROTECT_FULL_ATTENTION: bool = True  # never choose a full-attention layer to drop
DEVICE: str = "auto"  # auto | cuda | mps | cpu: where the result is tried
DTYPE: str = "auto"  # auto | bfloat16 | float32: in which precision the result is tried; weights keep their own

SHARD_BYTES = 5_000_000_000  # largest output file
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # as safetensors spells them
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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
    """The sizes as constants, to paste or to name in a message."""
    return ", ".join(f"{name.upper()} = {value}" for name, value in vars(sizes).items())


def sizes_of(config) -> Sizes:
    return Sizes(**{name: getattr(config, name) for name in Sizes.__dataclass_fields__})


def target_sizes(teacher: Sizes, targets: dict, layers_to_drop: list[int] | None) -> Sizes:
    """The student's sizes from the constants. Raises PareError with the nearest legal values."""
    for name in ("HIDDEN_SIZE", "INTERMEDIATE_SIZE", "NUM_ATTENTION_HEADS", "NUM_KEY_VALUE_HEADS", "NUM_HIDDEN_LAYERS"):
        value, largest = targets[name], getattr(teacher, name.lower())
        if value is not None and not 1 <= value <= largest:
            raise PareError(
                f"{name} = {value}: the teacher has {largest}. Set it from 1 to {largest}, or None for all."
            )
    heads, key_value_heads = target_heads(teacher, targets["NUM_ATTENTION_HEADS"], targets["NUM_KEY_VALUE_HEADS"])
    return Sizes(
        hidden_size=targets["HIDDEN_SIZE"] or teacher.hidden_size,
        intermediate_size=targets["INTERMEDIATE_SIZE"] or teacher.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=target_layers(teacher.num_hidden_layers, targets["NUM_HIDDEN_LAYERS"], layers_to_drop),
    )


def target_heads(teacher: Sizes, heads: int | None, key_value_heads: int | None) -> tuple[int, int]:
    """Query and key-value heads: every group of query heads that shares a key-value head keeps the same number."""
    group = teacher.num_attention_heads // teacher.num_key_value_heads  # query heads per key-value head
    if heads is None:
        heads = teacher.num_attention_heads if key_value_heads is None else key_value_heads * group
    if key_value_heads is None:
        key_value_heads = heads if group == 1 else teacher.num_key_value_heads
    if heads % key_value_heads or heads // key_value_heads > group:
        legal = [key_value_heads * i for i in range(1, group + 1)]
        nearest = sorted(sorted(legal, key=lambda value: abs(value - heads))[:2])
        raise PareError(
            f"NUM_ATTENTION_HEADS = {heads} does not fit NUM_KEY_VALUE_HEADS = {key_value_heads} (the teacher has "
            f"{teacher.num_attention_heads} and {teacher.num_key_value_heads}).\n"
            f"Set NUM_ATTENTION_HEADS = {' or '.join(map(str, nearest))}, or change NUM_KEY_VALUE_HEADS."
        )
    return heads, key_value_heads


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


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


@dataclass(frozen=True)
class Keep:
    """Sorted int64 indices of what is kept. The lists have one entry per teacher layer, dropped ones included."""

    layers: list[int]
    hidden: torch.Tensor  # (H',)
    neurons: list[torch.Tensor]  # (F',) each
    query_heads: list[torch.Tensor]  # (Q',) each
    key_value_heads: list[torch.Tensor]  # (G',) each


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The indices of the k highest scores, ascending; the first of equals."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def choose(scores: dict, teacher: Sizes, student: Sizes, layers: list[int]) -> Keep:
    """Top-k per layer for neurons and heads, one global set of hidden channels (arXiv 2407.14679 §2.2)."""
    heads = [choose_heads(layer_scores, teacher, student) for layer_scores in scores["attention"]]
    return Keep(
        layers=layers,
        hidden=top_k(scores["attn_ln"] + scores["ffn_ln"], student.hidden_size),
        neurons=[top_k(layer_scores, student.intermediate_size) for layer_scores in scores["mlp"]],
        query_heads=[query for query, _ in heads],
        key_value_heads=[key_value for _, key_value in heads],
    )


def choose_heads(scores: torch.Tensor, teacher: Sizes, student: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept query heads and key-value heads of a layer with head scores (Q,).

    The key-value heads whose query heads score highest together (L2) stay, and of each one's query heads the best,
    as many in every group, so that query head i still reads key-value head i // (Q' / G').
    """
    groups = scores.view(teacher.num_key_value_heads, -1)  # (G, Q / G)
    key_value_heads = top_k(groups.square().sum(1), student.num_key_value_heads)
    per_group = student.num_attention_heads // student.num_key_value_heads
    query_heads = [group * groups.shape[1] + top_k(groups[group], per_group) for group in key_value_heads.tolist()]
    return torch.cat(query_heads), key_value_heads


def choose_layers(
    importance: dict[int, float],
    layer_types: list[str],
    num_layers: int,
    layers_to_drop: list[int] | None,
    protect_full_attention: bool,
) -> list[int]:
    """The layers kept: all but `layers_to_drop`, or the `num_layers` of highest block importance."""
    if layers_to_drop is None:
        mixed = len(set(layer_types)) > 1
        free = [
            layer
            for layer, layer_type in enumerate(layer_types)
            if not (protect_full_attention and mixed and layer_type == "full_attention")
        ]
        num_drop, protected = len(layer_types) - num_layers, len(layer_types) - len(free)
        if num_drop > len(free):
            raise PareError(
                f"NUM_HIDDEN_LAYERS = {num_layers}: {protected} full-attention layers are protected.\n"
                f"Set it to {protected} or more, or PROTECT_FULL_ATTENTION = False."
            )
        layers_to_drop = sorted(free, key=lambda layer: importance[layer])[:num_drop]
    return [layer for layer in range(len(layer_types)) if layer not in layers_to_drop]


def check_scores(scores: dict, checkpoint: common.Checkpoint, path: Path) -> None:
    """Refuse scores that were made for another model, by its shapes, its config and its weights."""
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
        and meta["weights_hash"] == common.hash_checkpoint(checkpoint, "MODEL")
    )
    if not same:
        raise PareError(
            f"SCORES_PATH = {str(path)!r} was made for {meta['model']!r}, which is not the same as "
            f"MODEL = {checkpoint.name!r}.\nRun `uv run importance_analysis.py MODEL={checkpoint.name}` again."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The plan: every output tensor, from the headers alone


@dataclass(frozen=True)
class Planned:
    """One tensor of the student: where it comes from and what is kept along each axis (None: everything)."""

    name: str
    source: str
    file: str
    dtype: str
    indices: tuple[torch.Tensor | None, ...]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


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
            f"the checkpoint holds a tensor that the table of model families does not know: {tensor}.\n"
            "Add its module with its axes to FAMILIES in common.py; nothing is cut by guess."
        )
    return axes, layer


def kept_channels(keep: Keep, axis: str | None, layer: int | None, head_dim: int) -> torch.Tensor | None:
    """The kept indices along an axis of a tensor of a layer."""
    if axis is None:
        return None
    if axis == HIDDEN:
        return keep.hidden
    if axis == NEURONS:
        return keep.neurons[layer]
    heads = {QUERY: keep.query_heads, KEY_VALUE: keep.key_value_heads}[axis][layer]
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def plan_tensors(infos: dict[str, common.TensorInfo], keep: Keep, checkpoint: common.Checkpoint) -> list[Planned]:
    """Every tensor of the student. Raises PareError for a tensor or dtype that is not in the table."""
    planned = []
    new_index = {layer: index for index, layer in enumerate(keep.layers)}
    for source, info in infos.items():
        axes, layer = axes_of(checkpoint.family, source)
        if info.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise PareError(f"MODEL = {checkpoint.name!r}: {source} is {info.dtype}; Pare slices {known} only.")
        if layer is not None and layer not in new_index:
            continue
        name = source if layer is None else source.replace(f"layers.{layer}.", f"layers.{new_index[layer]}.", 1)
        indices = tuple(kept_channels(keep, axis, layer, checkpoint.head_dim) for axis in axes)
        shape = tuple(size if index is None else len(index) for size, index in zip(info.shape, indices, strict=True))
        planned.append(Planned(name, source, info.file, info.dtype, indices, shape))
    return planned


def check_shapes(config, shapes: dict[str, tuple], what: str) -> None:
    """Names and shapes must be those that transformers would build from the config (on the meta device)."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in shapes:
        del expected["lm_head.weight"]
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise PareError(
            f"{what}: config.json and weights disagree on {len(wrong)} tensors, the first {name}: "
            f"{expected.get(name, 'none')} and {shapes.get(name, 'none')}. Download the model again."
        )


def portable_config(raw: dict, config) -> dict:
    """config.json that old and new readers agree on: nested rope_parameters and the legacy keys beside them.

    transformers before 5 and several runtimes read only `rope_theta` and `rope_scaling`.
    """
    rope = config.rope_parameters
    main = rope["full_attention"] if common.FAMILIES[config.model_type].rope_per_layer_type else rope
    scaling = {key: value for key, value in main.items() if key != "rope_theta"}
    return raw | {
        "rope_parameters": rope,
        "rope_theta": main["rope_theta"],
        "rope_scaling": None if main.get("rope_type", "default") == "default" else scaling,
    }


def student_config(checkpoint: common.Checkpoint, sizes: Sizes, keep: Keep) -> dict:
    """config.json of the student: the teacher's with new sizes, head_dim and layer_types always written out."""
    raw = portable_config(checkpoint.raw, checkpoint.config) | vars(sizes)
    raw["head_dim"] = checkpoint.head_dim
    for key in checkpoint.family.per_layer:
        values = getattr(checkpoint.config, key, None)
        if values is not None:
            raw[key] = [values[layer] for layer in keep.layers]
    return raw


# ---------------------------------------------------------------------------------------------------------------------
# Reading, slicing and writing, one tensor at a time


def read_sliced(folder: Path, planned: Planned, shards: dict) -> torch.Tensor:
    """The student's tensor; `shards` caches the open safetensors files."""
    if planned.file not in shards:
        shards[planned.file] = safe_open(
            folder / planned.file, framework="pt", backend="pread"
        )  # not mmap: bounded memory
    tensor = shards[planned.file].get_tensor(planned.source)
    for axis, index in enumerate(planned.indices):
        if index is not None and not torch.equal(index, torch.arange(tensor.shape[axis])):
            tensor = tensor.index_select(axis, index)
    return tensor.contiguous()


def write_shard(path: Path, shard: list[Planned], source: Path, shards: dict, progress: common.Progress) -> None:
    """Write a safetensors file: eight bytes of header length, the JSON header, then the tensors as they come."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for planned in shard:
        offsets = [offset, offset + planned.num_bytes]
        header[planned.name] = {"dtype": planned.dtype, "shape": list(planned.shape), "data_offsets": offsets}
        offset = offsets[1]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for planned in shard:
            tensor = read_sliced(source, planned, shards)
            assert tuple(tensor.shape) == planned.shape, (planned, tensor.shape)
            file.write(tensor.view(torch.uint8).numpy())
            progress.update(planned.num_bytes)


def split_shards(planned: list[Planned]) -> dict[str, list[Planned]]:
    """Tensors by output file, in order, at most SHARD_BYTES each."""
    shards, size = [[]], 0
    for tensor in planned:
        if shards[-1] and size + tensor.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_weights(folder: Path, planned: list[Planned], source: Path) -> None:
    total = sum(tensor.num_bytes for tensor in planned)
    progress = common.Progress(total, "bytes", "slicing")
    by_file, open_shards = split_shards(planned), {}
    for file, shard in by_file.items():
        write_shard(folder / file, shard, source, open_shards, progress)
    progress.close()
    if len(by_file) > 1:
        weight_map = {tensor.name: file for file, shard in by_file.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def try_checkpoint(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load the folder strictly and run one forward pass."""
    checkpoint = common.find_checkpoint(str(folder), None, "OUTPUT_DIR")
    model = common.load_model(checkpoint, dtype, device, "OUTPUT_DIR")
    with torch.inference_mode():
        ids = torch.arange(16, device=device)[None] % checkpoint.config.vocab_size
        logits = model(input_ids=ids, use_cache=False).logits
    if not logits.isfinite().all():
        raise PareError(f"the pruned model gives logits that are not finite in {dtype}; try DTYPE = 'float32'.")


# ---------------------------------------------------------------------------------------------------------------------


def portability_notes(raw: dict) -> list[str]:
    """What other runtimes get wrong about this shape (transformers loads every shape)."""
    notes = []
    if raw["hidden_size"] != raw["num_attention_heads"] * raw["head_dim"]:
        heads = raw["hidden_size"] / raw["head_dim"]
        notes.append(
            f"llama.cpp and vLLM's own Olmo code want HIDDEN_SIZE = heads x {raw['head_dim']}; NUM_ATTENTION_HEADS = "
            f"{heads:.0f} would fit. vLLM with --model-impl transformers takes any."
            if heads.is_integer()
            else f"llama.cpp and vLLM's own Olmo code want HIDDEN_SIZE = heads x {raw['head_dim']}."
        )
    types = raw.get("layer_types") or []
    if any(
        layer_type != ("full_attention" if i % 4 == 3 else "sliding_attention") for i, layer_type in enumerate(types)
    ):
        notes.append("llama.cpp assumes that every fourth layer is full attention and would run this one wrongly.")
    return notes


def parameters_text(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def print_sizes(
    before: dict[str, tuple], after: dict[str, tuple], sizes: list[Sizes], weight_files: list[set[Path]]
) -> None:
    """The before/after table: parameters, every size, bytes on disk."""
    rows = [["", "teacher", "student", "kept"]]
    counts = zip(common.count_parameters(before), common.count_parameters(after), strict=True)
    for title, (old, new) in zip(("parameters", "without embeddings"), counts, strict=True):
        rows.append([title, parameters_text(old), parameters_text(new), f"{new / old:.0%}"])
    for name, old in vars(sizes[0]).items():
        new = vars(sizes[1])[name]
        rows.append([name, old, new, f"{new / old:.0%}"])
    old, new = (sum(file.stat().st_size for file in files) for files in weight_files)
    rows.append(["GB on disk", f"{old / 1e9:.3f}", f"{new / 1e9:.3f}", f"{new / old:.0%}"])
    common.print_table(rows)


def main() -> Path:
    script = sys.modules[__name__]
    targets = common.read_constants(script)
    output, scores_path = common.output_path(OUTPUT_DIR), common.output_path(SCORES_PATH)
    common.check_own_folder(output, "OUTPUT_DIR", "prune.py")
    scores = common.load_scores(scores_path)
    device = common.pick_device(DEVICE)
    dtype = common.pick_dtype(DTYPE, device)

    checkpoint = common.find_checkpoint(MODEL, REVISION, "MODEL")
    for constant, path in (("MODEL", checkpoint.folder), ("SCORES_PATH", scores_path)):
        if path.resolve().is_relative_to(output.resolve()):
            raise PareError(f"OUTPUT_DIR = {OUTPUT_DIR!r} is, or holds, {constant} itself; choose another.")
    config = checkpoint.config
    teacher = sizes_of(config)
    student = target_sizes(teacher, targets, LAYERS_TO_DROP)
    infos = common.tensor_infos(checkpoint, "MODEL")
    before = {name: info.shape for name, info in infos.items()}
    for name in before:
        axes_of(checkpoint.family, name)
    check_shapes(config, before, f"MODEL = {MODEL!r}")
    check_scores(scores, checkpoint, scores_path)

    layer_types = common.layer_types_of(config)
    drop = LAYERS_TO_DROP, PROTECT_FULL_ATTENTION
    layers = choose_layers(scores["layer"], layer_types, student.num_hidden_layers, *drop)
    keep = choose(scores, teacher, student, layers)
    planned = plan_tensors(infos, keep, checkpoint)
    raw = student_config(checkpoint, student, keep)
    after = {tensor.name: tensor.shape for tensor in planned}
    check_shapes(common.parse_config(type(config), raw, sizes_text(student)), after, "the student")
    old, new = (parameters_text(common.count_parameters(shapes)[0]) for shapes in (before, after))
    print(f"pruning {MODEL} from {old} to {new} parameters into {output}/", flush=True)

    with common.new_folder(output, "prune.py") as folder:
        write_weights(folder, planned, checkpoint.folder)
        common.copy_companions(checkpoint.folder, folder)
        common.write_json(folder / "config.json", raw)
        record = common.run_record(script, teacher=teacher_record(checkpoint, scores), kept=kept_record(keep))
        common.write_record(folder, record)
        try_checkpoint(folder, device, dtype)
    files = [{checkpoint.folder / info.file for info in infos.values()}, set(output.glob("*.safetensors"))]
    print_sizes(before, after, [teacher, student], files)
    for note in portability_notes(raw):
        print(f"  note: {note}")
    print(f"\nWrote {output}/: it loads strictly and runs. Next: uv run distill.py TEACHER={MODEL} STUDENT={output}")
    return output


def teacher_record(checkpoint: common.Checkpoint, scores: dict) -> dict:
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "config_hash": scores["meta"]["config_hash"],
        "weights_hash": scores["meta"]["weights_hash"],
        "scores_dataset": scores["meta"]["dataset"],
    }


def kept_record(keep: Keep) -> dict:
    """What was kept, in the teacher's numbering; the lists have one entry per kept layer."""
    return {
        "layers": keep.layers,
        "hidden": keep.hidden.tolist(),
        "neurons": [keep.neurons[layer].tolist() for layer in keep.layers],
        "query_heads": [keep.query_heads[layer].tolist() for layer in keep.layers],
        "key_value_heads": [keep.key_value_heads[layer].tolist() for layer in keep.layers],
    }


if __name__ == "__main__":
    common.run(sys.modules[__name__])
