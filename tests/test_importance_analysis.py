"""Scores against the papers' formulas in float64, and what the script promises around them."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS, DEFAULTS, ROOT, analyse, configure, cut, load, needs_gpu
from safetensors.torch import load_file

import common
import data
import importance_analysis
from common import PareError

# Module names written out here on their own, not taken from the family table.
OLMO = ("post_attention_layernorm", "post_feedforward_layernorm")
LLAMA = ("input_layernorm", "post_attention_layernorm")
NORMS = {  # of attention and feed-forward; of the other families LLAMA
    "olmo3": OLMO,
    "olmo2": OLMO,
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
}
GEMMA = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
STATISTICS = {  # the norms over hidden channels, or over the channels of all heads
    "olmo3": (*OLMO, "self_attn.q_norm", "self_attn.k_norm"),
    "olmo2": (*OLMO, "self_attn.q_norm", "self_attn.k_norm"),
    "gemma3_text": GEMMA,
}
WIDTHS = ("mlp", "attention", "attn_ln", "ffn_ln", "hidden")


def score(model: Path, text: str, path: Path, **more) -> dict:
    """Run the script, without second moments unless asked for, and read what it wrote."""
    configure(importance_analysis, **DEFAULTS[importance_analysis])  # a fixture may run before they are put back
    return torch.load(analyse(model, text, path, **{"SECOND_MOMENTS": False} | more), weights_only=True)


@pytest.fixture(scope="module")
def scored(checkpoints, text, tmp_path_factory):
    """family -> the scores of 12 rows of 40 tokens, made once."""
    made = {}

    def of(family: str) -> dict:
        if family not in made:
            path = tmp_path_factory.mktemp(family) / "scores.pt"
            made[family] = score(checkpoints[family], text, path, LAYER_PERPLEXITY_SAMPLES=8)
        return made[family]

    return of


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
        getattr(layer, NORMS.get(family, LLAMA)[0]).register_forward_hook(keep_output(("attn_ln", i)))
        getattr(layer, NORMS.get(family, LLAMA)[1]).register_forward_hook(keep_output(("ffn_ln", i)))
        layer.self_attn.q_proj.register_forward_pre_hook(keep_input(("hidden attention", i)))
        layer.mlp.gate_proj.register_forward_pre_hook(keep_input(("hidden mlp", i)))
        for name in STATISTICS.get(family, LLAMA):
            layer.get_submodule(name).register_forward_pre_hook(keep_input((f"norm {name}", i)))
        layer.register_forward_pre_hook(keep_input(("in", i)))
        layer.register_forward_hook(keep_output(("out", i)))
    model.model.norm.register_forward_pre_hook(keep_input(("norm model.norm", 0)))

    squares, influence, shares = {}, [0.0] * config.num_hidden_layers, {}
    last, mean = 0.0, 0.0
    for row in rows:
        with torch.no_grad():
            model(input_ids=row[None], use_cache=False)
        for key, x in seen.items():
            if key[0] in ("mlp", "attention", "attn_ln", "ffn_ln"):
                squares[key] = squares.get(key, 0) + x[0].abs().mean(dim=0) ** 2
            if key[0].startswith("hidden"):
                square, tokens = x[0] ** 2, x.shape[1]  # the first token as itself, the others from every 16th
                mean_square = (square[0] + (tokens - 1) * square.flip(0)[::16].mean(dim=0)) / tokens
                squares[key] = squares.get(key, 0) + mean_square
            if key[0].startswith("norm"):  # every 16th token, counted back from the last
                square = x[0].flip(0)[::16] ** 2
                share = (square / square.mean(dim=-1, keepdim=True)).mean(dim=0)
                shares[key] = shares.get(key, 0) + share / len(rows)
        for i in range(config.num_hidden_layers):
            a, b = seen["in", i][0], seen["out", i][0]
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            influence[i] += (1 - cosine.mean().item()) / len(rows)
        boundaries = [seen["in", i][0] for i in range(config.num_hidden_layers)]
        boundaries.append(seen["out", config.num_hidden_layers - 1][0])
        angles = angular_distances(torch.stack([x.flip(0)[::16] for x in boundaries]))  # (T', L + 1, L + 1)
        last, mean = last + angles[0] / len(rows), mean + angles.mean(0) / len(rows)
    layers = range(config.num_hidden_layers)
    heads = torch.stack([squares["attention", i] for i in layers]).view(len(layers), config.num_attention_heads, -1)
    return {
        "mlp": torch.stack([squares["mlp", i].sqrt() for i in layers]),
        "attention": heads.sum(-1).sqrt(),
        "attn_ln": sum(squares["attn_ln", i].sqrt() for i in layers),
        "ffn_ln": sum(squares["ffn_ln", i].sqrt() for i in layers),
        "hidden": sum(
            squares[place, i] / squares[place, i].sum() for place in ("hidden attention", "hidden mlp") for i in layers
        ),
        "layer": influence,
        "angular_distance": last,
        "angular_distance_mean": mean,
        "norms": {
            name.removeprefix("norm "): torch.stack([shares[name, i] for i in layers if (name, i) in shares])
            for name in {name for name, _ in shares}
        },
    }


def angular_distances(states: torch.Tensor) -> torch.Tensor:
    """arXiv 2403.17887 eq. 7 for every pair of states (boundaries, T', H) -> (T', boundaries, boundaries)."""
    distances = torch.zeros(states.shape[1], len(states), len(states), dtype=torch.float64)
    for t in range(states.shape[1]):
        for a in range(len(states)):
            for b in range(len(states)):
                x, y = states[a, t], states[b, t]
                cosine = (x @ y) / (x.norm() * y.norm())
                distances[t, a, b] = torch.arccos(cosine.clamp(-1, 1)) / math.pi
    return distances


def expected_rows(folder, text: str, num_samples: int, length: int) -> torch.Tensor:
    """Documents in the script's order, each with its end-of-text token, joined and cut."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream = []
    for document in data.open_text(text, None, "train", "text", shuffle_seed=0):
        stream += [*tokenizer(document)["input_ids"], 0]
    return torch.tensor(stream[: num_samples * length]).view(num_samples, length)


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_equal_the_papers_formulas_in_float64(family, checkpoints, text, scored):
    scores = scored(family)
    expected = reference_scores(checkpoints[family], family, expected_rows(checkpoints[family], text, 12, 40))
    for key in WIDTHS:
        assert scores[key].dtype == torch.float32
        assert scores[key].shape == expected[key].shape
        torch.testing.assert_close(scores[key].double(), expected[key], rtol=1e-5, atol=0)
    assert list(scores["layer"]) == list(range(len(expected["layer"])))
    torch.testing.assert_close(list(scores["layer"].values()), expected["layer"], rtol=1e-5, atol=1e-7)
    for key in ("angular_distance", "angular_distance_mean"):
        assert scores[key].dtype == torch.float32
        torch.testing.assert_close(scores[key].double(), expected[key], rtol=1e-5, atol=1e-7)
    assert scores["norms"].keys() == expected["norms"].keys()
    for name, shares in expected["norms"].items():
        assert scores["norms"][name].dtype == torch.float32
        torch.testing.assert_close(scores["norms"][name].double(), shares, rtol=1e-5, atol=1e-7)
        assert scores["norms"][name].mean(dim=1).tolist() == pytest.approx([1] * len(shares), abs=1e-5)


