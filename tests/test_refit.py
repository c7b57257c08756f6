"""Least squares against its definition, and teachers from which nothing is lost."""

import json
import math

import pytest
import torch
from conftest import analyse, cut, load, logits_of, needs_gpu, save_checkpoint, some_ids
from safetensors.torch import load_file

import common
import prune
import refit

MOMENTS = {"SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 12, "NUM_SAMPLES": 12}


def correlated(samples: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, generator=generator, dtype=torch.float64)
    return x @ torch.randn(channels, channels, generator=generator, dtype=torch.float64)


def test_refit_is_the_ridge_solution_of_the_reference():
    x, weight = correlated(500, 12), correlated(7, 12, seed=1)
    gram = x.T @ x / len(x)
    kept, removed = torch.tensor([0, 2, 3, 7, 8, 11]), torch.tensor([1, 4, 5, 6, 9, 10])
    among = gram[kept][:, kept]
    ridge = refit.RIDGE * among.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    numerator = weight @ gram[:, kept] - weight[:, kept] @ among
    expected = weight[:, kept] + numerator @ torch.linalg.inv(among + ridge)
    actual = weight[:, kept] + weight[:, removed] @ refit.refit_matrix(gram, kept, removed)
    torch.testing.assert_close(actual, expected)


def test_without_a_ridge_no_other_weights_come_nearer(monkeypatch):
    monkeypatch.setattr(refit, "RIDGE", 0.0)
    x, weight = correlated(500, 12), correlated(7, 12, seed=1)
    kept, removed = torch.arange(0, 12, 2), torch.arange(1, 12, 2)
    matrix = refit.refit_matrix(x.T @ x, kept, removed)
    actual = weight[:, kept] + weight[:, removed] @ matrix
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(actual, expected)


def test_a_ridge_too_small_for_the_rounding_of_the_moments_grows():
    gram = torch.diag(torch.tensor([1.0, 1.0, -3e-4, 1.0], dtype=torch.float64))
    factor = refit.factorize(gram, 1e-4)
    expected = gram + 1e-3 * gram.diagonal().abs().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, expected)
    nothing = torch.tensor([[-1e-9, 2e-9], [2e-9, 1e-9]], dtype=torch.float64)  # a covariance that is rounding alone
    assert refit.factorize(nothing, 1e-3).isfinite().all()
    with pytest.raises(common.PareError, match="REFIT"):
        refit.factorize(gram * math.nan, 1e-4)


def test_reading_from_all_directions_is_the_rotation_itself():
    x = correlated(500, 12)
    basis = torch.linalg.qr(correlated(12, 12, seed=2))[0]
    torch.testing.assert_close(refit.rotated_matrix(x.T @ x, basis), basis.T)


def test_greedy_removal_is_the_greedy_removal_by_least_squares(monkeypatch):
    """One neuron at a time, against solving the whole problem again for every candidate."""
    monkeypatch.setattr(refit, "GREEDY_STEP", 0.0)
    x, weight = correlated(300, 10), correlated(6, 10, seed=3)
    gram = x.T @ x / len(x)
    ridged = gram + refit.RIDGE * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)

    def error(kept: list[int]) -> float:
        solution = torch.linalg.solve(ridged[kept][:, kept], ridged[kept] @ weight.T)
        return (torch.trace(weight @ ridged @ weight.T) - torch.trace(solution.T @ ridged[kept] @ weight.T)).item()

    left = list(range(10))
    while len(left) > 4:
        left.remove(min(left, key=lambda neuron: error([other for other in left if other != neuron])))
    assert refit.greedy_neurons(gram, weight, 4).tolist() == left


def copy_neurons(model) -> None:
    """The second half of the neurons of every layer are copies of the first."""
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            for parameter in linear.parameters():
                half = len(parameter) // 2
                parameter.data[half:] = parameter.data[:half]


