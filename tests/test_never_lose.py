"""A run of distill.py that is killed, stopped, or short of disk or memory loses nothing: the same command ends with the
weights, optimizer and losses of the undisturbed run, bit for bit."""

import contextlib
import copy
import errno
import fcntl
import json
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, configure, documented_metrics, load, save_checkpoint
from safetensors.torch import load_file
from test_distill import run_constants

import checkpoints
import common
import data
import distill
import losses
from common import PareError

NUM_STEPS, LAST = 8, "step-00000008"
KILLS, KILL_STEPS = 10, 30

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    teacher = save_checkpoint(root / "teacher", "llama", seed=1, num_hidden_layers=2)
    return teacher, save_checkpoint(root / "student", "llama", seed=2, num_hidden_layers=1, hidden_size=24)


def constants_for(pair, text, output, **more) -> dict:
    often = {"GRADIENT_CHECKPOINTING": False, "EVAL_EVERY": 3, "EVAL_TOKENS": 128, "SAVE_EVERY": 2}
    return run_constants(pair, text, output, TRAIN_TOKENS=NUM_STEPS * 128, **often) | more


@pytest.fixture
def run(pair, text, tmp_path):
    """A function that runs distill.main() into tmp_path / "out"."""

    def call(**more):
        configure(distill, **constants_for(pair, text, tmp_path / "out") | more)
        return distill.main()

    return call


@pytest.fixture(scope="module")
def undisturbed(pair, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    configure(distill, **constants_for(pair, text, output))
    distill.main()
    return output


@pytest.fixture
def at_step(monkeypatch):
    """A function that has `action(student)` called once, at the start of a step, counted from 0."""

    def install(number: int, action) -> None:
        step_as_it_is, actions = distill.train_step, [action]

        def train_step(student, *args):
            if args[3] == number and actions:
                actions.pop()(student)
            return step_as_it_is(student, *args)

        monkeypatch.setattr(distill, "train_step", train_step)

    return install


def lines_of(output) -> list[dict]:
    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def steps_of(output) -> list[dict]:
    return [line for line in lines_of(output) if "loss" in line]


def bits(output: Path) -> tuple:
    """All that a run comes to: the export, the last checkpoint, and every line but the time it took."""
    last = checkpoints.checkpoints_in(output / "checkpoints")[-1]
    files = [output / "model" / "model.safetensors", last / "model.safetensors", last / "optimizer.safetensors"]
    lines = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines_of(output)]
    return last.name, [file.read_bytes() for file in files], lines


def steps_saved(output: Path) -> int:
    return max((checkpoints.step_of(path) for path in output.glob("checkpoints/step-*")), default=0)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contains(message, *parts) -> None:
    for part in parts:
        assert part in str(message), (part, str(message))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture
