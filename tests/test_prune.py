"""Slicing against the operations it must equal, the written checkpoint, and the published sizes of real models."""

import hashlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS, FULL, SLIDING, analyse, configure, cut, load, logits_of, save_checkpoint, some_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import importance_analysis
import prune
from common import PareError

FAMILIES = list(CONFIGS)


def assert_same_logits(logits, expected) -> None:
    """Equal but for float32 rounding through eight layers, relative to the largest logit (6 to 20 in these models)."""
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pictures take most of the time of tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance_analysis, "plot", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def scores(checkpoints, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return {family: analyse(checkpoints[family], text, folder / f"{family}.pt") for family in FAMILIES}


def kept(folder) -> dict:
    return json.loads((folder / "pare.json").read_text())["kept"]


def read_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The student is the teacher with what was removed masked, for every family, axis and treatment of the norms


class Identity(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def mask_of(size: int, kept, width: int = 1) -> torch.Tensor:
    """(size · width,) ones at the kept, each `width` channels wide."""
    mask = torch.zeros(size, width)
    mask[torch.tensor(kept).flatten()] = 1
    return mask.flatten()


def mask_input(module, mask) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * mask,))


def mask_output(module, mask) -> None:
    module.register_forward_hook(lambda module, args, output: output * mask)


def norm_over(module, mask, factor: float, eps: float, offset: float) -> None:
    """Make an RMSNorm see, divide by and return the channels of the mask alone, times a factor."""

    def hook(module, args, output):
        x = args[0] * mask
        return x / (x.square().sum(-1, keepdim=True) / mask.sum() + eps).sqrt() * (module.weight + offset) * factor

    module.register_forward_hook(hook)


def masked_teacher(folder, student, shares: dict | None):
    """The teacher with everything that `student` (a folder) lacks switched off by hooks; no weight is touched.

    `shares` are the score file's norm statistics where norms were rescaled: each norm that lost channels is then
    multiplied by the root of the mean share of those kept.
    """
    teacher, record = load(folder), kept(student)
    config, model, eps = teacher.config, teacher.model, read_config(student)["rms_norm_eps"]
    hidden = mask_of(config.hidden_size, record["hidden"])
    offset = 1.0 if config.model_type == "gemma3_text" else 0.0

    def narrow(norm, name, layer, mask):
        factor = 1.0 if shares is None else shares[name][layer][mask.bool()].double().mean().sqrt().item()
        norm_over(norm, mask, factor, eps, offset)

    mask_output(model.embed_tokens, hidden)
    narrow(model.norm, "model.norm", 0, hidden)
    for place, index in enumerate(record["layers"]):
        layer = model.layers[index]
        query = mask_of(config.num_attention_heads, record["query_heads"][place], 8)
        key = mask_of(config.num_key_value_heads, record["key_value_heads"][place], 8)
        mask_input(layer.self_attn.o_proj, query)
        mask_input(layer.mlp.down_proj, mask_of(config.intermediate_size, record["neurons"][place]))
        mask_output(layer.self_attn.o_proj, hidden)
        mask_output(layer.mlp.down_proj, hidden)
        for name, norm in layer.named_modules():
            if name.endswith("layernorm"):
                narrow(norm, name, index, hidden)
        if config.model_type in ("olmo2", "olmo3"):
            narrow(layer.self_attn.q_norm, "self_attn.q_norm", index, query)
            narrow(layer.self_attn.k_norm, "self_attn.k_norm", index, key)
    for index in set(range(config.num_hidden_layers)) - set(record["layers"]):
        model.layers[index] = Identity()
    return teacher


AXES = {
    "hidden": {"HIDDEN_SIZE": 36},
    "neurons": {"INTERMEDIATE_SIZE": 40},
    "heads": {"NUM_ATTENTION_HEADS": 4},
    "layers": {"NUM_HIDDEN_LAYERS": 3},
    "all": {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "NUM_ATTENTION_HEADS": 4, "NUM_HIDDEN_LAYERS": 3},
    "nothing": {},
}
CASES = [(family, axis) for family in FAMILIES for axis in AXES]
GROUPED = [family for family in FAMILIES if family not in ("olmo2", "olmo3")]
CASES += [(family, "groups") for family in GROUPED]
AXES["groups"] = {"NUM_ATTENTION_HEADS": 3, "NUM_KEY_VALUE_HEADS": 1}


@pytest.fixture(scope="module")
def students(checkpoints, scores, tmp_path_factory):
    """students(family, axis, rescale): the folder of such a student, cut once."""
    root, known = tmp_path_factory.mktemp("students"), {}

    def get(family: str, axis: str, rescale: bool) -> Path:
        key = (family, axis, rescale)
        if key not in known:
            more = {"NORM_RESCALE": rescale, "REFIT": False, "PROTECT_FULL_ATTENTION": False} | AXES[axis]
            known[key] = cut(checkpoints[family], scores[family], root / "-".join(map(str, key)), **more)
        return known[key]

    return get


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize(("family", "axis"), CASES)
def test_the_student_equals_the_teacher_with_what_was_removed_masked(
    family, axis, rescale, checkpoints, scores, students
):
    folder = students(family, axis, rescale)
    shares = torch.load(scores[family], weights_only=True)["norms"] if rescale else None
    student = load(folder)  # no missing, unexpected or mismatched key
    ids = some_ids(student.config.vocab_size)
    expected = logits_of(masked_teacher(checkpoints[family], folder, shares), ids)
    assert_same_logits(logits_of(student, ids), expected)
    unpruned = logits_of(load(checkpoints[family]), ids)
    assert ((expected - unpruned).abs().max() > 0.01 * unpruned.abs().max()) == (axis != "nothing")  # a real mask


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_norms_changes_only_norms_and_gives_them_the_teachers_size(family, scores, students):
    plain, rescaled = (load_file(students(family, "all", on) / "model.safetensors") for on in (False, True))
    scaled = {name for name in plain if not torch.equal(plain[name], rescaled[name])}
    over_heads = ("q_norm.weight", "k_norm.weight") if family in ("olmo2", "olmo3") else ()
    assert scaled == {name for name in plain if name.endswith(("layernorm.weight", "model.norm.weight", *over_heads))}
    record, shares = kept(students(family, "all", True)), torch.load(scores[family], weights_only=True)["norms"]
    offset = 1 if family == "gemma3_text" else 0
    for place, layer in enumerate(record["layers"]):
        name = f"model.layers.{place}.post_attention_layernorm.weight"
        factor = prune.norm_factor(shares["post_attention_layernorm"][layer], torch.tensor(record["hidden"]))
        assert factor != pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(rescaled[name] + offset, (plain[name] + offset) * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "axis"), CASES)
