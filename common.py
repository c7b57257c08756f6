"""What Pare's scripts share: constants, checkpoints, the table of model families, and safe writing.

Nothing here is a setting, and importing it does nothing. Shapes: T tokens of a row, L layers.
"""

import ast
import copy
import difflib
import fcntl
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm


class PareError(ValueError):
    """A user's mistake, in one or two lines: the constant, what it was, and what would work."""


# ---------------------------------------------------------------------------------------------------------------------
# Constants: every annotated capital at the top of a script, settable as NAME=value on the command line


def constants_of(script: types.ModuleType) -> dict[str, str]:
    """The names of a script's constants, one `NAME: kind = value  # comment` a line, with their comments."""
    return dict(re.findall(r"^([A-Z][A-Z0-9_]*): [^=\n]+ = .*?(?:  # (.*))?$", inspect.getsource(script), re.MULTILINE))


KIND_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "None",
    list: "a list",
    list[int]: "a list of whole numbers such as [4, 5]",
}


def kinds_of(script: types.ModuleType, name: str) -> tuple:
    hint = script.__annotations__[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def has_kind(value, kind) -> bool:
    if kind == list[int]:
        return isinstance(value, list) and all(has_kind(item, int) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind


def read_constants(script: types.ModuleType) -> dict:
    """The script's constants as they are now. Raises PareError for one of the wrong kind."""
    values = {name: getattr(script, name) for name in constants_of(script)}
    for name, value in values.items():
        kinds = kinds_of(script, name)
        if not any(has_kind(value, kind) for kind in kinds):
            raise PareError(f"{name} = {value!r} must be {' or '.join(KIND_NAMES[kind] for kind in kinds)}.")
    return values


def override_constants(script: types.ModuleType, arguments: list[str]) -> None:
    """Set constants from `NAME=value` arguments: a Python literal where that has the right kind, else text."""
    names = constants_of(script)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or name not in names:
            nearest = difflib.get_close_matches(name.lstrip("-").upper().replace("-", "_"), names, n=3, cutoff=0.5)
            advice = f"Did you mean {' or '.join(nearest)}?" if nearest else f"The constants are: {', '.join(names)}."
            what = f"there is no constant {name}" if equals else f"{argument!r} is not of the form NAME=value"
            raise PareError(f"{what}. {advice}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError):
            value = text
        kinds = kinds_of(script, name)
        if str in kinds and not any(has_kind(value, kind) for kind in kinds):
            value = text
        setattr(script, name, value)
    read_constants(script)


def print_help(script: types.ModuleType) -> None:
    print(script.__doc__.strip(), "\n\nConstants (edit them in the script, or give NAME=value on the command line):\n")
    for name, comment in constants_of(script).items():
        print(f"  {name} = {getattr(script, name)!r}" + (f"  # {comment}" if comment else ""))


def run(script: types.ModuleType) -> None:
    """Run a script from the command line: overrides, main(), and a user's mistake as one message and exit code 1."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print_help(script)
        return
    try:
        override_constants(script, arguments)
        script.main()
    except (PareError, PermissionError) as error:  # wherever that happens, it names the file
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def user_path(constant: str, value: str) -> Path:
    try:
        path = Path(value).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, or of a user who is not there
        raise PareError(f"{constant} = {value!r} is no path: {first_line(error)}") from None
    return path


def output_path(constant: str, value: str) -> Path:
    path = user_path(constant, value)
    if not path.name or len(path.name.encode()) > 200:  # we add to it, and 255 bytes are the most
        raise PareError(f"{constant} = {value!r} is no name of its own, or too long. Choose another.")
    return path


def check_choice(name: str, value, choices: Iterable) -> None:
    if value not in choices:
        raise PareError(f"{name} = {value!r}; choose one of {', '.join(map(repr, choices))}.")


def check_positive(constants: dict, *names: str) -> None:
    for name in names:
        if constants[name] <= 0:
            raise PareError(f"{name} = {constants[name]} must be greater than 0.")


def check_not_negative(constants: dict, *names: str) -> None:
    for name in names:
        if not constants[name] >= 0:
            raise PareError(f"{name} = {constants[name]} must be 0 or more.")


# ---------------------------------------------------------------------------------------------------------------------
# Device, versions, progress


def pick_device(name: str) -> torch.device:
    """`auto` is the first of cuda, mps and cpu that is there. Raises PareError for a device that is not."""
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    found = [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name not in ["auto", *found]:
        raise PareError(f"DEVICE = {name!r} is not there; this machine has 'auto', {', '.join(map(repr, found))}.")
    name = found[0] if name == "auto" else name
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    check_choice("DTYPE", name, ["auto", *DTYPES])
    return DTYPES.get(name, torch.float32 if device.type == "cpu" else torch.bfloat16)


def available_bytes(device: torch.device) -> int:
    """Memory of the device that is free now; on a CPU a process's share of what the system has available."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for itself
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        available = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def run_record(script: types.ModuleType, **more) -> dict:
    """What stands beside every output: script, constants, versions, git commit of Pare, and whatever else is given."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    packages = ("torch", "transformers", "datasets", "accelerate", "safetensors", "torchao")
    versions = {name: version(name) for name in packages if importlib.util.find_spec(name)}
    return {
        "script": Path(script.__file__).name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "constants": read_constants(script),
        "versions": {"python": platform.python_version()} | versions,
        "git_commit": git or None,
        **more,
    }


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside `accelerate launch`."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)


PATIENCE = timedelta(days=1)  # of the others while the process of rank 0 packs text or saves; NCCL's own is 10 minutes


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int]]:
    """Join the processes of `accelerate launch`, if it started this one; only the process of rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    if ":" in device:
        raise PareError(f"DEVICE = {device!r} would be that of all processes; set DEVICE = 'cuda': each has its own.")
    state = accelerate.PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if state.is_main_process else nowhere):
        yield rank_and_world()
        torch.distributed.barrier()
    state.destroy_process_group()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, in each of them."""
    if rank_and_world()[1] == 1:
        return tensor
    return accelerate.utils.reduce(tensor.to(accelerate.PartialState().device), "sum")


def from_rank_0(value):
    """The value that the process of rank 0 has, in all of them."""
    if rank_and_world()[1] == 1:
        return value
    return accelerate.utils.broadcast_object_list([value])[0]


class Progress:
    """One progress bar in a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, unit: str, description: str, done: int = 0):
        hidden = True if rank_and_world()[0] else None  # None: where there is no terminal
        self.bar = tqdm(total=total, unit=unit, desc=description, initial=done, disable=hidden, dynamic_ncols=True)
        self.total, self.unit, self.description, self.done = total, unit, description, done
        self.last = time.monotonic()

    def update(self, amount: int, text: str = "") -> None:
        self.done += amount
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(amount)
        if self.bar.disable and (time.monotonic() - self.last > 10 or self.done >= self.total):
            self.last = time.monotonic()
            print(f"{self.description}: {self.done}/{self.total} {self.unit}  {text}".rstrip(), flush=True)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def print_table(rows: list[list], right: bool = True) -> None:
    """Print rows of cells in aligned columns, the first left and the others right or left."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        pad = str.rjust if right else str.ljust
        cells = [row[0].ljust(widths[0]), *(pad(cell, width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    """A matplotlib figure and its axes; no display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


# ---------------------------------------------------------------------------------------------------------------------
# Model families. To add one: a row of FAMILIES that names every module with weights and the axes each is cut on.

HIDDEN, NEURONS, QUERY, KEY_VALUE = "hidden", "neurons", "query", "key_value"  # channels that pruning selects
WHOLE = None  # an axis that is never cut (the vocabulary, one head's width)

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens", "model.norm", "lm_head"
OUTSIDE_LAYERS = {EMBEDDING: (WHOLE, HIDDEN), FINAL_NORM: (HIDDEN,), LM_HEAD: (WHOLE, HIDDEN)}
LINEARS = {  # module of a decoder layer -> the channels along the axes of its weight; a bias lies along the first
    "self_attn.q_proj": (QUERY, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERY),
    "mlp.gate_proj": (NEURONS, HIDDEN),
    "mlp.up_proj": (NEURONS, HIDDEN),
    "mlp.down_proj": (HIDDEN, NEURONS),
}
ATTENTION_INPUT, HEADS_AT, FEEDFORWARD_INPUT, NEURONS_AT = (  # places: where the inputs of linear layers are cut
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
PLACES = {  # place -> the linear layers that read the same input there
    ATTENTION_INPUT: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    HEADS_AT: ("self_attn.o_proj",),
    FEEDFORWARD_INPUT: ("mlp.gate_proj", "mlp.up_proj"),
    NEURONS_AT: ("mlp.down_proj",),
}
MOMENTS_ROWS = "rows.safetensors"  # the calibration rows beside the second moments
PRE_NORMS = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
POST_NORMS = {"post_attention_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,)}
NORMS_BEFORE_AND_AFTER = PRE_NORMS | POST_NORMS | {"pre_feedforward_layernorm": (HIDDEN,)}
INPUT_NORMS = {ATTENTION_INPUT: "input_layernorm", FEEDFORWARD_INPUT: "post_attention_layernorm"}
OUTPUT_NORMS = {HEADS_AT: "post_attention_layernorm", NEURONS_AT: "post_feedforward_layernorm"}
HEAD_NORMS = {"self_attn.q_proj": "self_attn.q_norm", "self_attn.k_proj": "self_attn.k_norm"}
QK_NORMS_OVER_ALL_HEADS = {"self_attn.q_norm": (QUERY,), "self_attn.k_norm": (KEY_VALUE,)}
QK_NORMS_PER_HEAD = {"self_attn.q_norm": (WHOLE,), "self_attn.k_norm": (WHOLE,)}


@dataclass(frozen=True)
class Family:
    """What scoring and slicing know of an architecture. Module names are relative to a decoder layer."""

    modules: dict[str, tuple]  # every module of a layer that has weights -> the axes of its weight
    input_norms: dict[str, str] = field(default_factory=lambda: INPUT_NORMS)  # place -> the norm in front of it
    output_norms: dict[str, str] = field(default_factory=dict)  # place -> the norm behind its linear layer
    per_layer: tuple[str, ...] = ("layer_types",)  # lists in config.json with one entry per layer
    rope_per_layer_type: bool = False  # rope_parameters holds an entry for each layer type
    legacy_rope: dict[str, str] = field(default_factory=dict)  # older key -> layer type whose rope_theta it held
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    scaled_embedding: bool = False  # embeddings are multiplied by the square root of hidden_size
    divisible: bool = False  # transformers refuses a hidden_size that is no multiple of the heads
    # What other runtimes assume (vLLM's own code and llama.cpp, as of 2026-09):
    square: bool = False  # hidden_size = heads x head_dim
    untied: bool = False  # an LM head of its own
    pattern: tuple = ()  # the last list of `per_layer` repeats this

    @property
    def attention_norm(self) -> str:
        """The norm that belongs to the attention; its outputs score the hidden channels (DESIGN: attn_ln)."""
        return self.input_norms.get(ATTENTION_INPUT) or self.output_norms[HEADS_AT]

    @property
    def feedforward_norm(self) -> str:
        return self.input_norms.get(FEEDFORWARD_INPUT) or self.output_norms[NEURONS_AT]

    @property
    def norms(self) -> dict[str, str | None]:
        """Norms of a layer -> the channels they span."""
        return {name: axes[0] for name, axes in self.modules.items() if len(axes) == 1}

    def norm_behind(self, linear: str) -> str | None:
        """The norm of a linear layer's outputs."""
        norm = self.output_norms.get(linear) or HEAD_NORMS.get(linear)
        return norm if norm in self.modules else None


OLMO = {
    "modules": LINEARS | POST_NORMS | QK_NORMS_OVER_ALL_HEADS,
    "input_norms": {},
    "output_norms": OUTPUT_NORMS,
    "square": True,
    "untied": True,
}
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = {  # model_type in config.json -> family
    "llama": Family(LINEARS | PRE_NORMS, divisible=True),
    "mistral": Family(LINEARS | PRE_NORMS),
    "qwen2": Family(LINEARS | PRE_NORMS, square=True),
    "qwen3": Family(LINEARS | PRE_NORMS | QK_NORMS_PER_HEAD),
    "olmo2": Family(**OLMO),
    "olmo3": Family(**OLMO, rope_per_layer_type=True, pattern=(SLIDING,) * 3 + (FULL,)),
    "gemma3_text": Family(
        LINEARS | NORMS_BEFORE_AND_AFTER | QK_NORMS_PER_HEAD,
        input_norms=INPUT_NORMS | {FEEDFORWARD_INPUT: "pre_feedforward_layernorm"},
        output_norms=OUTPUT_NORMS,
        rope_per_layer_type=True,
        legacy_rope={"rope_local_base_freq": SLIDING},
        norm_offset=1.0,
        scaled_embedding=True,
        divisible=True,
        pattern=(SLIDING,) * 5 + (FULL,),
    ),
    "smollm3": Family(LINEARS | PRE_NORMS, per_layer=("layer_types", "no_rope_layers"), pattern=(1, 1, 1, 0)),
    "seed_oss": Family(LINEARS | PRE_NORMS),
}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: found, described from their headers, and loaded strictly


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk. `config` is config.json as transformers reads it, `raw` as it is written."""

    name: str  # the Hub id or folder that the user gave
    folder: Path
    revision: str | None  # resolved commit of a Hub id, None for a folder
    raw: dict
    config: transformers.PreTrainedConfig
    family: Family

    @property
    def again(self) -> str:
        """Advice for damaged files."""
        hub = f"Run `uv run hf download {self.name} --revision {self.revision} --force-download`."
        return hub if self.revision else "Download the model again."

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads


@dataclass(frozen=True)
class TensorInfo:
    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: BF16, F32, …
    start: int  # its first byte in the file
    size: int  # bytes


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # those that Pare slices
SAFETENSORS_DTYPES = {*DTYPE_BYTES, "BOOL", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2"}
SAFETENSORS_DTYPES |= {"F8_E5M2FNUZ", "F8_E8M0", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What transformers raises at a config that it cannot use:
REFUSALS = (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, RuntimeError, StrictDataclassError)
LOCAL_OR_DEMO = "A local folder works too, and `uv run demo.py` needs no network."


def find_checkpoint(
    name: str, revision: str | None, constant: str, check: Callable = lambda checkpoint: None
) -> Checkpoint:
    """Find a model by folder or Hub id (downloading what is not in the cache) and read its config.

    `check(checkpoint)` may refuse it by its config, before weights are downloaded. Raises PareError, naming `constant`,
    for a model that is not there, cannot be reached or is not supported.
    """
    check_transformers()
    folder = user_path(constant, name)
    if folder.is_dir():
        revision = None
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise PareError(f"{constant} = {name!r} is not a folder. Give a folder with a checkpoint, or a Hub id.")
    else:
        folder = download_checkpoint(name, revision, constant, ["config.json"])
        revision = folder.name  # the commit
    try:
        raw = json.loads((folder / "config.json").read_text())
        model_type = raw.get("model_type")
    except FileNotFoundError:
        raise PareError(
            f"{constant} = {name!r} holds no config.json, so it is not a Hugging Face checkpoint."
        ) from None
    except (ValueError, AttributeError, OSError) as error:
        raise PareError(
            f"{constant} = {name!r}: config.json is damaged, or cannot be read ({error}). Download it again."
        ) from None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise PareError(
            f"{constant} = {name!r} is of the family {model_type!r}, which Pare does not know (nor any "
            f"mixture of experts, nor fused projections).\nSupported: {', '.join(FAMILIES)}. A new family is a row of "
            "FAMILIES in common.py."
        )
    if raw.get("auto_map"):
        raise PareError(f"{constant} = {name!r} brings code of its own (auto_map in config.json); Pare never runs it.")
    if raw.get("quantization_config"):
        raise PareError(f"{constant} = {name!r} is quantized; give the bfloat16 or float32 checkpoint it came from.")
    config = parse_config(transformers.CONFIG_MAPPING[model_type], raw, f"{constant} = {name!r}")
    if FAMILIES[model_type].rope_per_layer_type:
        check_rope(config, f"{constant} = {name!r}")
    checkpoint = Checkpoint(name, folder, revision, raw, config, FAMILIES[model_type])
    check(checkpoint)
    if revision:
        download_checkpoint(name, revision, constant, ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])
    return checkpoint


def parse_config(config_class, raw: dict, what: str) -> transformers.PreTrainedConfig:
    """config.json as transformers reads it. Raises PareError where it refuses."""
    try:
        return config_class.from_dict(copy.deepcopy(raw))  # it edits what it is given
    except REFUSALS as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise PareError(f"transformers refuses {what}: {reason}") from None


def download_checkpoint(name: str, revision: str | None, constant: str, wanted: list[str]) -> Path:
    """The local snapshot of a Hub repository: the files `wanted`, never a pickle."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["original/*"]))
    except errors.GatedRepoError:
        raise PareError(
            f"{constant} = {name!r} is gated: accept its terms on the Hub, then run `uv run hf auth login`. "
            f"{LOCAL_OR_DEMO}"
        ) from None
    except errors.RevisionNotFoundError:
        raise PareError(f"REVISION = {revision!r} does not exist in {constant} = {name!r}.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise PareError(
            f"{constant} = {name!r} is neither a folder here nor a model on the Hub (or it is private: "
            f"`uv run hf auth login`)."
        ) from None
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        raise PareError(
            f"{constant} = {name!r} is not a folder here, and the Hub could not be reached or gave an error "
            f"({first_line(error)}).\n{LOCAL_OR_DEMO}"
        ) from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_transformers() -> None:
    """Olmo 3 is computed wrongly by transformers 5.0 to 5.12 (YaRN on the sliding layers too)."""
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 13):
        raise PareError(
            f"transformers {transformers.__version__} computes Olmo 3 wrongly; run `uv sync`, or install 5.13 or newer."
        )


def check_rope(config, what: str) -> None:
    """The rotary parameters must be nested by layer type, the sliding layers without scaling."""
    rope = config.rope_parameters
    wrong = not isinstance(rope, dict) or any(not isinstance(rope.get(kind), dict) for kind in set(config.layer_types))
    if wrong or rope.get("sliding_attention", {}).get("rope_type", "default") != "default":
        raise PareError(
            f"{what}: rope_parameters in config.json must have an entry for each of layer_types, and no scaling for "
            "sliding_attention."
        )


def layer_types_of(config) -> list[str]:
    """`full_attention` or `sliding_attention` for every layer."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def best_block(distances: torch.Tensor, count: int) -> int | None:
    """The first of the `count` contiguous layers over which `distances` (L + 1, L + 1) is least; None where there are
    too few. The first and the last layer are never among them."""
    starts = range(1, len(distances) - 1 - count)
    return min(starts, key=lambda start: distances[start, start + count].item(), default=None)


def tensor_infos(checkpoint: Checkpoint, constant: str) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint from the headers of its safetensors files; no weight is read."""
    folder = checkpoint.folder
    what = f"{constant} = {checkpoint.name!r}"
    index = folder / "model.safetensors.index.json"
    sharded = index.is_file() and not (folder / "model.safetensors").is_file()  # transformers looks in this order
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"]) if sharded else {}
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise PareError(f"{what}: {index.name} is damaged. {checkpoint.again}") from None
    except OSError as error:
        raise PareError(f"{what} cannot be read ({first_line(error)}).") from None
    files = sorted(set(weight_map.values())) or ["model.safetensors"]
    if any(Path(file).name != file or file in ("", "..") for file in files):
        raise PareError(f"{what}: {index.name} points outside its folder; this checkpoint is not to be trusted.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and not weight_map and any(folder.glob("model-*.safetensors")):
        missing = [index.name]
    if missing:
        raise PareError(
            f"{what} lacks {first_names(missing)}. Pare reads safetensors only (save_pretrained converts others). "
            f"{'' if any(folder.glob('*.bin')) else checkpoint.again}"
        )
    infos = {}
    for file in files:
        try:
            infos |= read_header(folder / file)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise PareError(f"{what}: {file} is damaged ({first_line(error)}). {checkpoint.again}") from None
    if weight_map and set(weight_map) != set(infos):
        lost = sorted(set(weight_map) ^ set(infos))
        raise PareError(f"{what}: {index.name} and the files disagree on {first_names(lost)}. {checkpoint.again}")
    # old Llama checkpoints hold buffers that transformers computes itself
    return {name: info for name, info in infos.items() if not name.endswith("rotary_emb.inv_freq")}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds: eight bytes of header length, the JSON header, the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size, 100_000_000):
            raise ValueError(f"{size} bytes without a header")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = sorted((*tensor["data_offsets"], name) for name, tensor in header.items())
    ends = [0, *(end for _, end, _ in spans)]
    if [start for start, _, _ in spans] != ends[:-1]:
        raise ValueError("its tensors overlap or leave gaps")
    if 8 + length + ends[-1] != size:
        raise ValueError(f"cut short: {size} bytes of {8 + length + ends[-1]}")
    infos = {}
    for start, end, name in spans:
        shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
        if dtype not in SAFETENSORS_DTYPES or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"{name} is of shape {shape} and dtype {dtype}")
        if dtype in DTYPE_BYTES and end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise ValueError(f"{name} has {end - start} bytes, which is not its shape {shape} in {dtype}")
        infos[name] = TensorInfo(path.name, shape, dtype, 8 + length + start, end - start)
    return infos


class Source:
    """Rows of the tensors of safetensors files, read as byte ranges."""

    def __init__(self, folder: Path, infos: dict[str, TensorInfo]):
        self.folder, self.infos = folder, infos
        self.files = {info.file: (folder / info.file).open("rb") for info in infos.values()}

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """The rows (n,) of a matrix: (n, columns), or of a vector, as a matrix of one column: (n, 1)."""
        info = self.infos[name]
        width = math.prod(info.shape[1:]) * DTYPE_BYTES[info.dtype]
        if len(info.shape) == 1:
            buffer = self.read(info, 0, info.shape[0] * width).reshape(-1, width)[index.numpy()]
        else:
            index = index.numpy()
            first, last = int(index.min()), int(index.max())
            if len(index) > (last - first) // 2:  # one long read is faster than many short ones with small gaps
                span = self.read(info, first * width, (last - first + 1) * width).reshape(-1, width)
                buffer = span if np.array_equal(index, np.arange(first, last + 1)) else span[index - first]
            else:
                buffer = np.empty((len(index), width), np.uint8)
                starts = np.flatnonzero(np.diff(index, prepend=-2) != 1).tolist()  # of each run of adjacent rows
                for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
                    self.read(info, int(index[start]) * width, (end - start) * width, buffer[start:end])
        return torch.from_numpy(buffer).view(TORCH_DTYPES[info.dtype])

    def read(self, info: TensorInfo, start: int, size: int, buffer: np.ndarray | None = None) -> np.ndarray:
        buffer = np.empty(size, np.uint8) if buffer is None else buffer
        rest, file = memoryview(buffer).cast("B"), self.files[info.file].fileno()
        while rest:  # a call reads 2 GiB at most
            try:
                count = os.preadv(file, [rest[: 2**30]], info.start + start + size - len(rest))
            except OSError as error:
                raise PareError(f"{self.folder / info.file} cannot be read ({first_line(error)}).") from None
            if not count:
                raise PareError(f"{self.folder / info.file} ended early: it changed while it was read.")
            rest = rest[count:]
        return buffer

    def forget(self, name: str) -> None:
        """Drop a tensor from the system's page cache: it is read once, and others need the room."""
        info = self.infos[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.files[info.file].fileno(), info.start, info.size, os.POSIX_FADV_DONTNEED)

    def whole(self, name: str) -> torch.Tensor:
        shape = self.infos[name].shape
        return self.rows(name, torch.arange(shape[0])).view(shape)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def count_parameters(shapes: dict[str, tuple]) -> tuple[int, int]:
    """Parameters in total, and without the embedding and the LM head."""
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    embeddings = counts.get("model.embed_tokens.weight", 0) + counts.get("lm_head.weight", 0)
    return sum(counts.values()), sum(counts.values()) - embeddings


def hash_checkpoint(checkpoint: Checkpoint, constant: str) -> str:
    """A hash that tells checkpoints of one shape apart: every tensor's name, shape and a sample of its values."""
    infos, digest = tensor_infos(checkpoint, constant), hashlib.sha256()
    with closing(Source(checkpoint.folder, infos)) as source:
        for name, info in sorted(infos.items()):
            digest.update(f"{name} {info.shape} {info.dtype}".encode())
            rows = max((*info.shape[:1], 1))
            digest.update(source.read(info, 0, info.size * min(2, rows) // rows))  # its first two rows
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_config(checkpoint: Checkpoint) -> str:
    return hashlib.sha256(json.dumps(checkpoint.raw, sort_keys=True).encode()).hexdigest()


def fits_whole(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, constant: str) -> bool:
    """True where a model's weights leave a fifth of what a GPU has free; and for any other device."""
    num_bytes = dtype.itemsize * sum(math.prod(info.shape) for info in tensor_infos(checkpoint, constant).values())
    return device.type != "cuda" or num_bytes <= 0.8 * available_bytes(device)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    constant: str,
    quantization=None,
    spread: bool = False,
):
    """Load a causal language model strictly, in eval mode; `quantization` is a config of transformers.

    Safetensors only, no remote code, no missing, unexpected or mismatched key, finite weights; else PareError. To
    `spread` it is to have its modules on all GPUs and in the CPU's memory, for forward passes of the whole model.
    """
    what = f"{constant} = {checkpoint.name!r}"
    tensor_infos(checkpoint, constant)  # the clear messages come from here
    check_hashes(checkpoint, constant)
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its report of wrong keys; ours is the error below
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            device_map="auto" if spread else {"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation="sdpa",
            quantization_config=quantization,
        )
    except (*REFUSALS, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):  # the scripts know what else there is, and what would fit
            raise
        shapes = "ignore_mismatched_sizes" in str(error)
        reason = "weights and config.json disagree on shapes" if shapes else first_line(error)
        raise PareError(f"{what} does not load: {reason}. {checkpoint.again}") from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
            raise PareError(
                f"{what}: weights and config.json disagree; {kind.replace('_', ' ')}: {first_names(names)}. "
                f"{checkpoint.again}"
            )
    for name, parameter in model.named_parameters():
        # on meta: waits in the CPU's memory
        if not parameter.is_meta and not all(tensor.isfinite().all() for tensor in stored_tensors(parameter)):
            raise PareError(f"{what}: {name} holds values that are not finite. {checkpoint.again}")
    return model.eval()


def widen_window(config, length: int) -> None:
    """Spare rows of `length` tokens the mask, all zeros, that transformers makes for a window just as long."""
    if getattr(config, "sliding_window", None) == length:
        config.sliding_window += 1


def stored_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What a parameter is stored as: itself, or the integers and scales of one that a tensor subclass quantises."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    return [getattr(parameter, name) for name in names] or [parameter]


def check_hashes(checkpoint: Checkpoint, constant: str) -> None:
    """Compare the weights of a model that prune.py or distill.py wrote with the hashes in its pare.json."""
    try:
        record = json.loads((checkpoint.folder / "pare.json").read_text())
        hashes, script = dict(record["sha256"]), record["script"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for file in {info.file for info in tensor_infos(checkpoint, constant).values()} & set(hashes):
        if hash_file(checkpoint.folder / file) != hashes[file]:
            raise PareError(
                f"{constant} = {checkpoint.name!r}: {file} is damaged, or was changed since {script} wrote it.\n"
                f"Run {script} again, or, for a change of your own, move the model out, without pare.json."
            )


def first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_length(checkpoint: Checkpoint, length: int, constant: str) -> None:
    longest = checkpoint.config.max_position_embeddings
    if length > longest:
        raise PareError(
            f"SEQUENCE_LENGTH = {length}: {constant} = {checkpoint.name!r} reads {longest} at most; set it to that."
        )


def load_tokenizer(checkpoint: Checkpoint, constant: str):
    """The checkpoint's own tokenizer. Raises PareError where it has none, or no end-of-text token."""
    settings = checkpoint.folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in settings.read_text(errors="replace"):
        raise PareError(
            f"{constant} = {checkpoint.name!r}: its tokenizer brings code of its own (auto_map); Pare never runs it."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise PareError(f"{constant} = {checkpoint.name!r} has no tokenizer that loads: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise PareError(f"{constant} = {checkpoint.name!r}: its tokenizer has no end-of-text (eos) token.")
    return tokenizer


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation config byte for byte."""
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")
    for path in sorted(source.iterdir()):
        text_file = path.suffix in {".json", ".jinja", ".txt", ".model"}
        weights = path.name in {"config.json", "pare.json"} or path.name.endswith(".index.json")
        if path.is_file() and text_file and not weights:
            shutil.copyfile(path, target / path.name)


# ---------------------------------------------------------------------------------------------------------------------
# Writing: a folder or file appears whole or not at all, and only where Pare wrote before


def check_own_folder(path: Path, constant: str, script: str) -> None:
    """Refuse to write over anything but an empty folder or one whose pare.json names the same script."""
    parent = existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PareError(f"{constant} = {str(path)!r}: {parent} is not a folder that can be written. Choose another.")
    if path.is_mount():  # it cannot be renamed
        raise PareError(f"{constant} = {str(path)!r} is the root of a disk. Choose a folder on it.")
    if not path.exists() or (path.is_dir() and {file.name for file in path.iterdir()} <= {".pare.json.tmp"}):
        return
    try:
        record = json.loads((path / "pare.json").read_text())
        owner, files, hashes = record["script"], record.get("files"), dict(record.get("sha256", {}))
        foreign = sorted(set(files_in(path)) - set(files)) if files is not None else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PareError(
            f"{constant} = {str(path)!r} exists and was not made by Pare. Choose a folder of its own."
        ) from None
    if owner != script:
        raise PareError(f"{constant} = {str(path)!r} was made by {owner}, not by {script}. Choose a folder of its own.")
    written = (path / "pare.json").stat().st_mtime_ns  # the last of its files
    changed = [file for file in hashes if (path / file).is_file() and (path / file).stat().st_mtime_ns > written]
    foreign += [file for file in changed if hash_file(path / file) != hashes[file]]
    if foreign:
        raise PareError(
            f"{constant} = {str(path)!r} holds files that Pare did not write so, as {foreign[0]}. Move them away."
        )


def existing_parent(path: Path) -> Path:
    return next(folder for folder in path.resolve().parents if folder.exists())


def check_outside(path: Path, model_folder: Path, constant: str, model: str = "MODEL") -> None:
    if model_folder.is_dir() and path.resolve().is_relative_to(model_folder.resolve()):
        raise PareError(
            f"{constant} = {str(path)!r} lies in the folder of {model}, where Pare never writes. Choose another."
        )


def write_record(folder: Path, record: dict) -> None:
    """Write pare.json, last: it lists the folder's files, so that a user's own are told apart from ours."""
    write_json(folder / "pare.json", record | {"files": [*files_in(folder), "pare.json"]})


def files_in(folder: Path) -> list[str]:
    """What is in a folder and below: all but folders that hold something themselves."""
    inside = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]
    return sorted(path.relative_to(folder).as_posix() for path in inside)


@contextmanager
def new_folder(path: Path, script: str, constant: str = "OUTPUT_DIR") -> Iterator[Path]:
    """Yield an empty folder that becomes `path` if the block ends well, and vanishes if it does not.

    What `path` held before is replaced only after its successor is complete and synced to disk.
    """
    path = path.resolve()  # a link stays a link
    temporary, old = temporary_folder(path), old_folder(path)
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    check_own_folder(path, constant, script)
    try:
        for left in (temporary, discarded_folder(path)):  # of killed runs
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(temporary, path)
    except (OSError, SafetensorError) as error:
        if old.exists() and not path.exists():
            old.rename(path)
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
        raise PareError(
            f"{constant} = {str(path)!r} could not be written ({first_line(error)}); {free / 1e9:.1f} GB are "
            "free there. What it held before is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def old_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def discarded_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.discarded")


def discard_old(path: Path) -> None:
    """Delete what `path` held before, under a third name: what a kill leaves half of it is never taken for whole."""
    if old_folder(path).exists():
        shutil.rmtree(discarded_folder(path), ignore_errors=True)
        old_folder(path).rename(discarded_folder(path))
    shutil.rmtree(discarded_folder(path), ignore_errors=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Sync the folder `temporary` to disk and rename it onto `path`; what `path` held is removed afterwards."""
    sync_folder(temporary)
    if path.exists():
        discard_old(path)
        path.rename(old_folder(path))
    temporary.rename(path)
    sync_file(path.parent)
    discard_old(path)


@contextmanager
def lock(path: Path, constant: str, rank: int = 0) -> Iterator[None]:
    """Refuse a second process that would write `path`. The system lets go of the lock when a process dies."""
    if rank:
        yield
        return
    path = path.resolve()  # behind a link lies the same folder
    name = path.with_name(f".{path.name}.lock")
    while True:
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            file = name.open("w")
        except OSError as error:
            raise PareError(f"{constant} = {str(path)!r} cannot be written ({first_line(error)}).") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PareError(
                f"{constant} = {str(path)!r} is being written by another run; wait for it, or choose another."
            ) from None
        except OSError as error:
            print(f"{name.parent} has no locks ({first_line(error)}): nothing but you keeps another run from it")
        if name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat()):
            break
        file.close()  # another run removed this file when it ended; lock the new one
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        file.close()


def metadata_of(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file; None where there is none that is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except (SafetensorError, OSError):
        return None


def pare_metadata(path: Path) -> dict:
    """What Pare wrote into a safetensors file's metadata, one JSON text; empty where it is not ours, or not whole."""
    try:
        return dict(json.loads((metadata_of(path) or {}).get("pare", "{}")))
    except (ValueError, TypeError):
        return {}


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_and_forget(descriptor: int) -> None:
    """Sync an open file to disk and drop it from the page cache."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def replace_file(path: Path, write) -> None:
    """Call `write(temporary path)`, sync, and rename onto `path`: it holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        sync_file(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(existing_parent(path)).free
        raise PareError(
            f"{path} could not be written ({first_line(error)}); {free / 1e9:.1f} GB are free there. What was there is "
            "untouched. Make room, or choose another disk by SCORES_PATH or OUTPUT_DIR."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure, path: Path) -> None:
    """Write a PNG, whole or not at all, with plain numbers on logarithmic axes."""
    for axes in figure.axes:
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def write_json(path: Path, value) -> None:
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


# ---------------------------------------------------------------------------------------------------------------------
# The score file


SCORE_TENSORS = ("mlp", "attention", "attn_ln", "ffn_ln", "hidden", "angular_distance")


def serve_command(folder: Path | str, family: Family, hidden_size: int, heads_width: int) -> str:
    """vLLM's for a model folder. Its own code of some families counts on hidden size = heads x head_dim."""
    own = not family.square or hidden_size == heads_width
    return f"uvx vllm serve {shlex.quote(str(folder))}" + " --model-impl transformers" * (not own)


def moments_folder(scores_path: Path) -> Path:
    return scores_path.with_suffix(".moments").resolve()  # a link to a larger disk stays a link


def moments_file(layer: int | None) -> str:
    """The file of a layer's second moments; None for the LM head's input."""
    return "outside.safetensors" if layer is None else f"layer-{layer}.safetensors"


def hash_scores(value) -> str:
    """A hash of everything in a score file but the hash itself: torch.load does not notice a flipped byte."""
    if isinstance(value, torch.Tensor):
        text = f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        text = repr([(key, hash_scores(value[key])) for key in value if key != "sha256"]).encode()
    else:
        text = repr(value).encode()
    return hashlib.sha256(text).hexdigest()


def save_scores(scores: dict, path: Path) -> None:
    scores["sha256"] = hash_scores(scores)
    replace_file(path, lambda temporary: torch.save(scores, temporary))


def load_scores(path: Path) -> dict:
    """Read a score file without running anything in it. Raises PareError for a file that is not one."""
    if not path.is_file():
        raise PareError(f"SCORES_PATH = {str(path)!r} does not exist as a file. Run importance_analysis.py first.")
    try:
        scores = torch.load(path, map_location="cpu", weights_only=True)
        tensors = all(isinstance(scores[key], torch.Tensor) for key in SCORE_TENSORS)
        meta = {"model", "config_hash", "weights_hash", "dataset"} <= set(scores["meta"])
        whole = tensors and meta and scores["layer"] and scores["sha256"] == hash_scores(scores)
    except PermissionError:
        raise
    except Exception:  # whatever the bytes of a foreign file provoke; nothing in it is run
        whole = False
    if not whole:
        raise PareError(
            f"SCORES_PATH = {str(path)!r} is not a score file of this version, or damaged. Run importance_analysis.py "
            "again."
        )
    return scores
