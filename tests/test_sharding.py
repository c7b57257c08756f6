"""Two processes with sharded models give what one process gives."""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from conftest import DEFAULTS, ROOT, configure, load, save_checkpoint
from safetensors.torch import load_file
from test_distill import lines_of, run_constants
from test_never_lose import bits

import common
import distill
import sharding
from common import PareError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A teacher and a narrower student, untied and tied; two processes cannot halve their vocabulary."""
    root = tmp_path_factory.mktemp("pairs")
    smaller = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    odd = {"vocab_size": 301}
    tied = odd | {"tie_word_embeddings": True}
    return {
        "untied": (
            save_checkpoint(root / "teacher", "olmo3", seed=1, **odd),
            save_checkpoint(root / "student", "olmo3", 2, **smaller, **odd),
        ),
        "tied": (
            save_checkpoint(root / "tied_teacher", "llama", seed=1, **tied),
            save_checkpoint(root / "tied_student", "llama", seed=2, num_hidden_layers=2, **tied),
        ),
    }


@pytest.fixture(scope="module")
def launch(forks):
    """A function that runs distill.py in two processes, after the code `before`; exit codes, and what they printed."""

    def call(constants: dict, before: str = "") -> tuple[list[int], str]:
        forks.begin("distill", constants, processes=2, before=before)
        return forks.end(), forks.printed

    return call


def alone(constants: dict):
    configure(distill, **constants)
    distill.main()


def assert_same_run(two, one, **tolerance) -> None:
    """Losses, gradient norms, evaluations and exported weights."""
    lines = lines_of(two), lines_of(one)
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        for key in a.keys() - {"tokens_per_second", "held_out_agreement", "held_out_kl_by_position"}:
            expected = None if b[key] is None else pytest.approx(b[key], **tolerance)  # no text ends there
            assert a[key] == expected, (a["step"], key)
        if "held_out_kl_by_position" in a:
            assert a["held_out_kl_by_position"] == {
                k: v and pytest.approx(v, **tolerance) for k, v in b["held_out_kl_by_position"].items()
            }
    newest = sorted((one / "checkpoints").iterdir())[-1].name
    a, b = (load_file(path / "checkpoints" / newest / "model.safetensors") for path in (two, one))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).norm() < tolerance["rel"] * b[name].norm(), name


# Every weight of both models lies in two halves, but for a few that cannot be halved.
LOOK_AT_SHARDS = """
import distill, sharding, torch
step = distill.train_step
def train_step(student, teacher, batches, *more):
    for model in (student, teacher):
        weights = [*sharding.named_parameters(model).values()]
        assert all(isinstance(weight, torch.distributed.tensor.DTensor) for weight in weights)
        assert sum(weight.to_local().numel() for weight in weights) < 0.52 * sum(weight.numel() for weight in weights)
    print(f"sharded, {len(batches)} micro-batches")
    return step(student, teacher, batches, *more)
distill.train_step = train_step
"""


@pytest.fixture(scope="module", params=["untied", "tied"])
def runs(request, pairs, text, tmp_path_factory, launch):
    """The constants of a run by one process and by two, which have an odd number of micro-batches to evaluate; with
    gradients accumulated in none or in both."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    options = {"TRAIN_TOKENS": 6 * 128, "EVAL_EVERY": 3, "SAVE_EVERY": 3, "EVAL_TOKENS": 32 * 9}
    options["GRADIENT_CHECKPOINTING"] = kind == "untied"
    one, two = (run_constants(pairs[kind], text, root / name, **options) for name in ("one", "two"))
    two["MICRO_BATCH_SIZE"] = 1 if kind == "untied" else 2
    configure(distill, **DEFAULTS[distill])  # a fixture may run before they are put back
    alone(one)
    return one, two, launch(two, LOOK_AT_SHARDS)