@pytest.mark.parametrize("family", ["olmo3", "llama"])
def test_layer_perplexity_equals_really_removing_the_layer(family, checkpoints, text, scored):
    """Each layer replaced by the identity in a float64 model, the whole model run, transformers' own loss."""
    scores, rows = scored(family), expected_rows(checkpoints[family], text, 8, 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float64).eval()

    def perplexity() -> float:
        with torch.no_grad():
            return math.exp(model(input_ids=rows, labels=rows, use_cache=False).loss.item())

    assert scores["perplexity"] == pytest.approx(perplexity(), rel=1e-5)
    assert list(scores["layer_perplexity"]) == list(range(len(model.model.layers)))
    for index, layer in enumerate(model.model.layers):
        own = layer.forward
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        assert scores["layer_perplexity"][index] == pytest.approx(perplexity(), rel=1e-5), index
        layer.forward = own


@pytest.mark.parametrize("family", ["olmo3", "llama"])
def test_layer_perplexity_costs_half_a_pass_per_layer(family, checkpoints, monkeypatch):
    model, calls = load(checkpoints[family]), []
    kind = type(model.model.layers[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: (calls.append(0), forward(*args, **kwargs))[1])
    losses = importance_analysis.removal_losses(model, torch.randint(2, 250, (3, 20)))
    num_layers = model.config.num_hidden_layers
    assert losses.shape == (3, 1 + num_layers)
    assert len(calls) == num_layers + num_layers * (num_layers - 1) // 2


@pytest.mark.parametrize("family", ["olmo3", "llama"])
def test_batch_size_does_not_change_the_scores(family, checkpoints, text, tmp_path):
    one, eight = (
        score(checkpoints[family], text, tmp_path / f"{size}.pt", BATCH_SIZE=size, LAYER_PERPLEXITY_SAMPLES=10)
        for size in (1, 8)
    )
    assert_same_scores(one, eight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["olmo3", "mistral", "qwen2", "gemma3_text"])
def test_layers_share_one_mask_and_give_what_they_gave(family, checkpoints, tmp_path):
    model = load(checkpoints[family]).base_model
    rows = torch.arange(80).view(2, 40) % 60
    seen = []

    def look(layer, inputs, kwargs):
        seen.append(kwargs.get("attention_mask"))

    def hidden_states():
        handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.layers]
        with torch.inference_mode():
            states = model(input_ids=rows, use_cache=False).last_hidden_state
        for handle in handles:
            handle.remove()
        masks = [mask for mask in seen if mask is not None]
        seen.clear()
        return states, masks

    bare, masks = hidden_states()
    assert {mask.dtype for mask in masks} == {torch.bool}  # else there is nothing to share
    sums = importance_analysis.Sums(tmp_path / "none.safetensors", "", 300)
    hooks = importance_analysis.Hooks(model, common.FAMILIES[family], sums)
    hooked, masks = hidden_states()
    hooks.remove()
    assert torch.equal(hooked, bare)
    assert {id(mask) for mask in masks} == {id(masks[0])}
    assert masks[0].dtype == torch.float32
    assert masks[0].shape == (1, 1, 40, 40)


def assert_same_scores(a: dict, b: dict, **tolerance) -> None:
    """Every key but `meta` and the hash over it all. Angles near 0 are the arc cosine near 1: float32 leaves 1e-6."""
    assert a.keys() == b.keys() >= {*WIDTHS, "layer", "angular_distance", "angular_distance_mean", "norms", "meta"}
    for key in a.keys() - {"meta", "sha256"}:
        more = {"rtol": 1e-5, "atol": 1e-6} if "angular" in key and tolerance["rtol"] else {}
        torch.testing.assert_close(a[key], b[key], **tolerance | more, msg=lambda message, key=key: f"{key}: {message}")