def unfinished(undisturbed, tmp_path):
    """The undisturbed run before its export, as `run` would find it."""
    shutil.copytree(undisturbed, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    return tmp_path / "out"


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_continues_to_the_same_bits(
    number, undisturbed, pair, text, run, at_step, tmp_path, monkeypatch, capsys
):
    """Stopped in the middle of a step, by the command line: exit code 0 and the command as it was typed."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    arguments = [f"{name}={value}" for name, value in constants_for(pair, text, tmp_path / "out").items()]
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments, "MAX_BAD_STEPS=3"])
    at_step(4, lambda student: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        common.run(distill)
    assert stopped.value.code == 0
    contains(capsys.readouterr().out, f"uv run distill.py TEACHER={pair[0]} ", " MAX_BAD_STEPS=3\n")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert names_in(tmp_path / "out" / "checkpoints") == ["step-00000004", "step-00000005"]
    assert not (tmp_path / "out" / "model").exists()
    run()
    assert bits(tmp_path / "out") == bits(undisturbed)


def test_a_signal_during_a_save_lets_it_complete(undisturbed, run, tmp_path, monkeypatch):
    sync = common.sync_folder

    def sync_and_signal(folder):
        if folder.name == ".step-00000002.tmp":
            os.kill(os.getpid(), signal.SIGTERM)
        sync(folder)

    monkeypatch.setattr(common, "sync_folder", sync_and_signal)
    with pytest.raises(SystemExit):
        run()
    assert names_in(tmp_path / "out" / "checkpoints") == ["step-00000002"]
    assert checkpoints.verifies(tmp_path / "out" / "checkpoints" / "step-00000002")
    run()
    assert bits(tmp_path / "out") == bits(undisturbed)


@pytest.mark.parametrize(("step", "saved"), [(0, []), (3, [2, 3]), (6, [4, 6]), (NUM_STEPS, [6, NUM_STEPS])])
def test_a_signal_during_an_evaluation_cuts_it_off(step, saved, undisturbed, run, tmp_path, monkeypatch):
    """After its first micro-batch; the step is saved unless it was, and what continues makes the evaluation again."""
    output, calls = tmp_path / "out", []

    def figures_and_signal(*args):
        if len(steps_of(output)) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            calls.append(step)
        return figures(*args)

    figures = distill.figures_of
    with monkeypatch.context() as patch:
        patch.setattr(distill, "figures_of", figures_and_signal)
        with pytest.raises(SystemExit):
            run()
    assert calls == [step]
    assert lines_of(output)[-1:] == steps_of(output)[-1:]
    assert sorted(path.name for path in output.glob("checkpoints/*")) == [f"step-{n:08d}" for n in saved]
    run()
    assert bits(output) == bits(undisturbed)


@pytest.mark.parametrize(("every", "kept"), [(3, 0), (6, 0), (4, 1)])
def test_an_evaluation_is_kept_where_it_is_not_made_again(every, kept, unfinished, tmp_path):
    """EVAL_EVERY may change when a run continues."""
    checkpoint = unfinished / "checkpoints" / "step-00000006"
    evaluation = json.dumps({"step": 6, "held_out_kl": 1.0}) + "\n"
    (checkpoint / "metrics.jsonl").write_text(json.dumps({"step": 6, "loss": 1.0}) + "\n" + evaluation)
    settings = SimpleNamespace(eval_every=every, num_steps=NUM_STEPS, report_to=None)
    distill.open_log(tmp_path / "metrics.jsonl", checkpoint, settings, {})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 + kept


@pytest.mark.parametrize(("step", "saved"), [(3, [2, 3]), (6, [4, 6]), (NUM_STEPS, [6, NUM_STEPS])])
def test_an_evaluation_that_a_signal_follows_is_there_once(step, saved, undisturbed, run, tmp_path, monkeypatch):
    output, evaluate = tmp_path / "out", distill.evaluate

    def evaluate_and_signal(*args):
        figures = evaluate(*args)
        if len(steps_of(output)) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(distill, "evaluate", evaluate_and_signal)
        with pytest.raises(SystemExit):
            run()
    assert "held_out_kl" in lines_of(output)[-1]
    assert sorted(path.name for path in output.glob("checkpoints/*")) == [f"step-{n:08d}" for n in saved]
    run()
    assert bits(output) == bits(undisturbed)


def test_a_second_ctrl_c_quits_at_once(run, at_step, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    seconds = iter((10.0, 10.1, 10.7))  # of the first, of one that a launcher passes on, and of the second

    def press(student):
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: next(seconds))
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)

    at_step(4, press)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert next(seconds, None) is None
    assert signal.getsignal(signal.SIGINT) == before
    assert names_in(tmp_path / "out" / "checkpoints") == ["step-00000002", "step-00000004"]


def test_a_terminal_that_is_closed_lets_the_step_be_saved(pair, text, tmp_path):
    """Its signal, and no place to print to any more."""
    ours, theirs = pty.openpty()
    constants = constants_for(pair, text, tmp_path / "out", TRAIN_TOKENS=10**6, SAVE_EVERY=10**4, EVAL_EVERY=10**4)
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "distill.py"), *(f"{name}={value}" for name, value in constants.items())],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.login_tty(0),
    )
    os.close(theirs)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or len(steps_of(tmp_path / "out")) < 5:
        assert time.monotonic() < deadline
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 2**16)
    os.close(ours)
    assert child.wait(timeout=60) == 0
    assert steps_saved(tmp_path / "out") == len(steps_of(tmp_path / "out")) >= 5


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distill.stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_train_without_handlers():
    found = []

    def work():
        with distill.stop_signals() as received:
            found.append(received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


# ---------------------------------------------------------------------------------------------------------------------
# Kills

# Dies beside the rename of DIE; and a slow disk, so that about half of the time goes into saves.
IN_A_CHILD = """
import time
when, where = {}
rename, fsync = common.Path.rename, os.fsync
def rename_and_die(path, target):
    if (when, where) == ("before", str(target)):
        os.kill(os.getpid(), 9)
    rename(path, target)
    if (when, where) == ("after", str(target)):
        os.kill(os.getpid(), 9)
def slow_fsync(descriptor):
    time.sleep(0.005)
    fsync(descriptor)
common.Path.rename, os.fsync = rename_and_die, slow_fsync
"""


@pytest.fixture(scope="module")
def begin(forks, pair, text):
    """A function that begins a run in a child, which saves every step, and returns its process id."""
    frequent = {"TRAIN_TOKENS": KILL_STEPS * 128, "SAVE_EVERY": 1, "EVAL_EVERY": 100}

    def call(output: Path, die: tuple = (None, None)) -> int:
        return forks.begin("distill", constants_for(pair, text, output, **frequent), before=IN_A_CHILD.format(die))[0]

    return call


@pytest.fixture(scope="module")
def end(forks):
    return lambda: forks.end()[0]


@pytest.fixture(scope="module")
def straight(begin, end, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "out"
    begin(output)
    assert end() == 0
    return bits(output)


def test_kills_at_random_moments_cost_no_bit(begin, end, straight, tmp_path):
    """After each a checkpoint verifies, the newest or the one before it. Every second kill is aimed at a save."""
    output, moments, in_a_save = tmp_path / "out", random.Random(0), 0
    for number in range(KILLS):
        before, aimed = steps_saved(output), number % 2
        child = begin(output)
        deadline = time.monotonic() + 60
        while steps_saved(output) <= before or (aimed and not any(output.glob("checkpoints/.step-*.tmp"))):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01 if aimed else 0.1))
        os.kill(child, signal.SIGKILL)
        assert end() == -signal.SIGKILL
        in_a_save += any(output.glob("checkpoints/.step-*.tmp"))
        assert any(map(checkpoints.verifies, checkpoints.checkpoints_in(output / "checkpoints")[-2:]))
    assert in_a_save, "no kill came in a save"
    begin(output)
    assert end() == 0
    assert bits(output) == straight
    assert names_in(output / "checkpoints") == [f"step-{step:08d}" for step in (KILL_STEPS - 1, KILL_STEPS)]
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_beside_the_rename_of_a_save_costs_no_bit(when, begin, end, straight, tmp_path):
    """The moments that no clock hits."""
    output = tmp_path / "out"
    target = output / "checkpoints" / "step-00000005"
    begin(output, (when, str(target)))
    assert end() == -signal.SIGKILL
    assert target.exists() == (when == "after")
    assert any(output.glob("checkpoints/.step-*.tmp")) == (when == "before")
    begin(output)
    assert end() == 0
    assert bits(output) == straight


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("folder", ["data", "model"])
def test_a_kill_beside_the_rename_of_text_or_model_costs_no_bit(folder, when, begin, end, straight, tmp_path):
    output = tmp_path / "out"
    begin(output, (when, str(output / folder)))
    assert end() == -signal.SIGKILL
    assert (output / folder).exists() == (when == "after")
    begin(output)
    assert end() == 0
    assert bits(output) == straight
    assert names_in(output) == ["checkpoints", "curves.png", "data", "metrics.jsonl", "model", "pare.json"]


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def test_debris_is_swept_before_room_is_looked_for(unfinished, run, monkeypatch):
    shutil.rmtree(unfinished / "checkpoints" / LAST)
    debris = unfinished / "checkpoints" / ".step-00000008.tmp"
    debris.mkdir()
    seen = []
    monkeypatch.setattr(distill, "check_room", lambda *args: seen.append((debris.exists(), args[-1])))
    run()
    shutil.rmtree(unfinished)
    run(TRAIN_TOKENS=128)
    assert seen[0] == (False, 0)
    assert seen[1] == (False, 8 * 32 * (4 + 4 + 1 / 8))  # to be packed: four rows, and four held out


@contextlib.contextmanager
def no_file_beyond(num_bytes: int):
    """What a full disk or a quota does; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("full_at", "stops_at"), [([4], None), ([4, 6], 6), ([8], 8)])