def test_two_processes_give_the_run_of_one(runs):
    """Sharded student and teacher."""
    one, two, (codes, printed) = runs
    assert codes == [0, 0], printed[-3000:]
    assert printed.count("Wrote ") == 1
    assert printed.count(f"sharded, {2 // two['MICRO_BATCH_SIZE']} micro-batches") == 6
    folders = [Path(constants["OUTPUT_DIR"]) for constants in (two, one)]
    assert_same_run(*folders, rel=2e-5)
    exported = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    assert exported[0].keys() == exported[1].keys()
    states = [load_file(folder / "checkpoints" / "step-00000003" / "optimizer.safetensors") for folder in folders]
    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_goes_on_with_another_number_of_processes(first, runs, launch, tmp_path):
    """From step 3."""
    one, two, _ = runs
    constants = one if first == "one" else two
    output = shutil.copytree(constants["OUTPUT_DIR"], tmp_path / "out")
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    result = (alone if first == "two" else launch)(constants | {"OUTPUT_DIR": str(output)})
    assert result is None or "continuing after step 3" in result[1]
    assert_same_run(output, Path(one["OUTPUT_DIR"]), rel=2e-5)


# Of two processes, a signal reaches the second in a step; the disk of the first is full for some saves, or it finds
# weights that may not be saved.
DISTURB = """
import checkpoints, distill, resource, signal, sys, torch
sys.argv = ["distill.py", "LEARNING_RATE=0.003"]
step, save, check = distill.train_step, distill.save_checkpoint, checkpoints.check_finite
rank, disturbed = int(os.environ["RANK"]), {}
def train_step(student, teacher, batches, optimizer, number, *more):
    if (rank, number) == (1, disturbed.get("signal at")):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(student, teacher, batches, optimizer, number, *more)
def save_checkpoint(root, number, *more):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    poison = {"weight": torch.tensor(torch.nan)} if number in disturbed.get("not finite at", []) else {}
    checkpoints.check_finite = lambda tensors, what: check(tensors | poison, what)
    if rank == 0 and number in disturbed.get("full at", []):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        save(root, number, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
distill.train_step, distill.save_checkpoint = train_step, save_checkpoint
"""


@pytest.mark.parametrize(
    ("disturbed", "codes", "said"),
    [
        ({"signal at": 2}, [0, 0], "1800 uv run accelerate launch --num_processes 2 distill.py LEARNING_RATE=0.003"),
        ({"full at": [2]}, [0, 0], "Training goes on to the next save"),
        ({"full at": [2, 4]}, [3, 3], "the checkpoint of step 4 could not be written"),
        ({"not finite at": [4]}, [3, 3], "weight holds values that are not finite"),
    ],
)
def test_two_processes_stop_together_and_go_on_to_the_same_bits(
    disturbed, codes, said, undisturbed, pairs, text, launch, tmp_path
):
    constants = two_constants(pairs, text, tmp_path / "out")
    found, printed = launch(constants, DISTURB + f"disturbed |= {disturbed}")
    assert found == codes, printed[-3000:]
    assert said in printed
    if said.startswith("Training goes on"):
        assert "Stopped" not in printed
    else:
        assert not (tmp_path / "out" / "model").exists()
        # The step of the signal is the last: it is neither evaluated nor due to be saved.
        assert (tmp_path / "out" / "checkpoints" / "step-00000003").exists() == ("signal at" in disturbed)
        assert launch(constants)[0] == [0, 0]
    assert bits(tmp_path / "out") == undisturbed


def two_constants(pairs, text, output) -> dict:
    options = {"TRAIN_TOKENS": 6 * 128, "EVAL_EVERY": 4, "SAVE_EVERY": 2, "EVAL_TOKENS": 64}
    return run_constants(pairs["untied"], text, output, **options)


