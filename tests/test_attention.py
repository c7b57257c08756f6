"""Attention within documents: the same as one document at a time, for every family and both implementations."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, checkpoint_layers, one_document_rows, random_model, save_checkpoint, some_ids
from test_distill import Rows, run_constants
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import common
import data
import distill
import losses
from common import PareError

LENGTHS = ((30,), (7, 23), (12, 13, 1, 4))  # of the documents of three rows; windows are of 12 tokens
CPU = torch.device("cpu")


def packed(vocab_size: int = 300) -> data.Batch:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return data.make_batch(some_ids(vocab_size), positions, torch.ones(3, 30, dtype=torch.bool), CPU)


def varlen_reference(query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window_size, **more):
    """What varlen_attn is documented to give, one document after the other, from (tokens, heads, head_dim)."""
    assert bounds is key_bounds, "cuDNN wants one tensor"
    assert bounds.dtype == torch.int32
    assert longest == longest_key == bounds.diff().max()
    assert (query.shape[1] != key.shape[1]) == more.get("enable_gqa", False)
    repeats, (left, right), outputs = query.shape[1] // key.shape[1], window_size, []
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < -right) | ((distance > left) if left >= 0 else False)
        scores = (scale or q.shape[-1] ** -0.5) * q @ k.mT
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def varlen(monkeypatch):
    """The kernel of GPUs, as it is documented."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference)


@pytest.mark.parametrize("mode", ["evaluation", "training", "training with checkpointing"])
@pytest.mark.parametrize("implementation", [attention.VARLEN, attention.MASKED])
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_documents_do_not_see_each_other(family, implementation, mode, varlen):
    """As teacher and as student, whose gradients must agree too."""
    model, batch = random_model(CONFIGS[family](vocab_size=300)), packed()
    with torch.enable_grad():
        apart = []
        for ids, lengths in zip(batch.input_ids, LENGTHS, strict=True):
            documents = [model.base_model(document[None], use_cache=False) for document in ids.split(lengths)]
            apart.append(torch.cat([output.last_hidden_state for output in documents], dim=1))
        apart = torch.cat(apart)
        weights = torch.randn(apart.shape, generator=torch.Generator().manual_seed(0))
        parameters = [parameter for parameter in model.base_model.parameters()]
        expected = torch.autograd.grad((apart * weights).sum(), parameters)

    if mode != "evaluation":
        model.train()
        distill.switch_off_dropout(model)  # Seed-OSS has some
    if mode == "training with checkpointing":
        checkpoint_layers(model)
    model.set_attn_implementation(implementation)
    together = distill.hidden_states(model, batch, torch.float32)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(torch.autograd.grad((together * weights).sum(), parameters), expected, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_float32_on_a_gpu_has_keys_for_every_head(monkeypatch):
    """Only the kernel that makes all scores at once shares keys between heads there, and without a mask it would."""
    seen = []

    def look(module, query, key, value, mask, scaling):
        seen.append((module.num_key_value_groups, key.shape[1], value.shape[1]))

    monkeypatch.setattr(attention, "sdpa_attention_forward", look)
    module = SimpleNamespace(num_key_value_groups=4)
    for device, dtype in (("cuda", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float32)):
        with FakeTensorMode():
            tensors = [torch.empty(2, heads, 30, 16, dtype=dtype, device=device) for heads in (8, 2, 2)]
            attention.attend_masked(module, *tensors, None, masks={None: None}, longest=30)
    assert seen == [(1, 8, 8), (4, 2, 2), (4, 2, 2)]


def masks_given(model, batch: data.Batch, monkeypatch) -> list:
    """The mask of every attention in a pass forward and backward."""
    seen, ordinary = [], torch.nn.functional.scaled_dot_product_attention

    def look(*tensors, attn_mask=None, **more):
        seen.append(attn_mask)
        assert more["is_causal"] == (attn_mask is None)
        return ordinary(*tensors, attn_mask=attn_mask, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
        distill.hidden_states(model, batch, torch.float32).sum().backward()
    return seen


def test_masks_are_made_once_and_only_where_they_are_needed(monkeypatch):
    model = random_model(CONFIGS["olmo3"](vocab_size=300)).train()
    checkpoint_layers(model)
    model.set_attn_implementation(attention.MASKED)
    long, short = one_document_rows(some_ids(300)), one_document_rows(some_ids(300, (3, 12)))
    assert masks_given(model, short, monkeypatch) == [None] * 16  # no document is longer than the window of 12
    masks = masks_given(model, long, monkeypatch)
    assert sum(mask is None for mask in masks) == 4  # two full layers of eight, twice
    assert len({id(mask) for mask in masks}) == 2
    masks = masks_given(model, packed(), monkeypatch)
    assert None not in masks
    assert len({id(mask) for mask in masks}) == 2


@pytest.mark.parametrize("family", CONFIGS)
def test_every_mask_is_one_that_a_layer_asks_for(family, monkeypatch):
    asked = set()

    class Masks(dict):
        def __getitem__(self, window):
            asked.add(window)
            return super().__getitem__(window)

    model, make = random_model(CONFIGS[family](vocab_size=300)), attention.arguments

    def arguments(*args):
        made = make(*args)
        return made | {"masks": Masks(made["masks"])}

    monkeypatch.setattr(attention, "arguments", arguments)
    model.set_attn_implementation(attention.MASKED)
    for length in (30, 10):
        asked.clear()
        distill.hidden_states(model, one_document_rows(some_ids(300, (2, length))), torch.float32)
        assert asked == attention.windows(model.config, length)


class Waiting(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: numbers read from tensors, sizes that depend on data."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::").startswith(self.names):
            self.seen.append(function._schema.name)
        indices = args[1] if function._schema.name == "aten::index.Tensor" or "aten::index" in str(function) else []
        if any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices or []):
            self.seen.append("index by booleans")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_a_step_waits_for_the_device_once(loss, hidden, text, tmp_path, monkeypatch):
    """For the line that it prints: loss and norm leave in one transfer, which is no operation that can be counted."""
    pair = (tmp_path, tmp_path)
    constants = run_constants(pair, text, tmp_path / "out", LOSS=loss, TOKENS_PER_STEP=128, MICRO_BATCH_SIZE=2)
    settings = distill.derive_settings(common.read_constants(distill) | constants)
    settings.hidden = losses.HiddenLoss(torch.arange(48)) if hidden else None
    teacher, student = (random_model(CONFIGS["olmo3"](vocab_size=300), seed) for seed in (1, 2))
    teacher.requires_grad_(False)
    student.train()
    batches = distill.step_batches(Rows(4), 0, settings)
    optimizer = distill.build_optimizer(student, settings)
    waited, transfers, ordinary, make = {}, [], torch.Tensor.tolist, torch.tensor

    def tensor(*args, device=None, **more):  # from the host's own memory to a GPU: that waits
        assert device is None
        return make(*args, **more)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor) or ordinary(tensor))
    for implementation in (attention.MASKED, "sdpa"):
        for model in (teacher, student):
            model.set_attn_implementation(implementation)
        transfers.clear()
        with Waiting() as waiting:
            distill.train_step(student, teacher, batches, optimizer, 0, settings)
        waited[implementation] = waiting.seen
        assert len(transfers) == 1
    assert waited[attention.MASKED] == []
    assert waited["sdpa"], "transformers' own masks wait: if they do not any more, attention.py has lost one reason"


