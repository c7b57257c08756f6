"""The preflight's bytes are those that a step keeps alive, and its sentences say what they should.

No GPU: live bytes are those of tensors' storages, counted where operations return them. At true shapes the tensors are
fake (shapes and dtypes, no values) on a fake CPU that computes as a GPU does: autocast's lists agree for what these
models call, `losses` multiplies bfloat16 into float32 without copies, and attention with a mask is the memory-efficient
kernel. What this cannot see, a GPU adds: workspaces of kernels, the allocator's rounding and
gaps, the driver.
"""

import ast
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CONFIGS, DEFAULTS, ROOT, configure, load
from test_distill import run_constants
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import common
import distill
import losses
import preflight
from common import PareError
from data import Batch

sys.path.insert(0, str(ROOT / "benchmarks"))

from prune_cost import OLMO_3_7B

STUDENT = {  # prune.py's default target
    "hidden_size": 3072,
    "intermediate_size": 6144,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "head_dim": 128,
}
SMALL = OLMO_3_7B | {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "layer_types": OLMO_3_7B["layer_types"][:4],
    "sliding_window": 64,
    "vocab_size": 2048,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GEMMA = {"vocab_size": 262208, "head_dim": 256, "sliding_window": 1024, "num_attention_heads": 8}
REAL_SHAPES = {  # teacher's, student's: 2 layers are enough, and the worst case for what is not weights
    "llama": ({"hidden_size": 4096, "intermediate_size": 14336}, {"hidden_size": 3072, "intermediate_size": 9216}),
    "mistral": ({"hidden_size": 4096, "intermediate_size": 14336}, {"hidden_size": 3072, "intermediate_size": 9216}),
    "qwen2": ({"hidden_size": 3584, "intermediate_size": 18944}, {"hidden_size": 2048, "intermediate_size": 11008}),
    "qwen3": ({"hidden_size": 4096, "intermediate_size": 12288}, {"hidden_size": 2560, "intermediate_size": 9728}),
    "olmo2": ({"hidden_size": 4096, "intermediate_size": 11008}, {"hidden_size": 2048, "intermediate_size": 8192}),
    "gemma3_text": (
        GEMMA | {"hidden_size": 2560, "intermediate_size": 10240},
        GEMMA | {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4},
    ),
    "smollm3": ({"hidden_size": 2048, "intermediate_size": 11008}, {"hidden_size": 2048, "intermediate_size": 5504}),
    "seed_oss": ({"hidden_size": 5120, "intermediate_size": 27648}, {"hidden_size": 4096, "intermediate_size": 13824}),
}


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def add(self, tensors) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)):
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                weakref.finalize(storage, self.remove, key)
        self.peak = max(self.peak, self.now)

    def remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def attention_of_a_gpu(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    assert attn_mask is not None
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    assert attn_mask.dtype == query.dtype
    numbers = attn_mask.expand(-1, query.shape[1], -1, -1)
    call = torch.ops.aten._scaled_dot_product_efficient_attention
    return call(query, key, value, numbers, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


@pytest.fixture
def as_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_of_a_gpu)
    monkeypatch.setattr(losses, "operand", lambda tensor, dtype: tensor)
    monkeypatch.setattr(losses, "project", lambda a, b, dtype, out: out)
    monkeypatch.setattr(losses, "add_product", lambda total, a, b: None)


def checkpoint(config) -> SimpleNamespace:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return SimpleNamespace(config=config, family=common.FAMILIES[config.model_type], head_dim=head_dim)


def olmo(num_layers: int) -> tuple:
    shape = OLMO_3_7B | {"num_hidden_layers": num_layers, "layer_types": OLMO_3_7B["layer_types"][:num_layers]}
    return transformers.Olmo3Config(**shape), transformers.Olmo3Config(**shape | STUDENT)


def settings_for(device: str = "cpu", dtype=torch.bfloat16, **constants):
    constants = {"SEQUENCE_LENGTH": 8192, "MICRO_BATCH_SIZE": 1, "TOKENS_PER_STEP": 2**17} | constants
    chunk = constants.pop("LOSS_CHUNK_BYTES", 2**30)
    settings = distill.derive_settings(DEFAULTS[distill] | constants | {"DEVICE": "cpu", "LOSS_CHUNK_BYTES": chunk})
    settings.dtype, settings.device = dtype, torch.device(device)
    return settings


def tracked_step(configs: tuple, settings, monkeypatch) -> tuple[int, int]:
    """(peak of a micro-batch and the optimizer's step, what lives before them) in bytes: rows of two documents."""

    def build(config, dtype, device, constant, quantization=None):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    monkeypatch.setattr(common, "load_model", build)
    rows, length = settings.micro_batch_size, settings.sequence_length
    teacher, student = distill.load_pair(*configs, settings)
    optimizer = distill.build_optimizer(student.train(), settings)
    with Live() as live:
        live.add([*teacher.parameters(), *student.parameters()])
        for parameter in student.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments | {"step": torch.zeros(())}
            if settings.rows_per_step > rows:
                parameter.grad = torch.zeros_like(parameter)
        before = live.now
        ids = torch.zeros(rows, length, dtype=torch.long)
        where = torch.arange(rows * (length - 1))
        bounds = torch.arange(2 * rows + 1, dtype=torch.int32)
        batch = Batch(ids, ids, where, attention.Documents(bounds, length - 1, (rows, length)))
        distill.backward(student, teacher, batch, len(where), settings)
        optimizer.step()
    return live.peak, before


def check(configs: tuple, settings, monkeypatch, fake: bool = True) -> None:
    """Within 10 % as a whole, and for what comes to weights, gradients and moments: that alone would hide the rest."""
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True):
            peak, before = tracked_step(configs, settings, monkeypatch)
    else:
        peak, before = tracked_step(configs, settings, monkeypatch)
    parts = preflight.memory_parts(*map(checkpoint, configs), settings, 1)
    expected = sum(parts.values())
    print(f"expected {expected / 1e9:.3f} GB, tracked {peak / 1e9:.3f} GB: {expected / peak - 1:+.2%}")
    assert expected == pytest.approx(peak, rel=0.1), parts
    assert expected - before == pytest.approx(peak - before, rel=0.1), parts


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_memory_is_that_of_a_step_at_true_widths(as_a_gpu, monkeypatch, rows, checkpointing):
    settings = settings_for(MICRO_BATCH_SIZE=rows, GRADIENT_CHECKPOINTING=checkpointing)
    check(olmo(4), settings, monkeypatch)