@pytest.fixture(scope="module")
def undisturbed(pairs, text, launch, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert launch(two_constants(pairs, text, output))[0] == [0, 0]
    return bits(output)


@pytest.mark.parametrize(("here", "said"), [("8", "give each machine the command"), ("16", "--num_processes 16 ")])
def test_what_continues_a_run_on_several_machines(here, said, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert said in distill.continue_command(16)


def test_two_processes_in_bfloat16(pairs, text, launch, tmp_path):
    """What is float32 in one process, norms among it, is so in two."""
    options = {"TRAIN_TOKENS": 4 * 128, "EVAL_TOKENS": 64, "DTYPE": "bfloat16"}
    one, two = (run_constants(pairs["untied"], text, tmp_path / name, **options) for name in ("one", "two"))
    alone(one)
    codes, printed = launch(two)
    assert codes == [0, 0], printed[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", rel=2e-5)


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_is_sharded_before_the_next_is_loaded(fits, pairs, monkeypatch):
    """On its GPU where it fits there whole, else from the CPU's memory."""
    done = []

    def load_model(checkpoint, dtype, device, constant, quantization):
        done.append(f"load {constant} on {device}")
        return load(checkpoint.folder)

    def shard(model, dtype, device):
        done.append(f"shard on {device}")
        return model

    monkeypatch.setattr(common, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(common, "available_bytes", lambda device: 10**9 if fits else 1000)
    monkeypatch.setattr(common, "load_model", load_model)
    monkeypatch.setattr(sharding, "shard", shard)
    constants = {name: getattr(distill, name) for name in common.constants_of(distill)}
    settings = distill.derive_settings(constants | {"DEVICE": "cpu"}, 2)
    settings.device = torch.device("cuda:1")
    distill.load_pair(*(common.find_checkpoint(str(path), None, "MODEL") for path in pairs["untied"]), settings)
    where = "cuda:1" if fits else "cpu"
    assert done == [f"load TEACHER on {where}", "shard on cuda:1", f"load STUDENT on {where}", "shard on cuda:1"]


def test_processes_are_patient_and_each_has_its_own_gpu(monkeypatch):
    """While that of rank 0 packs or saves; NCCL alone gives up after ten minutes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []

    def join(**arguments):
        seen.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(accelerate, "PartialState", join)
    with pytest.raises(InterruptedError), common.processes("auto"):
        pass
    assert seen == [{"cpu": not torch.cuda.is_available(), "timeout": datetime.timedelta(days=1)}]
    with pytest.raises(PareError, match=r"DEVICE = 'cuda:0' .* set DEVICE = 'cuda'"), common.processes("cuda:0"):
        pass


def test_who_has_30_seconds_to_save_is_told(monkeypatch, capsys):
    settings = SimpleNamespace(num_steps=1, rows_per_step=1, warmup_steps=0)
    monkeypatch.setattr(common, "rank_and_world", lambda: (0, 2))
    for value, lines in ((None, 1), ("600", 0)):
        monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
        if value:
            monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", value)
        distill.print_plan([0], 0, settings)
        assert capsys.readouterr().out.count("`TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 uv run accelerate launch`") == lines


def test_a_step_must_divide_among_the_processes():
    constants = {name: getattr(distill, name) for name in common.constants_of(distill)}
    constants |= {"TOKENS_PER_STEP": 3 * 64, "SEQUENCE_LENGTH": 32, "MICRO_BATCH_SIZE": 2, "DEVICE": "cpu"}
    distill.derive_settings(constants)
    with pytest.raises(PareError, match=r"TOKENS_PER_STEP = 192 .*MICRO_BATCH_SIZE.* x 2 processes = 128; the nearest"):
        distill.derive_settings(constants, 2)


def test_hidden_states_are_compared_in_several_processes(pairs, text, launch, tmp_path):
    """The student's record says what it kept; without one, a projection would be learned, in one process only."""
    teacher, _ = pairs["untied"]
    constants = {"TRAIN_TOKENS": 3 * 128, "HIDDEN_LOSS": True, "EVAL_TOKENS": 64}
    student = tmp_path / "student"
    smaller = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 301}
    save_checkpoint(student, "olmo3", 2, **smaller)
    record = {"script": "prune.py", "kept": {"hidden": list(range(0, 32)), "layers": list(range(8))}}
    (student / "pare.json").write_text(json.dumps(record))
    one, two = (run_constants((teacher, student), text, tmp_path / name, **constants) for name in ("one", "two"))
    alone(one)
    codes, printed = launch(two)
    assert codes == [0, 0], printed[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", rel=2e-5)
    assert [line for line in lines_of(tmp_path / "two") if "loss" in line][-1]["hidden_loss"] > 0
    (student / "pare.json").unlink()
    codes, printed = launch(two | {"OUTPUT_DIR": str(tmp_path / "three")})
    assert codes == [3, 3]
    assert "HIDDEN_LOSS = True: prune.py did not make" in printed


def test_launched_from_the_command_line(pairs, text, tmp_path):
    """As `accelerate launch` does it with two GPUs; on CPUs it starts a single process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    constants = run_constants(pairs["tied"], text, tmp_path / "out", TRAIN_TOKENS=128, EVAL_TOKENS=64)
    command += [str(ROOT / "distill.py"), *(f"{name}={value}" for name, value in constants.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("Wrote ") == 1
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
