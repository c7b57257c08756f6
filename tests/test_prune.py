"""Slicing against the operations it must equal, the written checkpoint, and the real 7B's sizes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS, analyse, cut, load, logits_of, save_checkpoint, some_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import prune

FAMILIES = ["olmo3", "olmo2", "llama"]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # float32 rounding through eight layers


@pytest.fixture(scope="module")
def scores(checkpoints, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return {family: analyse(checkpoints[family], text, folder / f"{family}.pt") for family in FAMILIES}


def kept(folder) -> dict:
    return json.loads((folder / "pare.json").read_text())["kept"]


@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_neurons_equals_zeroing_them(family, checkpoints, scores, tmp_path):
    folder = cut(checkpoints[family], scores[family], tmp_path / "out", INTERMEDIATE_SIZE=40)
    teacher = load(checkpoints[family])
    for layer, neurons in zip(teacher.model.layers, kept(folder)["neurons"], strict=True):
        mask = torch.zeros(64)
        mask[neurons] = 1
        layer.mlp.down_proj.weight.data *= mask
    ids = some_ids(teacher.config.vocab_size)
    torch.testing.assert_close(logits_of(load(folder), ids), logits_of(teacher, ids), **CLOSE)


def test_slicing_heads_equals_zeroing_them(checkpoints, scores, tmp_path):
    """In Llama, whose heads no norm ties together: 4 of 6 query heads, two in each of the two groups."""
    folder = cut(checkpoints["llama"], scores["llama"], tmp_path / "out", NUM_ATTENTION_HEADS=4)
    teacher = load(checkpoints["llama"])
    for layer, heads in zip(teacher.model.layers, kept(folder)["query_heads"], strict=True):
        mask = torch.zeros(6, 8)
        mask[heads] = 1
        layer.self_attn.o_proj.weight.data *= mask.flatten()
    ids = some_ids(teacher.config.vocab_size)
    torch.testing.assert_close(logits_of(load(folder), ids), logits_of(teacher, ids), **CLOSE)


def test_slicing_whole_groups_equals_zeroing_them(checkpoints, scores, tmp_path):
    sizes = {"NUM_ATTENTION_HEADS": 3, "NUM_KEY_VALUE_HEADS": 1}
    folder = cut(checkpoints["llama"], scores["llama"], tmp_path / "out", **sizes)
    teacher = load(checkpoints["llama"])
    for layer, groups in zip(teacher.model.layers, kept(folder)["key_value_heads"], strict=True):
        mask = torch.zeros(2, 24)
        mask[groups] = 1
        layer.self_attn.o_proj.weight.data *= mask.flatten()
    ids = some_ids(teacher.config.vocab_size)
    torch.testing.assert_close(logits_of(load(folder), ids), logits_of(teacher, ids), **CLOSE)


class Identity(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_layers_equals_replacing_them_by_the_identity(family, checkpoints, scores, tmp_path):
    folder = cut(checkpoints[family], scores[family], tmp_path / "out", LAYERS_TO_DROP=[1, 2])
    teacher = load(checkpoints[family])
    types = common.layer_types_of(teacher.config)
    for layer in (1, 2):
        teacher.model.layers[layer] = Identity()
    student = load(folder)
    assert common.layer_types_of(student.config) == [types[0], *types[3:]]
    ids = some_ids(teacher.config.vocab_size)
    torch.testing.assert_close(logits_of(student, ids), logits_of(teacher, ids), **CLOSE)


def write_permuted(checkpoint, folder, keep) -> None:
    """A student of the teacher's own sizes with its channels in another order."""
    infos = common.tensor_infos(checkpoint, "MODEL")
    folder.mkdir()
    prune.write_weights(folder, prune.plan_tensors(infos, keep, checkpoint), checkpoint.folder)
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
        key_value_heads=key_value,
    )
    write_permuted(checkpoint, tmp_path / "out", keep)
    teacher, student = load(checkpoints[family]), load(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(teacher.state_dict()[name], student.state_dict()[name]) == (axis == "heads")
    ids = some_ids(checkpoint.config.vocab_size)
    torch.testing.assert_close(logits_of(student, ids), logits_of(teacher, ids), **CLOSE)


AXES = {
    "hidden": {"HIDDEN_SIZE": 36},
    "neurons": {"INTERMEDIATE_SIZE": 40},
    "heads": {"NUM_ATTENTION_HEADS": 4},
    "layers": {"NUM_HIDDEN_LAYERS": 3},
    "all": {"HIDDEN_SIZE": 36, "INTERMEDIATE_SIZE": 40, "NUM_ATTENTION_HEADS": 4, "NUM_HIDDEN_LAYERS": 3},
    "nothing": {},
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_loads_strictly_and_generates(family, axis, checkpoints, scores, tmp_path):
    targets = AXES[axis]
    folder = cut(checkpoints[family], scores[family], tmp_path / "out", PROTECT_FULL_ATTENTION=False, **targets)
    student = load(folder)  # strict
    for name, value in targets.items():
        assert getattr(student.config, name.lower()) == value
    raw = json.loads((folder / "config.json").read_text())
    assert raw["head_dim"] == 8
    assert raw["rope_theta"] == 10000.0
    assert len(raw.get("layer_types") or [0] * raw["num_hidden_layers"]) == raw["num_hidden_layers"]
    if family == "olmo3":
        assert raw["rope_scaling"]["rope_type"] == "yarn"
        assert raw["rope_parameters"]["sliding_attention"]["rope_type"] == "default"
    ids = some_ids(student.config.vocab_size, (1, 20))
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with_cache, without = (student.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)
    if axis == "nothing":
        assert torch.equal(logits_of(student, ids), logits_of(load(checkpoints[family]), ids))


def test_the_highest_scores_stay(checkpoints, scores, tmp_path):
    """Each axis against a choice made here by hand from the score file."""
    folder = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", PROTECT_FULL_ATTENTION=False, **AXES["all"])
    values, record = torch.load(scores["olmo3"], weights_only=True), kept(folder)
    ranked = sorted(range(8), key=lambda layer: values["layer"][layer])
    assert record["layers"] == sorted(ranked[5:])
    hidden = (values["attn_ln"] + values["ffn_ln"]).tolist()
    assert record["hidden"] == sorted(sorted(range(48), key=lambda c: -hidden[c])[:36])
    for place, layer in enumerate(record["layers"]):
        neurons, heads = values["mlp"][layer].tolist(), values["attention"][layer].tolist()
        assert record["neurons"][place] == sorted(sorted(range(64), key=lambda c: -neurons[c])[:40])
        assert record["query_heads"][place] == sorted(sorted(range(6), key=lambda c: -heads[c])[:4])
        assert record["key_value_heads"][place] == record["query_heads"][place]


def test_heads_of_a_group_and_whole_groups_are_chosen_by_score():
    teacher = prune.Sizes(48, 64, 6, 2, 4)
    scores = torch.tensor(
        [4.0, 1.0, 1.0, 3.0, 3.0, 2.5]
    )  # squares per group: 18 and 24.25; the best head is in the first
    query, key_value = prune.choose_heads(scores, teacher, prune.Sizes(48, 64, 3, 1, 4))
    assert (query.tolist(), key_value.tolist()) == ([3, 4, 5], [1])
    query, key_value = prune.choose_heads(scores, teacher, prune.Sizes(48, 64, 4, 2, 4))
    assert (query.tolist(), key_value.tolist()) == ([0, 1, 3, 4], [0, 1])
    query, _ = prune.choose_heads(torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0, 9.5]), teacher, prune.Sizes(48, 64, 4, 2, 4))
    assert query.tolist() == [1, 2, 3, 5]