def test_documents_are_found_where_positions_do_not_go_on():
    positions = [[0, 1, 2, 0, 1], [5, 6, 7, 8, 9], [0, 0, 0, 1, 2], [0, 1, 5, 6, 7]]
    documents = attention.find_documents(torch.tensor(positions), CPU)
    assert documents.bounds.tolist() == [0, 3, 5, 10, 11, 12, 15, 17, 20]
    assert (documents.longest, documents.shape) == (5, (4, 5))


# ---------------------------------------------------------------------------------------------------------------------
# ATTENTION


def heads(number: int = 4, kv: int = 2):
    return SimpleNamespace(config=SimpleNamespace(num_attention_heads=number, num_key_value_heads=kv), head_dim=16)


def test_the_trial_passes_what_is_right(varlen):
    assert attention.trial(heads(), CPU, torch.float32) is None
    assert attention.trial(heads(4, 4), CPU, torch.float32) is None


def one_more(*args, window_size, **more):
    left, right = window_size
    return varlen_reference(*args, window_size=(left + (left > 0), right), **more)


def no_documents(query, key, value, bounds, _, longest, __, **more):
    whole = torch.tensor([0, len(query)], dtype=torch.int32)
    return varlen_reference(query, key, value, whole, whole, len(query), len(query), **more)


def absent(*args, **more):
    raise TypeError("varlen_attn() got an unexpected keyword argument 'window_size'")


