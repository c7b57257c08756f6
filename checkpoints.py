"""Checkpoints of distill.py: a folder appears whole or not at all, and is loaded only if every byte is as written.

    step-00000100/  model.safetensors      the student's float32 weights
                    optimizer.safetensors  AdamW's moments, and the random state
                    metrics.jsonl          the lines so far
                    pare.json              the run's record, the step, and the bad steps in a row before it
                    MANIFEST.json          sizes and SHA-256 of the other four

Nothing here is a setting, and importing it does nothing.
"""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import common
import sharding
from common import PareError

FILES = ("model.safetensors", "optimizer.safetensors", "metrics.jsonl", "pare.json", "MANIFEST.json")
WEIGHTS, OPTIMIZER, METRICS, RECORD, MANIFEST = FILES
BYTES_PER_PARAMETER = 12  # of a checkpoint: a weight and two moments in float32
NAME = re.compile(r"step-(\d{8,})")


class SaveError(PareError):
    """The disk did not take a checkpoint; those before are untouched."""


# ---------------------------------------------------------------------------------------------------------------------
# Whose a folder is


def read_json(path: Path) -> dict:
    """What a JSON file holds; nothing where it is damaged, or no dictionary."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def claims_to_be_ours(folder: Path) -> bool:
    """True where the manifest or the record, whichever is left of them, says that distill.py wrote the folder."""
    manifest, record = read_json(folder / MANIFEST), read_json(folder / RECORD)
    return {*manifest, MANIFEST} == {*FILES} or (record.get("script") == "distill.py" and "step" in record)


def may_remove(folder: Path) -> bool:
    """True for a checkpoint of ours that holds nothing else: a user's own files are never deleted."""
    if folder.is_symlink() or not claims_to_be_ours(folder):
        return False
    return {file.name for file in folder.iterdir()} <= {*FILES}


def checkpoints_in(root: Path) -> list[Path]:
    """The checkpoints of distill.py in a folder, damaged ones too, by step."""
    found = [folder for folder in root.glob("step-*") if NAME.fullmatch(folder.name) and claims_to_be_ours(folder)]
    return sorted(found, key=step_of)


def check_nothing_in_the_way(root: Path, first_step: int) -> None:
    """Refuse a user's own folder where a checkpoint will be saved."""
    for path in root.glob("step-*"):
        if NAME.fullmatch(path.name) and step_of(path) > first_step and not may_remove(path):
            raise PareError(f"OUTPUT_DIR = {str(root.parent)!r}: {path} is not Pare's alone. Move it away.")


