"""Every mistake a user can make ends in one or two lines that name the constant and what would work, and nothing on
disk is lost."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import DOCUMENTS, KEEP_ALL, ROOT, analyse, build_tokenizer, configure, save_checkpoint
from safetensors.torch import load_file, save_file

import common
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
            "MODEL": str(checkpoints["olmo3"]),
            "SCORES_PATH": str(tmp_path / "scores.pt"),
            "OUTPUT_DIR": str(tmp_path / "out"),
            "DEVICE": "cpu",
        },
        distill: {
            "TEACHER": str(checkpoints["olmo3"]),
            "STUDENT": str(checkpoints["olmo3"]),
            "OUTPUT_DIR": str(tmp_path / "out"),
            "DATASET": text,
            "DATASET_CONFIG": None,
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
    contains(result.stdout, "uv run prune.py", "INTERMEDIATE_SIZE = 6144  # MLP neurons kept", "LAYERS_TO_DROP = None")


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


def test_an_unsupported_architecture(refused, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "mixtral"}')
    for script, constant in ((importance_analysis, "MODEL"), (prune, "MODEL"), (distill, "STUDENT")):
        message = refused(script, **{constant: str(tmp_path / "bert")})
        contains(message, f"{constant} = ", "'mixtral'", "llama, olmo2, olmo3", "FAMILIES in common.py")


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


def test_damaged_checkpoints(damaged, refused):
    folder, weights = damaged
    path = folder / "model.safetensors"

    def messages():
        yield refused(importance_analysis, MODEL=str(folder))
        yield refused(distill, TEACHER=str(folder))

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for message in messages():
        contains(message, "model.safetensors is damaged", "Download")
    path.unlink()
    for message in messages():
        contains(message, "lacks model.safetensors", "safetensors only")
    torch.save(weights, folder / "pytorch_model.bin")
    for message in messages():
        contains(message, "lacks model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    poisoned = weights[name].clone()
    poisoned[3, 4] = float("nan")
    save_file(weights | {name: poisoned}, path)
    for message in messages():
        contains(message, name, "not finite")
    save_file({key: tensor for key, tensor in weights.items() if key != name}, path)
    for message in messages():
        contains(message, "missing keys", name)
    contains(refused(prune, MODEL=str(folder), OUTPUT_DIR=str(folder.parent / "new")), "disagree", name)


def test_a_damaged_index_or_config(damaged, refused):
    folder, _ = damaged
    for content in ('{"weight_', "{}", "[]"):
        (folder / "model.safetensors.index.json").write_text(content)
        contains(refused(prune, MODEL=str(folder)), "index.json is damaged", "Download")
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


def test_an_index_that_points_outside_its_folder(damaged, refused):
    folder, weights = damaged
    index = {"weight_map": {name: "../scores.pt" for name in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    contains(refused(prune, MODEL=str(folder)), "points outside its folder")


def test_rope_parameters_must_be_per_layer_type(checkpoints):
    config = transformers.AutoConfig.from_pretrained(checkpoints["olmo3"])
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1.0}
    with pytest.raises(PareError, match="rope_parameters"):
        common.check_rope(config, "MODEL = 'x'")
    config.rope_parameters = {key: {"rope_type": "yarn"} for key in ("full_attention", "sliding_attention")}
    with pytest.raises(PareError, match="sliding_attention"):
        common.check_rope(config, "MODEL = 'x'")


def test_old_transformers_are_refused(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.12.1")
    with pytest.raises(PareError, match=r"5\.13"):
        common.check_transformers()


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


def test_a_tokenizer_that_does_not_belong_to_the_model():
    with pytest.raises(PareError, match=r"vocabulary ends at 99"):
        list(common.pack_rows(DOCUMENTS, build_tokenizer(), 32, 100))


# ---------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("script", [importance_analysis, distill])
def test_text_that_is_missing_or_wrong(script, refused, tmp_path):
    contains(refused(script, DATASET=str(tmp_path / "no.jsonl")), "DATASET = ", "does not exist")
    (tmp_path / "empty.jsonl").write_text("")
    contains(refused(script, DATASET=str(tmp_path / "empty.jsonl")), "DATASET = ", "is empty")
    contains(refused(script, TEXT_COLUMN="content"), "TEXT_COLUMN = 'content'", "'text'")
    contains(refused(script, DATASET_SPLIT="validation"), "DATASET_SPLIT = 'validation'", "'train'")
    (tmp_path / "numbers.jsonl").write_text('{"text": 7}\n')
    contains(refused(script, DATASET=str(tmp_path / "numbers.jsonl")), "TEXT_COLUMN = 'text'", "int, not text")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    contains(refused(script, DATASET=str(tmp_path / "broken.jsonl")), "DATASET = ", "cannot be read")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    contains(refused(script, DATASET=str(tmp_path / "image.png")), "DATASET = ", ".jsonl", ".parquet")


def test_too_little_text(refused, tmp_path):
    message = refused(importance_analysis, NUM_SAMPLES=100_000)
    rows = int(message.split("text for ")[1].split()[0])
    contains(message, "NUM_SAMPLES = 100000", f"Set NUM_SAMPLES = {rows}", "SEQUENCE_LENGTH")
    assert 0 < rows < 100_000
    (tmp_path / "short.jsonl").write_text('{"text": "a few words"}\n')
    contains(refused(importance_analysis, DATASET=str(tmp_path / "short.jsonl")), "SEQUENCE_LENGTH = 40", "too little")
    contains(refused(distill, DATASET=str(tmp_path / "short.jsonl")), "DATASET = ", "too little text", "EVAL_TOKENS")


def test_a_dataset_on_the_hub_without_network(refused, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/data' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    contains(refused(importance_analysis, DATASET="org/data"), "DATASET = 'org/data'", "local .jsonl", "demo.py")

    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/data' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    contains(refused(importance_analysis, DATASET="org/data"), "DATASET = 'org/data'", "neither a file here")


@pytest.mark.parametrize("kind", ["json", "parquet", "txt", "folder", "saved", "saved_splits"])
def test_every_kind_of_local_dataset_is_read(kind, text, tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": DOCUMENTS[:5]})
    path, split = tmp_path / f"data.{kind}", "train"
    if kind == "json":
        data.to_json(path)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n\n".join(DOCUMENTS[:5]))
    elif kind == "folder":
        (path / "deep").mkdir(parents=True)
        for i, document in enumerate(DOCUMENTS[:5]):
            (path / "deep" / f"{i}.txt").write_text(document)
    elif kind == "saved":
        data.save_to_disk(path)
    else:
        split = "test"
        datasets.DatasetDict({"test": data}).save_to_disk(path)
    expected = ["\n\n".join(DOCUMENTS[:5])] if kind == "txt" else DOCUMENTS[:5]
    assert list(common.open_text(str(path), None, split, "text")) == expected
    shuffled = [list(common.open_text(str(path), None, split, "text", shuffle_seed=3)) for _ in range(2)]
    assert shuffled[0] == shuffled[1]
    assert sorted(shuffled[0]) == sorted(expected)
    orders = {tuple(common.open_text(str(path), None, split, "text", shuffle_seed=seed)) for seed in range(8)}
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
    ("heads", "key_value_heads", "parts"),
    [
        (25, None, ["NUM_ATTENTION_HEADS = 25", "NUM_KEY_VALUE_HEADS = 8", "24 or 32"]),
        (20, 8, ["NUM_ATTENTION_HEADS = 20", "16 or 24"]),
        (32, 4, ["NUM_ATTENTION_HEADS = 32", "NUM_KEY_VALUE_HEADS = 4", "12 or 16"]),
    ],
)
def test_heads_that_do_not_fit_the_key_value_heads(heads, key_value_heads, parts):
    with pytest.raises(PareError) as caught:
        prune.target_heads(prune.Sizes(4096, 11008, 32, 8, 32), heads, key_value_heads)
    contains(str(caught.value), *parts)


def test_sizes_that_transformers_refuses(checkpoints, text, tmp_path, refused):
    scores = analyse(checkpoints["llama"], text, tmp_path / "llama.pt")
    message = refused(prune, MODEL=str(checkpoints["llama"]), SCORES_PATH=str(scores), HIDDEN_SIZE=32)
    contains(message, "HIDDEN_SIZE = 32", "NUM_ATTENTION_HEADS = 6", "not a multiple of the number of attention heads")


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
    configure(prune, MODEL=str(checkpoints["olmo3"]), SCORES_PATH=str(tmp_path / "scores.pt"), DEVICE="cpu", **KEEP_ALL)
    prune.OUTPUT_DIR = str(tmp_path / "pruned")
    prune.main()
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


def test_a_full_disk_leaves_the_old_result(checkpoints, scores, tmp_path):
    """A write error in the middle of saving (a file size limit stands in for a full disk)."""
    program = (
        "import resource, signal, sys; sys.path[:0] = [sys.argv[1]]\n"
        "import common, prune\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "common.override_constants(prune, sys.argv[2:])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: prune.main()\n"
        "except common.PareError as error: print('PareError:', error)\n"
    )
    output = tmp_path / "out"
    sizes = [f"{name}={value}" for name, value in KEEP_ALL.items()]
    common_arguments = [f"MODEL={checkpoints['olmo3']}", f"SCORES_PATH={scores}", f"OUTPUT_DIR={output}", "DEVICE=cpu"]
    good = command("prune.py", *common_arguments, *sizes, "HIDDEN_SIZE=36")
    assert good.returncode == 0, good.stderr
    before = files_below(output)
    arguments = [sys.executable, "-c", program, str(ROOT), *common_arguments, *sizes]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    contains(result.stdout, "PareError: OUTPUT_DIR", "GB are free", "untouched")
    assert files_below(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