@pytest.mark.parametrize("samples", [0, 12])
@pytest.mark.parametrize("family", ["llama", "olmo3", "gemma3_text", "qwen2"])
def test_neurons_that_are_copies_of_others_are_no_loss(family, samples, text, tmp_path, monkeypatch):
    """Sliced, half of the output is gone; refitted, the copies left say it all. Once, and in sequence."""
    monkeypatch.setattr(refit, "RIDGE", 1e-7)
    source = save_checkpoint(tmp_path / "model", family, edit=copy_neurons)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    sizes = {"INTERMEDIATE_SIZE": 32, "REFIT_SAMPLES": samples}
    folder = cut(source, scores, tmp_path / "refitted", REFIT=True, **sizes)
    sliced = cut(source, scores, tmp_path / "sliced", REFIT=False, **sizes)
    kept = json.loads((folder / "pare.json").read_text())["kept"]["neurons"]
    assert all(sorted(neuron % 32 for neuron in neurons) == list(range(32)) for neurons in kept)
    ids = some_ids(300)
    expected = logits_of(load(source), ids)
    torch.testing.assert_close(logits_of(load(folder), ids), expected, rtol=5e-3, atol=5e-3)
    assert (logits_of(load(sliced), ids) - expected).abs().max() > 0.1


def in_a_plane(model) -> None:
    """The residual stream of a pre-norm model stays in 36 of 48 dimensions, none of them a channel."""
    basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(4)))[0][:36]
    project = basis.T @ basis
    model.model.embed_tokens.weight.data @= project
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data = project @ linear.weight.data
            if linear.bias is not None:
                linear.bias.data = project @ linear.bias.data


def in_a_plane_after_norms(model) -> None:
    """The same for a post-norm model: 24 of 48 dimensions after the norms' weights, which are large in one half of the
    channels and small in the other. Every direction has as much of either, so that a norm over the 24 alone divides by
    a constant times the same."""
    generator = torch.Generator().manual_seed(4)
    halves = [torch.linalg.qr(torch.randn(24, 24, generator=generator))[0] for _ in range(2)]
    basis = torch.cat(halves, dim=1) / math.sqrt(2)  # (24, 48), orthonormal rows
    model.model.embed_tokens.weight.data @= basis.T @ basis
    for index, layer in enumerate(model.model.layers):
        for linear, norm, large in (
            (layer.self_attn.o_proj, layer.post_attention_layernorm, 1.5 + index / 10),
            (layer.mlp.down_proj, layer.post_feedforward_layernorm, 1.2 + index / 5),
        ):
            norm.weight.data = torch.tensor([large] * 24 + [0.5] * 24)
            linear.weight.data = basis.T @ (basis @ linear.weight.data) / norm.weight.data[:, None]


@pytest.mark.parametrize("samples", [0, 12])
@pytest.mark.parametrize("family", ["olmo2", "olmo3"])
def test_directions_that_are_never_used_are_no_loss_after_norms(family, samples, text, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, edit=in_a_plane_after_norms, rms_norm_eps=1e-12)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    sizes = {"HIDDEN_SIZE": 24, "REFIT_SAMPLES": samples}
    rotated = cut(source, scores, tmp_path / "rotated", **sizes)
    channels = cut(source, scores, tmp_path / "channels", ROTATE=False, **sizes)
    ids = some_ids(300)
    expected = logits_of(load(source), ids)
    torch.testing.assert_close(logits_of(load(rotated), ids), expected, rtol=2e-3, atol=2e-3)
    assert (logits_of(load(channels), ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_directions_that_are_never_used_are_no_loss(family, text, tmp_path, monkeypatch):
    monkeypatch.setattr(refit, "RIDGE", 1e-2)
    eps = 1e-6 if family == "qwen3" else 0.05  # of its norms over a head's channels too, which stay as they are
    source = save_checkpoint(tmp_path / "model", family, edit=in_a_plane, rms_norm_eps=eps)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    rotated = cut(source, scores, tmp_path / "rotated", HIDDEN_SIZE=36, REFIT_SAMPLES=0)
    channels = cut(source, scores, tmp_path / "channels", HIDDEN_SIZE=36, REFIT_SAMPLES=0, ROTATE=False)
    ids = some_ids(300)
    expected = logits_of(load(source), ids)
    torch.testing.assert_close(logits_of(load(rotated), ids), expected, rtol=2e-3, atol=2e-3)
    assert (logits_of(load(channels), ids) - expected).abs().max() > 0.1
    assert json.loads((rotated / "pare.json").read_text())["kept"]["hidden"] is None


@pytest.mark.parametrize("samples", [0, 12])
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_sub_layer_of_zeros_is_no_trouble(family, samples, text, tmp_path):
    def edit(model):
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[2].self_attn.k_proj.weight.zero_()

    source = save_checkpoint(tmp_path / "model", family, edit=edit)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    sizes = {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "REFIT_SAMPLES": samples}
    assert logits_of(load(cut(source, scores, tmp_path / "out", **sizes)), some_ids(300)).isfinite().all()


def test_a_stream_too_large_for_float16_is_none_in_sequence(text, tmp_path):
    """Each layer's values fit into float16, their sum does not; scored in float32, as in bfloat16, all is well."""

    def edit(model):
        model.half().float()
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 20000

    source = save_checkpoint(tmp_path / "model", "mistral", edit=edit)
    load(source).half().save_pretrained(source)
    stream = load(source).model(some_ids(300), output_hidden_states=True).hidden_states
    assert max(state.abs().max() for state in stream) > 66000
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    student = load(cut(source, scores, tmp_path / "out", INTERMEDIATE_SIZE=40, REFIT_SAMPLES=12))
    assert logits_of(student, some_ids(300)).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "olmo3", "smollm3", "gemma3_text"])