def test_a_full_disk_during_a_save_costs_no_bit(full_at, stops_at, undisturbed, run, tmp_path, monkeypatch, capsys):
    """One save fails: training goes on. Two in a row, or the last: the end, and the same command again."""
    save = checkpoints.save_checkpoint

    def save_on_a_full_disk(root, step, *args):
        with no_file_beyond(20_000) if step in full_at else contextlib.nullcontext():
            save(root, step, *args)

    monkeypatch.setattr(distill, "save_checkpoint", save_on_a_full_disk)
    if stops_at:
        with pytest.raises(PareError) as error:
            run()
        contains(error.value, "OUTPUT_DIR = ", f"step {stops_at} ", "it needs ", "GB are free", "KEEP_CHECKPOINTS = 2")
        assert not (tmp_path / "out" / "model").exists()
        older = [f"step-0000000{step}" for step in range(2, 8, 2) if step not in full_at]
        assert names_in(tmp_path / "out" / "checkpoints") == older[-2:]
        assert all(checkpoints.verifies(tmp_path / "out" / "checkpoints" / name) for name in older[-2:])
        monkeypatch.undo()
        run()
        contains(capsys.readouterr().out, f"continuing after step {older[-1][-1]}")
    else:
        run()
        contains(capsys.readouterr().out, "step 4 could not be written", "Training goes on")
    assert bits(tmp_path / "out") == bits(undisturbed)