def test_every_student_has_the_asked_sizes_and_generates_the_same_with_and_without_a_cache(family, axis, students):
    folder = students(family, axis, True)
    student, raw = load(folder), read_config(folder)
    for name, value in AXES[axis].items():
        assert raw[name.lower()] == getattr(student.config, name.lower()) == value
    assert raw["head_dim"] == 8
    ids = some_ids(student.config.vocab_size, (1, 20))
    result = student.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        eos_token_id=-1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert result.sequences.shape == (1, 36)
    uncached = logits_of(student, result.sequences)[:, 19:-1]
    assert_same_logits(torch.stack(result.logits, dim=1), uncached)
    tied = family in ("gemma3_text", "smollm3")
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_nothing_changes_no_bit(family, rescale, checkpoints, students):
    before = load_file(checkpoints[family] / "model.safetensors")
    after = load_file(students(family, "nothing", rescale) / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_over_layers_follow_the_layers(family, checkpoints, scores, tmp_path):
    folder = cut(checkpoints[family], scores[family], tmp_path / "out", LAYERS_TO_DROP=[1, 3])
    before = load(checkpoints[family]).config
    for raw in (read_config(folder), load(folder).config.to_dict()):
        assert raw["num_hidden_layers"] == before.num_hidden_layers - 2
        for key in ("layer_types", "no_rope_layers"):
            values = getattr(before, key, None)
            if values is not None:
                assert raw[key] == [value for layer, value in enumerate(values) if layer not in (1, 3)]
    assert kept(folder)["layers"] == [layer for layer in range(before.num_hidden_layers) if layer not in (1, 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_legacy_rope_keys_alone_describe_the_same_student(family, students, tmp_path):
    """Readers from before nested rope_parameters see rope_theta, rope_scaling (and Gemma's rope_local_base_freq)."""
    folder = students(family, "all", True)
    raw = read_config(folder)
    gemma = family == "gemma3_text"
    thetas = {"olmo3": 500000.0, "gemma3_text": 1000000.0, "smollm3": 2000000.0, "mistral": 10000.0}
    assert raw["rope_theta"] == thetas.get(family, 10000.0)
    rope_types = {"olmo3": "yarn", "gemma3_text": "linear"}
    assert (raw["rope_scaling"] or {}).get("rope_type") == rope_types.get(family)
    assert "rope_theta" not in (raw["rope_scaling"] or {})
    assert raw.get("rope_local_base_freq") == (10000.0 if gemma else None)
    shutil.copytree(folder, tmp_path / "legacy")
    del raw["rope_parameters"]
    (tmp_path / "legacy" / "config.json").write_text(json.dumps(raw))
    ids = some_ids(raw["vocab_size"], (1, 60))
    assert torch.equal(logits_of(load(tmp_path / "legacy"), ids), logits_of(load(folder), ids))


# ---------------------------------------------------------------------------------------------------------------------
# Removing what is zero changes nothing


def zero_channels(model) -> None:
    """No trace of every fourth hidden channel in the residual stream."""
    model.model.embed_tokens.weight[:, 1::4] = 0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[1::4] = 0
            if linear.bias is not None:
                linear.bias[1::4] = 0


def zero_heads(model) -> None:
    """Two of six heads, others in each layer, without query, key and value."""
    for index, layer in enumerate(model.model.layers):
        for head in (index % 6, (index + 2) % 6):
            channels = slice(8 * head, 8 * head + 8)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[channels] = 0
            layer.self_attn.o_proj.weight[:, channels] = 0


def zero_both(model) -> None:
    zero_channels(model)
    zero_heads(model)


SMALL = {"rms_norm_eps": 1e-12}  # config.json has one epsilon; Olmo's norms over heads would want another
ZEROED = {
    "pre-norm": ("llama", zero_channels, {"HIDDEN_SIZE": 36}, {}),
    "pre-norm with a large epsilon": ("llama", zero_channels, {"HIDDEN_SIZE": 36}, {"rms_norm_eps": 0.1}),
    "norms over each head": ("qwen3", zero_channels, {"HIDDEN_SIZE": 36}, {}),
    "post-norm": ("olmo3", zero_channels, {"HIDDEN_SIZE": 36}, SMALL),
    "post-norm, heads": ("olmo3", zero_heads, {"NUM_ATTENTION_HEADS": 4}, SMALL),
    "post-norm, both": ("olmo3", zero_both, {"HIDDEN_SIZE": 36, "NUM_ATTENTION_HEADS": 4}, SMALL),
    "olmo2, both": ("olmo2", zero_both, {"HIDDEN_SIZE": 36, "NUM_ATTENTION_HEADS": 4}, SMALL),
    "norms before and after": ("gemma3_text", zero_channels, {"HIDDEN_SIZE": 36}, {}),
    "tied": ("smollm3", zero_channels, {"HIDDEN_SIZE": 36}, {}),
}


@pytest.mark.parametrize("case", ZEROED)
def test_removing_zeroed_channels_and_heads_changes_no_logit_if_norms_are_rescaled(case, text, tmp_path):
    family, edit, targets, config = ZEROED[case]
    source = save_checkpoint(tmp_path / "model", family, edit=edit, **config)
    path = analyse(source, text, tmp_path / "scores.pt")
    rescaled, plain = (
        cut(source, path, tmp_path / f"out-{on}", NORM_RESCALE=on, REFIT=False, **targets) for on in (True, False)
    )
    if "HIDDEN_SIZE" in targets:
        assert kept(rescaled)["hidden"] == [channel for channel in range(48) if channel % 4 != 1]
    if "NUM_ATTENTION_HEADS" in targets:
        for layer, heads in enumerate(kept(rescaled)["query_heads"]):
            assert heads == sorted(set(range(6)) - {layer % 6, (layer + 2) % 6})
    ids = some_ids(300)
    expected = logits_of(load(source), ids)
    assert_same_logits(logits_of(load(rescaled), ids), expected)
    assert (logits_of(load(plain), ids) - expected).abs().max() > 0.03 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Key-value heads averaged


def share_heads(model) -> None:
    """Key-value head i of the upper half is head i of the lower half, with its biases and its part of the norm."""
    config = model.config
    for layer in model.model.layers:
        attention = layer.self_attn
        shared = [attention.k_proj.weight, attention.v_proj.weight]
        shared += [linear.bias for linear in (attention.k_proj, attention.v_proj) if linear.bias is not None]
        if config.model_type in ("olmo2", "olmo3"):
            shared.append(attention.k_norm.weight)
        for tensor in shared:
            half = len(tensor) // 2
            tensor[half:] = tensor[:half]


MERGED = [  # family, heads of the teacher, key-value heads of the teacher
    ("llama", 6, 6),
    ("qwen2", 6, 6),
    ("olmo2", 6, 6),
    ("olmo3", 6, 6),
    ("gemma3_text", 6, 6),
    ("llama", 8, 4),
    ("qwen3", 8, 4),
    ("olmo3", 8, 4),
    ("smollm3", 8, 4),
]


@pytest.mark.parametrize(("family", "heads", "key_value_heads"), MERGED)
def test_averaging_key_value_heads_that_are_equal_changes_no_logit(family, heads, key_value_heads, text, tmp_path):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    source = save_checkpoint(tmp_path / "model", family, edit=share_heads, **sizes)
    path = analyse(source, text, tmp_path / "scores.pt")
    half = key_value_heads // 2
    folder = cut(source, path, tmp_path / "out", NUM_KEY_VALUE_HEADS=half, REFIT=False)
    student, ids = load(folder), some_ids(300)
    assert student.model.layers[0].self_attn.k_proj.weight.shape == (8 * half, 48)
    assert student.config.num_attention_heads == heads
    assert_same_logits(logits_of(student, ids), logits_of(load(source), ids))
    for groups in kept(folder)["key_value_heads"]:
        assert groups == [[head, head + half] for head in range(half)]


@pytest.mark.parametrize(("family", "what"), [("qwen2", "bias"), ("olmo3", "k_norm")])
@pytest.mark.parametrize("second_moments", [False, True])
def test_heads_are_grouped_by_their_biases_and_norms_too(family, what, second_moments, text, tmp_path):
    """All weights are equal; the heads 0 and 2, 1 and 3 have the same biases, or weights of the key norm."""

    def edit(model):
        for layer in model.model.layers:
            attention = layer.self_attn
            for tensor in (attention.k_proj.weight, attention.v_proj.weight):
                tensor.copy_(tensor.unflatten(0, (4, 8))[:1].expand(4, 8, -1).flatten(0, 1))
            tensors = (attention.k_proj.bias, attention.v_proj.bias) if what == "bias" else (attention.k_norm.weight,)
            for tensor in tensors:
                tensor[16:] = tensor[:16]

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    source = save_checkpoint(tmp_path / "model", family, edit=edit, **sizes)
    path = analyse(source, text, tmp_path / "scores.pt", SECOND_MOMENTS=second_moments)
    folder = cut(source, path, tmp_path / "out", NUM_KEY_VALUE_HEADS=2, REFIT=None if second_moments else False)
    assert kept(folder)["key_value_heads"] == [[[0, 2], [1, 3]]] * len(load(source).model.layers)
    if not second_moments:
        ids = some_ids(300)
        assert_same_logits(logits_of(load(folder), ids), logits_of(load(source), ids))


def test_averaged_key_value_heads_are_the_mean_of_their_group_and_query_heads_follow(text, tmp_path):
    source = save_checkpoint(tmp_path / "model", "llama", num_key_value_heads=6)
    path = analyse(source, text, tmp_path / "scores.pt")
    folder = cut(source, path, tmp_path / "out", NUM_ATTENTION_HEADS=4, NUM_KEY_VALUE_HEADS=2, REFIT=False)
    before, after = load(source).state_dict(), load(folder).state_dict()
    record = kept(folder)
    for layer in range(4):
        groups, queries = record["key_value_heads"][layer], record["query_heads"][layer]
        assert [len(group) for group in groups] == [2, 2]
        assert list(itertools.chain(*groups)) == queries  # in an MHA teacher query head i reads key-value head i
        assert len(set(queries)) == 4
        for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            old, new = (state[f"model.layers.{layer}.self_attn.{name}"] for state in (before, after))
            expected = old.unflatten(0, (6, 8))[torch.tensor(groups)].mean(1).flatten(0, 1)
            torch.testing.assert_close(new, expected)
        old, new = (state[f"model.layers.{layer}.self_attn.q_proj.weight"] for state in (before, after))
        assert torch.equal(new, old.unflatten(0, (6, 8))[queries].flatten(0, 1))


@pytest.mark.parametrize(
    ("positions", "size", "groups"),
    [
        ([0, 10, 1, 11], 2, [[0, 2], [1, 3]]),
        ([0, 10, 20, 1, 11, 22], 2, [[0, 3], [1, 4], [2, 5]]),
        ([0, 10, 2, 12, 1, 11], 3, [[0, 2, 4], [1, 3, 5]]),
        ([0, 3, 4, 5], 2, [[0, 3], [1, 2]]),  # of equals, the first pair
        ([5, 1, 3], 1, [[0], [1], [2]]),
        ([5, 1, 3, 9], 4, [[0, 1, 2, 3]]),
    ],
)
def test_heads_near_each_other_share_a_group(positions, size, groups):
    points = torch.tensor(positions, dtype=torch.float64)
    assert prune.group_heads((points[:, None] - points[None]).square(), size) == groups


def test_head_distances_are_squared_distances_of_keys_and_values_relative_to_their_size():
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(3, 4, 10, generator=generator), 7 * torch.randn(3, 4, 10, generator=generator)
    root = torch.randn(10, 10, generator=generator)
    for moments, transform in ((None, torch.eye(10)), (root @ root.T, root)):
        distances = prune.head_distances(keys, values, moments)
        for a, b in itertools.product(range(3), repeat=2):
            expected = sum(
                ((x[a] - x[b]) @ transform).square().sum() / (x @ transform).square().sum((1, 2)).mean()
                for x in (keys, values)
            )
            assert distances[a, b].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sizes", [{"NUM_ATTENTION_HEADS": 5, "NUM_KEY_VALUE_HEADS": 2}, {"NUM_KEY_VALUE_HEADS": 4}])
def test_head_counts_that_do_not_come_out_even_are_refused_with_legal_ones(sizes, checkpoints, scores, tmp_path):
    with pytest.raises(PareError, match=r"Set NUM_ATTENTION_HEADS = \d"):
        cut(checkpoints["olmo2"], scores["olmo2"], tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Channels in another order


def write_permuted(checkpoint, folder, keep) -> None:
    """A student of the teacher's own sizes with its channels in another order."""
    infos = common.tensor_infos(checkpoint, "MODEL")
    folder.mkdir()
    source = prune.Source(checkpoint.folder, infos)
    prune.write_weights(folder, prune.plan_tensors(source, keep, checkpoint), source)
    source.close()
    sizes = prune.sizes_of(checkpoint.config)
    (folder / "config.json").write_text(json.dumps(prune.student_config(checkpoint, sizes, keep)))


@pytest.mark.parametrize("axis", ["neurons", "heads", "hidden", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_channels_changes_nothing(family, axis, checkpoints, tmp_path):
    checkpoint = common.find_checkpoint(str(checkpoints[family]), None, "MODEL")
    sizes = prune.sizes_of(checkpoint.config)
    generator = torch.Generator().manual_seed(3)

    def order(size, name):
        return torch.randperm(size, generator=generator) if axis in (name, "all") else torch.arange(size)

    layers = range(sizes.num_hidden_layers)
    key_value = [order(sizes.num_key_value_heads, "heads") for _ in layers]
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    query = [torch.cat([g * group + order(group, "heads") for g in groups.tolist()]) for groups in key_value]
    keep = prune.Keep(
        layers=list(layers),
        hidden=order(sizes.hidden_size, "hidden"),
        neurons=[order(sizes.intermediate_size, "neurons") for _ in layers],
        query_heads=query,
        key_value_heads=[heads[:, None] for heads in key_value],
    )
    write_permuted(checkpoint, tmp_path / "out", keep)
    teacher, student = load(checkpoints[family]), load(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(teacher.state_dict()[name], student.state_dict()[name]) == (axis == "heads")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(teacher.state_dict()[name], student.state_dict()[name]) == (axis == "neurons")
    ids = some_ids(checkpoint.config.vocab_size)
    assert_same_logits(logits_of(student, ids), logits_of(teacher, ids))


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_highest_scores_stay(family, checkpoints, scores, tmp_path):
    """Each axis against a choice made here by hand from the score file."""
    more = {"PROTECT_FULL_ATTENTION": False, "LAYER_METRIC": "block_importance"} | AXES["all"]
    folder = cut(checkpoints[family], scores[family], tmp_path / "out", **more)
    values, record = torch.load(scores[family], weights_only=True), kept(folder)
    assert record["layers"] == sorted(sorted(values["layer"], key=lambda layer: -values["layer"][layer])[:3])
    hidden = values["hidden"].tolist()
    assert record["hidden"] == sorted(sorted(range(48), key=lambda c: -hidden[c])[:36])
    papers = (values["attn_ln"] + values["ffn_ln"]).tolist()
    by_norms = cut(
        checkpoints[family], scores[family], tmp_path / "norms", HIDDEN_METRIC="norm_outputs", HIDDEN_SIZE=36
    )
    assert kept(by_norms)["hidden"] == sorted(sorted(range(48), key=lambda c: -papers[c])[:36])
    assert sorted(range(48), key=lambda c: -papers[c])[:36] != sorted(range(48), key=lambda c: -hidden[c])[:36]
    grouped = family in GROUPED
    for place, layer in enumerate(record["layers"]):
        neurons, heads = values["mlp"][layer].tolist(), values["attention"][layer].tolist()
        assert record["neurons"][place] == sorted(sorted(range(64), key=lambda c: -neurons[c])[:40])
        sections = [range(3), range(3, 6)] if grouped else [range(6)]
        best = [sorted(section, key=lambda c: -heads[c])[: 4 // len(sections)] for section in sections]
        assert record["query_heads"][place] == sorted(itertools.chain(*best))
        assert record["key_value_heads"][place] == ([[0], [1]] if grouped else [[c] for c in sorted(best[0])])


def test_heads_of_a_group_and_whole_groups_are_chosen_by_score():
    teacher = prune.Sizes(48, 64, 6, 2, 4)
    scores = torch.tensor(
        [4.0, 1.0, 1.0, 3.0, 3.0, 2.5]
    )  # squares per group: 18 and 24.25; the best head is in the first
    query, key_value = prune.choose_heads(scores, teacher, prune.Sizes(48, 64, 3, 1, 4))
    assert (query.tolist(), key_value.tolist()) == ([3, 4, 5], [[1]])
    query, key_value = prune.choose_heads(scores, teacher, prune.Sizes(48, 64, 4, 2, 4))
    assert (query.tolist(), key_value.tolist()) == ([0, 1, 3, 4], [[0], [1]])
    query, _ = prune.choose_heads(torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0, 9.5]), teacher, prune.Sizes(48, 64, 4, 2, 4))
    assert query.tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize("metric", ["block_importance", "perplexity", "angular_distance"])
def test_the_layers_of_least_importance_by_the_metric_go(metric, checkpoints, scores, tmp_path):
    values = torch.load(scores["olmo3"], weights_only=True)
    angles = values["angular_distance"]
    by_metric = {
        "block_importance": values["layer"],
        "perplexity": values["layer_perplexity"],
        "angular_distance": {layer: angles[layer, layer + 1].item() for layer in range(8)},
    }
    ranked = {name: sorted(by_metric[name], key=by_metric[name].get) for name in by_metric}
    more = {"PROTECT_FULL_ATTENTION": False, "LAYER_METRIC": metric, "NUM_HIDDEN_LAYERS": 5}
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", **more)
    assert kept(folder)["layers"] == sorted(ranked[metric][3:])


def test_layer_metrics_do_not_all_choose_the_same():
    """Else the test above could not tell them apart."""
    scores = {
        "layer": {0: 0.3, 1: 0.1, 2: 0.2},
        "layer_perplexity": {0: 9.0, 1: 8.0, 2: 7.0},
        "angular_distance": torch.tensor([[0.0, 0.1, 1, 1], [1, 0, 0.2, 1], [1, 1, 0, 0.3], [1, 1, 1, 0]]),
    }
    least = {}
    for metric in prune.LAYER_METRICS:
        importance = prune.layer_importance(scores, metric)
        least[metric] = min(importance, key=importance.get)
    assert least == {"block_importance": 1, "perplexity": 2, "angular_distance": 0}


def test_an_unknown_or_missing_layer_metric_is_refused(checkpoints, scores, text, tmp_path):
    with pytest.raises(PareError, match=r"LAYER_METRIC.*block_importance"):
        cut(checkpoints["llama"], scores["llama"], tmp_path / "out", LAYER_METRIC="size")
    path = analyse(checkpoints["llama"], text, tmp_path / "scores.pt", LAYER_PERPLEXITY=False)
    with pytest.raises(PareError, match="LAYER_PERPLEXITY"):
        cut(checkpoints["llama"], path, tmp_path / "out", LAYER_METRIC="perplexity", NUM_HIDDEN_LAYERS=3)
    cut(checkpoints["llama"], path, tmp_path / "out", LAYER_METRIC="perplexity", INTERMEDIATE_SIZE=40)  # not needed


def test_the_least_important_layers_go_and_full_attention_stays_if_protected():
    importance = {0: 3.0, 1: 1.0, 2: 2.0, 3: 0.5, 4: 0.7}
    kinds = [SLIDING, SLIDING, SLIDING, FULL, SLIDING]
    assert prune.choose_layers(importance, kinds, 3, False) == [3, 4]
    assert prune.choose_layers(importance, kinds, 3, True) == [1, 4]
    assert prune.choose_layers(importance, [FULL] * 5, 3, True) == [3, 4]  # of one kind, nothing to protect
    assert prune.choose_layers(importance, kinds, 1, True) == [0, 1, 2, 4]
    with pytest.raises(PareError, match="PROTECT_FULL_ATTENTION = False"):
        prune.choose_layers(importance, [FULL, SLIDING, FULL, FULL, SLIDING], 2, True)


def test_a_block_of_layers_has_the_least_sum_and_spares_the_first_and_the_last():
    importance = dict(enumerate([0.0, 5.0, 1.0, 3.0, 2.0, 2.0, 0.0]))
    assert prune.choose_block({}, importance, 6, "block_importance") == [2]
    assert prune.choose_block({}, importance, 5, "block_importance") == [2, 3]  # 4, as 4 and 5: the first of equals
    assert prune.choose_block({}, importance, 4, "perplexity") == [2, 3, 4]
    assert prune.choose_block({}, importance, 2, "perplexity") == [1, 2, 3, 4, 5]
    assert prune.choose_block({}, importance, 7, "perplexity") == []
    with pytest.raises(PareError, match="first and the last"):
        prune.choose_block({}, importance, 1, "perplexity")


def test_a_block_by_angular_distance_is_the_nearest_pair_of_its_ends():
    """Distances between layer boundaries are no sums: 2 to 4 is near though 2 to 3 and 3 to 4 are far."""
    distances = torch.ones(7, 7)
    distances[2, 4] = 0.1
    distances[0, 2] = distances[4, 6] = 0.01  # hold the first and the last layer
    importance = dict(enumerate(distances.diagonal(1).tolist()))
    scores = {"angular_distance": distances}
    assert prune.choose_block(scores, importance, 4, "angular_distance") == [2, 3]


def test_a_contiguous_block_is_what_main_drops(checkpoints, scores, tmp_path):
    more = {"CONTIGUOUS_LAYERS": True, "LAYER_METRIC": "angular_distance", "NUM_HIDDEN_LAYERS": 5}
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", **more)
    distances = torch.load(scores["olmo3"], weights_only=True)["angular_distance"]
    start = min(range(1, 5), key=lambda i: distances[i, i + 3].item())
    assert kept(folder)["layers"] == [layer for layer in range(8) if not start <= layer < start + 3]
    assert load(folder).config.num_hidden_layers == 5


@pytest.mark.parametrize("pattern", [(SLIDING, SLIDING, SLIDING, FULL), (SLIDING, FULL), (SLIDING, SLIDING, FULL)])
def test_portable_layers_are_the_most_important_ones_in_the_familys_order(pattern):
    """Against every subset of nine layers."""
    generator = torch.Generator().manual_seed(2)
    kinds = [SLIDING, SLIDING, SLIDING, FULL] * 2 + [SLIDING]
    importance = dict(enumerate(torch.rand(9, generator=generator).tolist()))
    for count in range(1, 10):
        fitting = [
            layers
            for layers in itertools.combinations(range(9), count)
            if all(kinds[layer] == pattern[index % len(pattern)] for index, layer in enumerate(layers))
        ]
        best = max(fitting, key=lambda layers: sum(importance[layer] for layer in layers), default=None)
        dropped = prune.portable_layers(kinds, importance, count, pattern)
        assert dropped == (None if best is None else [layer for layer in range(9) if layer not in best])


def test_portable_layers_by_hand():
    kinds, importance = [1, 1, 1, 0] * 2, dict(enumerate([9, 1, 9, 9, 8, 2, 3, 9]))
    assert prune.portable_layers(kinds, importance, 4, (1, 1, 1, 0)) == [1, 3, 5, 6]
    assert prune.portable_layers(kinds, importance, 8, (1, 1, 1, 0)) == []
    assert prune.portable_layers([0, 0, 1], {0: 1, 1: 1, 2: 1}, 2, (1, 0)) is None


def test_full_attention_layers_are_protected(checkpoints, scores, tmp_path):
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", NUM_HIDDEN_LAYERS=2)
    assert kept(folder)["layers"] == [3, 7]
    assert load(folder).config.layer_types == ["full_attention"] * 2


def test_companions_are_copied_byte_for_byte(checkpoints, scores, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(checkpoints["olmo3"], source)
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.6}')
    folder = cut(source, scores["olmo3"], tmp_path / "out", INTERMEDIATE_SIZE=40)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_no_model_is_ever_built(checkpoints, scores, tmp_path, monkeypatch):
    """But for names and shapes, on the meta device."""
    original = transformers.AutoModelForCausalLM.from_config
    built = []

    def record(config, **more):
        model = original(config, **more)
        built.append({parameter.device.type for parameter in model.parameters()})
        return model

    def refuse(*args, **more):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", record)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", **AXES["all"] | {"NUM_HIDDEN_LAYERS": 6})
    assert built
    assert all(devices == {"meta"} for devices in built)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype_and_values(dtype, checkpoints, text, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], source)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    scores = analyse(source, text, tmp_path / "scores.pt")
    folder = cut(source, scores, tmp_path / "out", INTERMEDIATE_SIZE=40)
    written = load_file(folder / "model.safetensors")
    neurons = kept(folder)["neurons"][2]
    name = "model.layers.2.mlp.down_proj.weight"
    assert written[name].dtype == dtype
    assert torch.equal(written[name], weights[name][:, neurons])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_holds_the_sha256_of_every_weight_file_and_lists_every_file(family, students):
    folder = students(family, "all", True)
    record = json.loads((folder / "pare.json").read_text())
    written = [path for path in folder.iterdir() if path.name != "pare.json"]
    assert record["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
    assert sorted(record["files"]) == sorted(path.name for path in folder.iterdir())


def test_pieces_of_any_size_give_the_same_file(checkpoints, scores, tmp_path, monkeypatch):
    files = []
    for size in (1, 5_000, 16_000_000):
        monkeypatch.setattr(prune, "PIECE_BYTES", size)
        folder = cut(checkpoints["llama"], scores["llama"], tmp_path / str(size), **AXES["all"])
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_it_syncs_while_it_writes(checkpoints, scores, tmp_path, monkeypatch):
    synced, sync = [], common.sync_and_forget

    def watch(descriptor):
        synced.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(common, "sync_and_forget", watch)
    monkeypatch.setattr(prune, "PIECE_BYTES", 2_000)
    monkeypatch.setattr(prune, "SYNC_BYTES", 20_000)
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", HIDDEN_SIZE=36)
    size = (folder / "model.safetensors").stat().st_size
    assert size / 40_000 < len(synced) <= size / 20_000


def test_sharded_in_and_out_equals_one_file(checkpoints, scores, tmp_path, monkeypatch):
    source = tmp_path / "model"
    shutil.copytree(checkpoints["olmo3"], source, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(checkpoints["olmo3"] / "model.safetensors")
    names = sorted(weights)  # lm_head first in name and last on disk: the hash must not depend on the files
    weight_map = {name: f"model-{3 - 3 * i // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: weights[n] for n in names if weight_map[n] == file}, source / file, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    one = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "one", HIDDEN_SIZE=36)
    monkeypatch.setattr(prune, "SHARD_BYTES", 60_000)
    many = cut(source, scores["olmo3"], tmp_path / "many", HIDDEN_SIZE=36)
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((many / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == len(shards)
    merged = {}
    for shard in shards:
        tensors = load_file(shard)
        assert all(index[name] == shard.name for name in tensors)
        merged |= tensors
    record = json.loads((many / "pare.json").read_text())["sha256"]
    assert {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}.items() <= record.items()
    expected = load_file(one / "model.safetensors")
    assert merged.keys() == expected.keys() == index.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])
def test_tied_embeddings_stay_tied(family, text, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, tie_word_embeddings=True)
    scores = analyse(source, text, tmp_path / "scores.pt")
    folder = cut(source, scores, tmp_path / "out", HIDDEN_SIZE=36)
    student = load(folder)
    scale = math.sqrt(48 / 36) if family == "gemma3_text" else 1  # its embeddings are multiplied by sqrt(hidden_size)
    expected = load(source).lm_head.weight[:, kept(folder)["hidden"]] * scale
    torch.testing.assert_close(student.lm_head.weight, expected, rtol=1e-6, atol=0)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_stored_copy_of_tied_embeddings_is_left_out(family, text, tmp_path):
    """Some trainers write it; cut or refitted apart from the embedding it would be another model."""
    source = save_checkpoint(tmp_path / "model", family, tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    scores = analyse(source, text, tmp_path / "scores.pt", SECOND_MOMENTS=True)
    expected = logits_of(load(cut(source, scores, tmp_path / "expected", HIDDEN_SIZE=36)), some_ids(300))
    save_file(weights | copy, source / "model.safetensors", {"format": "pt"})
    scores = analyse(source, text, tmp_path / "scores.pt", SECOND_MOMENTS=True)
    student = load(cut(source, scores, tmp_path / "out", HIDDEN_SIZE=36))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert_same_logits(logits_of(student, some_ids(300)), expected)


def test_a_tensor_that_the_system_reads_in_parts_is_read_whole(checkpoints, monkeypatch):
    """Linux reads 2 GiB at most at once."""
    checkpoint = common.find_checkpoint(str(checkpoints["llama"]), None, "MODEL")
    source = common.Source(checkpoint.folder, common.tensor_infos(checkpoint, "MODEL"))
    whole, name = os.preadv, "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: whole(file, [buffers[0][:1000]], at))
    assert torch.equal(source.whole(name), load_file(checkpoint.folder / "model.safetensors")[name])
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(PareError, match="ended early"):
        source.whole(name)
    source.close()


def test_a_failed_run_leaves_the_old_result(checkpoints, scores, tmp_path, monkeypatch):
    output = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", HIDDEN_SIZE=36)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "copy_companions", fail)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        cut(checkpoints["olmo3"], scores["olmo3"], output, HIDDEN_SIZE=40)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_two_renames_keeps_a_result(tmp_path, monkeypatch):
    """Once as an error that Pare sees, once as a kill, which only the next run can repair."""

    def make(content):
        with common.new_folder(tmp_path / "out", "prune.py") as folder:
            (folder / "pare.json").write_text('{"script": "prune.py"}')
            (folder / "data").write_text(content)

    make("first")
    rename = Path.rename

    def fail(self, target):
        if self.name == ".out.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(common.PareError, match="OUTPUT_DIR"):
        make("second")
    assert (tmp_path / "out" / "data").read_text() == "first"
    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    make("third")
    assert (tmp_path / "out" / "data").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_of_a_deleted_result_is_never_taken_for_one(tmp_path, monkeypatch):
    """A kill while the old result is deleted, and the new one moved away by the user."""

    def make(content, **more):
        with common.new_folder(tmp_path / "out", "prune.py") as folder:
            (folder / "pare.json").write_text('{"script": "prune.py"}')
            (folder / "data").write_text(content)

    class Killed(BaseException):
        pass

    def delete_half(folder, **more):
        if (Path(folder) / "data").exists() and Path(folder).name != ".out.tmp":
            (Path(folder) / "data").unlink()
            raise Killed

    make("first")
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", delete_half)
    with pytest.raises(Killed):
        make("second")
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(PareError, match="OUTPUT_DIR"), common.new_folder(tmp_path / "out", "prune.py") as folder:
        (folder / "no" / "such").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert (tmp_path / "moved" / "data").read_text() == "second"


def test_the_disk_behind_a_link_is_the_one_that_is_measured(tmp_path):
    (tmp_path / "big" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "big" / "disk" / "out")
    assert common.existing_parent(tmp_path / "link") == tmp_path / "big" / "disk"


def test_the_buffers_of_old_llama_checkpoints_are_left_out(checkpoints, text, tmp_path):
    """rotary_emb.inv_freq, which transformers computes itself; a tensor without axes is refused by name."""
    source = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], source)
    weights = load_file(source / "model.safetensors")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save_file(weights | buffers, source / "model.safetensors", {"format": "pt"})
    folder = cut(source, analyse(source, text, tmp_path / "scores.pt"), tmp_path / "out", INTERMEDIATE_SIZE=40)
    assert not [name for name in load_file(folder / "model.safetensors") if "inv_freq" in name]
    load(folder)
    save_file(weights | {"step": torch.tensor(1.0)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PareError, match="step"):
        analyse(source, text, tmp_path / "other.pt")


def test_an_output_folder_behind_a_link_stays_behind_it(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    for content in ("first", "second"):
        with common.new_folder(tmp_path / "link", "prune.py") as folder:
            (folder / "pare.json").write_text('{"script": "prune.py"}')
            (folder / "data").write_text(content)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "data").read_text() == "second"


def test_a_result_is_replaced_by_a_complete_successor(checkpoints, scores, tmp_path):
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", HIDDEN_SIZE=36)
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", HIDDEN_SIZE=40)
    assert load(folder).config.hidden_size == 40
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------------------
# REFIT


@pytest.mark.parametrize("family", ["llama", "olmo3", "gemma3_text"])
def test_refit_with_every_channel_kept_changes_no_bit(family, checkpoints, text, tmp_path):
    path = analyse(checkpoints[family], text, tmp_path / "scores.pt", SECOND_MOMENTS=True)
    folder = cut(checkpoints[family], path, tmp_path / "out", REFIT=True)
    before, after = (load_file(model / "model.safetensors") for model in (checkpoints[family], folder))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_refit_without_second_moments_is_refused_and_is_off_by_default(checkpoints, scores, tmp_path):
    with pytest.raises(PareError, match="SECOND_MOMENTS = True"):
        cut(checkpoints["llama"], scores["llama"], tmp_path / "out", INTERMEDIATE_SIZE=40, REFIT=True)
    assert not (tmp_path / "out").exists()
    one, other = (
        load_file(
            cut(checkpoints["llama"], scores["llama"], tmp_path / str(refit), INTERMEDIATE_SIZE=40, REFIT=refit)
            / "model.safetensors"
        )
        for refit in (None, False)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# Who can load it


def states(family: str, **more) -> dict[str, str]:
    """Runtime -> state of a student of portable sizes but for what is given."""
    pattern = common.FAMILIES[family].pattern
    raw = {
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "num_hidden_layers": 12,
        "tie_word_embeddings": False,
    }
    lists = {"layer_types": [FULL] * 12}
    if pattern:
        lists[common.FAMILIES[family].per_layer[-1]] = list(pattern) * (12 // len(pattern))
    rows = prune.portability(raw | lists | more, common.FAMILIES[family], "out", "; ADVICE")
    return {runtime.split()[0] + (" K" if "K-quants" in runtime else ""): state for runtime, state, _ in rows}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_runtime_takes_portable_sizes(family):
    assert set(states(family).values()) == {"ok"}
    assert {"transformers", "vLLM", "llama.cpp"} <= states(family).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_size_other_than_heads_times_head_dim_is_named_where_it_matters(family):
    found = states(family, hidden_size=2048)
    square = family in ("olmo2", "olmo3", "qwen2")
    for runtime in ("vLLM", "llama.cpp"):
        assert ("NUM_ATTENTION_HEADS = 16 would fit" in found[runtime]) == square
        assert (found[runtime] == "ok") == (not square)
    assert found["transformers"] == "ok"


PATTERNS = {
    "olmo3": ("layer_types", [SLIDING] * 3 + [FULL], [SLIDING] * 2 + [FULL]),
    "gemma3_text": ("layer_types", [SLIDING] * 5 + [FULL], [SLIDING] * 3 + [FULL]),
    "smollm3": ("no_rope_layers", [1, 1, 1, 0], [1, 1, 0]),
}


@pytest.mark.parametrize("family", PATTERNS)
def test_layers_out_of_the_familys_order_are_wrong_output_in_llama_cpp(family):
    key, right, wrong = PATTERNS[family]
    assert states(family, **{key: right * 2 + right[:1]})["llama.cpp"] == "ok"
    found = states(family, **{key: wrong + right})
    assert "WRONG OUTPUT" in found["llama.cpp"]
    assert key in found["llama.cpp"]
    assert "ADVICE" in found["llama.cpp"]
    assert found["vLLM"] == found["transformers"] == "ok"


def test_layer_types_of_families_without_an_order_are_free():
    assert set(states("qwen2", layer_types=[FULL, SLIDING, FULL]).values()) == {"ok"}


def test_tied_embeddings_and_other_attention_scales_are_named():
    assert "tied" in states("olmo3", tie_word_embeddings=True)["llama.cpp"]
    assert "tied" in states("olmo2", tie_word_embeddings=True)["llama.cpp"]
    assert states("llama", tie_word_embeddings=True)["llama.cpp"] == "ok"
    assert states("gemma3_text", query_pre_attn_scalar=128)["llama.cpp"] == "ok"
    found = states("gemma3_text", query_pre_attn_scalar=168)
    assert "query_pre_attn_scalar" in found["llama.cpp"]
    assert found["transformers"] == "ok"
    gemma_3_27b = {"hidden_size": 5376, "num_attention_heads": 32, "query_pre_attn_scalar": 168}
    assert states("gemma3_text", num_hidden_layers=62, **gemma_3_27b)["llama.cpp"] == "ok"
    assert "128" in states("gemma3_text", num_hidden_layers=60, **gemma_3_27b)["llama.cpp"]


def test_heads_that_would_fit_are_named_only_where_they_can_be_set():
    assert "NUM_ATTENTION_HEADS = 18" not in states("qwen2", hidden_size=2304)["vLLM"]


def test_sizes_that_k_quants_do_not_divide_are_named():
    for name in ("hidden_size", "intermediate_size"):
        found = states("llama", **{name: 3000})["GGUF K"]
        assert f"{name.upper()} = 3000" in found
    assert "heads x head_dim = 2944" in states("llama", num_attention_heads=23)["GGUF K"]


def test_the_table_is_printed_recorded_and_on_the_card_and_its_advice_helps(checkpoints, scores, tmp_path, capsys):
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "a", LAYERS_TO_DROP=[1, 2, 4, 5])
    advice = "LAYERS_TO_DROP = ["
    texts = capsys.readouterr().out, (folder / "README.md").read_text(), (folder / "pare.json").read_text()
    for text in texts:
        assert "WRONG OUTPUT" in text
        assert advice in text
    start = texts[0].index(advice) + len(advice) - 1
    drop = json.loads(texts[0][start : texts[0].index("]", start) + 1])
    assert len(drop) == 4
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "b", LAYERS_TO_DROP=drop)
    assert "WRONG OUTPUT" not in capsys.readouterr().out
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "c", HIDDEN_SIZE=32)
    assert "NUM_ATTENTION_HEADS = 4 would fit" in capsys.readouterr().out


def test_require_portable_refuses_what_some_runtime_cannot_load_and_takes_the_rest(text, tmp_path):
    sizes = {"hidden_size": 512, "num_attention_heads": 64, "num_key_value_heads": 64, "intermediate_size": 512}
    source = save_checkpoint(tmp_path / "model", "olmo2", num_hidden_layers=1, **sizes)
    path = analyse(source, text, tmp_path / "scores.pt")
    with pytest.raises(PareError, match=r"REQUIRE_PORTABLE.*\n?.*NUM_ATTENTION_HEADS = 32 would fit"):
        cut(source, path, tmp_path / "out", REQUIRE_PORTABLE=True, HIDDEN_SIZE=256)
    assert not (tmp_path / "out").exists()
    cut(source, path, tmp_path / "out", REQUIRE_PORTABLE=True, HIDDEN_SIZE=256, NUM_ATTENTION_HEADS=32)
    assert load(tmp_path / "out").config.hidden_size == 256


# ---------------------------------------------------------------------------------------------------------------------
# Published sizes

OLMO_3_7B = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_cache": False,
    "vocab_size": 100278,
}


def published(hidden_size, intermediate_size, num_hidden_layers, heads, key_value_heads, vocab_size, **more) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab_size,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    } | more


HEAD_128 = {"head_dim": 128}
PUBLISHED = {  # family -> config.json's sizes, and parameters in billions as published
    "llama": (published(4096, 14336, 32, 32, 8, 128256), 8.03),  # Llama 3.1 8B
    "mistral": (published(4096, 14336, 32, 32, 8, 32768, **HEAD_128), 7.25),  # Mistral 7B v0.3
    "qwen2": (published(3584, 18944, 28, 28, 4, 152064), 7.62),  # Qwen2 7B
    "qwen3": (published(4096, 12288, 36, 32, 8, 151936, **HEAD_128), 8.19),  # Qwen3 8B
    "olmo2": (published(4096, 11008, 32, 32, 32, 100352), 7.30),  # OLMo 2 7B
    "olmo3": (OLMO_3_7B, 7.30),
    "gemma3_text": (  # Gemma 3 12B without its vision tower
        published(3840, 15360, 48, 16, 8, 262208, head_dim=256, query_pre_attn_scalar=256, tie_word_embeddings=True),
        11.77,
    ),
    "seed_oss": (published(5120, 27648, 64, 80, 8, 155136, **HEAD_128), 36.15),  # Seed-OSS 36B
    "smollm3": (published(2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True), 3.08),  # SmolLM3 3B
}


def meta_model(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", PUBLISHED)
def test_target_params_is_met_within_two_percent_at_published_sizes(family):
    raw, billions = PUBLISHED[family]
    raw = {key: value for key, value in raw.items() if key != "model_type"}
    config = transformers.CONFIG_MAPPING[family](**raw)
    model = meta_model(config)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.01)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    checkpoint = common.Checkpoint("published", Path(), None, raw, config, common.FAMILIES[family])
    count, teacher = prune.parameter_counter(shapes, checkpoint), prune.sizes_of(config)
    assert count(teacher) == model.num_parameters()
    for share in (0.5, 0.6, 0.75, 0.95, 1):
        wanted = share * model.num_parameters()
        targets = dict.fromkeys(prune.SIZE_NAMES) | {"LAYERS_TO_DROP": None, "TARGET_PARAMS": f"{wanted / 1e9:.4f}B"}
        targets = prune.derive_targets(teacher, targets, count, checkpoint.head_dim)
        student = prune.target_sizes(teacher, targets, None)
        config = transformers.CONFIG_MAPPING[family](**raw | {"head_dim": checkpoint.head_dim} | vars(student))
        assert meta_model(config).num_parameters() == count(student)
        assert count(student) == pytest.approx(wanted, rel=0.02)
        assert all(vars(student)[name] <= size for name, size in vars(teacher).items())
        assert student.num_hidden_layers == teacher.num_hidden_layers
        for name in ("hidden_size", "intermediate_size"):
            assert vars(student)[name] % 256 == 0 or vars(student)[name] == vars(teacher)[name]
        if common.FAMILIES[family].square:
            assert student.hidden_size == student.num_attention_heads * checkpoint.head_dim


def targets_of_olmo_3_7b(**more):
    """(sizes, their number of parameters) for constants, from a formula of our own."""
    teacher = prune.Sizes(4096, 11008, 32, 32, 32)

    def count(sizes):
        H, F, A = sizes.hidden_size, sizes.intermediate_size, 128 * sizes.num_attention_heads
        layer = 4 * H * A + 3 * H * F + 2 * H + 2 * A
        return sizes.num_hidden_layers * layer + 2 * 100278 * H + H

    targets = dict.fromkeys(prune.SIZE_NAMES) | {"LAYERS_TO_DROP": None} | more
    sizes = prune.target_sizes(teacher, prune.derive_targets(teacher, targets, count, 128), targets["LAYERS_TO_DROP"])
    return sizes, count(sizes)


def test_sizes_that_are_given_are_kept_and_the_others_meet_the_target():
    sizes, _ = targets_of_olmo_3_7b(TARGET_PARAMS="3.6B")
    assert sizes == prune.Sizes(3072, 6144, 24, 24, 32)
    for given in (
        {"INTERMEDIATE_SIZE": 9000},
        {"HIDDEN_SIZE": 2560},
        {"NUM_ATTENTION_HEADS": 32},
        {"NUM_HIDDEN_LAYERS": 24},
        {"LAYERS_TO_DROP": [1, 2, 3]},
    ):
        sizes, parameters = targets_of_olmo_3_7b(TARGET_PARAMS="3600M", **given)
        assert parameters == pytest.approx(3.6e9, rel=0.02)
        for name, value in given.items():
            assert (value == [1, 2, 3] and sizes.num_hidden_layers == 29) or vars(sizes)[name.lower()] == value


@pytest.mark.parametrize(
    ("given", "parameters"),
    [
        ({"HIDDEN_SIZE": 2048}, 3.11e9),
        ({"INTERMEDIATE_SIZE": 4096}, 3.77e9),
        ({"HIDDEN_SIZE": 2560, "INTERMEDIATE_SIZE": 4608, "NUM_ATTENTION_HEADS": 20, "NUM_HIDDEN_LAYERS": 32}, 2.49e9),
    ],
)
def test_sizes_set_by_hand_win_where_the_target_is_out_of_their_reach(given, parameters):
    """The nearest that they allow, found here by trying every round shape."""
    sizes, found = targets_of_olmo_3_7b(TARGET_PARAMS="3.6B", **given)
    assert all(vars(sizes)[name.lower()] == value for name, value in given.items())
    assert found == pytest.approx(parameters, rel=0.01)
    nearest = math.inf
    for heads in range(1, 33):
        for neurons in [*range(256, 11008, 256), 11008]:
            shape = {"HIDDEN_SIZE": 128 * heads, "INTERMEDIATE_SIZE": neurons, "NUM_ATTENTION_HEADS": heads} | given
            if heads % 2 == 0 and shape["HIDDEN_SIZE"] == 128 * heads:
                _, count = targets_of_olmo_3_7b(TARGET_PARAMS="3.6B", **shape)
                nearest = min(nearest, abs(count / 3.6e9 - 1))
    assert abs(found / 3.6e9 - 1) <= max(nearest, 0.02) + 1e-9


def test_the_whole_teacher_is_a_target_too():
    assert targets_of_olmo_3_7b(TARGET_PARAMS="7.3B")[0] == prune.Sizes(4096, 11008, 32, 32, 32)
    with pytest.raises(PareError, match=r"TARGET_PARAMS = '8B'.*to 7.30B"):
        targets_of_olmo_3_7b(TARGET_PARAMS="8B")


def test_the_printed_sizes_can_be_pasted(checkpoints, scores, tmp_path, capsys, monkeypatch):
    """Behind `uv run prune.py`, whose own TARGET_PARAMS is another number."""
    first = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "first", TARGET_PARAMS="0.12M", REFIT=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("HIDDEN_SIZE"))
    configure(prune, OUTPUT_DIR=str(tmp_path / "second"), **dict.fromkeys(prune.SIZE_NAMES) | {"TARGET_PARAMS": "0.2M"})
    common.override_constants(prune, line.split())
    second = prune.main()
    assert "the nearest to TARGET_PARAMS = '0.2M'" in capsys.readouterr().out
    assert load(first).num_parameters() < 0.7 * load(checkpoints["olmo3"]).num_parameters()
    for name, tensor in load(first).state_dict().items():
        assert torch.equal(tensor, load(second).state_dict()[name])


def test_heads_that_cannot_follow_a_hidden_size_set_by_hand_stay():
    """Llama 3 8B: 2304 / 128 = 18 heads serve no whole number of its 8 key-value heads, nor of fewer."""
    teacher = prune.Sizes(4096, 14336, 32, 8, 32)
    count = lambda sizes: 1000 * sizes.hidden_size + sizes.intermediate_size * sizes.hidden_size  # noqa: E731
    targets = dict.fromkeys(prune.SIZE_NAMES) | {"LAYERS_TO_DROP": None, "HIDDEN_SIZE": 2304, "TARGET_PARAMS": "20M"}
    found = prune.derive_targets(teacher, targets, count, 128)
    assert [found[name] for name in prune.SIZE_NAMES[:4]] == [2304, 7680, 32, 8]


@pytest.mark.parametrize(("factor", "value", "blamed"), [(2.0, 6e4, "outgrows F16"), (1.0, math.inf, "not finite")])
def test_what_outgrows_float16_is_not_blamed_on_the_download(factor, value, blamed, tmp_path):
    save_file({"x": torch.full((4, 2), value, dtype=torch.float16)}, tmp_path / "a.safetensors")
    source = common.Source(tmp_path, common.read_header(tmp_path / "a.safetensors"))
    tensor = prune.Planned("x", "x", "F16", (4, 2), None, torch.arange(4)[:, None], None, factor=factor)
    with pytest.raises(PareError, match=blamed):
        prune.cut_piece(tensor, tensor.rows, source, None)
    source.close()


@pytest.mark.parametrize("divisible", [True, False])
def test_a_hidden_size_chosen_for_llama_is_a_multiple_of_its_heads(divisible):
    teacher = prune.Sizes(80, 256, 5, 5, 2)  # heads of 32
    count = lambda sizes: 1000 * sizes.hidden_size + sizes.intermediate_size * sizes.hidden_size  # noqa: E731
    targets = dict.fromkeys(prune.SIZE_NAMES) | {"LAYERS_TO_DROP": None}
    chosen = [
        prune.derive_targets(teacher, targets | {"TARGET_PARAMS": f"{wanted}K"}, count, 32, divisible)["HIDDEN_SIZE"]
        for wanted in (44, 48, 50, 85, 95)
    ]
    assert all(hidden % 5 == 0 for hidden in chosen) == divisible


@pytest.mark.parametrize("name", ["HIDDEN_SIZE", "INTERMEDIATE_SIZE", "NUM_ATTENTION_HEADS", "NUM_KEY_VALUE_HEADS"])
def test_a_size_of_zero_is_not_a_size_left_open(name):
    with pytest.raises(PareError, match=f"{name} = 0"):
        targets_of_olmo_3_7b(TARGET_PARAMS="3.6B", **{name: 0})


@pytest.mark.parametrize("value", ["9B", "1K", "much", "-3B", "0", ""])
def test_target_params_out_of_reach_or_no_number_is_refused_by_name(value):
    with pytest.raises(PareError, match="TARGET_PARAMS"):
        targets_of_olmo_3_7b(TARGET_PARAMS=value)


@pytest.mark.parametrize(("text", "count"), [("3.6B", 3.6e9), ("900M", 9e8), ("12K", 12e3), ("3600000000", 3.6e9)])
def test_target_params_is_read_with_its_unit(text, count):
    assert prune.parse_params(text) == pytest.approx(count)


def write_hollow_checkpoint(folder, raw: dict) -> None:
    """config.json and a safetensors file of the true shapes whose data is a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def test_olmo_3_7b_gives_the_default_target_before_any_tensor_is_read(tmp_path, monkeypatch, capsys):
    write_hollow_checkpoint(tmp_path / "model", OLMO_3_7B)
    checkpoint = common.find_checkpoint(str(tmp_path / "model"), None, "MODEL")
    meta = {
        "model": str(tmp_path / "model"),
        "config_hash": common.hash_config(checkpoint),
        "weights_hash": common.hash_checkpoint(checkpoint, "MODEL"),
        "dataset": {},
    }
    generator = torch.Generator().manual_seed(0)
    scores = {
        "mlp": torch.rand(32, 11008, generator=generator),
        "attention": torch.rand(32, 32, generator=generator),
        "attn_ln": torch.rand(4096, generator=generator),
        "ffn_ln": torch.rand(4096, generator=generator),
        "hidden": torch.rand(4096, generator=generator),
        "angular_distance": torch.rand(33, 33, generator=generator),
        "layer": {layer: layer / 32 for layer in range(32)},
        "norms": {"model.norm": torch.ones(1, 4096)}
        | {
            name: torch.ones(32, 4096)
            for name in (
                "post_attention_layernorm",
                "post_feedforward_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
            )
        },
        "meta": meta,
    }
    common.save_scores(scores, tmp_path / "scores.pt")

    planned = []

    def stop(folder, tensors, *more):
        planned.extend(tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "write_weights", stop)
    prune.MODEL, prune.SCORES_PATH = str(tmp_path / "model"), str(tmp_path / "scores.pt")
    prune.OUTPUT_DIR, prune.DEVICE = str(tmp_path / "out"), "cpu"
    with pytest.raises(KeyboardInterrupt):  # every other constant is the default
        prune.main()
    printed = capsys.readouterr().out
    assert "7.30B" in printed
    assert "3.64B" in printed

    config = transformers.Olmo3Config(**OLMO_3_7B | {"hidden_size": 3072, "head_dim": 128, "intermediate_size": 6144})
    config.num_attention_heads = config.num_key_value_heads = 24
    with torch.device("meta"):
        student = transformers.AutoModelForCausalLM.from_config(config)
    assert round(student.num_parameters() / 1e9, 2) == 3.64
    assert {tensor.name: tensor.shape for tensor in planned} == {
        name: tuple(tensor.shape) for name, tensor in student.state_dict().items()
    }


def test_family_table_covers_every_tensor_that_transformers_builds():
    for family, build in CONFIGS.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(build(vocab_size=300))
        for name, tensor in model.state_dict().items():
            axes, _ = prune.axes_of(common.FAMILIES[family], name)
            assert len(axes) == tensor.ndim
