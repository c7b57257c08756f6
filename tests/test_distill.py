"""The loss against float64, resuming after a kill, and what a run writes."""

import importlib
import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    CONFIGS,
    DOCUMENTS,
    build_tokenizer,
    configure,
    documented_metrics,
    load,
    one_document_rows,
    random_model,
    save_checkpoint,
    some_ids,
)
from safetensors.torch import load_file

import checkpoints
import common
import data
import distill
from common import PareError

# ---------------------------------------------------------------------------------------------------------------------
# A training step


def relative_error(value, reference) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


class Rows:
    """Packed rows of 32 tokens in memory."""

    def __init__(self, num_rows: int):
        documents = data.read_documents(iter(DOCUMENTS), data.TextSource("text"), build_tokenizer(), 300, "TEACHER")
        packed = data.best_fit(documents, 32, num_rows, data.OPEN_ROWS)
        rows = [data.build_row(pieces, 32, filler=0) for pieces in packed]
        assert len(rows) == num_rows
        self.columns = {name: torch.stack([torch.from_numpy(row[name]) for row in rows]) for name in rows[0]}

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, indices):
        return {name: column[indices].long() for name, column in self.columns.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_step_equals_full_float64_logits_in_any_split(tied, pair, text, tmp_path):
    """distill.train_step itself: loss, gradient norm and every gradient, for micro-batches of 1, 2 and 4 rows with
    different numbers of counted tokens: one denominator for the step. Covers the tied head and the temperature."""
    shape = {"vocab_size": 300, "tie_word_embeddings": tied}
    teacher, student = (
        random_model(CONFIGS["olmo3"](vocab_size=300), seed=1),
        random_model(CONFIGS["olmo3"](**shape), 2),
    )
    rows = Rows(4)
    input_ids, position_ids, mask = rows[:].values()
    mask = mask.bool()
    assert len({int(row.sum()) for row in mask}) > 1
    options = {"position_ids": position_ids, "use_cache": False}
    logits = student(input_ids, **options).logits[mask].double() / 2
    teacher_logits = teacher(input_ids, **options).logits[mask].double().detach() / 2
    q_log, p_log = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    expected = 4 * (q_log.exp() * (q_log - p_log)).sum() / mask.sum()
    expected.backward()
    gradients = {name: parameter.grad.double().clone() for name, parameter in student.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()

    seen = {}

    class Optimizer:  # looks at the gradients instead of stepping
        param_groups = ()

        def step(self):
            seen.update({name: parameter.grad.clone() for name, parameter in student.named_parameters()})

        def zero_grad(self, set_to_none):
            student.zero_grad()

    constants = run_constants(pair, text, tmp_path, TOKENS_PER_STEP=128, TEMPERATURE=2.0, LOSS_CHUNK_BYTES=10_000)
    defaults = {name: getattr(distill, name) for name in common.constants_of(distill)}
    student.zero_grad()
    for micro_batch_size in (1, 2, 4):
        settings = distill.derive_settings(defaults | constants | {"MICRO_BATCH_SIZE": micro_batch_size})
        loss, gradient_norm, _ = distill.train_step(
            student, teacher, distill.step_batches(rows, 0, settings), Optimizer(), 0, settings
        )
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert gradient_norm == pytest.approx(norm, rel=1e-4)
        clip = min(1.0, 1.0 / (gradient_norm + 1e-6))
        for name, gradient in seen.items():
            assert relative_error(gradient, gradients[name] * clip) < 1e-4, name


def test_norms_and_biases_are_not_decayed_and_the_rate_is_a_warmed_cosine(pair, text, tmp_path):
    defaults = {name: getattr(distill, name) for name in common.constants_of(distill)}
    settings = distill.derive_settings(defaults | run_constants(pair, text, tmp_path))
    groups = distill.build_optimizer(random_model(CONFIGS["llama"](vocab_size=300)), settings).param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    rates = [distill.learning_rate(step, settings) for step in range(12)]
    assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert rates[2 + 3] == pytest.approx(1e-4 + 2.9e-3 * (1 + math.cos(math.pi * 3 / 9)) / 2)
    assert rates[-1] == pytest.approx(1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher and a smaller student with its own random weights."""
    root = tmp_path_factory.mktemp("pair")
    smaller = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    return save_checkpoint(root / "teacher", "olmo3", seed=1), save_checkpoint(root / "student", "olmo3", 2, **smaller)


def run_constants(pair, text: str, output, **more) -> dict:
    return {
        "TEACHER": str(pair[0]),
        "STUDENT": str(pair[1]),
        "OUTPUT_DIR": str(output),
        "DATASETS": text,
        "SEQUENCE_LENGTH": 32,
        "TRAIN_TOKENS": 12 * 128,
        "TOKENS_PER_STEP": 128,
        "MICRO_BATCH_SIZE": 2,
        "LEARNING_RATE": 3e-3,
        "MIN_LEARNING_RATE": 1e-4,
        "WARMUP_STEPS": 2,
        "EVAL_EVERY": 4,
        "EVAL_TOKENS": 256,
        "SAVE_EVERY": 3,
        "DEVICE": "cpu",
    } | more


def distilled(pair, text, output, **more):
    configure(distill, **run_constants(pair, text, output, **more))
    return distill.main()


def lines_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(pair, text, tmp_path_factory):
    """One uninterrupted run that several tests look at."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, distilled(pair, text, output)


def test_a_run_learns_and_records(finished):
    output, _ = finished
    lines = lines_of(output)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    evaluated = [line for line in lines if "held_out_kl" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8, 12]
    assert evaluated[-1]["held_out_kl"] < 0.8 * evaluated[0]["held_out_kl"]
    last = evaluated[-1]
    assert last["held_out_perplexity"] == pytest.approx(math.exp(last["held_out_loss"]))
    assert 0 <= last["held_out_agreement"] <= 1
    assert {key for line in lines for key in line} <= documented_metrics()
    assert steps[-1]["learning_rate"] == pytest.approx(1e-4)
    assert max(line["learning_rate"] for line in steps) == pytest.approx(3e-3)
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_the_export_is_a_plain_bfloat16_folder_with_a_card(finished, pair):
    output, folder = finished
    assert folder == output / "model"
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = load(folder)
    assert model.config.hidden_size == 32
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    assert (folder / "tokenizer.json").read_bytes() == (pair[1] / "tokenizer.json").read_bytes()
    card = (folder / "README.md").read_text()
    evaluated = [line for line in lines_of(output) if "held_out_kl" in line]
    for needed in (str(pair[0]), "hidden_size | 48 | 32", "LEARNING_RATE", f"{evaluated[-1]['held_out_kl']:.4f}"):
        assert needed in card
    master = load_file(output / "checkpoints" / "step-00000012" / "model.safetensors")
    assert {tensor.dtype for tensor in master.values()} == {torch.float32}
    assert all(torch.equal(weights[name], master[name].bfloat16()) for name in master)


def test_evaluation_equals_full_logits(finished, pair, text):
    """KL, losses and agreement of the exported step against a plain computation on the same held-out rows."""
    import datasets

    output, _ = finished
    rows = datasets.Dataset.from_file(str(output / "data" / "held_out.arrow"))
    input_ids, position_ids = torch.tensor(rows["input_ids"][:]), torch.tensor(rows["position_ids"][:])
    teacher, student = load(pair[0]), load(pair[1])
    mask = torch.tensor(rows["counted"][:])
    labels = input_ids.roll(-1, 1)[mask]
    options = {"position_ids": position_ids, "use_cache": False}
    with torch.no_grad():
        p_log, q_log = (m(input_ids, **options).logits[mask].double().log_softmax(-1) for m in (student, teacher))
    first = lines_of(output)[0]
    assert first["held_out_kl"] == pytest.approx((q_log.exp() * (q_log - p_log)).sum(-1).mean().item(), rel=1e-5)
    assert first["held_out_loss"] == pytest.approx(-p_log.gather(1, labels[:, None]).mean().item(), rel=1e-5)
    assert first["teacher_loss"] == pytest.approx(-q_log.gather(1, labels[:, None]).mean().item(), rel=1e-5)
    agreement = (p_log.argmax(-1) == q_log.argmax(-1)).double().mean().item()
    assert first["held_out_agreement"] == pytest.approx(agreement, abs=2 / len(labels))
    assert first["teacher_entropy"] == pytest.approx(-(q_log.exp() * q_log).sum(-1).mean().item(), rel=1e-5)
    ends = labels == 0
    assert 0 < ends.sum() < len(labels)
    assert first["held_out_end_of_text"] == pytest.approx(p_log[ends, 0].exp().mean().item(), rel=1e-4)
    assert first["teacher_end_of_text"] == pytest.approx(q_log[ends, 0].exp().mean().item(), rel=1e-4)
    kl, places = (q_log.exp() * (q_log - p_log)).sum(-1), position_ids[mask]
    assert first["held_out_kl_by_position"] == {
        "0": pytest.approx(kl[places < 16].mean().item(), rel=1e-5),
        "16": pytest.approx(kl[places >= 16].mean().item(), rel=1e-5),
    }


def test_position_buckets_cover_a_row():
    assert distill.position_buckets(8) == [0]
    assert distill.position_buckets(4096) == [0, 16, 64, 256, 1024]


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "cross_entropy", "forward_kl_and_cross_entropy"])
def test_every_loss_trains(loss, pair, text, tmp_path):
    distilled(pair, text, tmp_path / "out", LOSS=loss)
    measured = [line for line in lines_of(tmp_path / "out") if "held_out_kl" in line]
    key = "held_out_loss" if "cross_entropy" in loss else "held_out_kl"
    assert measured[-1][key] < 0.97 * measured[0][key]


def test_the_teacher_is_corrected_without_a_forward_pass_of_its_own(pair, text, tmp_path, monkeypatch):
    """arXiv 2408.11796 §3.1: STUDENT = TEACHER on the text's own loss."""
    monkeypatch.setattr(distill, "teacher_states", None)
    constants = run_constants(pair, text, tmp_path / "out", STUDENT=str(pair[0]), LOSS="cross_entropy")
    settings = distill.derive_settings({n: getattr(distill, n) for n in common.constants_of(distill)} | constants)
    settings.end_of_text = 0
    teacher, student = load(pair[0]), load(pair[0]).float()
    rows = Rows(8)
    optimizer = distill.build_optimizer(student, settings)
    batches = [distill.step_batches(rows, step, settings) for step in range(8)]
    values = [distill.train_step(student, teacher, batches[s], optimizer, s, settings)[0] for s in range(8)]
    assert values[-1] < values[0] - 0.3


def test_held_out_documents_are_not_trained_on(finished):
    import datasets

    output, _ = finished
    tokenizer = build_tokenizer()
    names = {}
    for part in ("held_out", "train"):
        rows = datasets.Dataset.from_file(str(output / "data" / f"{part}.arrow"))
        words = tokenizer.decode([token for row in rows["input_ids"] for token in row])
        names[part] = {number for number in range(60) if f"Document {number}. " in words}
    assert names["held_out"]
    assert names["train"]
    assert not names["held_out"] & names["train"]


def test_gradient_checkpointing_changes_nothing(finished, pair, text, tmp_path):
    distilled(pair, text, tmp_path / "out", GRADIENT_CHECKPOINTING=False)
    plain, checkpointed = (lines_of(output)[-1]["held_out_kl"] for output in (tmp_path / "out", finished[0]))
    assert plain == pytest.approx(checkpointed, rel=1e-4)


def copy_of(finished, tmp_path):
    """The finished run, not exported yet."""
    shutil.copytree(finished[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    return tmp_path / "out"


def test_a_damaged_checkpoint_is_passed_over(finished, pair, text, tmp_path, capsys):
    output = copy_of(finished, tmp_path)
    newest = output / "checkpoints" / "step-00000012" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    distilled(pair, text, output)
    printed = capsys.readouterr().out
    assert "step-00000012 is damaged" in printed
    assert "continuing after step 9" in printed
    exported = [(folder / "model" / "model.safetensors").read_bytes() for folder in (output, finished[0])]
    assert exported[0] == exported[1]


def test_a_run_with_other_constants_is_not_continued(finished, pair, text, tmp_path):
    output = copy_of(finished, tmp_path)
    with pytest.raises(PareError, match=r"LEARNING_RATE = 0.001 \(was 0.003\)"):
        distilled(pair, text, output, LEARNING_RATE=1e-3)
    other = save_checkpoint(tmp_path / "other", "olmo3", seed=9)
    with pytest.raises(PareError, match="TEACHER"):
        distilled((other, pair[1]), text, output)
    checkpoints = [
        {path.name: path.read_bytes() for path in (folder / "checkpoints" / "step-00000012").iterdir()}
        for folder in (output, finished[0])
    ]
    assert checkpoints[0] == checkpoints[1]


def test_a_run_whose_text_changed_goes_on_with_its_own_rows_or_not_at_all(pair, tmp_path, text, capsys):
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(Path(text).read_bytes())
    output = tmp_path / "run"
    distilled(pair, str(changed), output, TRAIN_TOKENS=4 * 128)
    weights = (output / "model" / "model.safetensors").read_bytes()
    changed.write_text(changed.read_text().replace("cats", "cows"))
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    distilled(pair, str(changed), output, TRAIN_TOKENS=4 * 128)
    assert "the run goes on with its own rows" in capsys.readouterr().out
    assert (output / "model" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "data")
    with pytest.raises(PareError, match=r"DATASETS = .*not the text that OUTPUT_DIR was started with"):
        distilled(pair, str(changed), output, TRAIN_TOKENS=4 * 128)


def test_no_intact_checkpoint_is_an_error_and_not_a_new_start(finished, pair, text, tmp_path):
    output = copy_of(finished, tmp_path)
    for path in output.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(PareError, match=r"OUTPUT_DIR.*no checkpoint verifies"):
        distilled(pair, text, output)
    assert lines_of(output) == lines_of(finished[0])


def test_a_resumed_run_overtakes_a_damaged_newer_checkpoint(pair, text, tmp_path):
    """The step just saved is never the one that retention removes."""
    root, student = tmp_path / "checkpoints", random_model(CONFIGS["llama"](vocab_size=300))
    optimizer, metrics = torch.optim.AdamW(student.parameters()), tmp_path / "metrics.jsonl"
    metrics.write_text("")
    for step in (200, 300, 100):
        distill.save_checkpoint(root, step, student, optimizer, {"script": "distill.py"}, metrics, keep=2)
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000100"]
    assert checkpoints.verifies(root / "step-00000100")


def test_bfloat16_compute_learns_and_the_masters_stay_float32(pair, text, tmp_path):
    distilled(pair, text, tmp_path / "out", DTYPE="bfloat16")
    evaluated = [line for line in lines_of(tmp_path / "out") if "held_out_kl" in line]
    assert evaluated[-1]["held_out_kl"] < 0.8 * evaluated[0]["held_out_kl"]
    weights = load_file(tmp_path / "out" / "checkpoints" / "step-00000012" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_states_reach_the_lm_head_in_the_compute_dtype(checkpointing, pair, text, tmp_path):
    defaults = {name: getattr(distill, name) for name in common.constants_of(distill)}
    more = {"DTYPE": "bfloat16", "GRADIENT_CHECKPOINTING": checkpointing}
    settings = distill.derive_settings(defaults | run_constants(pair, text, tmp_path, **more))
    student = random_model(CONFIGS["olmo3"](vocab_size=300))
    batch = one_document_rows(some_ids(300, (2, 8)), torch.isin(torch.arange(16), torch.tensor([0, 1, 9])).view(2, 8))
    states = distill.student_states(student, batch, settings)
    assert states.dtype == torch.bfloat16
    assert states.shape == (3, 48)


def test_the_next_batches_are_fetched_while_a_step_is_computed(pair, text, tmp_path, monkeypatch):
    fetched, step_batches, train_step = [threading.Event() for _ in range(3)], distill.step_batches, distill.train_step

    def fetch_and_tell(rows, step, settings):
        batches = step_batches(rows, step, settings)
        fetched[step].set()
        return batches

    def wait_and_step(student, teacher, batches, optimizer, step, *more):
        assert step == 2 or fetched[step + 1].wait(timeout=60)
        return train_step(student, teacher, batches, optimizer, step, *more)

    monkeypatch.setattr(distill, "step_batches", fetch_and_tell)
    monkeypatch.setattr(distill, "train_step", wait_and_step)
    distilled(pair, text, tmp_path / "out", TRAIN_TOKENS=3 * 128)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_report_to_logs_to_the_tracker(name, pair, text, tmp_path, monkeypatch):
    """A stand-in package of the tracker's name records what it is given; a run that goes on is the same one there."""
    (tmp_path / f"{name}.py").write_text(
        "calls = []\ndef init(**k): calls.append(k)\ndef log(m, step): calls.append((step, m))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    distilled(pair, text, tmp_path / "an odd=name", REPORT_TO=name, TRAIN_TOKENS=128)
    tracker = importlib.import_module(name)
    first, evaluated, stepped, _ = tracker.calls
    calls = tracker.calls[1:]
    shutil.rmtree(tmp_path / "an odd=name" / "model")
    tracker.calls = []
    time.sleep(1)  # another second, which is not the run's
    distilled(pair, text, tmp_path / "an odd=name", REPORT_TO=name, TRAIN_TOKENS=128)
    assert (first["resume"], tracker.calls[0]["resume"]) == ("never", "allow")
    assert re.fullmatch(r"an-odd-name-20[\d-]+T[\d-]+Z", first["name"])
    assert first["name"] == tracker.calls[0]["name"]
    assert first.get("id") == tracker.calls[0].get("id") == (first["name"] if name == "wandb" else None)
    assert first["config"]["TRAIN_TOKENS"] == 128
    assert [step for step, _ in calls] == [0, 1, 1]
    assert evaluated[1]["held_out_kl"] > 0
    assert stepped[1]["loss"] > 0