def test_in_sequence_a_student_that_lost_nothing_stays_as_it_is(family, text, tmp_path):
    source = save_checkpoint(tmp_path / "model", family)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    folder = cut(source, scores, tmp_path / "out", REFIT=True, REFIT_SAMPLES=12)
    ids = some_ids(300)
    expected = logits_of(load(source), ids)
    torch.testing.assert_close(logits_of(load(folder), ids), expected, rtol=1e-3, atol=1e-3)


def norm_outputs(folder, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every norm behind a linear layer gives, (B, T, channels), float64, by layer and name."""
    model, found = load(folder), {}
    behind = ["self_attn.q_norm", "self_attn.k_norm"]
    if hasattr(model.model.layers[0], "post_feedforward_layernorm"):  # not Qwen 3
        behind += ["post_attention_layernorm", "post_feedforward_layernorm"]

    def keep(module, args, output, name):
        if output.ndim == 4 and output.shape[2] == rows.shape[1]:  # Gemma 3: (B, heads, T, head_dim)
            output = output.transpose(1, 2)
        found[name] = output.flatten(2).double()

    for index, layer in enumerate(model.model.layers):
        for name in behind:
            hook = lambda *seen, name=f"{index} {name}": keep(*seen, name)  # noqa: E731
            layer.get_submodule(name).register_forward_hook(hook)
    logits_of(model, rows)
    return found


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("family", ["olmo3", "qwen3", "gemma3_text"])
def test_norms_in_sequence_have_the_size_of_least_squares(family, rotate, text, tmp_path):
    """No other factor brings a norm's outputs nearer to the teacher's: their error is orthogonal to them."""
    source = save_checkpoint(tmp_path / "model", family)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    sizes = {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "NUM_ATTENTION_HEADS": 4, "NUM_HIDDEN_LAYERS": 3}
    more = {"PROTECT_FULL_ATTENTION": False, "REFIT_SAMPLES": 12, "ROTATE": rotate}
    rows = load_file(common.moments_folder(scores) / common.MOMENTS_ROWS)["rows"].long()
    teacher, width = norm_outputs(source, rows), load(source).config.head_dim
    channels = lambda heads: (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()  # noqa: E731
    errors = {True: [], False: []}
    for rescaled in errors:
        folder = cut(source, scores, tmp_path / str(rescaled), NORM_RESCALE=rescaled, **sizes | more)
        kept = json.loads((folder / "pare.json").read_text())["kept"]
        for name, given in norm_outputs(folder, rows).items():
            index, norm = name.split()
            wanted = teacher[f"{kept['layers'][int(index)]} {norm}"]
            if norm.startswith("self_attn"):
                heads = kept["query_heads" if "q_norm" in norm else "key_value_heads"][int(index)]
                wanted = wanted[..., channels(heads)]
            elif kept["directions"]:
                wanted = wanted @ load_file(folder / kept["directions"])["basis"].T.double()
            else:
                wanted = wanted[..., kept["hidden"]]
            errors[rescaled].append(((wanted - given) * given).sum().abs() / given.square().sum())
    assert max(errors[True]) < 1e-6
    assert max(errors[False]) > 1e-2


def test_in_sequence_averaged_keys_keep_their_size(text, tmp_path):
    source = save_checkpoint(tmp_path / "model", "olmo2")
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    once, twice = (
        load(cut(source, scores, tmp_path / str(samples), NUM_KEY_VALUE_HEADS=2, REFIT_SAMPLES=samples)).model.layers
        for samples in (0, 12)
    )
    for one, other in zip(once[1:], twice[1:], strict=True):  # the first gets the teacher's inputs
        one, other = one.self_attn, other.self_attn
        assert torch.equal(one.k_norm.weight, other.k_norm.weight)
        assert not torch.equal(one.k_proj.weight, other.k_proj.weight)
        assert not torch.equal(one.q_norm.weight, other.q_norm.weight)


@pytest.mark.parametrize("family", ["olmo3", "llama", "qwen3", "gemma3_text"])
def test_refitted_on_every_axis_it_loads_strictly_and_runs(family, text, tmp_path):
    source = save_checkpoint(tmp_path / "model", family)
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    sizes = {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "NUM_ATTENTION_HEADS": 4, "NUM_HIDDEN_LAYERS": 3}
    ids = some_ids(300)
    for samples in (0, 12):
        more = {"REFIT_SAMPLES": samples, "PROTECT_FULL_ATTENTION": False, "LAYER_METRIC": "block_importance"}
        student = load(cut(source, scores, tmp_path / str(samples), **sizes | more))
        assert logits_of(student, ids).isfinite().all()
        uncached = student.generate(ids[:1], max_new_tokens=20, do_sample=False, use_cache=False, eos_token_id=None)
        cached = student.generate(ids[:1], max_new_tokens=20, do_sample=False, use_cache=True, eos_token_id=None)
        assert torch.equal(cached, uncached)
        tied = student.lm_head.weight is student.model.embed_tokens.weight
        assert tied == student.config.tie_word_embeddings == (family == "gemma3_text")
    assert not list(tmp_path.glob(".*"))  # no lock, no temporary folder


def test_in_sequence_over_several_files_is_as_in_one(text, tmp_path, monkeypatch):
    source = save_checkpoint(tmp_path / "model", "olmo3")
    scores = analyse(source, text, tmp_path / "scores.pt", **MOMENTS)
    sizes = {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "REFIT_SAMPLES": 12}
    one = load(cut(source, scores, tmp_path / "one", **sizes)).state_dict()
    monkeypatch.setattr(prune, "SHARD_BYTES", 60_000)
    folder = cut(source, scores, tmp_path / "many", **sizes)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, one[name]), name
    record = json.loads((folder / "pare.json").read_text())["sha256"]
    for path in folder.glob("model-*.safetensors"):
        assert record[path.name] == common.hash_file(path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["olmo3", "llama", "qwen3", "gemma3_text"])
def test_the_refit_on_a_gpu_is_that_on_the_cpu(family, text, tmp_path):
    source = save_checkpoint(tmp_path / "model", family)
    sizes = {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "NUM_ATTENTION_HEADS": 4}
    scores, logits = {}, {}
    for device in ("cpu", "cuda"):
        on = {"DEVICE": device, "DTYPE": "float32"}
        scores[device] = analyse(source, text, tmp_path / device / "scores.pt", **MOMENTS, **on)
        for samples in (0, 12):
            output = tmp_path / device / str(samples)
            cut(source, scores["cpu"], output, DEVICE=device, REFIT_SAMPLES=samples, **sizes)
            logits[device, samples] = logits_of(load(output), some_ids(300))
    for path in scores["cpu"].with_suffix(".moments").glob("layer-*.safetensors"):
        found, expected = load_file(scores["cuda"].with_suffix(".moments") / path.name), load_file(path)
        for name, moments in expected.items():
            torch.testing.assert_close(found[name], moments, rtol=1e-3, atol=1e-4 * moments.abs().max().item())
    for samples in (0, 12):
        error = (logits["cuda", samples] - logits["cpu", samples]).norm() / logits["cpu", samples].norm()
        assert error < 1e-3, (samples, error)
