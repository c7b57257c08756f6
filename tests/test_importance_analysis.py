"""Scores against the papers' formulas in float64, and what the script promises around them."""

import pytest
import torch
import transformers
from conftest import ROOT, analyse

import common
import importance_analysis
from common import PareError

# Module names written out here on their own, not taken from the family table.
NORMS = {
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
}


def reference_scores(folder, family: str, rows: torch.Tensor, dtype=torch.float64) -> dict:
    """arXiv 2407.14679 §2.2 and 2403.03853 eq. 1 in float64, one sample at a time; the model in `dtype`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = model.config
    seen = {}

    def keep_input(name):
        return lambda module, args: seen.__setitem__(name, args[0].double())

    def keep_output(name):
        return lambda module, args, out: seen.__setitem__(name, (out[0] if isinstance(out, tuple) else out).double())

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep_input(("mlp", i)))
        layer.self_attn.o_proj.register_forward_pre_hook(keep_input(("attention", i)))
        getattr(layer, NORMS[family][0]).register_forward_hook(keep_output(("attn_ln", i)))
        getattr(layer, NORMS[family][1]).register_forward_hook(keep_output(("ffn_ln", i)))
        layer.register_forward_pre_hook(keep_input(("in", i)))
        layer.register_forward_hook(keep_output(("out", i)))

    squares, influence = {}, [0.0] * config.num_hidden_layers
    for row in rows:
        with torch.no_grad():
            model(input_ids=row[None], use_cache=False)
        for key, x in seen.items():
            if key[0] in ("mlp", "attention", "attn_ln", "ffn_ln"):
                squares[key] = squares.get(key, 0) + x[0].abs().mean(dim=0) ** 2
        for i in range(config.num_hidden_layers):
            a, b = seen["in", i][0], seen["out", i][0]
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            influence[i] += (1 - cosine.mean().item()) / len(rows)
    layers = range(config.num_hidden_layers)
    heads = torch.stack([squares["attention", i] for i in layers]).view(len(layers), config.num_attention_heads, -1)
    return {
        "mlp": torch.stack([squares["mlp", i].sqrt() for i in layers]),
        "attention": heads.sum(-1).sqrt(),
        "attn_ln": sum(squares["attn_ln", i].sqrt() for i in layers),
        "ffn_ln": sum(squares["ffn_ln", i].sqrt() for i in layers),
        "layer": influence,
    }


def expected_rows(folder, text: str, num_samples: int, length: int) -> torch.Tensor:
    """Documents in the script's order, each with its end-of-text token, joined and cut."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream = []
    for document in common.open_text(text, None, "train", "text", shuffle_seed=0):
        stream += [*tokenizer(document)["input_ids"], 0]
    return torch.tensor(stream[: num_samples * length]).view(num_samples, length)