def step_of(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def remove(folder: Path) -> None:
    """Delete a checkpoint under the name of debris: what a kill leaves half of it is swept by the next run. One that
    cannot be deleted stays."""
    debris = common.temporary_folder(folder)
    shutil.rmtree(debris, ignore_errors=True)
    with suppress(OSError):
        folder.rename(debris)
    shutil.rmtree(debris, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what killed saves left."""
    for debris in root.glob(".step-*.tmp"):
        if NAME.fullmatch(debris.name[1:-4]):
            shutil.rmtree(debris)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_manifest(folder: Path) -> None:
    files = {path.name: [path.stat().st_size, common.hash_file(path)] for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def check_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PareError(
                f"{name} holds values that are not finite, so {what} is not written. What was saved before is intact.\n"
                "Start again in another OUTPUT_DIR with a lower LEARNING_RATE."
            )


def whole_on_cpu(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """In full, in the process of rank 0; all processes must ask for it."""
    tensor = sharding.whole(tensor.detach())
    if common.rank_and_world()[0] > 0:
        return None
    return tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()


def save_checkpoint(root: Path, step: int, student, optimizer, record: dict, metrics: Path, keep: int) -> None:
    """Write `root/step-…`: float32 weights, optimizer state, random state, record and metrics so far.

    All processes call it and the one of rank 0 writes, the same files whatever their number.
    Then the oldest go, and any that a run from an older checkpoint has overtaken. Raises SaveError where the disk does
    not take it, and PareError, before anything is written, for weights that are not finite.
    """
    named = sharding.named_parameters(student)
    parameters = {name: whole_on_cpu(parameter) for name, parameter in named.items()}
    state = {"rng.cpu": torch.get_rng_state()}
    if student.device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(student.device)
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{key}"] = whole_on_cpu(value)
    if common.rank_and_world()[0] > 0:
        return
    target = root / f"step-{step:08d}"
    check_finite(parameters, str(target))
    temporary = common.temporary_folder(target)
    if target.exists() and not may_remove(target):
        raise SaveError(f"OUTPUT_DIR = {str(root.parent)!r}: {target} is not Pare's alone. Move it away.")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(parameters, temporary / WEIGHTS)
        save_file(state, temporary / OPTIMIZER)
        shutil.copyfile(metrics, temporary / METRICS)
        (temporary / RECORD).write_text(json.dumps(record | {"step": step}, indent=2) + "\n")
        write_manifest(temporary)
        common.sync_folder(temporary)
        if target.exists():  # damaged, or this run would have started from it
            shutil.rmtree(target)
        temporary.rename(target)
        common.sync_file(root)
    except (OSError, SafetensorError) as error:
        needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in parameters.values())
        raise SaveError(
            f"OUTPUT_DIR = {str(root.parent)!r}: the checkpoint of step {step} could not be written "
            f"({common.first_line(error)}); it needs {needed / 1e9:.4g} GB, and {free_bytes(root) / 1e9:.4g} GB are "
            f"free there.\nThe checkpoints before are untouched. Make room, or lower KEEP_CHECKPOINTS = {keep}."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    ours = checkpoints_in(root)
    kept = [folder for folder in ours if step_of(folder) <= step][-keep:]
    for folder in ours:
        if folder not in kept and may_remove(folder):
            remove(folder)


def free_bytes(root: Path) -> int:
    return shutil.disk_usage(common.existing_parent(root)).free


def check_room(root: Path, num_parameters: int, keep: int, more: int = 0) -> None:
    """Refuse a disk that is too small for the checkpoints, one more while it is written, the exported model, and `more`
    bytes of text that are still to be packed."""
    sizes = [file.stat().st_size for folder in checkpoints_in(root) if may_remove(folder) for file in folder.iterdir()]
    needed = num_parameters * (BYTES_PER_PARAMETER * (keep + 1) + 2) - sum(sizes) + more
    free = free_bytes(root)
    if needed > free:
        raise PareError(
            f"OUTPUT_DIR = {str(root.parent)!r} needs {needed / 1e9:.4g} GB for KEEP_CHECKPOINTS = {keep} and one more "
            f"while it is written, the model{' and the packed text' * bool(more)}, and {free / 1e9:.4g} GB are free "
            f"there. Make room, or choose another disk{' or fewer TRAIN_TOKENS' * bool(more)}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def verifies(folder: Path) -> bool:
    """True where every file is there with the size and hash of the manifest, which names these files and no other."""
    manifest = read_json(folder / MANIFEST)
    try:
        return {*manifest, MANIFEST} == {*FILES} and all(
            (folder / n).stat().st_size == size and common.hash_file(folder / n) == h
            for n, (size, h) in manifest.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is named and passed over. None where there is none at all."""
    folders = checkpoints_in(root)
    for folder in reversed(folders):
        if verifies(folder):
            return folder
        print(f"{folder} is damaged; trying the one before it")
    if folders:
        raise PareError(f"OUTPUT_DIR = {str(root.parent)!r}: no checkpoint verifies. Choose another OUTPUT_DIR.")
    return None


def load_checkpoint(folder: Path, student, optimizer) -> tuple[int, int]:
    """Restore weights, optimizer and random state in place; return the step and the bad steps in a row before it."""
    weights = load_file(folder / WEIGHTS)
    state = load_file(folder / OPTIMIZER)
    named = sharding.named_parameters(student)
    names = {parameter: name for name, parameter in named.items()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(sharding.like(weights[name], parameter))
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {"step": state[f"{name}.step"]}
        | {key: sharding.like(state[f"{name}.{key}"], named[name]) for key in ("exp_avg", "exp_avg_sq")}
        for index, name in enumerate(order)
        if f"{name}.step" in state
    }
    # The optimizer puts each tensor where it wants it (a fused `step` on the device, any other on the CPU).
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], student.device)
    record = read_json(folder / RECORD)
    return record["step"], record["bad_steps"]
