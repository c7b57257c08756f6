"""Every mistake a user can make ends in one or two lines that name the constant and what would work, and nothing on
disk is lost."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import DOCUMENTS, KEEP_ALL, ROOT, analyse, build_tokenizer, configure, load, save_checkpoint
from safetensors.torch import load_file, save_file

import common
import data
import distill
import importance_analysis
import prune
from common import PareError


@pytest.fixture(scope="module")
def scores(checkpoints, text, tmp_path_factory):
    return analyse(checkpoints["olmo3"], text, tmp_path_factory.mktemp("scores") / "scores.pt")


def files_below(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(checkpoints, text, scores, tmp_path):
    """A function that runs a script with good constants but for those given, and returns its message."""
    shutil.copy(scores, tmp_path / "scores.pt")
    good = {
        importance_analysis: {
            "MODEL": str(checkpoints["olmo3"]),
            "DATASET": text,
            "DATASET_CONFIG": None,
            "NUM_SAMPLES": 4,
            "SEQUENCE_LENGTH": 40,
            "SCORES_PATH": str(tmp_path / "new_scores.pt"),
            "DEVICE": "cpu",
        },
        prune: KEEP_ALL
        | {
            "TARGET_PARAMS": None,
            "MODEL": str(checkpoints["olmo3"]),
            "SCORES_PATH": str(tmp_path / "scores.pt"),
            "OUTPUT_DIR": str(tmp_path / "out"),
            "DEVICE": "cpu",
        },
        distill: {
            "TEACHER": str(checkpoints["olmo3"]),
            "STUDENT": str(checkpoints["olmo3"]),
            "OUTPUT_DIR": str(tmp_path / "out"),
            "DATASETS": text,
            "SEQUENCE_LENGTH": 32,
            "TRAIN_TOKENS": 256,
            "TOKENS_PER_STEP": 64,
            "MICRO_BATCH_SIZE": 2,
            "EVAL_TOKENS": 64,
            "DEVICE": "cpu",
        },
    }

    defaults = {script: {name: getattr(script, name) for name in common.constants_of(script)} for script in good}

    def run(script, **constants) -> str:
        configure(script, **defaults[script] | good[script] | constants)
        before = files_below(tmp_path)
        with pytest.raises(PareError) as caught:
            script.main()
        message = str(caught.value)
        assert 1 <= len(message.splitlines()) <= 2, message
        after = files_below(tmp_path)
        lost = [path for path, content in before.items() if after.get(path) != content]
        assert not lost, lost
        return message

    return run


def cut_into(output: Path, checkpoints, scores: Path, **more) -> Path:
    """A good run of prune.py with everything kept but what is given."""
    constants = {"MODEL": str(checkpoints["olmo3"]), "SCORES_PATH": str(scores), "DEVICE": "cpu", "TARGET_PARAMS": None}
    configure(prune, **KEEP_ALL | constants | {"OUTPUT_DIR": str(output)} | more)
    return prune.main()


def in_child(work) -> str:
    """What `work()` returns in a forked child, where it may limit itself."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's threads are not in the child
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode()[:50_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(child, 0)
    return text


def contains(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, message


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def command(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "argument", "parts"),
    [
        ("prune.py", "INTERMEDIATE_SIZ=4096", ["no constant INTERMEDIATE_SIZ", "INTERMEDIATE_SIZE"]),
        ("importance_analysis.py", "NUM_SAMPLES=many", ["NUM_SAMPLES = 'many'", "a whole number"]),
        ("distill.py", "STUDENT=no/such/folder", ["STUDENT = 'no/such/folder'", "folder"]),
    ],
)
def test_a_mistake_is_one_message_on_standard_error_and_exit_code_1(script, argument, parts, checkpoints):
    result = command(script, argument, *([f"TEACHER={checkpoints['olmo3']}"] if script == "distill.py" else []))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"{script}: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    contains(result.stderr, *parts)


def test_help_lists_the_docstring_and_every_constant_with_its_comment():
    result = command("prune.py", "--help")
    assert result.returncode == 0
    contains(result.stdout, "uv run prune.py", "INTERMEDIATE_SIZE = None  # MLP neurons kept", "LAYERS_TO_DROP = None")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("HIDEN_SIZE=3", ["no constant HIDEN_SIZE", "HIDDEN_SIZE"]),
        ("--hidden-size=3", ["no constant --hidden-size", "HIDDEN_SIZE"]),
        ("XYZZY=3", ["no constant XYZZY", "The constants are", "OUTPUT_DIR"]),
        ("hello", ["'hello'", "NAME=value"]),
        ("HIDDEN_SIZE=3.5", ["HIDDEN_SIZE = 3.5", "a whole number or None"]),
        ("HIDDEN_SIZE=True", ["HIDDEN_SIZE = True", "a whole number or None"]),
        ("PROTECT_FULL_ATTENTION=1", ["PROTECT_FULL_ATTENTION = 1", "True or False"]),
        ("LAYERS_TO_DROP=5", ["LAYERS_TO_DROP = 5", "a list of whole numbers"]),
        ("LAYERS_TO_DROP=[1,'a']", ["LAYERS_TO_DROP", "a list of whole numbers"]),
        ("HIDDEN_SIZE={[1]:2}", ["HIDDEN_SIZE = '{[1]:2}'", "a whole number or None"]),
    ],
)
def test_unknown_constants_and_wrong_kinds(argument, parts):
    with pytest.raises(PareError) as caught:
        common.override_constants(prune, [argument])
    contains(str(caught.value), *parts)


def test_overrides_are_literals_of_the_right_kind_else_text():
    common.override_constants(prune, ["HIDDEN_SIZE=None", "LAYERS_TO_DROP=[1, 2]", "OUTPUT_DIR=2024", "MODEL=a/b"])
    assert (prune.HIDDEN_SIZE, prune.LAYERS_TO_DROP, prune.OUTPUT_DIR, prune.MODEL) == (None, [1, 2], "2024", "a/b")
    common.override_constants(distill, ["LEARNING_RATE=1", "REPORT_TO=wandb"])
    assert (distill.LEARNING_RATE, distill.REPORT_TO) == (1, "wandb")


def test_a_constant_of_the_wrong_kind_in_the_script_itself(refused):
    contains(refused(prune, INTERMEDIATE_SIZE="6144"), "INTERMEDIATE_SIZE = '6144'", "a whole number or None")
    contains(refused(distill, LEARNING_RATE=float("inf")), "LEARNING_RATE = inf", "must be a number")


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize(
    ("script", "constant"),
    [(importance_analysis, "MODEL"), (prune, "MODEL"), (distill, "TEACHER"), (distill, "STUDENT")],
)
def test_a_model_that_does_not_exist(script, constant, refused, tmp_path):
    contains(refused(script, **{constant: str(tmp_path / "nowhere")}), f"{constant} = ", "not a folder", "Hub id")
    # A Hub id without network (the tests run offline): say what works.
    message = refused(script, **{constant: "allenai/Olmo-3-7B-Instruct"})
    contains(message, f"{constant} = 'allenai/Olmo-3-7B-Instruct'", "could not be reached", "local folder", "demo.py")


def test_a_folder_without_a_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    contains(refused(importance_analysis, MODEL=str(tmp_path / "empty")), "MODEL", "no config.json")


