"""Two processes with sharded models give what one process gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEFAULTS, ROOT, configure, save_checkpoint
from safetensors.torch import load_file
from test_distill import lines_of, run_constants

import common
import distill
from common import PareError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> a teacher and a narrower student, untied and tied."""
    root = tmp_path_factory.mktemp("pairs")
    smaller = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    tied = {"tie_word_embeddings": True}
    return {
        "untied": (
            save_checkpoint(root / "teacher", "olmo3", seed=1),
            save_checkpoint(root / "student", "olmo3", 2, **smaller),
        ),
        "tied": (
            save_checkpoint(root / "tied_teacher", "llama", seed=1, **tied),
            save_checkpoint(root / "tied_student", "llama", seed=2, num_hidden_layers=2, **tied),
        ),
    }


@pytest.fixture(scope="module")
def launch(forks):
    """A function that runs distill.py in two processes; exit codes, and what they printed."""

    def call(constants: dict) -> tuple[list[int], str]:
        forks.begin("distill", constants, processes=2)
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


@pytest.fixture(scope="module", params=["untied", "tied"])
def runs(request, pairs, text, tmp_path_factory, launch):
    """The constants of a run by one process and by two: five micro-batches of evaluation, so that one has one more."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    options = {"TRAIN_TOKENS": 6 * 128, "EVAL_EVERY": 3, "SAVE_EVERY": 3, "EVAL_TOKENS": 32 * 2 * 5}
    options["GRADIENT_CHECKPOINTING"] = kind == "untied"
    one, two = (run_constants(pairs[kind], text, root / name, **options) for name in ("one", "two"))
    configure(distill, **DEFAULTS[distill])  # a fixture may run before they are put back
    alone(one)
    return one, two, launch(two)


def test_two_processes_give_the_run_of_one(runs):
    """Sharded student and teacher."""
    one, two, (codes, printed) = runs
    assert codes == [0, 0], printed[-3000:]
    assert printed.count("Wrote ") == 1
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
    save_checkpoint(student, "olmo3", 2, hidden_size=32, num_attention_heads=4, num_key_value_heads=4)
    record = {"script": "prune.py", "kept": {"hidden": list(range(0, 32))}}
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