@pytest.mark.parametrize("part", ["data", "model"])
def test_a_full_disk_under_the_text_or_the_export_costs_no_bit(part, undisturbed, run, tmp_path, monkeypatch, capsys):
    name = {"data": "write_part", "model": "export"}[part]
    where = data if part == "data" else distill
    write = getattr(where, name)

    def write_on_a_full_disk(*args):
        with no_file_beyond(2_000):
            write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, write_on_a_full_disk)
        with pytest.raises(PareError) as error:
            run()
    contains(error.value, "could not be written")
    assert not (tmp_path / "out" / part).exists()
    run()
    assert bits(tmp_path / "out") == bits(undisturbed)


def test_what_only_says_where_a_run_is_may_find_no_room(undisturbed, run, tmp_path, monkeypatch):
    """pare.json after a save, and a checkpoint that cannot be deleted."""
    write_json, rename = common.write_json, Path.rename

    def write_on_a_full_disk(path, value):
        if path == tmp_path / "out" / "pare.json" and "step" in value:
            raise PareError("no room")
        write_json(path, value)

    def rename_no_checkpoint(path, target):
        if path.name == "step-00000002":
            raise OSError("read-only")
        rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(common, "write_json", write_on_a_full_disk)
        patch.setattr(Path, "rename", rename_no_checkpoint)
        run()
    assert bits(tmp_path / "out") == bits(undisturbed)
    assert names_in(tmp_path / "out" / "checkpoints") == ["step-00000002", "step-00000006", LAST]


def test_a_full_disk_under_the_metrics_costs_no_bit(undisturbed, run, at_step, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "out" / "metrics.jsonl"
    at_step(5, lambda student: resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard)))
    try:
        with pytest.raises(PareError, match=r"OUTPUT_DIR = .*metrics.jsonl could not be written"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run()
    assert bits(tmp_path / "out") == bits(undisturbed)


def test_a_disk_that_is_too_small_is_refused_before_a_model_loads(run, pair, monkeypatch, unfinished):
    """Three checkpoints of 12 bytes a parameter and an export of 2, less the checkpoints that are there."""
    count = sum(tensor.numel() for tensor in load_file(pair[1] / "model.safetensors").values())
    root, usage = unfinished / "checkpoints", shutil.disk_usage("/")
    there = sum(file.stat().st_size for file in root.rglob("*.*") if file.is_file())
    (root / "step-best").mkdir()
    (root / "step-best" / "model.safetensors").write_bytes(bytes(10**6))  # a user's own, which stays
    needed = count * (12 * 3 + 2) - there
    assert 0 < needed < count * (12 * 3 + 2)
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(PareError) as error:
        run()
    contains(error.value, "OUTPUT_DIR = ", "KEEP_CHECKPOINTS = 2", f"needs {needed / 1e9:.4g} GB")
    contains(error.value, f"and {(needed - 1) / 1e9:.4g} GB are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    checkpoints.check_room(root, count, keep=2)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints, and what is not Pare's


def flip_in(name):
    return lambda folder: flip(folder / name)


def manifest_entry(folder, name, entry):
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {name: entry}))


def point_outside(folder):
    """A file outside the folder, with the size and hash that the manifest says."""
    (folder.parent / "x").write_bytes(b"x")
    manifest_entry(folder, "../x", [1, common.hash_file(folder.parent / "x")])