def test_memory_is_that_of_a_step_at_true_widths_and_depth(as_a_gpu, monkeypatch):
    check(olmo(32), settings_for(), monkeypatch)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_is_that_of_a_step_without_masks(as_a_gpu, monkeypatch, checkpointing):
    settings = settings_for(SEQUENCE_LENGTH=2**15, GRADIENT_CHECKPOINTING=checkpointing)
    settings.implementation = attention.VARLEN
    check(olmo(4), settings, monkeypatch)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_is_that_of_a_step_of_long_rows(as_a_gpu, monkeypatch, checkpointing):
    """Masks grow with the square of the length."""
    settings = settings_for(SEQUENCE_LENGTH=2**15, GRADIENT_CHECKPOINTING=checkpointing)
    check(olmo(4), settings, monkeypatch)


def test_memory_is_that_of_a_large_teacher_and_a_small_student(as_a_gpu, monkeypatch):
    """The peak is the teacher's forward pass."""
    small = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    teacher, _ = olmo(4)
    student = transformers.Olmo3Config(**teacher.to_dict() | small)
    check((teacher, student), settings_for(MICRO_BATCH_SIZE=4), monkeypatch)


@pytest.mark.parametrize("family", REAL_SHAPES)
def test_memory_is_that_of_a_step_in_each_family(as_a_gpu, monkeypatch, family):
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 128256}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    more = layers if family == "gemma3_text" else {"num_hidden_layers": 2}
    more |= {"no_rope_layers": [1, 0]} if family == "smollm3" else {}
    configs = tuple(
        CONFIGS[family](**heads | more | {"max_position_embeddings": 8192} | shape) for shape in REAL_SHAPES[family]
    )
    check(configs, settings_for(SEQUENCE_LENGTH=4096, MICRO_BATCH_SIZE=4), monkeypatch)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_is_that_of_a_real_step_in_float32(monkeypatch, checkpointing):
    """Real tensors in place of fake ones, and the CPU's own attention."""
    student = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3}
    configs = transformers.Olmo3Config(**SMALL), transformers.Olmo3Config(**SMALL | student)
    more = {"SEQUENCE_LENGTH": 256, "MICRO_BATCH_SIZE": 2, "LOSS_CHUNK_BYTES": 2**22}
    settings = settings_for(dtype=torch.float32, GRADIENT_CHECKPOINTING=checkpointing, **more)
    check(configs, settings, monkeypatch, fake=False)