def test_shapes_that_other_runtimes_refuse_are_named(checkpoints, scores, tmp_path, capsys):
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "a", HIDDEN_SIZE=32)
    assert "NUM_ATTENTION_HEADS = 4 would fit" in capsys.readouterr().out
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "b", LAYERS_TO_DROP=[1])
    assert "every fourth layer" in capsys.readouterr().out
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "c", HIDDEN_SIZE=32, NUM_ATTENTION_HEADS=4)
    assert "note:" not in capsys.readouterr().out


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


def test_the_teacher_is_never_built(checkpoints, scores, tmp_path, monkeypatch):
    """Only the result is loaded."""
    loaded = []
    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda folder, **more: (loaded.append(str(folder)), original(folder, **more))[1],
    )
    cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", **AXES["all"] | {"NUM_HIDDEN_LAYERS": 6})
    assert loaded == [str(tmp_path / ".out.tmp")]


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
    expected = load_file(one / "model.safetensors")
    assert merged.keys() == expected.keys() == index.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_tied_embeddings_stay_tied(text, tmp_path):
    source = save_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=True)
    scores = analyse(source, text, tmp_path / "scores.pt")
    folder = cut(source, scores, tmp_path / "out", HIDDEN_SIZE=36)
    student = load(folder)
    assert torch.equal(student.lm_head.weight, load(source).lm_head.weight[:, kept(folder)["hidden"]])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()


def test_a_failed_run_leaves_the_old_result(checkpoints, scores, tmp_path, monkeypatch):
    output = cut(checkpoints["olmo3"], scores["olmo3"], tmp_path / "out", HIDDEN_SIZE=36)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "try_checkpoint", fail)
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
# allenai/Olmo-3-7B-Instruct's sizes

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
        "layer": {layer: layer / 32 for layer in range(32)},
        "meta": meta,
    }
    torch.save(scores, tmp_path / "scores.pt")

    planned = []

    def stop(folder, tensors, source):
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