@pytest.mark.parametrize(
    "model_type", ["mixtral", "olmoe", "qwen3_moe", "phi3", "gemma3", "gpt2", "my_own", "", None, 3]
)
def test_families_that_are_not_in_the_table(model_type, refused, tmp_path):
    """Mixtures of experts, fused projections, models with pictures, and what nobody knows, refused by name."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": model_type}))
    for script, constant in ((importance_analysis, "MODEL"), (prune, "MODEL"), (distill, "STUDENT")):
        message = refused(script, **{constant: str(tmp_path / "other")})
        contains(message, f"{constant} = ", repr(model_type), "mixture of experts", "fused projections")
        contains(message, *common.FAMILIES, "FAMILIES in common.py")


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """A copy of the teacher for a test to damage, and its tensors."""
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints["olmo3"], folder)
    weights = load_file(folder / "model.safetensors")  # a view of the file, which the test will overwrite
    return folder, {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.mystery.weight", "lm_head.bias", "model.layers.0.mlp.up_proj.scale"]
)
def test_a_tensor_that_the_table_does_not_know(name, damaged, refused):
    folder, weights = damaged
    save_file(weights | {name: torch.ones(3)}, folder / "model.safetensors")
    contains(refused(prune, MODEL=str(folder)), name, "FAMILIES in common.py")


SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FIRST = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def sharded(damaged):
    """The same in two shards."""
    folder, weights = damaged
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for file, part in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_header(path: Path, edit) -> None:
    """Let `edit` change a safetensors file's header in place; the data stays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def edit_json(path: Path, **more) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def cut_short(folder: Path) -> None:
    path = folder / SHARDS[1]
    os.truncate(path, path.stat().st_size // 2)


def edit_first(**more):
    return lambda folder: edit_header(folder / SHARDS[0], lambda header: header[FIRST].update(more))


def move_outside(folder: Path) -> None:
    """The last tensor's bytes begin where the file ends."""

    def edit(header):
        last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        start, end = header[last]["data_offsets"]
        header[last]["data_offsets"] = [end, end + end - start]

    edit_header(folder / SHARDS[0], edit)


def point_to(file: str):
    def damage(folder: Path) -> None:
        shutil.copy(folder / SHARDS[1], folder.parent / "secret.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(SHARDS[1], file))

    return damage


def convert_to_bin(folder: Path) -> None:
    weights = {name: tensor for file in SHARDS for name, tensor in load_file(folder / file).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    for path in (*(folder / file for file in SHARDS), folder / "model.safetensors.index.json"):
        path.unlink()


def poison(value: float):
    def damage(folder: Path) -> None:
        path = next(folder / file for file in SHARDS if FIRST in load_file(folder / file))
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
        weights[FIRST][5, 7] = value
        save_file(weights, path, {"format": "pt"})

    return damage


LAYER_TYPES = (["sliding_attention"] * 3 + ["full_attention"]) * 3
DAMAGES = {  # name -> what to do to a checkpoint in two shards, and what the message must hold
    "a shard cut short": (cut_short, [f"{SHARDS[1]} is damaged", "cut short: ", "Download"]),
    "a shard of no bytes": (lambda folder: os.truncate(folder / SHARDS[0], 0), [f"{SHARDS[0]} is damaged", "0 bytes"]),
    "a shard of seven bytes": (lambda folder: os.truncate(folder / SHARDS[0], 7), [SHARDS[0], "7 bytes"]),
    "a missing shard": (lambda folder: (folder / SHARDS[0]).unlink(), [f"lacks {SHARDS[0]}", "safetensors only"]),
    "a shard that is text": (
        lambda folder: (folder / SHARDS[0]).write_text("<html>rate limit exceeded</html>" * 9),
        [f"{SHARDS[0]} is damaged"],
    ),
    "overlapping tensors": (edit_first(data_offsets=[64, 64 + 48 * 64 * 4]), [SHARDS[0], "overlap or leave gaps"]),
    "negative offsets": (edit_first(data_offsets=[-64, 48 * 64 * 4]), [f"{SHARDS[0]} is damaged"]),
    "offsets that are text": (edit_first(data_offsets=["0", "9"]), [f"{SHARDS[0]} is damaged"]),
    "tensors outside the file": (move_outside, [f"{SHARDS[0]} is damaged"]),
    "a shape that is not its bytes": (edit_first(shape=[48, 63]), [f"{SHARDS[0]} is damaged", FIRST]),
    "a shape that is not a shape": (edit_first(shape=[[48], 64]), [f"{SHARDS[0]} is damaged"]),
    "no shape": (
        lambda folder: edit_header(folder / SHARDS[0], lambda header: header[FIRST].pop("shape")),
        [f"{SHARDS[0]} is damaged"],
    ),
    "another shape of as many bytes": (edit_first(shape=[64, 48]), ["disagree", FIRST, "config.json"]),
    "a dtype that is none": (edit_first(dtype="G32"), [f"{SHARDS[0]} is damaged", FIRST, "G32"]),
    "a negative shape": (edit_first(shape=[-48, -64]), [f"{SHARDS[0]} is damaged", FIRST]),
    "another dtype of as many bytes": (edit_first(dtype="BF16", shape=[48, 128]), ["disagree", FIRST]),
    "more layers in config.json": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=12, layer_types=LAYER_TYPES),
        ["disagree", "model.layers.1", "Download"],
    ),
    "fewer layers in config.json": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=4, layer_types=LAYER_TYPES[:4]),
        ["disagree", "model.layers.4", "Download"],
    ),
    "layer_types too short": (
        lambda folder: edit_json(folder / "config.json", layer_types=LAYER_TYPES[:5]),
        ["transformers refuses", "layer_types"],
    ),
    "an index that leaves the folder": (point_to("../secret.safetensors"), ["points outside its folder"]),
    "an index with a full path": (point_to("/etc/passwd"), ["points outside its folder"]),
    "an index with a folder": (point_to("sub/" + SHARDS[1]), ["points outside its folder"]),
    "an index of a number": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
        ["index.json is damaged", "Download"],
    ),
    "only a pickle": (convert_to_bin, ["lacks model.safetensors", "safetensors only", "save_pretrained"]),
    "a weight that is NaN": (poison(float("nan")), [FIRST, "not finite", "Download"]),
    "a weight that is infinite": (poison(-float("inf")), [FIRST, "not finite", "Download"]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_checkpoints(what, sharded, refused, tmp_path, checkpoints):
    """Scoring, pruning and distilling refuse them alike; an older result of prune.py stays as it was."""
    damage, parts = DAMAGES[what]
    cut_into(tmp_path / "out", checkpoints, tmp_path / "scores.pt", HIDDEN_SIZE=40)
    good = torch.load(tmp_path / "scores.pt", weights_only=True)
    checkpoint = common.find_checkpoint(str(sharded), None, "MODEL")  # the scores fit the model before the damage
    good["meta"] |= {"weights_hash": common.hash_checkpoint(checkpoint, "MODEL")}
    common.save_scores(good, tmp_path / "scores.pt")
    damage(sharded)
    for script, constant in ((importance_analysis, "MODEL"), (distill, "TEACHER"), (prune, "MODEL")):
        output = {"OUTPUT_DIR": str(tmp_path / "new")} if script is distill else {}
        message = refused(script, **{constant: str(sharded)}, **output)
        if script is prune or "disagree" not in parts:
            contains(message, *parts)
        contains(message, constant, *(["disagree"] if "disagree" in parts else []))
    assert not list(tmp_path.glob(".out*"))
    load(tmp_path / "out")


def test_the_code_of_a_repository_is_never_run(damaged, refused, tmp_path):
    """auto_map: refused in one line, for a family that transformers knows and for one that it does not."""
    folder, _ = damaged
    marker = tmp_path / "marker"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    good = (folder / "config.json").read_text()
    edit_json(folder / "config.json", auto_map=auto_map)
    for script, constant in ((importance_analysis, "MODEL"), (prune, "MODEL"), (distill, "TEACHER")):
        contains(refused(script, **{constant: str(folder)}), constant, "code of its own")
    edit_json(folder / "config.json", auto_map=auto_map, model_type="evil")
    for script, constant in ((importance_analysis, "MODEL"), (prune, "MODEL"), (distill, "TEACHER")):
        contains(refused(script, **{constant: str(folder)}), constant)
    (folder / "config.json").write_text(good)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Evil")
    contains(refused(importance_analysis, MODEL=str(folder)), "MODEL", "tokenizer")
    assert not marker.exists()


def test_a_damaged_index_or_config(sharded, damaged, refused):
    for content in ('{"weight_', "{}", "[]"):
        (sharded / "model.safetensors.index.json").write_text(content)
        contains(refused(prune, MODEL=str(sharded)), "index.json is damaged", "Download")
    folder, _ = damaged
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    contains(refused(importance_analysis, MODEL=str(folder)), "MODEL", "is quantized")
    for content in ("[]", "{"):
        (folder / "config.json").write_text(content)
        contains(refused(importance_analysis, MODEL=str(folder)), "MODEL", "config.json is damaged")


def test_a_damaged_tokenizer(damaged, refused):
    folder, _ = damaged
    (folder / "tokenizer.json").write_text('{"version": "9"}')
    contains(refused(importance_analysis, MODEL=str(folder)), "MODEL", "no tokenizer that loads")


@pytest.mark.parametrize("script", [importance_analysis, distill])
def test_rows_longer_than_the_model_reads(script, refused):
    step = {"TOKENS_PER_STEP": 1000, "TRAIN_TOKENS": 1000} if script is distill else {}
    contains(refused(script, SEQUENCE_LENGTH=500, **step), "SEQUENCE_LENGTH = 500", "128 at most")


def test_rope_parameters_must_be_per_layer_type(checkpoints):
    config = transformers.AutoConfig.from_pretrained(checkpoints["olmo3"])
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1.0}
    with pytest.raises(PareError, match="rope_parameters"):
        common.check_rope(config, "MODEL = 'x'")
    config.rope_parameters = {key: {"rope_type": "yarn"} for key in ("full_attention", "sliding_attention")}
    with pytest.raises(PareError, match="sliding_attention"):
        common.check_rope(config, "MODEL = 'x'")