@pytest.mark.parametrize(
    "wrong", [one_more, no_documents, absent, lambda *a, **k: varlen_reference(*a, **k) * torch.nan]
)
def test_the_trial_fails_what_is_wrong(wrong, monkeypatch, capsys):
    """Then "auto" goes on without it, and says so; "flash" is refused."""
    monkeypatch.setattr(attention, "varlen_attn", wrong)
    problem = attention.trial(heads(), CPU, torch.float32)
    assert problem
    monkeypatch.setattr(attention, "trial", lambda model, device, dtype: problem)
    gpu = torch.device("cuda")
    assert attention.choose("auto", [heads()], gpu, torch.bfloat16) == attention.MASKED
    assert problem in capsys.readouterr().out
    with pytest.raises(PareError, match=r"(?s)ATTENTION = 'flash'.*Set ATTENTION = 'sdpa'"):
        attention.choose("flash", [heads()], gpu, torch.bfloat16)
    assert attention.choose("sdpa", [heads()], gpu, torch.bfloat16) == attention.MASKED


def test_flash_is_chosen_where_it_works(monkeypatch):
    monkeypatch.setattr(attention, "trial", lambda model, device, dtype: None)
    gpu = torch.device("cuda")
    assert attention.choose("auto", [heads()], gpu, torch.bfloat16) == attention.VARLEN
    assert attention.choose("flash", [heads()], gpu, torch.bfloat16) == attention.VARLEN
    assert attention.choose("auto", [heads()], gpu, torch.float32) == attention.MASKED
    assert attention.choose("auto", [heads()], CPU, torch.bfloat16) == attention.MASKED
    with pytest.raises(PareError, match="bfloat16, not cpu"):
        attention.choose("flash", [heads()], CPU, torch.bfloat16)


def test_a_kernel_that_is_not_there_is_a_reason_and_no_traceback():
    """PyTorch's own, on a CPU."""
    assert attention.trial(heads(), CPU, torch.bfloat16)


def test_cudnn_is_never_used(text, tmp_path):
    """Its gradients would not be the same bits in every run."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    settings = distill.derive_settings(common.read_constants(distill) | run_constants((tmp_path,) * 2, text, tmp_path))
    distill.choose_attention(heads(), heads(), settings)
    assert settings.implementation == attention.MASKED
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_full_gpu_is_no_reason_for_other_bits(monkeypatch):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "varlen_attn", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.trial(heads(), CPU, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_the_trial_passes_on_a_gpu():
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert attention.trial(heads(8, 8), torch.device("cuda"), torch.bfloat16) is None
    assert attention.trial(heads(8, 2), torch.device("cuda"), torch.bfloat16) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_flash_gives_the_same_bits_twice_on_a_gpu():
    gpu = torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert attention.choose("flash", [heads()], gpu, torch.bfloat16) == attention.VARLEN
    model = random_model(CONFIGS["olmo3"](vocab_size=300)).to(gpu)
    model.set_attn_implementation(attention.VARLEN)
    rows = torch.stack([torch.arange(n) for n in (30, 30, 30)])
    batch = data.make_batch(some_ids(300), rows, torch.ones(3, 30, dtype=torch.bool), gpu)
    gradients = []
    with distill.deterministic(True, gpu):
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = distill.hidden_states(model, batch, torch.bfloat16).float().square().mean()
            gradients.append(torch.autograd.grad(loss, list(model.base_model.parameters())))
    assert all(map(torch.equal, *gradients))


# ---------------------------------------------------------------------------------------------------------------------
# COMPILE


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_run_and_give_the_same(checkpointing, text, tmp_path, monkeypatch):
    """Traced and differentiated as COMPILE does it, but not translated to C++, which takes long."""
    graphs, compile = [], torch.nn.Module.compile

    def run_as_it_is(graph, example_inputs):
        return make_boxed_func(lambda *inputs: graphs.append(1) or graph(*inputs))

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m: compile(m, backend=aot_autograd(fw_compiler=run_as_it_is))
    )
    torch.compiler.reset()
    pair = [save_checkpoint(tmp_path / str(n), "olmo3", seed=n, num_hidden_layers=4) for n in (1, 2)]
    constants = run_constants(pair, text, tmp_path / "out", GRADIENT_CHECKPOINTING=checkpointing)
    settings = distill.derive_settings(common.read_constants(distill) | constants)
    batch = distill.step_batches(Rows(4), 0, settings)[0]
    checkpoints = [common.find_checkpoint(str(folder), None, "STUDENT") for folder in pair]
    found = []
    for settings.compile in (False, True):
        teacher, student = distill.load_pair(*checkpoints, settings)
        settings.compile = False  # of the loss
        student.train()
        loss = distill.backward(student, teacher, batch, 50, settings)
        ran = len(graphs)
        gradients = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
        evaluation = distill.hidden_states(student.eval(), batch, torch.float32)
        found.append((loss, gradients, evaluation))
    assert ran >= 4 + 2 * 4  # every layer of the student forward and backward, and of the teacher
    assert len(graphs) > ran  # in evaluation too
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
