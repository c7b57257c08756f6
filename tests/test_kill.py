"""Pruning killed at random moments leaves nothing or a complete checkpoint, and never touches the teacher."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import KEEP_ALL, analyse, load, save_checkpoint

import common

KILLS = 25
SIZES = {"HIDDEN_SIZE": 40, "INTERMEDIATE_SIZE": 160, "NUM_ATTENTION_HEADS": 5}


@pytest.fixture(scope="module")
def teacher(text, tmp_path_factory):
    """A checkpoint whose pruning takes about a second, and its scores, with second moments."""
    root = tmp_path_factory.mktemp("kill")
    folder = save_checkpoint(root / "teacher", "olmo3", intermediate_size=400)
    return folder, analyse(folder, text, root / "scores.pt", SECOND_MOMENTS=True, LAYER_PERPLEXITY=False)


DIE_AFTER_RENAMES = """
count, rename = [], common.Path.rename
def rename_and_die(path, target):
    rename(path, target)
    count.append(target)
    if len(count) == {}:
        os.kill(os.getpid(), 9)
common.Path.rename = rename_and_die
"""


@pytest.fixture
def start(forks, teacher):
    """A function that begins a run of prune.py and returns its process id."""

    def begin(output: Path, die_after_renames: int = 0, **sizes) -> int:
        constants = KEEP_ALL | {"MODEL": str(teacher[0]), "SCORES_PATH": str(teacher[1]), "OUTPUT_DIR": str(output)}
        constants |= {"DEVICE": "cpu", "TARGET_PARAMS": None}
        constants |= {"PIECE_BYTES": 2_000}  # many small pieces: the writing takes most of the time
        return forks.begin("prune", constants | SIZES | sizes, before=DIE_AFTER_RENAMES.format(die_after_renames))[0]

    return begin


@pytest.fixture
def end(forks):
    """A function that waits for the run under way and returns its exit code, -9 if it was killed."""
    return lambda: forks.end()[0]


def bytes_below(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden_size_of(folder: Path) -> int:
    """The size of a checkpoint that is complete: every file is there and the weights are those that were written."""
    record = json.loads((folder / "pare.json").read_text())
    assert common.files_in(folder) == sorted(record["files"])
    assert record["sha256"]
    for file, expected in record["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == expected, file
    assert (folder / "tokenizer.json").is_file()
    return load(folder).config.hidden_size


@pytest.mark.parametrize(("over", "refit"), [("nothing", None), ("an older result", False)])
def test_a_killed_run_leaves_a_complete_result_or_none(over, refit, teacher, start, end, tmp_path):
    """25 kills at random moments: then what is there verifies, and the next run succeeds. Sliced only, most kills hit
    the writing; with the default corrections also the choice of neurons and the refit in sequence, in place."""
    before = bytes_below(teacher[0])
    output, moments = tmp_path / "out", random.Random(0)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        start(tmp_path / "measured", REFIT=refit)
        assert end() == 0
        seconds.append(time.perf_counter() - started)
    weights = (tmp_path / "measured" / "model.safetensors").read_bytes()
    if over == "an older result":
        start(tmp_path / "older", REFIT=refit, HIDDEN_SIZE=24, NUM_ATTENTION_HEADS=3)
        assert end() == 0
        shutil.copytree(tmp_path / "older", output)
    found = []
    for _ in range(KILLS):
        child = start(output, REFIT=refit)
        time.sleep(moments.uniform(0, min(seconds)))
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(child, signal.SIGKILL)
        assert end() in (0, -signal.SIGKILL)
        # Between the two renames the old result has its other name; the next run puts it back.
        old = common.old_folder(output)
        place = output if output.exists() or not old.exists() else old
        found.append(hidden_size_of(place) if place.exists() else None)
        assert found[-1] in ((40, 24) if over == "an older result" else (40, None)), found
        if found[-1] == 40:  # once more from what was there at first
            shutil.rmtree(place)
            if over == "an older result":
                shutil.copytree(tmp_path / "older", output)
    assert found.count(40) < KILLS / 2, (found, seconds)  # most kills came before the end
    assert bytes_below(teacher[0]) == before
    start(output, REFIT=refit)
    assert end() == 0
    assert hidden_size_of(output) == 40
    assert (output / "model.safetensors").read_bytes() == weights
    assert {path.name for path in tmp_path.iterdir()} <= {"measured", "older", "out"}


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_right_after_each_of_the_two_renames(renames, start, end, tmp_path):
    """The moments that no clock hits: the old result aside and the new one not yet there; both there."""
    output = tmp_path / "out"
    start(output, HIDDEN_SIZE=24, NUM_ATTENTION_HEADS=3)
    assert end() == 0
    start(output, die_after_renames=renames)
    assert end() == -signal.SIGKILL
    if renames == 1:
        assert not output.exists()
        assert hidden_size_of(common.old_folder(output)) == 24
    else:
        assert hidden_size_of(output) == 40
    start(output, HIDDEN_SIZE=49)
    assert end() == 3  # refused: nothing is put right or wrong
    start(output, HIDDEN_SIZE=32, NUM_ATTENTION_HEADS=4)
    assert end() == 0
    assert hidden_size_of(output) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