DAMAGES = {
    "weights": flip_in("model.safetensors"),
    "optimizer": flip_in("optimizer.safetensors"),
    "metrics": flip_in("metrics.jsonl"),
    "record": flip_in("pare.json"),
    "cut short": lambda folder: os.truncate(folder / "optimizer.safetensors", 1000),
    "file gone": lambda folder: (folder / "pare.json").unlink(),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "empty manifest": lambda folder: (folder / "MANIFEST.json").write_text("{}"),
    "manifest of another form": lambda folder: manifest_entry(folder, "pare.json", 3),
    "manifest that is a list": lambda folder: (folder / "MANIFEST.json").write_text("[1]"),
    "manifest pointing outside": point_outside,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_byte_is_never_loaded(damage, unfinished, capsys):
    root = unfinished / "checkpoints"
    assert checkpoints.latest_checkpoint(root) == root / LAST
    DAMAGES[damage](root / LAST)
    assert checkpoints.latest_checkpoint(root) == root / "step-00000006"
    contains(capsys.readouterr().out, f"{LAST} is damaged; trying the one before it")
    DAMAGES[damage](root / "step-00000006")
    with pytest.raises(PareError, match="no checkpoint verifies"):
        checkpoints.latest_checkpoint(root)


@pytest.mark.parametrize("damage", ["weights", "file gone"])
def test_a_damaged_folder_of_the_same_step_is_replaced(damage, undisturbed, unfinished, run, capsys):
    """And the debris of a killed save is swept."""
    root = unfinished / "checkpoints"
    DAMAGES[damage](root / LAST)
    (root / ".step-00000008.tmp").mkdir()
    (root / ".step-00000008.tmp" / "model.safetensors").write_bytes(b"half of a")
    (root / ".step-00000004.tmp").mkdir()
    run()
    contains(capsys.readouterr().out, f"{LAST} is damaged", "continuing after step 6")
    assert bits(unfinished) == bits(undisturbed)
    assert names_in(root) == ["step-00000006", LAST]
    assert checkpoints.verifies(root / LAST)


def test_a_users_own_folders_are_never_deleted(undisturbed, unfinished, run, capsys):
    root = unfinished / "checkpoints"
    shutil.rmtree(root / LAST)
    shutil.copytree(root / "step-00000006", root / "step-00000006-best")
    for name in ("step-best", "step-00000001"):
        (root / name).mkdir()
        (root / name / "model.safetensors").write_bytes(b"a user's own")
    shutil.copytree(root / "step-00000006", root / "step-00000003")
    (root / "step-00000003" / "notes.txt").write_text("a user's own")
    (root / "step-00000005").symlink_to(root / "step-00000006-best")
    before = names_in(root)
    run()
    assert names_in(root) == sorted([*before, LAST])
    assert bits(unfinished) == bits(undisturbed)
    assert (root / "step-00000001" / "model.safetensors").read_bytes() == b"a user's own"

    shutil.rmtree(unfinished / "model")
    (root / LAST / "pare.json").write_bytes(b"")
    (root / LAST / "notes.txt").write_text("a user's own")
    with pytest.raises(PareError, match=f"OUTPUT_DIR = .*{LAST}.*Move it away"):
        run()
    assert (root / LAST / "notes.txt").exists()


@pytest.mark.parametrize("folder", ["model", "data"])
def test_a_users_own_folder_in_the_way_is_refused_at_once(folder, unfinished, run, monkeypatch):
    monkeypatch.setattr(common, "find_checkpoint", None)
    shutil.rmtree(unfinished / folder, ignore_errors=True)
    (unfinished / folder).mkdir()
    (unfinished / folder / "mine.txt").write_text("")
    with pytest.raises(PareError, match="not made by Pare"):
        run()


def test_a_run_whose_checkpoints_are_gone_is_not_started_again_over_its_metrics(unfinished, run):
    shutil.rmtree(unfinished / "checkpoints")
    before = (unfinished / "metrics.jsonl").read_bytes()
    with pytest.raises(PareError, match=r"OUTPUT_DIR = .*a run of 8 steps whose checkpoints are gone"):
        run()
    assert (unfinished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("without", [[], ["checkpoints", "data"]])
def test_a_finished_run_is_left_as_it_is(without, undisturbed, run, tmp_path, monkeypatch, capsys):
    shutil.copytree(undisturbed, tmp_path / "out")
    for folder in without:
        shutil.rmtree(tmp_path / "out" / folder)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(common, "load_model", None)
    assert run() == tmp_path / "out" / "model"
    contains(capsys.readouterr().out, "is finished already", "KL to the teacher", "vllm serve")
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    with pytest.raises(PareError, match=r"LEARNING_RATE = 0.001 \(was 0.003\)"):
        run(LEARNING_RATE=1e-3)


def test_a_damaged_export_is_found_and_written_again(undisturbed, run, pair, text, tmp_path):
    """By whoever reads it, and by the run that wrote it."""
    shutil.copytree(undisturbed, tmp_path / "out")
    weights = tmp_path / "out" / "model" / "model.safetensors"
    times = weights.stat()
    flip(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(PareError, match=r"STUDENT = .*model.safetensors is damaged.*distill.py"):
        run(STUDENT=str(weights.parent), OUTPUT_DIR=str(tmp_path / "second"))
    with pytest.raises(PareError, match=r"MODEL = .*model.safetensors is damaged.*distill.py"):
        common.check_hashes(common.find_checkpoint(str(weights.parent), None, "MODEL"), "MODEL")
    run()
    assert bits(tmp_path / "out") == bits(undisturbed)
    record = json.loads((weights.parent / "pare.json").read_text())
    assert set(record["sha256"]) == {*common.files_in(weights.parent)} - {"pare.json"}


def test_a_second_run_in_the_folder_is_refused(run, tmp_path):
    with common.lock(tmp_path / "out", "OUTPUT_DIR"), pytest.raises(PareError, match="another run"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with common.lock(tmp_path / "out", "OUTPUT_DIR"):
        contains(capsys.readouterr().out, str(tmp_path), "has no locks", "No locks available")


def test_output_inside_or_around_a_model(run, pair, tmp_path):
    around = tmp_path / "around"
    shutil.copytree(pair[1], around / "student")
    (around / "pare.json").write_text('{"script": "distill.py"}')
    for constant, folder in zip(("TEACHER", "STUDENT"), pair, strict=True):
        with pytest.raises(PareError, match=f"OUTPUT_DIR = .*folder of {constant}"):
            run(OUTPUT_DIR=str(folder / "out"))
        assert not (folder / "out").exists()
        with pytest.raises(PareError, match=f"OUTPUT_DIR = .*holds, {constant} itself"):
            run(OUTPUT_DIR=str(around), **{constant: str(around / "student")})


@pytest.mark.parametrize("locked", ["out", "out/checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(locked, unfinished, run, tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / locked and access(path, mode))
    monkeypatch.setattr(common, "find_checkpoint", None)
    with pytest.raises(PareError) as error:
        run()
    contains(error.value, "OUTPUT_DIR = ", "cannot be written")
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Losses, gradients and weights that are not finite


@pytest.fixture
def poison(monkeypatch):
    """A function that makes loss and gradients, or one gradient alone, not finite in some steps (counted from 0)."""

    def install(steps, alone: bool = False) -> dict:
        unchanged, kl, step_as_it_is = {}, losses.logit_loss, distill.train_step

        def train_step(student, *args):
            if args[3] not in steps:
                return step_as_it_is(student, *args)
            before = [parameter.detach().clone() for parameter in student.parameters()]
            with monkeypatch.context() as patch:
                norm = student.model.norm.weight
                handle = norm.register_hook(lambda gradient: gradient * float("inf" if alone else 1))
                if not alone:
                    patch.setattr(losses, "logit_loss", lambda *a, **k: kl(*a, **k) * float("nan"))
                found = step_as_it_is(student, *args)
                handle.remove()
            assert all(parameter.grad is None for parameter in student.parameters())
            unchanged[args[3]] = all(map(torch.equal, before, student.parameters()))
            return found

        monkeypatch.setattr(distill, "train_step", train_step)
        return unchanged

    return install


@pytest.mark.parametrize("alone", [False, True])
def test_bad_steps_are_skipped_and_counted(alone, run, poison, tmp_path):
    """Two in a row and, later, one; a gradient that is not finite where the loss is counts too."""
    unchanged = poison([2, 3, 5], alone)
    run()
    assert unchanged == {2: True, 3: True, 5: True}
    lines = steps_of(tmp_path / "out")
    assert [line.get("bad_steps") for line in lines] == [None, None, 1, 2, None, 1, None, None]
    assert [line["loss"] is None for line in lines] == [not alone and "bad_steps" in line for line in lines]
    assert [line["gradient_norm"] is None for line in lines] == ["bad_steps" in line for line in lines]
    assert lines[3]["rows"] == data.row_indices(3, 4, 32, 0)
    assert lines[3].keys() <= documented_metrics()
    state = load_file(tmp_path / "out" / "checkpoints" / LAST / "optimizer.safetensors")
    assert {value.item() for name, value in state.items() if name.endswith(".step")} == {NUM_STEPS - 3}
    assert json.loads((tmp_path / "out" / "model" / "pare.json").read_text())["after"]["held_out_kl"] > 0


def test_a_figure_that_is_not_finite_within_another_is_null():
    nan = float("nan")
    assert distill.without_nan({"a": nan, "b": {"0": nan, "16": 2.0, "64": None}, "c": [1]}) == {
        "a": None,
        "b": {"0": None, "16": 2.0, "64": None},
        "c": [1],
    }


def test_too_many_bad_steps_in_a_row_stop_also_over_a_resumption(run, poison, at_step, tmp_path, monkeypatch):
    """Stopped by a signal after the second, the continued run stops at the third, and so it does again."""
    poison([3, 4, 5])
    at_step(4, lambda student: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run()
    for _ in range(2):
        with pytest.raises(PareError) as error:
            run()
        contains(error.value, "MAX_BAD_STEPS = 3", "LEARNING_RATE = 0.003", "step-00000005")
        assert [line.get("bad_steps") for line in steps_of(tmp_path / "out")[3:]] == [1, 2, 3]
    run(MAX_BAD_STEPS=4)


def test_weights_that_are_not_finite_are_never_saved(run, at_step, tmp_path, pair, monkeypatch):
    def spoil(student):
        with torch.no_grad():
            student.model.layers[0].mlp.up_proj.weight[3, 2] = float("inf")

    at_step(3, spoil)
    monkeypatch.setattr(distill, "check_bad_steps", lambda *args: None)
    with pytest.raises(
        PareError, match=r"(?s)model.layers.0.mlp.up_proj.weight holds .*not finite.*LEARNING_RATE"
    ) as error:
        run()
    contains(error.value, "step-00000004")
    assert names_in(tmp_path / "out" / "checkpoints") == ["step-00000002"]


def test_weights_that_are_not_finite_in_bfloat16_are_never_exported(pair, tmp_path):
    student, checkpoint = load(pair[1]), common.find_checkpoint(str(pair[1]), None, "STUDENT")
    with torch.no_grad():
        student.lm_head.weight[0, 0] = torch.finfo(torch.float32).max
    weights = {name: tensor.detach().bfloat16() for name, tensor in student.named_parameters()}
    with pytest.raises(PareError, match=r"lm_head.weight holds .*not finite"):
        distill.export(tmp_path / "model", student, weights, checkpoint, "", {"script": "distill.py"})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Memory, dropout, determinism


@pytest.mark.parametrize(
    ("size", "checkpointing", "advice"),
    [
        (6, False, "This would: MICRO_BATCH_SIZE = 3."),
        (5, False, "This would: MICRO_BATCH_SIZE = 1."),
        (1, True, "This would: TEACHER_QUANTIZATION = '8bit'."),
    ],
)
@pytest.mark.parametrize("when", ["first", "later"])
def test_memory_that_runs_out_names_the_constants_that_fit(when, size, checkpointing, advice, run, tmp_path, at_step):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    constants = {"MICRO_BATCH_SIZE": size, "TOKENS_PER_STEP": 192 if size == 6 else 160}
    with pytest.MonkeyPatch.context() as patch:
        if when == "first":
            patch.setattr(distill, "backward", too_large)
        else:
            at_step(0, too_large)
        with pytest.raises(PareError) as error:
            run(**constants, GRADIENT_CHECKPOINTING=checkpointing)
    contains(error.value, f"MICRO_BATCH_SIZE = {size} rows of SEQUENCE_LENGTH = 32", "CUDA out of memory.", advice)
    assert (tmp_path / "out" / "data").exists() == (when == "later")  # no text is packed for what does not fit
    assert (tmp_path / "out" / "metrics.jsonl").exists() == (when == "later")


def test_memory_that_runs_out_later_says_what_a_continued_run_can_do(unfinished, run, at_step):
    def too_large(student):
        raise torch.OutOfMemoryError

    shutil.rmtree(unfinished / "checkpoints" / LAST)
    at_step(6, too_large)
    with pytest.raises(PareError, match=", in another OUTPUT_DIR, or free the device"):
        run()


def test_the_largest_micro_batch_runs_first_and_leaves_nothing(undisturbed, run, tmp_path, monkeypatch):
    """All its tokens counted, masks needed, gradients of a micro-batch there; without it the bits are the same."""
    seen, masks, backward = [], [], distill.backward

    def look(student, teacher, batch, denominator, settings):
        assert student.training  # else it would not checkpoint
        masks.append(batch.documents.mask(None, torch.float32))
        seen.append((len(batch.counted), [parameter.grad is not None for parameter in student.parameters()]))
        return backward(student, teacher, batch, denominator, settings)

    monkeypatch.setattr(distill, "backward", look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "rehearse", lambda *args: None)
        run()
    assert bits(tmp_path / "out") == bits(undisturbed)
    without, seen, masks = seen, [], []
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(distill, "backward", look)
    run(TRAIN_TOKENS=128)
    assert without[0][0] < 2 * 31
    assert seen[0][0] == 2 * 31
    assert masks[0].shape == (2, 1, 32, 32)
    assert all(seen[0][1])
    assert not any(seen[1][1])


def test_a_students_dropout_is_switched_off_and_stays_in_its_config(pair, text, tmp_path):
    rates = {"attention_dropout": 0.5, "residual_dropout": 0.5}
    found = []
    for name, more in (("with", rates), ("without", dict.fromkeys(rates, 0.0))):
        student = save_checkpoint(tmp_path / name, "seed_oss", seed=3, num_hidden_layers=1, **more)
        configure(distill, **constants_for((pair[0], student), text, tmp_path / f"{name}-out", TRAIN_TOKENS=2 * 128))
        folder = distill.main()
        found.append([line.get("loss") for line in lines_of(folder.parent)])
        config = json.loads((folder / "config.json").read_text())
        assert {key: config[key] for key in rates} == more
    assert found[0] == found[1]


def test_a_gpu_run_is_deterministic_and_the_process_as_before_afterwards(monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for on, device, expected in ((True, cuda, True), (False, cuda, False), (True, cpu, False)):
        with contextlib.suppress(KeyError), distill.deterministic(on, device):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert os.environ.get(name) == (":4096:8" if expected else None)
            assert torch.utils.deterministic.fill_uninitialized_memory != expected
            raise KeyError
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert name not in os.environ


def test_main_is_deterministic(run, monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "deterministic", lambda *args: seen.append(args) or contextlib.nullcontext())
    monkeypatch.setattr(distill, "finished_record", lambda *args: {"before": {}, "after": {}})
    monkeypatch.setattr(distill, "print_results", lambda *args: None)
    run()
    assert seen == [(True, torch.device("cpu"))]


# ---------------------------------------------------------------------------------------------------------------------
# Resuming with something changed


def saved_record(output) -> dict:
    return json.loads((output / "checkpoints" / LAST / "pare.json").read_text())


@pytest.mark.parametrize("name", common.constants_of(distill))
def test_a_changed_constant_is_refused_or_makes_no_difference(name, undisturbed):
    saved = saved_record(undisturbed)
    assert name in saved["constants"]
    record = copy.deepcopy(saved)
    record["constants"][name] = "something else"
    if name in distill.MAY_CHANGE_ON_RESUME:
        distill.check_same_run(saved, record)
    else:
        with pytest.raises(PareError, match=f"other {name} = 'something else' .was "):
            distill.check_same_run(saved, record)


def test_changed_constants_that_make_no_difference_make_none(undisturbed, unfinished, run):
    shutil.rmtree(unfinished / "checkpoints" / LAST)
    assert {"OUTPUT_DIR", "EVAL_EVERY", "SAVE_EVERY", "KEEP_CHECKPOINTS", "MAX_BAD_STEPS", "REPORT_TO"} == (
        distill.MAY_CHANGE_ON_RESUME
    )
    run(SAVE_EVERY=1, KEEP_CHECKPOINTS=3, MAX_BAD_STEPS=1, EVAL_EVERY=7)
    assert bits(unfinished)[:2] == bits(undisturbed)[:2]
    assert names_in(unfinished / "checkpoints") == ["step-00000006", "step-00000007", LAST]


@pytest.mark.parametrize(
    ("key", "value"), [("device", "cuda"), ("dtype", "bfloat16"), ("attention", "documents_varlen")]
)
def test_another_device_dtype_or_attention_is_refused(key, value, undisturbed):
    saved = saved_record(undisturbed)
    with pytest.raises(PareError, match=f"other {key} {value}"):
        distill.check_same_run(saved, saved | {key: value})


def test_other_package_versions_are_said_aloud(undisturbed, capsys):
    saved = saved_record(undisturbed)
    distill.check_same_run(saved, saved)
    assert not capsys.readouterr().out
    distill.check_same_run(saved | {"versions": saved["versions"] | {"torch": "2.0.0"}}, saved)
    contains(capsys.readouterr().out, "other versions", "2.0.0")


@pytest.mark.parametrize("seed", [distill.LARGEST_SEED + 1, 2**63, 2**64])
def test_a_seed_that_is_too_large(seed, run):
    data.epoch_order(1000, 4, distill.LARGEST_SEED)
    with pytest.raises(PareError, match=f"SEED = {seed} must be from 0 to {distill.LARGEST_SEED}"):
        run(SEED=seed)


def test_a_tokenizer_of_another_vocabulary_is_refused(run, pair, tmp_path):
    """Sizes equal, tokens not."""
    shutil.copytree(pair[1], tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PareError, match=r"STUDENT = .* TEACHER = .*different vocabularies"):
        run(STUDENT=str(tmp_path / "other"))