@pytest.mark.parametrize("script", [importance_analysis, prune, distill])
def test_old_transformers_are_refused(script, refused, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.12.1")
    contains(refused(script), "transformers 5.12.1", "5.13", "uv sync")


@pytest.mark.parametrize("script", [importance_analysis, prune, distill])
def test_one_rope_for_all_kinds_of_layers_is_refused(script, refused, monkeypatch):
    """transformers mends what a file says when it reads it, so its config is changed."""
    read, constant = common.parse_config, "TEACHER" if script is distill else "MODEL"

    def read_flat(*args, **more):
        config = read(*args, **more)
        config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1.0}
        return config

    monkeypatch.setattr(common, "parse_config", read_flat)
    contains(refused(script), constant, "rope_parameters")


def test_student_and_teacher_with_different_vocabularies(refused, text, tmp_path):
    other = save_checkpoint(tmp_path / "other", "llama")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    contains(refused(distill, STUDENT=str(other)), "STUDENT", "TEACHER", "different vocabularies")
    weights = {name: tensor.clone() for name, tensor in load_file(other / "model.safetensors").items()}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:5]])
    save_file(weights, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    size = config["vocab_size"]
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": size + 5}))
    contains(refused(distill, STUDENT=str(other)), "different vocabularies", str(size + 5), str(size))


def test_a_model_that_no_batch_size_makes_fit(refused, monkeypatch):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    message = refused(importance_analysis)
    contains(message, "MODEL = ", "does not fit on cpu in float32", "DEVICE = 'auto'")
    assert "BATCH_SIZE" not in message


@pytest.mark.parametrize("script", [importance_analysis, distill])
def test_a_tokenizer_with_more_tokens_than_the_model_has(script, refused, checkpoints, tmp_path):
    other = shutil.copytree(checkpoints["olmo3"], tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["vocab"]["."] = 5000
    (other / "tokenizer.json").write_text(json.dumps(raw))
    models = {"TEACHER": str(other), "STUDENT": str(other)} if script is distill else {"MODEL": str(other)}
    contains(refused(script, **models), "DATASET", "holds token 5000", "vocabulary ends at")


def test_a_tokenizer_that_does_not_belong_to_the_model():
    with pytest.raises(PareError, match=r"DATASET: document 1 holds token \d+, .*vocabulary ends at 99"):
        list(data.pack_rows(DOCUMENTS, build_tokenizer(), 32, 100))


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_text_that_is_missing_or_wrong(refused, tmp_path):
    def message(**constants):
        return refused(importance_analysis, **constants)

    contains(message(DATASET=str(tmp_path / "no.jsonl")), "DATASET = ", "does not exist")
    (tmp_path / "empty.jsonl").write_text("")
    contains(message(DATASET=str(tmp_path / "empty.jsonl")), "DATASET = ", "is empty")
    contains(message(TEXT_COLUMN="content"), "TEXT_COLUMN = 'content'", "'text'")
    contains(message(DATASET_SPLIT="validation"), "DATASET_SPLIT = 'validation'", "'train'")
    (tmp_path / "numbers.jsonl").write_text('{"text": 7}\n')
    contains(message(DATASET=str(tmp_path / "numbers.jsonl")), "TEXT_COLUMN = 'text'", "int, not text")
    (tmp_path / "chats.jsonl").write_text('{"text": [{"role": "user", "content": "Hi"}]}\n')
    contains(message(DATASET=str(tmp_path / "chats.jsonl")), "TEXT_COLUMN = 'text'", "list, not text")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    contains(message(DATASET=str(tmp_path / "broken.jsonl")), "DATASET = ", "cannot be read")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    contains(message(DATASET=str(tmp_path / "image.png")), "DATASET = ", ".jsonl", ".parquet")


FILES = {  # what a user may give as a source, and what is in it
    "empty.jsonl": "",
    "numbers.jsonl": '{"text": 7}\n',
    "broken.jsonl": '{"text": "a"}\n{"text": \n',
    "image.png": "PNG",
    "other.jsonl": '{"title": "a", "body": "b"}\n',
    "pairs.jsonl": '{"messages": [["user", "Hi"]]}\n',
    "mixed.jsonl": '{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": []}\n'
    '{"messages": null}\n{"messages": null}\n',
    "good.jsonl": '{"text": "a few words"}\n',
    "latin.jsonl": '{"text": "café"}\n',
    "first.jsonl": '{"text": "some other words"}\n',
}
SOURCES = [  # (the source, what the message holds)
    ({"name": "no.jsonl"}, ["'no.jsonl' does not exist"]),
    ({"name": "empty.jsonl"}, ["'empty.jsonl' is empty"]),
    ({"name": "good.jsonl", "column": "content"}, ["with column 'content'", "has the columns 'text'"]),
    ({"name": "other.jsonl"}, ["with column 'text'", "has the columns 'title', 'body'"]),
    ({"name": "good.jsonl", "split": "validation"}, ["with split 'validation'", "has the splits 'train'"]),
    ({"name": "numbers.jsonl"}, ["int, not text"]),
    ({"name": "pairs.jsonl"}, ["list, not chats", "'role'"]),
    ({"name": "mixed.jsonl"}, ["with column 'messages'", "holds NoneType, not"]),
    ({"name": "broken.jsonl"}, ["cannot be read"]),
    ({"name": "latin.jsonl"}, ["cannot be read", "utf-8"]),
    ({"name": "image.png"}, [".jsonl", ".parquet"]),
    ({"name": "good.jsonl", "wieght": 2}, ["a key 'wieght'", "name, config, split, column, weight"]),
    ({"name": "good.jsonl", "weight": 0}, ["weight 0", "greater than 0"]),
    ({"name": "good.jsonl", "weight": -1.5}, ["weight -1.5", "greater than 0"]),
    ({"name": "good.jsonl", "weight": float("nan")}, ["weight nan", "greater than 0"]),
    ({"name": "good.jsonl", "weight": True}, ["weight True", "greater than 0"]),
    ({"name": "good.jsonl", "weight": "2"}, ["weight '2'", "greater than 0"]),
    ({"name": "good.jsonl", "split": None}, ["split None", "must be text"]),
    ({"name": "good.jsonl", "config": 3}, ["config 3", "text or None"]),
    ({"config": None}, ["is no source", "'name'"]),
    (["good.jsonl"], ["is no source"]),
    (7, ["7 is no source"]),
]


@pytest.mark.parametrize("constant", ["DATASETS", "EVAL_DATASETS"])
@pytest.mark.parametrize("number", range(len(SOURCES)))
def test_sources_that_are_missing_or_wrong(number, constant, refused, tmp_path, monkeypatch):
    """Alone and as the second of two, in what is trained on and in what is held out."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="latin-1" if name == "latin.jsonl" else "utf-8")
    source, parts = SOURCES[number]
    contains(refused(distill, **{constant: [source]}), f"{constant}: ", *parts)
    contains(refused(distill, **{constant: [str(tmp_path / "first.jsonl"), source]}), f"{constant}: ", *parts)


def test_lists_of_sources_that_are_none(refused, text):
    for nothing in ("", []):
        contains(refused(distill, DATASETS=nothing), f"DATASETS = {nothing!r}", "no source")
        contains(refused(distill, EVAL_DATASETS=nothing), f"EVAL_DATASETS = {nothing!r}", "no source")
    contains(refused(distill, DATASETS=3), "DATASETS = 3", "text or a list")
    contains(refused(distill, EVAL_DATASETS={"name": text}), "EVAL_DATASETS = ", "text or a list or None")
    contains(refused(distill, DATASETS=[text, {"name": text, "weight": 2}]), "DATASETS: ", "twice", "weight")
    contains(refused(distill, DATASETS=[text, {"name": text, "column": "text"}]), "DATASETS: ", "twice", "weight")
    contains(refused(distill, DATASETS=[text, os.path.relpath(text)]), "DATASETS: ", "twice", "weight")
    contains(refused(distill, DATASETS="a\0b"), "DATASETS = ", "no path")


def test_text_that_is_held_out_and_trained_on(refused, text):
    for source in (text, os.path.relpath(text), {"name": text, "column": "text", "weight": 2}):
        message = refused(distill, EVAL_DATASETS=["other.jsonl", source])
        contains(message, "EVAL_DATASETS: ", Path(text).name, "in DATASETS too", "EVAL_DATASETS = None")


def test_a_disk_too_small_for_the_packed_text(refused, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 10**9))
    constants = {"TRAIN_TOKENS": 2**29, "TOKENS_PER_STEP": 2**20}
    message = refused(distill, **constants)
    contains(message, "OUTPUT_DIR = ", "4.369 GB", "the model and the packed text, and 3 GB are free", "TRAIN_TOKENS")
    monkeypatch.setattr(distill, "check_room", lambda *args: None)  # as for a continued run whose text is gone
    message = refused(distill, **constants)
    contains(message, "OUTPUT_DIR = ", "4.36 GB", "3.00 GB are free", f"TRAIN_TOKENS = {2**29}")


def test_too_little_text(refused, tmp_path):
    message = refused(importance_analysis, NUM_SAMPLES=100_000)
    rows = int(message.split("text for ")[1].split()[0])
    contains(message, "NUM_SAMPLES = 100000", f"Set NUM_SAMPLES = {rows}", "SEQUENCE_LENGTH")
    assert 0 < rows < 100_000
    (tmp_path / "short.jsonl").write_text('{"text": "a few words"}\n')
    contains(refused(importance_analysis, DATASET=str(tmp_path / "short.jsonl")), "SEQUENCE_LENGTH = 40", "too little")
    contains(refused(distill, DATASETS=str(tmp_path / "short.jsonl")), "DATASETS: ", "too little text", "EVAL_TOKENS")
    (tmp_path / "one_token.jsonl").write_text('{"text": "<|endoftext|>"}\n')
    message = refused(distill, EVAL_DATASETS=[str(tmp_path / "one_token.jsonl")])
    contains(message, "EVAL_DATASETS: ", "one_token.jsonl", "too little text", "held_out", "SEQUENCE_LENGTH = 32")


def test_a_dataset_on_the_hub_without_network(refused, monkeypatch):
    import datasets

    load_dataset = datasets.load_dataset

    def unreachable(name, *args, **kwargs):
        if name == "json":  # of a local file
            return load_dataset(name, *args, **kwargs)
        raise ConnectionError("Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    contains(refused(importance_analysis, DATASET="org/data"), "DATASET = 'org/data'", "local .jsonl", "demo.py")
    contains(refused(distill, DATASETS="org/data"), "DATASETS: 'org/data'", "local .jsonl", "demo.py")
    contains(refused(distill, EVAL_DATASETS=["org/data"]), "EVAL_DATASETS: 'org/data'", "local .jsonl", "demo.py")

    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/data' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    contains(refused(importance_analysis, DATASET="org/data"), "DATASET = 'org/data'", "neither a file here")
    contains(refused(distill, DATASETS="org/data"), "DATASETS: 'org/data'", "neither a file here")

    def gated(*args, **kwargs):
        text = "Dataset 'org/data' is a gated dataset on the Hub. You must be authenticated to access it."
        raise datasets.exceptions.DatasetNotFoundError(text)

    monkeypatch.setattr(datasets, "load_dataset", gated)
    contains(refused(importance_analysis, DATASET="org/data"), "DATASET = 'org/data' is gated", "hf auth login")
    contains(refused(distill, DATASETS="org/data"), "DATASETS: 'org/data' is gated", "hf auth login")

    def no_such_config(*args, **kwargs):
        raise ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", no_such_config)
    source = {"name": "org/data", "config": "x"}
    contains(refused(distill, DATASETS=[source]), "DATASETS: 'org/data' with config 'x'", "Available: ['a', 'b']")
    contains(refused(importance_analysis, DATASET="org/data"), "DATASET_CONFIG = None", "Available: ['a', 'b']")


@pytest.mark.parametrize("kind", ["json", "parquet", "txt", "folder", "saved", "saved_splits"])
def test_every_kind_of_local_dataset_is_read(kind, text, tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": DOCUMENTS[:5]})
    path, split = tmp_path / f"data.{kind}", "train"
    if kind == "json":
        rows.to_json(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n\n".join(DOCUMENTS[:5]))
    elif kind == "folder":
        (path / "deep").mkdir(parents=True)
        for i, document in enumerate(DOCUMENTS[:5]):
            (path / "deep" / f"{i}.txt").write_text(document)
    elif kind == "saved":
        rows.save_to_disk(path)
    else:
        split = "test"
        datasets.DatasetDict({"test": rows}).save_to_disk(path)
    expected = ["\n\n".join(DOCUMENTS[:5])] if kind == "txt" else DOCUMENTS[:5]
    assert list(data.open_text(str(path), None, split, "text")) == expected
    shuffled = [list(data.open_text(str(path), None, split, "text", shuffle_seed=3)) for _ in range(2)]
    assert shuffled[0] == shuffled[1]
    assert sorted(shuffled[0]) == sorted(expected)
    if kind == "parquet":  # five seconds for every shuffled reading
        return
    orders = {tuple(data.open_text(str(path), None, split, "text", shuffle_seed=seed)) for seed in range(8)}
    assert len(orders) > 1 or len(expected) == 1
    if kind.startswith("saved"):
        assert not list(path.rglob("cache-*"))  # nothing is written into the user's folder


# ---------------------------------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize(
    ("constants", "parts"),
    [
        ({"HIDDEN_SIZE": 49}, ["HIDDEN_SIZE = 49", "from 1 to 48"]),
        ({"HIDDEN_SIZE": 0}, ["HIDDEN_SIZE = 0", "from 1 to 48"]),
        ({"INTERMEDIATE_SIZE": 65}, ["INTERMEDIATE_SIZE = 65", "from 1 to 64"]),
        ({"NUM_ATTENTION_HEADS": 7}, ["NUM_ATTENTION_HEADS = 7", "from 1 to 6"]),
        ({"NUM_HIDDEN_LAYERS": 9}, ["NUM_HIDDEN_LAYERS = 9", "from 1 to 8"]),
        (
            {"NUM_HIDDEN_LAYERS": 1},
            ["NUM_HIDDEN_LAYERS = 1", "2 full-attention", "2 or more", "PROTECT_FULL_ATTENTION"],
        ),
        ({"LAYERS_TO_DROP": [8]}, ["LAYERS_TO_DROP = [8]", "from 0 to 7"]),
        ({"LAYERS_TO_DROP": [1, 1]}, ["LAYERS_TO_DROP = [1, 1]", "different numbers"]),
        ({"LAYERS_TO_DROP": list(range(8))}, ["LAYERS_TO_DROP", "at least one"]),
        ({"LAYERS_TO_DROP": [1], "NUM_HIDDEN_LAYERS": 5}, ["NUM_HIDDEN_LAYERS = 5", "NUM_HIDDEN_LAYERS = 7 or None"]),
        ({"NUM_ATTENTION_HEADS": 4, "NUM_KEY_VALUE_HEADS": 3}, ["NUM_ATTENTION_HEADS = 4", "NUM_ATTENTION_HEADS = 3"]),
    ],
)
def test_impossible_targets(constants, parts, refused):
    contains(refused(prune, **constants), *parts)


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        ("abc", ["TARGET_PARAMS = 'abc'", "'3.6B'"]),
        ("", ["TARGET_PARAMS = ''", "'3.6B'"]),
        ("B", ["TARGET_PARAMS = 'B'", "'3.6B'"]),
        ("0B", ["TARGET_PARAMS = '0B'", "'3.6B'"]),
        ("-1M", ["TARGET_PARAMS = '-1M'", "'3.6B'"]),
        ("nan", ["TARGET_PARAMS = 'nan'", "'3.6B'"]),
        ("1e999B", ["TARGET_PARAMS = '1e999B'", "'3.6B'"]),
        ("3.6BB", ["TARGET_PARAMS = '3.6BB'", "'3.6B'"]),
        ("3.6B", ["TARGET_PARAMS = '3.6B'", "from 0.", "M parameters", "or None"]),  # larger than the teacher
        ("1K", ["TARGET_PARAMS = '1K'", "from 0.", "M parameters", "or None"]),
    ],
)
def test_impossible_numbers_of_parameters(number, parts, refused):
    contains(refused(prune, TARGET_PARAMS=number), *parts)


def test_a_number_of_parameters_beside_impossible_sizes(refused):
    contains(refused(prune, TARGET_PARAMS="0.1M", HIDDEN_SIZE=50), "HIDDEN_SIZE = 50", "from 1 to 48")
    contains(refused(prune, TARGET_PARAMS="0.1M", LAYERS_TO_DROP=[9]), "LAYERS_TO_DROP = [9]", "from 0 to 7")
    message = refused(prune, TARGET_PARAMS="0.1M", NUM_ATTENTION_HEADS=5, NUM_KEY_VALUE_HEADS=3)
    contains(message, "NUM_ATTENTION_HEADS = 5", "NUM_KEY_VALUE_HEADS = 3")


def test_layers_that_no_metric_can_choose(refused, tmp_path):
    contains(refused(prune, LAYER_METRIC="magic"), "LAYER_METRIC = 'magic'", "'block_importance'", "'perplexity'")
    scores = torch.load(tmp_path / "scores.pt", weights_only=True)
    scores.pop("layer_perplexity", None)
    common.save_scores(scores, tmp_path / "without.pt")
    more = {"SCORES_PATH": str(tmp_path / "without.pt"), "NUM_HIDDEN_LAYERS": 7, "LAYER_METRIC": "perplexity"}
    contains(refused(prune, **more), "LAYER_METRIC = 'perplexity'", "LAYER_PERPLEXITY = True", "'block_importance'")


def test_blocks_of_layers_keep_the_first_and_the_last(refused):
    message = refused(prune, CONTIGUOUS_LAYERS=True, NUM_HIDDEN_LAYERS=1, LAYER_METRIC="angular_distance")
    contains(message, "NUM_HIDDEN_LAYERS = 1", "CONTIGUOUS_LAYERS", "2 or more")


@pytest.mark.parametrize(
    ("constants", "parts"),
    [
        ({"HIDDEN_SIZE": 40}, ["HIDDEN_SIZE", "NUM_ATTENTION_HEADS = 5"]),
        ({"LAYERS_TO_DROP": [3], "HIDDEN_SIZE": 40}, ["layer_types", "LAYERS_TO_DROP = ["]),
    ],
)
def test_shapes_that_other_runtimes_load_wrongly(constants, parts, refused):
    contains(refused(prune, REQUIRE_PORTABLE=True, **constants), "REQUIRE_PORTABLE = True", "llama.cpp", *parts)


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "parts"),
    [
        (25, None, ["NUM_ATTENTION_HEADS = 25", "NUM_KEY_VALUE_HEADS = 8", "24 or 32"]),
        (20, 8, ["NUM_ATTENTION_HEADS = 20", "16 or 24"]),
        (28, 4, ["NUM_ATTENTION_HEADS = 28", "NUM_KEY_VALUE_HEADS = 4", "24 or 32"]),
        (32, 3, ["NUM_ATTENTION_HEADS = 32", "NUM_KEY_VALUE_HEADS = 3", "18 or 24"]),
    ],
)
def test_heads_that_do_not_fit_the_key_value_heads(heads, key_value_heads, parts):
    with pytest.raises(PareError) as caught:
        prune.target_heads(prune.Sizes(4096, 11008, 32, 8, 32), heads, key_value_heads)
    contains(str(caught.value), *parts)


def test_sizes_that_transformers_refuses(checkpoints, text, tmp_path, refused):
    scores = analyse(checkpoints["llama"], text, tmp_path / "llama.pt")
    message = refused(prune, MODEL=str(checkpoints["llama"]), SCORES_PATH=str(scores), HIDDEN_SIZE=32)
    contains(message, "HIDDEN_SIZE = 32", "multiple of NUM_ATTENTION_HEADS = 6", "30 or 36")


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_scores_that_are_missing_or_not_scores(refused, tmp_path):
    message = refused(prune, SCORES_PATH=str(tmp_path / "none.pt"))
    contains(message, "SCORES_PATH", "does not exist", "importance_analysis.py")
    for name, content in (("text.pt", b"hello"), ("dot.pt", b"."), ("empty.pt", b""), ("zip.pt", b"PK\x03\x04broken")):
        (tmp_path / name).write_bytes(content)
        contains(refused(prune, SCORES_PATH=str(tmp_path / name)), "SCORES_PATH", "not a score file")
        message = refused(importance_analysis, SCORES_PATH=str(tmp_path / name))
        contains(message, "SCORES_PATH", "not a score file")
    complete = torch.load(tmp_path / "scores.pt", weights_only=True)
    for broken in ({"mlp": torch.ones(2)}, complete | {"meta": {}}, complete | {"mlp": [1.0]}):
        torch.save(broken, tmp_path / "broken.pt")
        contains(refused(prune, SCORES_PATH=str(tmp_path / "broken.pt")), "SCORES_PATH", "not a score file")
    torch.save({"mlp": torch.ones(2)}, tmp_path / "other.pt")
    contains(refused(prune, SCORES_PATH=str(tmp_path / "other.pt")), "SCORES_PATH", "not a score file")
    contains(refused(importance_analysis, SCORES_PATH=str(tmp_path / "scores.txt")), "SCORES_PATH", ".pt")
    contains(refused(importance_analysis, SCORES_PATH=str(tmp_path / "scores.pt" / "a.pt")), "SCORES_PATH", "written")
    (tmp_path / "photo.png").write_bytes(b"precious")
    contains(refused(importance_analysis, SCORES_PATH=str(tmp_path / "photo.pt")), "photo.png is in the way")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_a_malicious_pickle_in_place_of_scores_is_never_run(refused, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(marker)))
    torch.save({"mlp": Evil(marker)}, tmp_path / "evil_zip.pt")
    for name in ("evil.pt", "evil_zip.pt"):
        contains(refused(prune, SCORES_PATH=str(tmp_path / name)), "not a score file")
    assert not marker.exists()


def flip_bytes(path: Path, positions) -> None:
    content = bytearray(path.read_bytes())
    for position in positions:
        content[position] ^= 0x41
    path.write_bytes(content)


def same_values(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_flipped_byte_in_a_score_file_is_never_taken_for_scores(scores, tmp_path):
    """At 60 places all over the file: refused, or it did not matter."""
    whole, size = common.load_scores(scores), scores.stat().st_size
    taken = []
    for position in torch.randint(size, (60,), generator=torch.Generator().manual_seed(0)).tolist():
        shutil.copy(scores, tmp_path / "flipped.pt")
        flip_bytes(tmp_path / "flipped.pt", [position])
        try:
            if not same_values(common.load_scores(tmp_path / "flipped.pt"), whole):
                taken.append(position)
        except PareError as error:
            contains(str(error), "SCORES_PATH = ", "flipped.pt")
    assert not taken, f"{len(taken)} of 60 flips taken for scores"


@pytest.fixture
def with_moments(checkpoints, text, tmp_path):
    """Scores with the second moments beside them."""
    constants = {"SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 8, "LAYER_PERPLEXITY": False}
    return analyse(checkpoints["olmo3"], text, tmp_path / "moments.pt", **constants)


def test_second_moments_that_are_missing(refused, scores, with_moments, tmp_path):
    without = torch.load(scores, weights_only=True)
    without["meta"]["moments"] = None
    common.save_scores(without, tmp_path / "without.pt")
    message = refused(prune, SCORES_PATH=str(tmp_path / "without.pt"), REFIT=True, HIDDEN_SIZE=40)
    contains(message, "REFIT = True", "SECOND_MOMENTS = True", "REFIT = None")
    shutil.rmtree(with_moments.with_suffix(".moments"))
    message = refused(prune, SCORES_PATH=str(with_moments), REFIT=True, HIDDEN_SIZE=40)
    contains(message, "SCORES_PATH", "second moments", "importance_analysis.py", "REFIT = False")


def unlink(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        unlink,
        lambda path: os.truncate(path, path.stat().st_size - 100),
        lambda path: os.truncate(path, 0),
        lambda path: flip_bytes(path, [0]),
        lambda path: flip_bytes(path, [30]),
        lambda path: flip_bytes(path, range(8, 200)),
        lambda path: edit_header(path, lambda header: header.pop("mlp.down_proj")),
        lambda path: edit_header(path, lambda header: header["__metadata__"].update(pare='{"fingerprint": "1"}')),
        lambda path: edit_header(path, lambda header: header["__metadata__"].update(pare="nonsense")),
        lambda path: flip_bytes(path, [common.read_header(path)["mlp.down_proj"].start + 1000]),
        lambda path: save_file({"a": torch.ones(3)}, path),
    ],
)
def test_second_moments_that_are_damaged_or_of_another_run(damage, refused, with_moments):
    damage(with_moments.with_suffix(".moments") / "layer-2.safetensors")
    for refit in (True, None):
        message = refused(prune, SCORES_PATH=str(with_moments), REFIT=refit, INTERMEDIATE_SIZE=40)
        contains(message, "SCORES_PATH", "layer-2.safetensors", "importance_analysis.py", "REFIT = False")


def test_second_moments_that_are_not_finite(refused, with_moments):
    path = with_moments.with_suffix(".moments") / "layer-2.safetensors"
    identity = common.pare_metadata(path)["fingerprint"]
    moments = {name: tensor.clone() for name, tensor in load_file(path).items()}
    moments["mlp.down_proj"][3, 3] = float("nan")
    importance_analysis.save_moments(path, moments, identity)
    message = refused(prune, SCORES_PATH=str(with_moments), INTERMEDIATE_SIZE=40)
    contains(message, "SCORES_PATH", "layer-2.safetensors", "not finite", "REFIT = False")


def test_fewer_than_no_refit_samples(refused, with_moments):
    contains(refused(prune, SCORES_PATH=str(with_moments), REFIT_SAMPLES=-1), "REFIT_SAMPLES = -1")


def test_unfinished_sums_that_are_damaged_are_left_aside(tmp_path):
    """A flipped byte anywhere in what a killed scoring run saved, at 60 places."""
    path = tmp_path / ".scores.partial-0-of-1.safetensors"
    sums = importance_analysis.Sums(path, "run", 0)
    sums.add({"mlp.0": torch.rand(2, 20)}, torch.tensor([0, 1]))
    sums.done["scoring"] = 12345678
    sums.save_if_due()
    whole = path.read_bytes()
    for position in torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        path.write_bytes(whole)
        flip_bytes(path, [position])
        again = importance_analysis.Sums(path, "run", 0)
        assert again.done in ({}, {"scoring": 12345678}), position
        if again.done:
            assert torch.equal(again.sums["mlp.0"], sums.sums["mlp.0"]), position


def test_scores_from_another_model(checkpoints, text, refused, tmp_path):
    other = save_checkpoint(tmp_path / "other_weights", "olmo3", seed=7)  # same shapes, same config
    message = refused(prune, SCORES_PATH=str(analyse(other, text, tmp_path / "other.pt")))
    contains(message, "SCORES_PATH", str(other), str(checkpoints["olmo3"]), "importance_analysis.py")
    scores = analyse(checkpoints["llama"], text, tmp_path / "llama.pt")  # other shapes
    contains(refused(prune, SCORES_PATH=str(scores)), "SCORES_PATH", str(checkpoints["llama"]))


# ---------------------------------------------------------------------------------------------------------------------
# Outputs and devices


@pytest.mark.parametrize("script", [prune, distill])
def test_an_output_folder_that_is_not_pares(script, refused, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    contains(refused(script, OUTPUT_DIR=str(tmp_path / "precious")), "OUTPUT_DIR", "not made by Pare")
    (tmp_path / "file").write_text("also precious")
    contains(refused(script, OUTPUT_DIR=str(tmp_path / "file")), "OUTPUT_DIR", "not made by Pare")
    contains(refused(script, OUTPUT_DIR=str(tmp_path / "file" / "out")), "OUTPUT_DIR", "can be written")


def test_an_output_folder_of_another_script_or_with_a_users_files(refused, checkpoints, tmp_path):
    cut_into(tmp_path / "pruned", checkpoints, tmp_path / "scores.pt")
    contains(refused(distill, OUTPUT_DIR=str(tmp_path / "pruned")), "OUTPUT_DIR", "made by prune.py, not by distill.py")
    (tmp_path / "pruned" / "model.gguf").write_bytes(b"hours of conversion")
    contains(refused(prune, OUTPUT_DIR=str(tmp_path / "pruned")), "OUTPUT_DIR", "did not write", "model.gguf")


def test_a_folder_that_holds_the_model_or_the_scores(refused, checkpoints, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoints["olmo3"], run / "teacher")
    shutil.copy(tmp_path / "scores.pt", run / "scores.pt")
    (run / "pare.json").write_text('{"script": "prune.py"}')
    contains(refused(prune, MODEL=str(run / "teacher"), OUTPUT_DIR=str(run)), "OUTPUT_DIR", "MODEL itself")
    contains(
        refused(prune, SCORES_PATH=str(run / "scores.pt"), OUTPUT_DIR=str(run)), "OUTPUT_DIR", "SCORES_PATH itself"
    )


def test_output_onto_the_model_itself(refused, checkpoints, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["olmo3"], folder)
    (folder / "pare.json").write_text('{"script": "prune.py"}')  # e.g. a model that Pare pruned before
    contains(refused(prune, MODEL=str(folder), OUTPUT_DIR=str(folder)), "OUTPUT_DIR", "MODEL itself")
    (folder / "pare.json").write_text('{"script": "distill.py"}')
    contains(refused(distill, STUDENT=str(folder), OUTPUT_DIR=str(folder)), "OUTPUT_DIR", "STUDENT itself")


@pytest.mark.parametrize("script", [importance_analysis, prune, distill])
def test_a_device_that_is_not_there(script, refused):
    for device in ("cuda:7", "tpu", "cpu:1", "cpu:"):
        contains(refused(script, DEVICE=device), f"DEVICE = '{device}' is not there", "'cpu'")
    if script is not prune:
        contains(refused(script, DTYPE="float17"), "DTYPE = 'float17'", "'bfloat16'")


@pytest.mark.parametrize(
    ("constants", "parts"),
    [
        ({"TOKENS_PER_STEP": 100}, ["TOKENS_PER_STEP = 100", "the nearest is 128"]),
        ({"TRAIN_TOKENS": 10}, ["TRAIN_TOKENS = 10", "TOKENS_PER_STEP = 64"]),
        ({"MICRO_BATCH_SIZE": 0}, ["MICRO_BATCH_SIZE = 0", "greater than 0"]),
        ({"LEARNING_RATE": -1e-4}, ["LEARNING_RATE = -0.0001", "greater than 0"]),
        ({"KEEP_CHECKPOINTS": 1}, ["KEEP_CHECKPOINTS = 1", "at least 2"]),
        ({"SEQUENCE_LENGTH": 1}, ["SEQUENCE_LENGTH = 1", "2 or more"]),
        ({"WEIGHT_DECAY": -1.0}, ["WEIGHT_DECAY = -1.0", "0 or more"]),
        ({"SEED": -1}, ["SEED = -1", "0 or more"]),
        ({"MIN_LEARNING_RATE": 1.0}, ["MIN_LEARNING_RATE = 1.0", "LEARNING_RATE = 0.0001"]),
        ({"REPORT_TO": "email"}, ["REPORT_TO = 'email'", "'wandb'", "'trackio'"]),
        ({"REPORT_TO": "wandb"}, ["REPORT_TO = 'wandb'", "uv add wandb"]),
    ],
)
def test_impossible_training_settings(constants, parts, refused):
    contains(refused(distill, **constants), *parts)


@pytest.mark.parametrize("name", ["NUM_SAMPLES", "SEQUENCE_LENGTH", "BATCH_SIZE"])
def test_counts_of_zero(name, refused):
    contains(refused(importance_analysis, **{name: 0}), f"{name} = 0", "greater than 0")


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=90_000_000))
    contains(refused(prune), "OUTPUT_DIR = ", "needs 0.1 GB", "0.1 GB are free", "another disk")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    contains(
        refused(importance_analysis, SECOND_MOMENTS=True), "SECOND_MOMENTS = True", "0.0 GB are free", "larger disk"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.pt"]


def full_disk(limit: int):
    """No file of this process may grow beyond `limit` bytes: what a full disk or a quota does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def failing_sync(path):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "tokenizer", "sync"])