def test_a_step_of_one_micro_batch_finds_no_gradients(as_a_gpu, monkeypatch):
    settings = settings_for(MICRO_BATCH_SIZE=2, TOKENS_PER_STEP=2**14, GRADIENT_CHECKPOINTING=False)
    configs = olmo(4)
    check(configs, settings, monkeypatch)
    parts = preflight.memory_parts(*map(checkpoint, configs), settings, 1)
    assert parts["gradients"] < parts["student's weights"]


def test_two_processes_halve_what_is_sharded():
    models = [checkpoint(config) for config in olmo(32)]
    one, two = (preflight.memory_parts(*models, settings_for(), world) for world in (1, 2))
    sharded = ["student's weights", "gradients", "AdamW's moments", "teacher's weights"]
    assert [two[part] for part in sharded] == [one[part] // 2 for part in sharded]
    assert one["layers gathered"] == 0 < two["layers gathered"] < one["student's weights"] / 2
    assert two["activations"] == one["activations"]


def test_a_teacher_of_fewer_bits_takes_fewer_bytes():
    models = [checkpoint(config) for config in olmo(32)]
    bf16, settings = settings_for(), settings_for()
    settings.teacher_quantization = "8bit"
    bf16, int8 = (preflight.memory_parts(*models, s, 1)["teacher's weights"] for s in (bf16, settings))
    assert bf16 - int8 == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


@pytest.mark.parametrize(
    ("gigabytes", "advice"),
    [
        (100, "GRADIENT_CHECKPOINTING = True"),
        (90, "MICRO_BATCH_SIZE = 2 and GRADIENT_CHECKPOINTING = True"),
        (80, "MICRO_BATCH_SIZE = 1 and GRADIENT_CHECKPOINTING = True"),
        (75, "MICRO_BATCH_SIZE = 1 and GRADIENT_CHECKPOINTING = True and TEACHER_QUANTIZATION = '8bit'"),
        (70, "GRADIENT_CHECKPOINTING = True and 2 GPUs (`uv run accelerate launch --num_processes 2 distill.py`)"),
    ],
)
def test_what_does_not_fit_is_told_what_would(gigabytes, advice):
    models, free = [checkpoint(config) for config in olmo(32)], gigabytes * 10**9
    settings = settings_for("cuda", MICRO_BATCH_SIZE=4, GRADIENT_CHECKPOINTING=False)
    needed = sum(preflight.memory_parts(*models, settings, 1).values())
    said = preflight.verdict(*models, settings, 1, needed, free)
    assert said == f"does not fit. This would: {advice}."


def test_advice_is_true():
    """For many sizes of a device: with the constants that are named the peak is below what is free."""
    models, constants = [checkpoint(c) for c in olmo(32)], {"MICRO_BATCH_SIZE": 4, "GRADIENT_CHECKPOINTING": False}
    needed = sum(preflight.memory_parts(*models, settings_for("cuda", **constants), 1).values())
    for gigabytes in range(10, needed // 10**9, 3):
        settings = settings_for("cuda", **constants)
        advice = preflight.what_fits(*models, settings, 1, gigabytes * 10**9)
        if advice is None:
            assert gigabytes < 30
            continue
        world = 1
        for change in advice.split(" and "):
            if "num_processes" in change:
                world = int(change.split()[0])
            else:
                name, value = change.split(" = ")
                setattr(settings, name.lower(), ast.literal_eval(value))
        settings.rows_per_step = settings.tokens_per_step // settings.sequence_length
        assert sum(preflight.memory_parts(*models, settings, world).values()) <= gigabytes * 10**9, advice


def test_what_fits_is_said_to_fit():
    models, settings = [checkpoint(config) for config in olmo(4)], settings_for()
    assert preflight.verdict(*models, settings, 1, 80, 100) == "fits"
    assert preflight.verdict(*models, settings, 1, 95, 100) == "fits, with less than a tenth to spare"
    assert preflight.verdict(*models, settings, 1, 101, 100).endswith(
        "Take a larger device, or a smaller STUDENT or TEACHER."
    )
    said = preflight.verdict(*models, settings_for(MICRO_BATCH_SIZE=4), 1, 10**12, 25 * 10**9, True)
    elsewhere = ", in another OUTPUT_DIR, or free the device: a run continues with its own constants."
    assert said.endswith(f"MICRO_BATCH_SIZE = 1{elsewhere}")
    said = preflight.verdict(*models, settings_for("cuda", MICRO_BATCH_SIZE=4), 1, 10**12, 25 * 10**9, True)
    assert said.endswith("This would: 4 GPUs (`uv run accelerate launch --num_processes 4 distill.py`).")  # it may have


def test_more_gpus_are_for_a_teacher_in_bfloat16_and_not_for_a_projection(tmp_path):
    models, settings = [checkpoint(config) for config in olmo(32)], settings_for("cuda")
    settings.teacher_quantization = "8bit"
    assert preflight.what_fits(*models, settings, 1, 50 * 10**9).startswith("TEACHER_QUANTIZATION = None and 2 GPUs")
    settings = settings_for("cuda", HIDDEN_LOSS=True)
    models[1].folder = tmp_path  # without a record of what it kept
    assert "GPUs" not in str(preflight.what_fits(*models, settings, 1, 50 * 10**9))


@pytest.mark.parametrize(
    ("gigabytes", "advice"),
    [(40, "4 GPUs (`uv run accelerate launch --num_processes 4 distill.py`)"), (90, "MICRO_BATCH_SIZE = 1 and")],
)
def test_memory_that_runs_out_is_told_what_the_forecast_knows(gigabytes, advice, tmp_path, monkeypatch):
    """Weights and optimizer alone too large; or all of it, which the forecast had called just large enough."""
    models = [checkpoint(config) for config in olmo(32)]
    settings = settings_for("cuda", MICRO_BATCH_SIZE=2)
    settings.checkpoints = tmp_path
    monkeypatch.setattr(common, "available_bytes", lambda device: gigabytes * 10**9)
    needed = sum(preflight.memory_parts(*models, settings, 1).values())
    assert (needed > gigabytes * 10**9) == (gigabytes == 40)
    with pytest.raises(PareError) as error, distill.enough_memory(*models, settings, 1):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert advice in str(error.value)


def test_speed_is_the_median_after_the_first_step():
    settings = settings_for(TOKENS_PER_STEP=2**17)
    text = preflight.speed([900.0, 10.0, 30.0], 360, settings)
    assert text == f"{2**17 / 20:,.0f} tokens/s: 2 hours to go"


def test_a_run_says_what_it_takes_before_it_loads_and_its_speed_after(checkpoints, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "available_bytes", lambda device: 1000)
    load_pair, printed = distill.load_pair, []
    monkeypatch.setattr(distill, "load_pair", lambda *args: printed.append(capsys.readouterr().out) or load_pair(*args))
    configure(distill, **run_constants([checkpoints["olmo3"]] * 2, text, tmp_path / "out", TRAIN_TOKENS=4 * 128))
    distill.main()
    before, after = printed[0], capsys.readouterr().out
    number = sum(parameter.numel() for parameter in load(checkpoints["olmo3"]).parameters())
    assert f"{number:,} -> {number:,} parameters on cpu, compute in float32" in before
    assert "memory does not fit" in before
    assert f"{distill.KEEP_CHECKPOINTS + 1} checkpoints, one being written" in before
    assert after.count(" hours to go") == 1
