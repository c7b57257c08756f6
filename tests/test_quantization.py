"""TEACHER_QUANTIZATION: what is quantised and what is not, the KL that it costs, runs with it, and what is refused."""

import importlib
import re
import shutil
import weakref

import pytest
import torch
import transformers
from conftest import CONFIGS, DEFAULTS, ROOT, configure, load, logits_of, save_checkpoint, some_ids
from test_distill import Rows, distilled, lines_of, run_constants
from test_never_lose import bits

import attention
import common
import distill
import quantization
from common import PareError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    teacher = save_checkpoint(root / "teacher", "olmo3", seed=1)
    return teacher, save_checkpoint(root / "student", "olmo3", 2, hidden_size=32, num_hidden_layers=4)


@pytest.fixture(scope="module")
def finished(pair, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    configure(distill, **DEFAULTS[distill])  # a module's fixture comes before those of its tests
    distilled(pair, text, output, TEACHER_QUANTIZATION="8bit")
    return output


def load_quantized(folder, dtype=torch.float32):
    checkpoint = common.find_checkpoint(str(folder), None, "TEACHER")
    return common.load_model(checkpoint, dtype, CPU, "TEACHER", quantization.config_of("X", "8bit", 1))


def stored_bytes(model) -> int:
    return sum(tensor.nbytes for parameter in model.parameters() for tensor in common.stored_tensors(parameter))


# ---------------------------------------------------------------------------------------------------------------------
# The model


@needs_torchao
@pytest.mark.parametrize("family", CONFIGS)
def test_the_linear_layers_are_quantised_and_nothing_else(family, checkpoints):
    """Embeddings, norms, biases and the LM head, tied or not, keep every bit; a layer's outputs move a little."""
    whole, model = load(checkpoints[family]), load_quantized(checkpoints[family])
    before = dict(whole.named_parameters())
    kinds = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        in_layers = isinstance(module, torch.nn.Linear) and ".layers." in name and name.endswith("weight")
        stored = common.stored_tensors(parameter)
        kinds[name] = {str(tensor.dtype) for tensor in stored}
        if in_layers:
            assert "torch.int8" in kinds[name], name
            scale = before[name].abs().amax(1, keepdim=True) / 127
            assert ((parameter.dequantize() - before[name]).abs() <= 0.51 * scale).all(), name
        else:
            assert kinds[name] == {"torch.float32"}, name
            assert torch.equal(parameter, before[name]), name
    assert kinds.keys() == before.keys()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == whole.config.tie_word_embeddings
    ids = some_ids(model.config.vocab_size)
    logits, expected = logits_of(model, ids), logits_of(whole, ids)
    assert torch.equal(logits, logits_of(model, ids))
    assert 1e-5 < (logits - expected).norm() / expected.norm() < 0.1


@needs_torchao
def test_the_bundled_teacher_in_8_bit():
    """What README says of it: bytes, and a KL to the bfloat16 teacher that is small beside the text's entropy."""
    checkpoint = common.find_checkpoint(str(ROOT / "assets" / "tiny-olmo3"), None, "TEACHER")
    whole = common.load_model(checkpoint, torch.bfloat16, CPU, "TEACHER")
    model = load_quantized(checkpoint.folder, torch.bfloat16)
    assert (stored_bytes(whole), stored_bytes(model)) == (7_055_680, 4_584_000)
    tokenizer = common.load_tokenizer(checkpoint, "TEACHER")
    ids = torch.tensor([tokenizer((ROOT / "common.py").read_text()[:3000]).input_ids[:512]])
    q_log, p_log = (logits_of(m, ids).double().log_softmax(-1) for m in (whole, model))
    assert 1e-4 < (q_log.exp() * (q_log - p_log)).sum(-1).mean() < 2e-3


@needs_torchao
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    def edit(model):
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value

    with pytest.raises(PareError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        load_quantized(save_checkpoint(tmp_path / "model", "llama", edit=edit))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("fits", [True, False])
def test_a_teacher_too_large_for_the_gpu_before_it_is_quantised(fits, pair, text, tmp_path, monkeypatch):
    """Its states come from the CPU."""
    load_model, used = common.load_model, []

    def watched(checkpoint, dtype, device, constant):
        used.append(load_model(checkpoint, dtype, CPU, constant))
        assert device.type == ("meta" if fits else "cpu")
        return used[-1].to(device)

    monkeypatch.setattr(common, "load_model", watched)
    monkeypatch.setattr(common, "fits_whole", lambda *args: fits)
    constants = {name: getattr(distill, name) for name in common.constants_of(distill)}
    settings = distill.derive_settings(constants | run_constants(pair, text, tmp_path / "out"))
    settings.device, settings.implementation = torch.device("meta"), attention.VARLEN
    teacher = common.find_checkpoint(str(pair[0]), None, "TEACHER")
    monkeypatch.setattr(distill, "teacher_states", lambda model, batch: batch.input_ids[0].float())
    batch, states = distill.unquantized_states(teacher, Rows(8), settings)
    assert used[0].config._attn_implementation == (attention.VARLEN if fits else attention.MASKED)
    assert batch.input_ids.device.type == states.device.type == "meta"


@needs_torchao
def test_the_printed_kl_is_that_of_full_logits(pair, text, tmp_path, capsys, monkeypatch):
    """Against transformers alone and float64, on the first held-out micro-batch, in chunks that do not divide it; and
    the whole teacher is gone before the quantised one comes."""
    import datasets
    from torchao.quantization import Int8WeightOnlyConfig

    load_model, teachers, alive = common.load_model, [], []

    def watched(checkpoint, dtype, device, constant, config=None):
        alive.append(sum(teacher() is not None for teacher in teachers))
        model = load_model(checkpoint, dtype, device, constant, config)
        teachers.extend([weakref.ref(model)] * (constant == "TEACHER"))
        return model

    monkeypatch.setattr(common, "load_model", watched)
    distilled(pair, text, tmp_path / "out", TEACHER_QUANTIZATION="8bit", TRAIN_TOKENS=128, LOSS_CHUNK_BYTES=50_000)
    assert len(teachers) == 2
    assert alive[:2] == [0, 0]
    rows = datasets.Dataset.from_file(str(tmp_path / "out" / "data" / "held_out.arrow"))[:2]
    columns = {name: torch.as_tensor(rows[name]) for name in rows}
    counted = columns["counted"].bool()
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        pair[0], dtype=torch.float32, quantization_config=config
    )
    options = {"position_ids": columns["position_ids"].long(), "use_cache": False}
    with torch.no_grad():
        q_log, p_log = (
            model.eval()(input_ids=columns["input_ids"].long(), **options).logits[counted].double().log_softmax(-1)
            for model in (load(pair[0]), quantized)
        )
    expected = (q_log.exp() * (q_log - p_log)).sum(-1).mean().item()
    assert expected > 1e-4
    pattern = r"teacher in 8bit: KL ([\d.]+) to the float32 one, on one batch of (\d+) tokens"
    ((printed, count),) = re.findall(pattern, capsys.readouterr().out)
    assert int(count) == counted.sum()
    assert float(printed) == pytest.approx(expected, abs=6e-6)
    for record in ("pare.json", "model/pare.json", "checkpoints/step-00000001/pare.json"):
        saved = distill.read_json(tmp_path / "out" / record)
        assert saved["teacher"]["quantization_kl"] == pytest.approx(expected, rel=1e-3)
        assert saved["constants"]["TEACHER_QUANTIZATION"] == "8bit"
        assert "torchao" in saved["versions"]


@needs_torchao
def test_the_student_learns_from_the_quantised_teacher(finished, pair):
    evaluated = [line for line in lines_of(finished) if "held_out_kl" in line]
    assert evaluated[-1]["held_out_kl"] < 0.8 * evaluated[0]["held_out_kl"]
    load(finished / "model")


@needs_torchao
def test_a_run_that_was_cut_continues_to_the_same_bits(finished, pair, text, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000012")
    distilled(pair, text, output, TEACHER_QUANTIZATION="8bit")
    assert "continuing after step 9" in capsys.readouterr().out
    assert bits(output) == bits(finished)
    with pytest.raises(PareError, match=r"other TEACHER_QUANTIZATION = None .was '8bit'"):
        distilled(pair, text, output, TEACHER_QUANTIZATION=None)


@needs_torchao
@pytest.mark.parametrize("more", [{"HIDDEN_LOSS": True}, {"DTYPE": "bfloat16"}, {"LOSS": "cross_entropy"}])
def test_with_other_settings(more, pair, text, tmp_path):
    """Also teacher correction, where only the evaluation runs the teacher: at first the student is the whole one."""
    models = (pair[0], pair[0]) if "LOSS" in more else pair
    distilled(models, text, tmp_path / "out", TEACHER_QUANTIZATION="8bit", TRAIN_TOKENS=256, **more)
    first, *_, last = [line for line in lines_of(tmp_path / "out") if "held_out_kl" in line]
    if "LOSS" in more:
        assert 1e-4 < first["held_out_kl"] < 0.1
    key = "held_out_loss" if "LOSS" in more else "held_out_kl"
    assert last[key] < first[key]


@needs_torchao
def test_a_micro_batch_too_large_for_the_whole_teacher_is_said(pair, text, tmp_path, monkeypatch):
    def out_of_memory(teacher, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(distill, "teacher_states", out_of_memory)
    with pytest.raises(PareError, match="MICRO_BATCH_SIZE = 2 rows"):
        distilled(pair, text, tmp_path / "out", TEACHER_QUANTIZATION="8bit")


# ---------------------------------------------------------------------------------------------------------------------
# Refused before anything is loaded or packed


def test_a_package_that_is_not_there_is_named(pair, text, tmp_path, monkeypatch):
    missing = ("not_there>=1", lambda: importlib.import_module("not_there"), 1)
    monkeypatch.setattr(quantization, "SCHEMES", {"8bit": missing})
    monkeypatch.setattr(common, "load_model", None)
    with pytest.raises(PareError) as error:
        distilled(pair, text, tmp_path / "out", TEACHER_QUANTIZATION="8bit")
    message = str(error.value)
    assert "TEACHER_QUANTIZATION = '8bit' needs not_there>=1" in message
    assert "uv run --group quantization distill.py" in message
    assert not (tmp_path / "out").exists()


def settings_for(pair, text, output, scheme, world):
    configure(distill, **run_constants(pair, text, output, TEACHER_QUANTIZATION=scheme))
    return distill.derive_settings(common.read_constants(distill), world)


def test_several_processes_and_unknown_schemes_are_refused(pair, text, tmp_path):
    with pytest.raises(PareError, match=r"TEACHER_QUANTIZATION = '8bit' is for one process; here are 2"):
        settings_for(pair, text, tmp_path / "out", "8bit", 2)
    with pytest.raises(PareError, match="TEACHER_QUANTIZATION = '3bit'; choose one of None, '8bit'"):
        settings_for(pair, text, tmp_path / "out", "3bit", 1)
    assert settings_for(pair, text, tmp_path / "out", None, 2).quantization is None