@pytest.mark.parametrize("over", ["nothing", "an older result"])
def test_a_full_disk_leaves_the_old_result(where, over, checkpoints, scores, tmp_path, capsys):
    if over == "an older result":
        cut_into(tmp_path / "out", checkpoints, scores, HIDDEN_SIZE=40)
    before = files_below(tmp_path)

    def work() -> str:
        if where == "sync":
            common.sync_folder = failing_sync
        full_disk({"weights": 200_000, "tokenizer": 12_000, "sync": 10**9}[where])
        sizes = {"HIDDEN_SIZE": 8, "INTERMEDIATE_SIZE": 1, "NUM_HIDDEN_LAYERS": 2} if where == "tokenizer" else {}
        try:
            return str(cut_into(tmp_path / "out", checkpoints, scores, **sizes))
        except PareError as error:
            return f"PareError: {error}"

    message = in_child(work)
    contains(
        message, "PareError: OUTPUT_DIR = ", "GB are free", "untouched", "space" if where == "sync" else "too large"
    )
    assert files_below(tmp_path) == before
    assert not list(tmp_path.glob(".out*"))
    if before:
        load(tmp_path / "out")


def test_a_folder_that_cannot_be_written(checkpoints, scores):
    """As root, who may write anywhere, in a child that is nobody."""
    root = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(checkpoints["olmo3"], root / "teacher")
        shutil.copy(scores, root / "scores.pt")
        (root / "locked").mkdir()
        for path in (root, root / "teacher", root / "locked"):
            path.chmod(0o555)

        def work() -> str:
            if os.geteuid() == 0:
                os.setuid(65534)
            messages = []
            for output in (root / "locked" / "out", root / "out", root / "locked"):
                try:
                    cut_into(output, {"olmo3": root / "teacher"}, root / "scores.pt")
                except PareError as error:
                    messages.append(str(error))
            try:
                analyse(root / "teacher", str(root / "none.jsonl"), root / "locked" / "scores.pt")
            except PareError as error:
                messages.append(str(error))
            return "\n".join(messages)

        lines = in_child(work).splitlines()
        assert len(lines) == 4, lines
        for line in lines[:3]:
            contains(line, "OUTPUT_DIR = ", "written")
        contains(lines[3], "SCORES_PATH = ", "written")
    finally:
        root.chmod(0o755)
        (root / "locked").chmod(0o755)
        shutil.rmtree(root)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, and what a killed run left