@pytest.mark.parametrize("family", ["olmo3", "olmo2", "llama"])
def test_scores_equal_the_papers_formulas_in_float64(family, checkpoints, text, tmp_path):
    path = analyse(checkpoints[family], text, tmp_path / "scores.pt")
    scores = torch.load(path, weights_only=True)
    expected = reference_scores(checkpoints[family], family, expected_rows(checkpoints[family], text, 12, 40))
    for key in ("mlp", "attention", "attn_ln", "ffn_ln"):
        assert scores[key].dtype == torch.float32
        assert scores[key].shape == expected[key].shape
        torch.testing.assert_close(scores[key].double(), expected[key], rtol=1e-5, atol=0)
    assert list(scores["layer"]) == list(range(len(expected["layer"])))
    torch.testing.assert_close(list(scores["layer"].values()), expected["layer"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["olmo3", "llama"])
def test_batch_size_does_not_change_the_scores(family, checkpoints, text, tmp_path):
    one, eight = (
        torch.load(analyse(checkpoints[family], text, tmp_path / f"{b}.pt", BATCH_SIZE=b), weights_only=True)
        for b in (1, 8)
    )
    for key in ("mlp", "attention", "attn_ln", "ffn_ln"):
        torch.testing.assert_close(one[key], eight[key], rtol=1e-6, atol=0)
    torch.testing.assert_close(list(one["layer"].values()), list(eight["layer"].values()), rtol=1e-6, atol=1e-8)


def test_lm_head_is_never_applied(checkpoints, text, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the LM head was applied")

    monkeypatch.setattr(transformers.Olmo3ForCausalLM, "forward", refuse)
    analyse(checkpoints["olmo3"], text, tmp_path / "scores.pt")


def test_meta_says_what_was_scored(checkpoints, text, tmp_path):
    meta = torch.load(analyse(checkpoints["olmo3"], text, tmp_path / "scores.pt"), weights_only=True)["meta"]
    assert meta["model"] == str(checkpoints["olmo3"])
    assert meta["revision"] is None
    assert meta["num_samples"] == 12
    assert meta["num_tokens"] == 12 * 40
    assert meta["seed"] == 0
    assert meta["dataset"]["name"] == text
    assert len(meta["dataset"]["fingerprint"]) == len(meta["config_hash"]) == len(meta["weights_hash"]) == 64
    assert meta["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert meta["constants"]["BATCH_SIZE"] == 4


def test_report_and_picture(checkpoints, text, tmp_path, capsys):
    path = analyse(checkpoints["olmo3"], text, tmp_path / "scores.pt")
    printed = capsys.readouterr().out
    scores = torch.load(path, weights_only=True)
    least = min(scores["layer"], key=scores["layer"].get)
    section = printed[printed.index("Least important layers") :].splitlines()
    assert section[1].split()[:2] == ["layer", str(least)]
    assert "full_attention" in printed
    assert "sliding_attention" in printed
    assert "Rank correlation of the scores between the two halves of the 12 samples" in printed
    assert "NUM_SAMPLES=24" in printed or "12 samples were enough" in printed
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_rank_correlation_is_spearmans():
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert importance_analysis.rank_correlation(a, a * 3 + 1) == pytest.approx(1)
    assert importance_analysis.rank_correlation(a, -a) == pytest.approx(-1)
    b = torch.tensor([[1.0, 3.0, 2.0, 4.0]])  # 1 - 6·Σd²/(n(n²-1)) = 1 - 6·2/60
    assert importance_analysis.rank_correlation(a, b) == pytest.approx(0.8)


def test_an_interrupted_run_leaves_the_old_score_file(checkpoints, text, tmp_path, monkeypatch):
    path = analyse(checkpoints["olmo3"], text, tmp_path / "scores.pt")
    before = path.read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importance_analysis, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        analyse(checkpoints["olmo3"], text, path)
    assert path.read_bytes() == before


def test_a_bfloat16_model_is_scored_in_float32_or_better(checkpoints, text, tmp_path):
    """Against the float64 formulas over the same bfloat16 activations: rounding any part to bfloat16 costs 1e-3."""
    path = analyse(checkpoints["olmo3"], text, tmp_path / "scores.pt", DTYPE="bfloat16", BATCH_SIZE=1)
    scores = torch.load(path, weights_only=True)
    rows = expected_rows(checkpoints["olmo3"], text, 12, 40)
    expected = reference_scores(checkpoints["olmo3"], "olmo3", rows, torch.bfloat16)
    for key in ("mlp", "attention", "attn_ln", "ffn_ln"):
        torch.testing.assert_close(scores[key].double(), expected[key], rtol=1e-5, atol=0)
    torch.testing.assert_close(list(scores["layer"].values()), expected["layer"], rtol=1e-5, atol=1e-6)


def test_importing_a_script_does_nothing():
    import subprocess
    import sys

    scripts = "importance_analysis, prune, distill, demo"
    command = [sys.executable, "-c", f"import {scripts}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""


def test_scores_that_are_not_finite_are_not_written(checkpoints, text, tmp_path, monkeypatch):
    nan = float("nan")
    monkeypatch.setattr(importance_analysis.ScoreSums, "scores", lambda *args: {"layer": {0: nan}})
    with pytest.raises(PareError, match="DTYPE"):
        analyse(checkpoints["olmo3"], text, tmp_path / "scores.pt")
    assert not (tmp_path / "scores.pt").exists()