def test_lm_head_is_never_applied(checkpoints, text, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the LM head was applied")

    monkeypatch.setattr(transformers.Olmo3ForCausalLM, "forward", refuse)
    monkeypatch.setattr(transformers.Olmo3ForCausalLM, "get_output_embeddings", lambda model: refuse)
    score(checkpoints["olmo3"], text, tmp_path / "scores.pt", LAYER_PERPLEXITY=False)


def test_meta_says_what_was_scored(checkpoints, text, scored):
    meta = scored("olmo3")["meta"]
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
    path = tmp_path / "scores.pt"
    scores = score(checkpoints["olmo3"], text, path, LAYER_PERPLEXITY_SAMPLES=4)
    printed = capsys.readouterr().out
    assert f"perplexity with all layers: {scores['perplexity']:.4g}" in printed
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
    path = tmp_path / "scores.pt"
    score(checkpoints["olmo3"], text, path, LAYER_PERPLEXITY=False)
    before = path.read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(importance_analysis, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        score(checkpoints["olmo3"], text, path)
    assert path.read_bytes() == before


def test_a_bfloat16_model_is_scored_in_float32_or_better(checkpoints, text, tmp_path):
    """Against the float64 formulas over the same bfloat16 activations: rounding any part to bfloat16 costs 1e-3."""
    constants = {"DTYPE": "bfloat16", "BATCH_SIZE": 1, "LAYER_PERPLEXITY": False}
    scores = score(checkpoints["olmo3"], text, tmp_path / "scores.pt", **constants)
    rows = expected_rows(checkpoints["olmo3"], text, 12, 40)
    expected = reference_scores(checkpoints["olmo3"], "olmo3", rows, torch.bfloat16)
    for key in WIDTHS:
        torch.testing.assert_close(scores[key].double(), expected[key], rtol=1e-5, atol=0)
    torch.testing.assert_close(list(scores["layer"].values()), expected["layer"], rtol=1e-5, atol=1e-6)
    for key in ("angular_distance", "angular_distance_mean"):
        torch.testing.assert_close(scores[key].double(), expected[key], rtol=1e-5, atol=1e-7)
    for name, shares in expected["norms"].items():
        torch.testing.assert_close(scores["norms"][name].double(), shares, rtol=1e-5, atol=1e-7)


def test_importing_a_script_does_nothing():
    scripts = "importance_analysis, prune, distill, demo"
    command = [sys.executable, "-c", f"import {scripts}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""


def test_scores_that_are_not_finite_are_not_written(checkpoints, text, tmp_path, monkeypatch):
    nan = float("nan")
    monkeypatch.setattr(importance_analysis, "scores_of", lambda *args: {"layer": {0: nan}})
    for dtype, advice in (("bfloat16", "try DTYPE = 'float32'"), ("float32", "weights are damaged")):
        with pytest.raises(PareError, match=advice):
            score(checkpoints["olmo3"], text, tmp_path / "scores.pt", LAYER_PERPLEXITY=False, DTYPE=dtype)
    assert not (tmp_path / "scores.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial-0-of-1.safetensors")


def kill_after(saves: int, monkeypatch) -> None:
    """Let the next run die when its sums have been saved `saves` times."""
    save, left = importance_analysis.Sums.save_if_due, [saves]

    def save_and_die(sums):
        save(sums)
        left[0] -= 1
        if left[0] == 0:
            monkeypatch.setattr(importance_analysis.Sums, "save_if_due", save)
            raise Killed

    monkeypatch.setattr(importance_analysis.Sums, "save_if_due", save_and_die)


SHORT = {"NUM_SAMPLES": 6, "BATCH_SIZE": 1, "LAYER_PERPLEXITY_SAMPLES": 2, "SAVE_MINUTES": 0.0}


@pytest.fixture(scope="module")
def short_scores(checkpoints, text, tmp_path_factory) -> dict:
    return score(checkpoints["llama"], text, tmp_path_factory.mktemp("short") / "scores.pt", **SHORT)


@pytest.fixture
def killed(checkpoints, text, tmp_path, monkeypatch) -> Path:
    """The score path of a run that died after 4 of its 6 rows."""
    kill_after(4, monkeypatch)
    with pytest.raises(Killed):
        score(checkpoints["llama"], text, tmp_path / "scores.pt", **SHORT)
    assert partial_of(tmp_path / "scores.pt").exists()
    return tmp_path / "scores.pt"


def test_a_killed_run_continues_in_either_stage(checkpoints, text, killed, short_scores, monkeypatch, capsys):
    kill_after(3, monkeypatch)  # the last two rows of scoring and the first of the layer perplexity
    capsys.readouterr()
    with pytest.raises(Killed):
        score(checkpoints["llama"], text, killed, **SHORT)
    assert "continuing after 4 rows of scoring\n" in capsys.readouterr().out
    scores = score(checkpoints["llama"], text, killed, **SHORT)
    assert "continuing after 6 rows of scoring, 1 rows of layer perplexity\n" in capsys.readouterr().out
    assert_same_scores(scores, short_scores, rtol=0, atol=0)
    assert {path.name for path in killed.parent.iterdir()} == {"scores.pt", "scores.png"}


def test_a_damaged_partial_file_is_left_aside(checkpoints, text, killed, short_scores, capsys):
    partial = partial_of(killed)
    content = bytearray(partial.read_bytes())
    content[-100] ^= 1
    partial.write_bytes(content)
    scores = score(checkpoints["llama"], text, killed, **SHORT)
    assert "starting anew" in capsys.readouterr().out
    assert_same_scores(scores, short_scores, rtol=0, atol=0)


def test_no_flipped_byte_of_a_partial_file_is_believed(killed, tmp_path, capsys):
    """Every byte of the header and some of the rest: the sums are taken up unchanged, or not at all."""
    content = partial_of(killed).read_bytes()
    identity = common.metadata_of(partial_of(killed))["identity"]
    whole = importance_analysis.Sums(partial_of(killed), identity, 0.0)
    assert whole.done == {"scoring": 4}
    header, wrong = 8 + int.from_bytes(content[:8], "little"), []
    path = tmp_path / "damaged.safetensors"
    for position in [*range(header), *range(header, len(content), 997)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        try:
            found = importance_analysis.Sums(path, identity, 0.0)
            if found.sums or found.done:
                assert found.done == whole.done
                torch.testing.assert_close(found.sums, whole.sums, rtol=0, atol=0)
        except Exception as error:
            around = bytes(damaged[max(0, position - 15) : position + 15])
            wrong.append(f"byte {position} of {around}: {type(error).__name__} {common.first_line(error)}")
    capsys.readouterr()
    assert not wrong, "\n".join([f"{len(wrong)} flips:", *wrong[:5], *wrong[-5:]])


def test_a_partial_file_of_other_constants_is_left_aside(checkpoints, text, killed, capsys):
    other = SHORT | {"SEQUENCE_LENGTH": 24}
    scores = score(checkpoints["llama"], text, killed, **other)
    assert "starting anew" in capsys.readouterr().out
    assert_same_scores(scores, score(checkpoints["llama"], text, killed.with_name("o.pt"), **other), rtol=0, atol=0)


# One process imports torch once; its children are the runs, and die.
KILLS = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import torch, datasets, matplotlib.figure, matplotlib.backends.backend_agg, pyarrow.json
import transformers.models.llama.modeling_llama, accelerate
import common, importance_analysis
from pathlib import Path

torch.set_num_threads(1)
folder, constants = Path(sys.argv[1]), sys.argv[2:]

def start(name, log):
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        common.override_constants(importance_analysis, [*constants, f"SCORES_PATH={{folder / name}}"])
        importance_analysis.main()
        sys.stdout.flush()
        os._exit(0)
    return child

begun = time.monotonic()
assert os.waitpid(start("whole.pt", folder / "whole.log"), 0)[1] == 0
seconds = time.monotonic() - begun
partial = folder / ".killed.partial-0-of-1.safetensors"

def stamp():
    try:
        return partial.stat().st_ctime_ns
    except FileNotFoundError:  # a child removes it when it ends
        return 0

chance, kills, continued, ends = random.Random(0), 0, 0, 0
while kills < {kills} or not ends:
    known, ended = stamp(), (0, 0)
    (folder / "killed.log").write_text("")  # a child may be killed before it opens its log
    child = start("killed.pt", folder / "killed.log")
    delay = chance.uniform(0, seconds) if kills % 2 else chance.uniform(0, seconds / 4)
    while kills < {kills} and not kills % 2 and not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if stamp() not in (0, known):
            break  # every second kill comes while sums grow, however slow the machine is to get there
        time.sleep(0.002)
    else:
        delay = delay if kills < {kills} else 600
    until = time.monotonic() + delay
    while not ended[0] and time.monotonic() < until and not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.002)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        kills += 1
        ended = os.waitpid(child, 0)
    else:
        assert ended[1] == 0, (folder / "killed.log").read_text()
        ends += 1
        (folder / "killed.pt").rename(folder / f"end-{{ends}}.pt")
        (folder / "killed.png").unlink()  # without its score file it would be in the way
        if (folder / "killed.moments").exists():
            (folder / "killed.moments").rename(folder / f"end-{{ends}}.moments")
    log = (folder / "killed.log").read_text()
    assert not known or os.WIFSIGNALED(ended[1]) or "continuing after" in log, log
    continued += "continuing after" in log
print(kills, continued, ends)
"""


def test_ten_kills_at_random_moments_change_nothing(checkpoints, text, tmp_path):
    constants = {"MODEL": checkpoints["llama"], "DATASET": text, "DATASET_CONFIG": None, "DEVICE": "cpu"}
    constants |= {"NUM_SAMPLES": 32, "SEQUENCE_LENGTH": 24, "BATCH_SIZE": 1, "SAVE_MINUTES": 0.0}
    constants |= {"LAYER_PERPLEXITY_SAMPLES": 12, "SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 8}
    command = [sys.executable, "-c", KILLS.format(root=str(ROOT), kills=10), str(tmp_path)]
    command += [f"{name}={value}" for name, value in constants.items()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kills, continued, ends = map(int, result.stdout.split())
    assert kills == 10
    assert continued >= 3, "too few of the kills came while sums were growing"
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for end in range(1, ends + 1):
        scores = torch.load(tmp_path / f"end-{end}.pt", weights_only=True)
        assert_same_scores(scores, whole, rtol=0, atol=0)
        different = {key for key in whole["meta"] if scores["meta"][key] != whole["meta"][key]}
        assert different <= {"created", "constants"}  # of the constants SCORES_PATH alone
        moments = sorted((tmp_path / "whole.moments").iterdir())
        assert [path.name for path in moments] == sorted(os.listdir(tmp_path / f"end-{end}.moments"))
        for path in moments:
            assert path.read_bytes() == (tmp_path / f"end-{end}.moments" / path.name).read_bytes(), path.name


def test_a_second_run_on_the_same_score_file_is_refused(checkpoints, text, tmp_path):
    path = tmp_path / "scores.pt"
    with common.lock(path, "SCORES_PATH"), pytest.raises(PareError, match="another run"):
        score(checkpoints["llama"], text, path)
    assert not path.exists()


def test_rows_of_another_shape_but_the_same_tokens_are_another_run():
    rows = torch.arange(480).view(12, 40)
    assert importance_analysis.hash_rows(rows) != importance_analysis.hash_rows(rows.view(24, 20))


def test_a_file_of_the_user_beside_the_scores_is_left_alone(checkpoints, text, tmp_path):
    (tmp_path / "scores.tmp").write_text("mine")
    score(checkpoints["llama"], text, tmp_path / "scores.pt")
    assert (tmp_path / "scores.tmp").read_text() == "mine"


def test_scoring_another_model_at_the_same_place_leaves_none_of_its_moments(checkpoints, text, tmp_path):
    path, names = tmp_path / "scores.pt", {}
    for family in ("olmo3", "llama", "olmo3"):
        score(checkpoints[family], text, path, SECOND_MOMENTS=True)
        layers = common.find_checkpoint(str(checkpoints[family]), None, "MODEL").config.num_hidden_layers
        names[family] = {file.name for file in path.with_suffix(".moments").iterdir()}
        assert len(names[family]) == layers + 2
    assert names["olmo3"] != names["llama"]


def test_a_kill_between_scores_and_moments_costs_nothing(checkpoints, text, tmp_path, monkeypatch):
    """The old moments stay until the new score file is there, then the same command puts the new ones in place."""
    path, out = tmp_path / "scores.pt", tmp_path / "out"
    score(checkpoints["llama"], text, path, SECOND_MOMENTS=True)
    before = {file.name: file.read_bytes() for file in path.with_suffix(".moments").iterdir()}

    def die(*arguments):
        raise KeyboardInterrupt

    for stop in ("save_scores", "replace_folder"):
        monkeypatch.setattr(common, stop, die)
        with pytest.raises(KeyboardInterrupt):
            score(checkpoints["llama"], text, path, SECOND_MOMENTS=True, NUM_SAMPLES=9, SAVE_MINUTES=0.0)
        monkeypatch.undo()
        assert {file.name: file.read_bytes() for file in path.with_suffix(".moments").iterdir()} == before
        if stop == "save_scores":
            cut(checkpoints["llama"], path, out, INTERMEDIATE_SIZE=32)
    with pytest.raises(PareError, match="another run"):
        cut(checkpoints["llama"], path, out, INTERMEDIATE_SIZE=32)
    monkeypatch.setattr(importance_analysis.Hooks, "end_batch", die)  # no forward pass any more
    score(checkpoints["llama"], text, path, SECOND_MOMENTS=True, NUM_SAMPLES=9)
    cut(checkpoints["llama"], path, out, INTERMEDIATE_SIZE=32)
    assert not list(tmp_path.glob(".*"))


def test_two_processes_give_the_scores_of_one(checkpoints, text, tmp_path):
    constants = {"NUM_SAMPLES": 10, "LAYER_PERPLEXITY_SAMPLES": 5, "SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 6}
    one = score(checkpoints["llama"], text, tmp_path / "one.pt", **constants)
    constants |= {"MODEL": checkpoints["llama"], "DATASET": text, "DATASET_CONFIG": None, "DEVICE": "cpu"}
    constants |= {"SEQUENCE_LENGTH": 40, "BATCH_SIZE": 4, "SCORES_PATH": tmp_path / "two.pt"}
    # What `accelerate launch` does with two GPUs; on CPUs it starts a single process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "importance_analysis.py"), *(f"{name}={value}" for name, value in constants.items())]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=os.environ | {"HF_HOME": str(tmp_path / "hf")}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert_same_scores(one, two, rtol=1e-6, atol=1e-8)
    assert result.stdout.count("Wrote ") == 1
    assert "scoring: 5/5 samples" in result.stdout, "each process has half of the ten rows"
    assert not list(tmp_path.glob(".*")), "partial sums or the lock were left behind"
    for path in (tmp_path / "one.moments").iterdir():
        torch.testing.assert_close(
            load_file(tmp_path / "two.moments" / path.name), load_file(path), rtol=1e-4, atol=1e-6
        )


def test_rows_as_long_as_the_window_need_no_mask(checkpoints, text, tmp_path, monkeypatch):
    """In any stage; the window of 12 tokens hides nothing of them."""
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def look(*tensors, attn_mask=None, **more):
        masks.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    score(checkpoints["olmo3"], text, tmp_path / "12.pt", **MOMENTS | {"SEQUENCE_LENGTH": 12, "LAYER_PERPLEXITY": True})
    assert len(masks) > 0
    assert all(mask is None for mask in masks)
    score(checkpoints["olmo3"], text, tmp_path / "13.pt", **MOMENTS | {"SEQUENCE_LENGTH": 13})
    assert not all(mask is None for mask in masks)


# ---------------------------------------------------------------------------------------------------------------------
# Second moments


MOMENTS = {"NUM_SAMPLES": 4, "LAYER_PERPLEXITY": False, "SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 4}


@pytest.fixture(scope="module")
def moments(checkpoints, text, tmp_path_factory) -> Path:
    """The folder that one pass over llama writes."""
    path = tmp_path_factory.mktemp("moments") / "scores.pt"
    assert score(checkpoints["llama"], text, path, **MOMENTS)["meta"]["moments"]
    return path.with_suffix(".moments")


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma3_text"])
def test_second_moments_equal_their_definition_in_float64(family, checkpoints, text, tmp_path, capsys):
    """Inputs relative to what the next norm divides by: before it where a norm comes first, else 1 / the mean square of
    the layer's output where a norm follows, else of the stream that the sub-layer read."""
    path = tmp_path / "scores.pt"
    score(checkpoints[family], text, path, **MOMENTS)
    assert re.search(
        r"second moments: .* GB more on disk.*\n(.*\n)*second moments: less than a minute", capsys.readouterr().out
    )
    model, seen = load(checkpoints[family]).double(), {}
    after, before = family != "llama" and family != "qwen3", family != "olmo3"  # norms

    def watch(name, index, module):
        def hook(module, args, output):
            seen[index, name] = args[0].flatten(0, 1), output.flatten(0, 1)

        module.register_forward_hook(hook)

    for index, layer in enumerate(model.model.layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            watch(name, index, layer.get_submodule(name))
        watch("layer", index, layer)
        for norm in {"pre_feedforward_layernorm", "post_attention_layernorm"} & {
            name for name, _ in layer.named_children()
        }:
            watch(norm, index, layer.get_submodule(norm))
    watch("norm", None, model.model.norm)
    with torch.no_grad():
        model(input_ids=load_file(path.with_suffix(".moments") / "rows.safetensors")["rows"].long(), use_cache=False)

    def check(file, name, x, size):
        x, weight = x / size.sqrt()[:, None], 1 / size
        found = load_file(path.with_suffix(".moments") / file)
        expected = x.T @ x / weight.sum()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        mean = (x / size.sqrt()[:, None]).sum(0) / weight.sum()
        torch.testing.assert_close(found[f"{name}.mean"].double(), mean, rtol=1e-4, atol=1e-4 * mean.abs().max().item())

    square = lambda x: x.square().mean(1)  # noqa: E731
    ones = torch.ones(len(seen[None, "norm"][0])).double()
    for index in range(len(model.model.layers)):
        file, at = f"layer-{index}.safetensors", lambda name, index=index: seen[index, name]
        streams = {"self_attn.q_proj": at("layer")[0]}
        norm = "pre_feedforward_layernorm" if family == "gemma3_text" else "post_attention_layernorm"
        streams["mlp.gate_proj"] = at(norm)[0] if before else at("mlp.gate_proj")[0]
        for place, output in (("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.down_proj")):
            stream, (x, y) = streams[place], at(output)
            if before:
                check(file, place, stream / square(stream).sqrt()[:, None], ones)
            else:
                check(file, place, stream, square(stream))
            check(file, output, x, square(y) if after else square(stream))
            if after:
                check(file, f"{output}.output", y, square(y))
    if not model.config.tie_word_embeddings:
        stream = seen[None, "norm"][0]
        check("outside.safetensors", "lm_head", stream / square(stream).sqrt()[:, None], ones)


def test_second_moments_are_symmetric_and_positive_semidefinite(moments):
    files = sorted(path.name for path in moments.iterdir())
    assert files == [*(f"layer-{index}.safetensors" for index in range(4)), "outside.safetensors", "rows.safetensors"]
    for file in files[:-1]:
        tensors = load_file(moments / file)
        matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
        assert len(matrices) >= (4 if file.startswith("layer") else 1)
        for name, matrix in matrices.items():
            assert matrix.dtype == torch.float32
            assert matrix.shape[0] == matrix.shape[1]
            assert torch.equal(matrix, matrix.T), name
            eigenvalues = torch.linalg.eigvalsh(matrix.double())
            assert eigenvalues[-1] > 0
            assert eigenvalues[0] > -1e-5 * eigenvalues[-1], name


def test_a_pass_for_each_layer_gives_the_same_second_moments(checkpoints, text, tmp_path, moments, monkeypatch, capsys):
    monkeypatch.setattr(importance_analysis, "free_memory", lambda device: 1)
    score(checkpoints["llama"], text, tmp_path / "scores.pt", **MOMENTS)
    assert "pass 5 of 5" in capsys.readouterr().out
    for path in moments.iterdir():
        assert (tmp_path / "scores.moments" / path.name).read_bytes() == path.read_bytes(), path.name


def test_killed_second_moments_continue(checkpoints, text, tmp_path, moments, monkeypatch):
    monkeypatch.setattr(importance_analysis, "free_memory", lambda device: 1)
    replace_file, path = common.replace_file, tmp_path / "scores.pt"

    def die_at_layer_2(target, write):
        if target.name == "layer-2.safetensors":
            raise Killed
        replace_file(target, write)

    monkeypatch.setattr(common, "replace_file", die_at_layer_2)
    with pytest.raises(Killed):
        score(checkpoints["llama"], text, path, **MOMENTS)
    monkeypatch.setattr(common, "replace_file", replace_file)
    assert not path.exists()
    done = {file.name: file.stat().st_ino for file in (tmp_path / ".scores.moments.tmp").iterdir()}
    assert set(done) == {"layer-0.safetensors", "layer-1.safetensors"}
    score(checkpoints["llama"], text, path, **MOMENTS)
    for file in moments.iterdir():
        found = path.with_suffix(".moments") / file.name
        assert found.read_bytes() == file.read_bytes()
        assert file.name not in done or done[file.name] == found.stat().st_ino, f"{file.name} was made again"


def test_second_moments_killed_within_a_pass_continue(checkpoints, text, tmp_path, monkeypatch, capsys):
    constants = MOMENTS | {"BATCH_SIZE": 1, "SAVE_MINUTES": 0.0, "LAYER_PERPLEXITY": False, "NUM_SAMPLES": 6}
    score(checkpoints["llama"], text, tmp_path / "whole.pt", **constants)
    capsys.readouterr()
    kill_after(6 + 3, monkeypatch)
    with pytest.raises(Killed):
        score(checkpoints["llama"], text, tmp_path / "scores.pt", **constants)
    assert not (tmp_path / ".scores.moments.tmp" / "layer-0.safetensors").exists()
    score(checkpoints["llama"], text, tmp_path / "scores.pt", **constants)
    assert "continuing after 3 rows of second moments\n" in capsys.readouterr().out
    for file in (tmp_path / "whole.moments").iterdir():
        assert (tmp_path / "scores.moments" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_second_moments_killed_within_a_later_pass_continue_with_another_plan(
    checkpoints, text, tmp_path, monkeypatch, capsys
):
    """In the third pass of one file each; then all that is missing fits into one beside it, or one file at a time."""
    constants = MOMENTS | {"BATCH_SIZE": 1, "SAVE_MINUTES": 0.0, "LAYER_PERPLEXITY": False, "NUM_SAMPLES": 6}
    score(checkpoints["llama"], text, tmp_path / "whole.pt", **constants)
    for free in (1, 10**9):
        path = tmp_path / f"{free}.pt"
        monkeypatch.setattr(importance_analysis, "free_memory", lambda device: 1)
        kill_after(6 + 2 * 4 + 3, monkeypatch)
        with pytest.raises(Killed):
            score(checkpoints["llama"], text, path, **constants)
        monkeypatch.setattr(importance_analysis, "free_memory", lambda device, free=free: free)
        capsys.readouterr()
        score(checkpoints["llama"], text, path, **constants)
        said = capsys.readouterr().out
        assert "continuing after 3 rows of second moments\n" in said
        assert f"pass {3 if free == 1 else 2} of {3 if free == 1 else 2}" in said
        for file in (tmp_path / "whole.moments").iterdir():
            assert (path.with_suffix(".moments") / file.name).read_bytes() == file.read_bytes()
        assert not list(tmp_path.glob(".*"))


def test_no_room_for_unfinished_second_moments_is_no_reason_to_stop(checkpoints, text, tmp_path, monkeypatch):
    saved, save_file, usage = [], importance_analysis.save_file, shutil.disk_usage(tmp_path)

    def note(tensors, path, record):
        saved.append(Path(path).name)
        save_file(tensors, path, record)

    monkeypatch.setattr(importance_analysis, "save_file", note)
    needed = sum(
        importance_analysis.moment_bytes(places)
        for places in importance_analysis.moment_files(
            load(checkpoints["llama"]).config, common.find_checkpoint(str(checkpoints["llama"]), None, "MODEL")
        ).values()
    )
    for free, expected in ((2 * needed, False), (3 * needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        saved.clear()
        score(checkpoints["llama"], text, tmp_path / f"{free}.pt", **MOMENTS | {"SAVE_MINUTES": 0.0})
        assert any("-moments" in name for name in saved) == expected
        assert any("partial-0-of-1.safetensors" in name for name in saved)


def test_damaged_second_moments_of_a_killed_run_are_made_again(checkpoints, text, tmp_path, moments):
    folder, path = tmp_path / ".scores.moments.tmp", tmp_path / "scores.pt"
    shutil.copytree(moments, folder)
    damaged = bytearray((folder / "layer-1.safetensors").read_bytes())
    damaged[-1000] ^= 1
    (folder / "layer-1.safetensors").write_bytes(damaged)
    kept = (folder / "layer-0.safetensors").stat().st_ino
    score(checkpoints["llama"], text, path, **MOMENTS)
    for file in moments.iterdir():
        assert (path.with_suffix(".moments") / file.name).read_bytes() == file.read_bytes()
    assert (path.with_suffix(".moments") / "layer-0.safetensors").stat().st_ino == kept


def test_the_models_perplexity_is_printed_first(checkpoints, text, tmp_path, capsys):
    """Flipped bytes in a download may leave finite weights: the user sees what the model makes of text."""
    score(checkpoints["llama"], text, tmp_path / "scores.pt", NUM_SAMPLES=4)
    printed = re.search(r"perplexity of the first (\d+) tokens: (\S+) ", capsys.readouterr().out)
    constants = common.load_scores(tmp_path / "scores.pt")["meta"]["constants"]
    rows = expected_rows(checkpoints["llama"], text, 4, constants["SEQUENCE_LENGTH"])[:1]
    with torch.inference_mode():
        log_probs = load(checkpoints["llama"])(rows).logits.log_softmax(-1)
    loss = -log_probs[:, :-1].gather(2, rows[:, 1:, None]).mean()
    assert int(printed[1]) == rows.numel()
    assert float(printed[2]) == pytest.approx(loss.exp().item(), rel=1e-3)


def test_second_moments_of_other_samples_are_not_taken_up(checkpoints, text, tmp_path, moments):
    folder, path = tmp_path / ".scores.moments.tmp", tmp_path / "scores.pt"
    shutil.copytree(moments, folder)
    score(checkpoints["llama"], text, path, **MOMENTS | {"SECOND_MOMENT_SAMPLES": 3})
    for file in moments.iterdir():
        assert (path.with_suffix(".moments") / file.name).read_bytes() != file.read_bytes()


def test_a_disk_too_small_for_second_moments_is_refused_before_the_model_loads(
    checkpoints, text, tmp_path, monkeypatch
):
    def refuse(*args):
        raise AssertionError("the model was loaded")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(common, "load_model", refuse)
    with pytest.raises(PareError, match="SECOND_MOMENTS"):
        score(checkpoints["llama"], text, tmp_path / "scores.pt", SECOND_MOMENTS=True)


def test_a_folder_of_a_user_is_never_replaced_by_second_moments(checkpoints, text, tmp_path):
    (tmp_path / "scores.moments").mkdir()
    (tmp_path / "scores.moments" / "mine.txt").write_text("mine")
    with pytest.raises(PareError, match="in the way"):
        score(checkpoints["llama"], text, tmp_path / "scores.pt", SECOND_MOMENTS=True)
    assert (tmp_path / "scores.moments" / "mine.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_neurons_kept_globally_by_hand():
    """Relative to their layer's mean (2 and 20): 2, 0.5, 1, 0.5 and 1.5, 1.5, 0.5, 0.5."""
    mlp = torch.tensor([[4.0, 1.0, 2.0, 1.0], [30.0, 30.0, 10.0, 10.0]])
    assert importance_analysis.neurons_kept_globally(mlp) == [2, 2]
    assert importance_analysis.neurons_kept_globally(mlp, share=0.375) == [1, 2]
    assert importance_analysis.neurons_kept_globally(mlp, share=0.125) == [1, 0]


def test_best_block_by_hand():
    distances = torch.full((7, 7), 0.9)  # 6 layers
    distances[0, 2] = distances[4, 6] = 0.1  # the first and the last layer are never among them
    distances[3, 5] = 0.2
    assert common.best_block(distances, 2) == 3  # layers 3 and 4
    distances[1, 5] = 0.3
    assert common.best_block(distances, 4) == 1  # layers 1 to 4
    assert common.best_block(distances, 5) is None


def test_the_report_marks_the_layers_that_every_measure_finds_weak(capsys):
    """Of six layers the lowest third are two: layer 4 by all three measures, layers 1 and 2 by some of them."""
    mlp = torch.full((6, 8), 1.0)
    mlp[:, :4] = 1.2
    mlp[4] = torch.tensor([8.0, *[0.1] * 7])  # one neuron does all: few of the best half are here
    mlp[2] = torch.tensor([8.0, 7.0, *[0.1] * 6])
    importance = {0: 0.5, 1: 0.01, 2: 0.3, 3: 0.4, 4: 0.02, 5: 0.6}
    scores = {"mlp": mlp, "layer": importance, "angular_distance": torch.full((7, 7), 0.25), "perplexity": 10.0}
    scores["layer_perplexity"] = {0: 90.0, 1: 10.5, 2: 15.0, 3: 30.0, 4: 11.0, 5: 70.0}
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    importance_analysis.report_layers(scores, kinds)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert all(word in printed for word in ("block importance", "perplexity without", "angular distance"))
    kept = importance_analysis.neurons_kept_globally(mlp)
    for index, kind in enumerate(kinds):
        row = next(line for line in lines if line and line[0] == str(index))
        mark = ["weak"] if index == 4 else []
        values = [f"{importance[index]:.4g}", f"{scores['layer_perplexity'][index]:.4g}", "0.25", str(kept[index])]
        assert row == [str(index), *values, kind.split("_")[0], *mark]
    assert "perplexity with all layers: 10\n" in printed
    assert "least angular distance over 1 layers: from 1 to 1 (0.250)" in printed


# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_too_large_for_its_gpu_is_spread(checkpoints, monkeypatch):
    """As far as a machine without a GPU can tell: the model is dispatched over what there is, and computes the same."""
    seen, load_it = [], transformers.AutoModelForCausalLM.from_pretrained

    def watch(*args, device_map, **kwargs):
        seen.append(device_map)
        return load_it(*args, device_map=device_map if device_map == "auto" else "cpu", **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watch)
    checkpoint, ids = common.find_checkpoint(str(checkpoints["llama"]), None, "MODEL"), torch.arange(2, 32)[None]
    logits = []
    gpu = torch.device("cuda:0")
    for free in (1000, 10**12):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        spread = not common.fits_whole(checkpoint, torch.float32, gpu, "MODEL")
        model = common.load_model(checkpoint, torch.float32, gpu, "MODEL", spread=spread)
        with torch.no_grad():
            logits.append(model(input_ids=ids.to(model.device)).logits.cpu())
    assert seen == ["auto", {"": torch.device("cuda:0")}]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_on_a_gpu_are_those_on_the_cpu(family, checkpoints, scored, text, tmp_path):
    expected = scored(family)
    on_gpu = {"DEVICE": "cuda", "LAYER_PERPLEXITY_SAMPLES": 8}
    found = score(checkpoints[family], text, tmp_path / "exact.pt", DTYPE="float32", **on_gpu)
    numbers = {key: value for key, value in expected.items() if key != "meta" and not isinstance(value, str)}
    assert {*WIDTHS, "layer", "layer_perplexity", "angular_distance", "norms"} < numbers.keys()
    for key, value in numbers.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    found = score(checkpoints[family], text, tmp_path / "scores.pt", DTYPE="bfloat16", **on_gpu)
    for key in WIDTHS:
        torch.testing.assert_close(found[key], expected[key], rtol=0.1, atol=0.0)
    wanted = importance_analysis.layer_values(expected)
    torch.testing.assert_close(importance_analysis.layer_values(found), wanted, rtol=0.1, atol=1e-3)