def test_two_runs_do_not_write_one_place(refused, tmp_path):
    with common.lock(tmp_path / "out", "OUTPUT_DIR"):
        contains(refused(prune), "OUTPUT_DIR = ", "another run")
    with common.lock(tmp_path / "new_scores.pt", "SCORES_PATH"):
        contains(refused(importance_analysis), "SCORES_PATH = ", "another run")


@pytest.mark.parametrize("debris", [".out.tmp", ".out.old", ".out.discarded", ".out.lock"])
@pytest.mark.parametrize("over", ["nothing", "an older result"])
def test_what_a_killed_run_left_is_not_in_the_way(debris, over, checkpoints, scores, tmp_path):
    if over == "an older result":
        cut_into(tmp_path / "out", checkpoints, scores, HIDDEN_SIZE=40)
    if debris == ".out.lock":
        (tmp_path / debris).write_text("")
    elif debris != ".out.old":
        (tmp_path / debris).mkdir()
        (tmp_path / debris / "model.safetensors").write_bytes(b"half of a")
    else:  # killed between the two renames, or just before the last removal
        cut_into(tmp_path / "first", checkpoints, scores, HIDDEN_SIZE=32)
        (tmp_path / "first").rename(tmp_path / debris)
    folder = cut_into(tmp_path / "out", checkpoints, scores, HIDDEN_SIZE=24)
    assert load(folder).config.hidden_size == 24
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------------------
# Found by trying to break it


