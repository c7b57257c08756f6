"""The bundled teacher, and the demo's plumbing on a few tokens (its figures are in the README)."""

import json

import pytest
import torch
from conftest import load

import common
import data
import demo


@pytest.fixture(scope="module")
def teacher():
    return load(demo.TEACHER)


def held_out_rows(num_rows: int) -> torch.Tensor:
    tokenizer = common.load_tokenizer(common.find_checkpoint(str(demo.TEACHER), None, "MODEL"), "MODEL")
    documents = (text for name, text in demo.python_documents() if demo.is_held_out(name))
    rows = data.pack_rows(documents, tokenizer, 256, 3072)
    return torch.tensor([next(rows) for _ in range(num_rows)])


def test_the_teacher_has_every_feature_of_the_7b(teacher):
    config = teacher.config
    assert config.model_type == "olmo3"
    assert config.layer_types == (["sliding_attention"] * 3 + ["full_attention"]) * 2
    assert config.sliding_window < 256
    assert config.num_key_value_heads == config.num_attention_heads
    assert not config.tie_word_embeddings
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    layer = teacher.model.layers[0]
    assert layer.self_attn.q_norm.weight.shape == (config.hidden_size,)
    weights = demo.TEACHER / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    checkpoint = common.find_checkpoint(str(demo.TEACHER), None, "MODEL")
    assert {info.dtype for info in common.tensor_infos(checkpoint, "MODEL").values()} == {"BF16"}
    assert common.load_tokenizer(checkpoint, "MODEL").eos_token == "<|endoftext|>"


@torch.no_grad()
def test_the_teacher_needs_its_neurons(teacher):
    """Half of the neurons zeroed at random cost at least 0.3 nats of KL on held-out text, and the teacher itself is
    as good as its training record says (to what another Python version's text may change)."""
    rows = held_out_rows(24)
    whole = teacher(rows[:, :-1], use_cache=False).logits.log_softmax(-1)
    loss = -whole.gather(2, rows[:, 1:, None]).mean().item()
    recorded = [json.loads(line) for line in (demo.TEACHER / "training.jsonl").read_text().splitlines()][-1]
    assert recorded["tokens"] >= 20_000_000
    assert abs(loss - recorded["held_out_loss"]) < 0.5
    generator = torch.Generator().manual_seed(0)
    for layer in teacher.model.layers:
        mask = torch.ones(448)
        mask[torch.randperm(448, generator=generator)[:224]] = 0
        layer.mlp.down_proj.weight.mul_(mask)
    half = teacher(rows[:, :-1], use_cache=False).logits.log_softmax(-1)
    assert (whole.exp() * (whole - half)).sum(-1).mean().item() >= 0.3


def test_the_text_is_split_by_document_name():
    documents = dict(demo.python_documents())
    held_out = {name for name in documents if demo.is_held_out(name)}
    assert 0.02 < len(held_out) / len(documents) < 0.15
    assert {"enum.py", "uuid.py", "topics/execmodel"} <= held_out  # the same on every machine
    assert not {"argparse.py", "json/decoder.py", "topics/while"} & held_out
    assert not any(
        name.startswith("/") or {"test", "tests", "site-packages"} & {*name.split("/")} for name in documents
    )
    assert documents["topics/while"]
    assert "argparse.py" in documents


def test_the_demo_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUTPUT_DIR", str(tmp_path / "demo"))
    monkeypatch.setattr(demo, "NUM_SAMPLES", 16)
    monkeypatch.setattr(demo, "TRAIN_TOKENS", 2**12)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 5)
    monkeypatch.setattr(demo, "DISTILLATION", demo.DISTILLATION | {"TOKENS_PER_STEP": 2**11, "MICRO_BATCH_SIZE": 8})
    monkeypatch.setitem(demo.DISTILLATION, "EVAL_TOKENS", 2**11)
    output = demo.main()
    printed = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["teacher", "pruned", "pruned + distilled", "random + distilled"]
    for name, result in results.items():
        assert f"[{name}]" in printed
        assert f"{result['held_out_loss']:.3f}" in printed
    assert results["teacher"]["kl_to_teacher"] == 0
    share = results["pruned"]["parameters_without_embeddings"] / results["teacher"]["parameters_without_embeddings"]
    assert 0.45 < share < 0.55
    same = {results[name]["parameters"] for name in ("pruned", "pruned + distilled", "random + distilled")}
    assert len(same) == 1
    data = [(output / folder / "data" / "train.arrow").read_bytes() for folder in ("distilled", "random_distilled")]
    assert data[0] == data[1]  # both students see the same tokens
    assert results["pruned + distilled"]["kl_to_teacher"] < results["pruned"]["kl_to_teacher"]
    assert (output / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert demo.main() == output  # a second run replaces the first