@pytest.mark.parametrize("path", ["/", "x" * 300, "a\0b", "~nobody-of-this-name/x", "x" * 230 + ".pt"])
def test_paths_that_are_none(path, refused):
    contains(refused(prune, OUTPUT_DIR=path), "OUTPUT_DIR = ")
    contains(refused(importance_analysis, SCORES_PATH=path), "SCORES_PATH = ")
    if path != "/":
        contains(refused(importance_analysis, MODEL=path), "MODEL = ")
        contains(refused(importance_analysis, DATASET=path), "DATASET = ")


def test_what_a_user_changed_in_a_result_is_not_written_over(refused, checkpoints, scores, tmp_path):
    """Weights trained in place, folders, links; a copy with new times is the same result."""
    folder = cut_into(tmp_path / "out", checkpoints, scores, HIDDEN_SIZE=40)
    for path in sorted(folder.rglob("*")):
        path.touch()
    (folder / "pare.json").touch()
    os.utime(folder / "model.safetensors")  # as `cp` may leave it: newer than pare.json, and the same
    assert cut_into(folder, checkpoints, scores, HIDDEN_SIZE=44) == folder
    weights = {name: 2 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    contains(refused(prune, OUTPUT_DIR=str(folder)), "OUTPUT_DIR", "did not write", "model.safetensors")
    contains(refused(importance_analysis, MODEL=str(folder)), "MODEL = ", "changed since prune.py wrote it", "move")
    shutil.rmtree(folder)
    for add in (lambda path: path.mkdir(), lambda path: path.symlink_to("/nowhere"), os.mkfifo):
        add(cut_into(folder, checkpoints, scores, HIDDEN_SIZE=40) / "mine")
        contains(refused(prune, OUTPUT_DIR=str(folder)), "OUTPUT_DIR", "did not write", "mine")
        shutil.rmtree(folder)


def test_records_of_another_form(refused, checkpoints, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoints["olmo3"], model)
    for record in ('{"script": "prune.py", "files": 5}', '{"script": "prune.py", "sha256": 5}', "[]"):
        output.mkdir(exist_ok=True)
        (output / "pare.json").write_text(record)
        contains(refused(prune, OUTPUT_DIR=str(output)), "OUTPUT_DIR", "not made by Pare")
    (model / "pare.json").write_text('{"sha256": 5}')
    common.check_hashes(common.find_checkpoint(str(model), None, "MODEL"), "MODEL")


def test_the_weights_that_transformers_loads_are_the_ones_that_are_pruned(checkpoints, text, tmp_path):
    """Where one file lies beside shards and their index, as `save_pretrained` may leave them, it is the one file."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], folder)
    load(folder).save_pretrained(folder, max_shard_size="100KB")
    model = load(folder)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    save_file(
        {name: x.clone() for name, x in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert (folder / "model.safetensors.index.json").is_file()
    scores = analyse(folder, text, tmp_path / "scores.pt")
    configure(prune, MODEL=str(folder), SCORES_PATH=str(scores), OUTPUT_DIR=str(tmp_path / "out"), DEVICE="cpu")
    configure(prune, **KEEP_ALL | {"TARGET_PARAMS": None})
    for name, tensor in load(prune.main()).state_dict().items():
        assert torch.equal(tensor, load(folder).state_dict()[name])


def test_names_with_brackets_are_no_patterns(checkpoints, text, tmp_path):
    for name, words in (("a[1].jsonl", "right"), ("a1.jsonl", "wrong"), ("d [v2]/t*.jsonl", "star")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": words}))
    for name, words in (("a[1].jsonl", "right"), ("d [v2]", "star"), ("d [v2]/t*.jsonl", "star")):
        assert list(data.open_text(str(tmp_path / name), None, "train", "text")) == [words]
    other = tmp_path / ".s1.partial-0-of-1.safetensors"
    other.write_text("of another run")
    analyse(checkpoints["llama"], text, tmp_path / "s[1].pt", SAVE_MINUTES=0.0)
    assert other.read_text() == "of another run"
    assert not list(tmp_path.glob(".s[[]*"))


def test_moments_behind_a_link_stay_there(checkpoints, text, tmp_path):
    """A user has moved them to a larger disk."""
    path, moments = tmp_path / "scores.pt", tmp_path / "scores.moments"
    for seed in range(3):
        analyse(checkpoints["llama"], text, path, SECOND_MOMENTS=True, SEED=seed)
        if not moments.is_symlink():
            (tmp_path / "large").mkdir()
            moments.rename(tmp_path / "large" / "moments")
            moments.symlink_to(tmp_path / "large" / "moments")
        identity = common.load_scores(path)["meta"]["moments"]
        prune.Moments(tmp_path / "large" / "moments", identity).check(4, True)
    assert [file.name for file in (tmp_path / "large").iterdir()] == ["moments"]


def test_files_without_permission_are_named(checkpoints, tmp_path):
    """One line and exit code 1, for a user who is not root."""
    shutil.copytree(checkpoints["olmo3"], tmp_path / "closed" / "model")
    (tmp_path / "closed").chmod(0)

    def work() -> str:
        if os.geteuid() == 0:
            os.setuid(65534)
        sys.argv = ["importance_analysis.py", f"MODEL={tmp_path / 'closed' / 'model'}", f"SCORES_PATH={tmp_path}/s.pt"]
        with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match="1"):
            common.run(importance_analysis)
        return errors.getvalue()

    message = in_child(work)
    (tmp_path / "closed").chmod(0o700)
    assert message.startswith("importance_analysis.py: ")
    contains(message, "Permission denied")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("name", "value"), [("model_type", ["olmo3"]), ("model_type", {}), ("num_attention_heads", 0)])
def test_configs_that_no_model_has(name, value, damaged, refused):
    folder, _ = damaged
    edit_json(folder / "config.json", **{name: value})
    for script in (importance_analysis, prune):
        contains(refused(script, MODEL=str(folder)), "MODEL")


def test_the_next_command_can_be_pasted(checkpoints, text, tmp_path, capsys):
    import shlex

    folder = tmp_path / "my models" / "olmo"
    shutil.copytree(checkpoints["olmo3"], folder)
    scores = analyse(folder, text, tmp_path / "my models" / "scores.pt")
    pasted = shlex.split(capsys.readouterr().out.splitlines()[-1].split("Next: ")[1])
    assert pasted == ["uv", "run", "prune.py", f"MODEL={folder}", f"SCORES_PATH={scores}"]


def test_a_fresh_download_is_advised_by_its_command(checkpoints, tmp_path):
    """A shard of a Hub model that is cut short."""
    shutil.copytree(checkpoints["olmo3"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = common.find_checkpoint(str(tmp_path / "model"), None, "MODEL")
    with pytest.raises(PareError) as caught:
        common.tensor_infos(dataclasses.replace(found, name="org/model", revision="abc"), "MODEL")
    contains(str(caught.value), "cut short", "hf download org/model --revision abc --force-download")


def test_nothing_is_written_into_the_folder_of_the_model(refused, checkpoints, tmp_path):
    contains(refused(prune, OUTPUT_DIR=str(checkpoints["olmo3"] / "pruned")), "OUTPUT_DIR = ", "folder of MODEL")
    before = sorted(checkpoints["olmo3"].rglob("*"))
    for inside in (checkpoints["olmo3"] / "s.pt", checkpoints["olmo3"] / "new" / "s.pt"):
        contains(refused(importance_analysis, SCORES_PATH=str(inside)), "SCORES_PATH = ", "folder of MODEL")
    assert sorted(checkpoints["olmo3"].rglob("*")) == before


def test_an_output_folder_that_is_the_root_of_a_disk(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    contains(refused(prune), "OUTPUT_DIR = ", "root of a disk", "folder on it")


def test_a_teacher_that_cannot_be_read_is_not_blamed_on_the_output(refused, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    contains(message := refused(prune, HIDDEN_SIZE=40), "model.safetensors cannot be read", "Input/output error")
    assert "OUTPUT_DIR" not in message


def test_a_gpu_too_small_for_the_refit(refused, monkeypatch, with_moments):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prune, "refit_in_sequence", fail)
    message = refused(prune, SCORES_PATH=str(with_moments), HIDDEN_SIZE=40)
    contains(message, "DEVICE = 'cpu'", "memory is too small", "REFIT_SAMPLES = 256")


def test_memory_too_small_for_the_refit_is_seen_before_any_work(refused, monkeypatch, with_moments):
    """With as many calibration rows as the message names, it is enough."""
    rows = load_file(with_moments.with_suffix(".moments") / "rows.safetensors")["rows"]
    work, of_row = 6 * 8 * 64**2, rows.shape[1] * (48 + 40) * 4  # float64 squares of the neurons; two float32 streams
    assert len(rows) > 2
    constants = {"SCORES_PATH": str(with_moments), "HIDDEN_SIZE": 40}
    monkeypatch.setattr(common, "available_bytes", lambda device: work + 2 * of_row)
    with monkeypatch.context() as patch:
        patch.setattr(prune, "choose_neurons", None)
        patch.setattr(prune, "write_student", None)
        message = refused(prune, **constants)
    contains(message, "REFIT_SAMPLES = 256: ", "do not fit on cpu", "Set REFIT_SAMPLES = 2, or another DEVICE")
    configure(prune, **constants, REFIT_SAMPLES=2)
    assert prune.main().is_dir()


def test_hidden_scores_of_another_name(refused):
    contains(refused(prune, HIDDEN_METRIC="magic"), "HIDDEN_METRIC = 'magic'", "'block_inputs'", "'norm_outputs'")


def test_single_samples_and_tokens(refused):
    for name in ("NUM_SAMPLES", "SEQUENCE_LENGTH"):
        contains(refused(importance_analysis, **{name: 1}), f"{name} = 1", "2 or more")


def test_a_missing_index_is_named(refused, checkpoints, tmp_path):
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["olmo3"])
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors.index.json").unlink()
    contains(refused(prune, MODEL=str(folder)), "MODEL = ", "lacks model.safetensors.index.json")


def test_a_flipped_byte_in_a_pruned_model_is_noticed(refused, checkpoints, scores, tmp_path):
    folder = cut_into(tmp_path / "out", checkpoints, scores, INTERMEDIATE_SIZE=32)
    flip_bytes(folder / "model.safetensors", [(folder / "model.safetensors").stat().st_size - 1000])
    message = refused(importance_analysis, MODEL=str(folder))
    contains(message, "MODEL = ", "model.safetensors is damaged", "prune.py")
    record = torch.load(scores, weights_only=True)  # the scores fit: the byte is in none of the rows that are hashed
    checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
    hashes = {
        "config_hash": common.hash_config(checkpoint),
        "weights_hash": common.hash_checkpoint(checkpoint, "MODEL"),
    }
    record["mlp"] = record["mlp"][:, :32].contiguous()
    record["meta"] |= hashes
    common.save_scores(record, tmp_path / "again.pt")
    message = refused(
        prune, MODEL=str(folder), SCORES_PATH=str(tmp_path / "again.pt"), OUTPUT_DIR=str(tmp_path / "new")
    )
    contains(message, "MODEL = ", "model.safetensors is damaged", "prune.py")


def test_impossible_sizes_are_refused_before_a_download(refused, monkeypatch, checkpoints, tmp_path):
    """A Hub id: config.json comes alone, and nothing else is asked for."""
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns, **more):
        asked.append(allow_patterns)
        return str(checkpoints["olmo3"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    wrongs = [
        {"NUM_ATTENTION_HEADS": 99},
        {"TARGET_PARAMS": "much"},
        {"TARGET_PARAMS": "70B"},
        {"NUM_KEY_VALUE_HEADS": 5},
        {"NUM_KEY_VALUE_HEADS": 4, "NUM_ATTENTION_HEADS": 6, "TARGET_PARAMS": "0.2M"},
        *({"LAYERS_TO_DROP": [99], "TARGET_PARAMS": target} for target in (None, "0.2M")),
        {"NUM_HIDDEN_LAYERS": 5, "LAYERS_TO_DROP": [3], "TARGET_PARAMS": "0.2M"},
        {"NUM_HIDDEN_LAYERS": 1},
        {"NUM_HIDDEN_LAYERS": 1, "CONTIGUOUS_LAYERS": True},
        {"REQUIRE_PORTABLE": True, "HIDDEN_SIZE": 40},
    ]
    for wrong in wrongs:
        contains(refused(prune, MODEL="org/model", **wrong), next(iter(wrong)))
    scores = torch.load(tmp_path / "scores.pt", weights_only=True)
    scores["meta"]["config_hash"] = 64 * "0"
    common.save_scores(scores, tmp_path / "other.pt")
    contains(
        refused(prune, MODEL="org/model", SCORES_PATH=str(tmp_path / "other.pt")), "SCORES_PATH = ", "not the same"
    )
    contains(refused(importance_analysis, MODEL="org/model", SEQUENCE_LENGTH=10**6), "SEQUENCE_LENGTH")
    assert asked == [["config.json"]] * (len(wrongs) + 2)


def test_a_lock_holds_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with common.lock(tmp_path / "real", "OUTPUT_DIR"), pytest.raises(common.PareError, match="another run"):
        with common.lock(tmp_path / "link", "OUTPUT_DIR"):
            pass


def test_scores_on_a_full_disk(tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""

    def full(tensors, path, metadata):
        raise common.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    sums = importance_analysis.Sums(tmp_path / "partial.safetensors", "", 0)
    sums.add({"a": torch.ones(1, 3)}, torch.zeros(1, dtype=torch.long))
    monkeypatch.setattr(importance_analysis, "save_file", full)
    with pytest.raises(common.PareError, match=r"No space left.*GB are free"):
        sums.save_if_due()
