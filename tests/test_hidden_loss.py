"""HIDDEN_LOSS: the loss on states within the models against float64, what a pruned student is compared with; runs."""

import copy
import json
import shutil

import pytest
import torch
from conftest import (
    CONFIGS,
    KEEP_ALL,
    analyse,
    checkpoint_layers,
    cut,
    documented_metrics,
    load,
    one_document_rows,
    random_model,
    save_checkpoint,
    some_ids,
)
from safetensors.torch import load_file
from test_distill import Rows, distilled, lines_of, relative_error, run_constants

import common
import data
import distill
import losses
from common import PareError

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5}
KEPT = torch.arange(47, 15, -1)  # no order is assumed


def settings_for(pair, text, output, **more):
    defaults = {name: getattr(distill, name) for name in common.constants_of(distill)}
    return distill.derive_settings(defaults | run_constants(pair, text, output, **more))


class Optimizer:
    """Looks at the gradients instead of stepping."""

    param_groups = ()

    def __init__(self, student):
        self.student, self.seen = student, {}

    def step(self):
        self.seen = {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none):
        self.student.zero_grad()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return save_checkpoint(root / "teacher", "olmo3", 1), save_checkpoint(root / "student", "olmo3", 2, **SMALL)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([x @ y / (x @ x).sqrt() / (y @ y).sqrt() for x, y in zip(a, b, strict=True)])


def expected_losses(student, teacher, rows, compare) -> tuple[torch.Tensor, torch.Tensor]:
    """L_logits and L_hidden of all rows by transformers' own outputs; `compare` is given states (N, H) of both."""
    input_ids, position_ids, mask = rows[:].values()
    mask = mask.bool()
    options = {"position_ids": position_ids, "use_cache": False, "output_hidden_states": True}
    ours, theirs = student(input_ids, **options), teacher(input_ids, **options)
    p_log, q_log = (output.logits[mask].log_softmax(-1) for output in (ours, theirs))
    kl = (q_log.exp() * (q_log - p_log)).sum() / mask.sum()
    places = [(0, 0), (student.config.num_hidden_layers - 2, teacher.config.num_hidden_layers - 2)]
    pairs = [(ours.hidden_states[i][mask], theirs.hidden_states[j][mask]) for i, j in places]  # [i]: input of layer i
    return kl, torch.stack([1 - cosine(*compare(*pair)) for pair in pairs]).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "way"), [("olmo3", "channels"), ("llama", "directions"), ("llama", "projection")])
def test_a_step_equals_float64_in_any_split(family, way, checkpointing, pair, text, tmp_path):
    """Loss, L_hidden, the next weight and every gradient; rows differ in how many of their tokens count."""
    teacher = random_model(CONFIGS[family](vocab_size=300), 1)
    student = random_model(CONFIGS[family](vocab_size=300, **SMALL), 2)
    directions = torch.linalg.qr(torch.randn(48, 32))[0].T.contiguous()
    kept = {"channels": KEPT, "directions": directions, "projection": None}[way]
    settings = settings_for(pair, text, tmp_path)
    if kept is None:
        losses.add_projection(student, 48, settings)
        torch.testing.assert_close(student.hidden_projection.weight.T @ student.hidden_projection.weight, torch.eye(32))
    if checkpointing:
        checkpoint_layers(student)
    student.train()
    rows, reference = Rows(4), copy.deepcopy(student).double().eval()
    assert len({int(row.sum()) for row in rows[:]["counted"]}) > 1
    compare = {
        "channels": lambda s, t: (s, t[:, KEPT]),
        "directions": lambda s, t: (s, t @ directions.double().T),
        "projection": lambda s, t: (s @ reference.hidden_projection.weight.T, t),
    }[way]
    kl, distance = expected_losses(reference, copy.deepcopy(teacher).double(), rows, compare)
    (kl + 0.7 * distance).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for micro_batch_size in (1, 2, 4):
        settings = settings_for(pair, text, tmp_path, TOKENS_PER_STEP=128, MICRO_BATCH_SIZE=micro_batch_size)
        settings.hidden, optimizer = losses.HiddenLoss(kept, weight=0.7), Optimizer(student)
        loss, gradient_norm, _ = distill.train_step(
            student, teacher, distill.step_batches(rows, 0, settings), optimizer, 0, settings
        )
        assert loss == pytest.approx(kl.item(), rel=1e-5)
        assert gradient_norm == pytest.approx(norm, rel=1e-4)
        assert settings.hidden.figures == {
            "hidden_loss": pytest.approx(distance.item(), rel=1e-5),
            "hidden_weight": 0.7,
        }
        assert settings.hidden.weight == pytest.approx((kl / distance).item(), rel=1e-5)
        assert optimizer.seen.keys() == gradients.keys()
        for name, gradient in optimizer.seen.items():
            assert relative_error(gradient, gradients[name] * min(1.0, 1.0 / (gradient_norm + 1e-6))) < 1e-4, name


def test_a_bad_step_leaves_the_weight_alone():
    hidden = losses.HiddenLoss(None, weight=0.7)
    hidden.finish_step(float("nan"), 0.5, finite=False)
    assert hidden.weight == 0.7
    hidden.finish_step(0.25, 0.0, finite=True)  # nothing to compare
    assert hidden.weight == 0.0


def test_a_state_of_zeros_is_at_distance_1_and_has_no_gradient():
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0]], requires_grad=True)
    distance = losses.cosine_distance(states, torch.tensor([[1.0, 2.0], [0.0, 0.0], [-30.0, -40.0]]))
    torch.testing.assert_close(distance, torch.tensor([1.0, 1.0, 2.0]))
    distance.sum().backward()
    torch.testing.assert_close(states.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_off_a_step_has_the_bits_of_the_logits_loss_alone(checkpointing, pair, text, tmp_path):
    teacher, student = load(pair[0]), load(pair[1])
    if checkpointing:
        checkpoint_layers(student)
    student.train()
    rows, settings = Rows(4), settings_for(pair, text, tmp_path)
    indices = data.row_indices(0, 4, 4, settings.seed)
    batches = [data.fetch(rows, indices[start : start + 2], settings.device) for start in (0, 2)]
    for batch in batches:
        losses.logit_loss(
            "forward_kl",
            distill.student_states(student, batch, settings),
            student.lm_head.weight,
            distill.teacher_states(teacher, batch),
            teacher.lm_head.weight,
            denominator=sum(len(batch.counted) for batch in batches),
            chunk_bytes=settings.loss_chunk_bytes,
        ).backward()
    parameters = list(student.parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    optimizer = Optimizer(student)
    assert (
        distill.train_step(student, teacher, distill.step_batches(rows, 0, settings), optimizer, 0, settings)[1]
        == norm.item()
    )
    assert all(torch.equal(optimizer.seen[name], gradient) for name, gradient in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# What a pruned student is compared with


def checkpoint_of(folder) -> common.Checkpoint:
    return common.find_checkpoint(str(folder), None, "STUDENT")


def distances(teacher_folder, student_folder) -> list[float]:
    """Mean distance at the embedding's output and at layer (last - 2), with what prune.py recorded."""
    kept, layer = losses.what_was_kept(checkpoint_of(teacher_folder), checkpoint_of(student_folder))
    batch = one_document_rows(some_ids(300, (2, 20)), torch.arange(40).view(2, 20) < 38)
    states = []
    for folder, index in ((student_folder, losses.LAYER), (teacher_folder, layer)):
        model = load(folder)
        with torch.no_grad(), losses.compared_states(model, index) as seen:
            distill.hidden_states(model, batch, torch.float32)
        states.append(seen)
    student, hidden = load(student_folder), losses.HiddenLoss(kept)
    return [hidden(student, [s], [t], batch, 38).item() for s, t in zip(*states, strict=True)]


def zero_some_channels(model) -> None:
    """Every third channel is zero in all that writes to the residual stream."""
    gone = torch.arange(48) % 3 == 1
    model.model.embed_tokens.weight[:, gone] = 0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[gone] = 0
            if linear.bias is not None:
                linear.bias[gone] = 0


def into_a_plane(model) -> None:
    """The residual stream stays in 36 directions, none of which is a channel."""
    plane = torch.linalg.qr(torch.randn(48, 36, generator=torch.Generator().manual_seed(3)))[0]
    onto = plane @ plane.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(onto @ linear.weight)


def test_channels_that_are_kept_are_compared_directly(text, tmp_path):
    teacher = save_checkpoint(tmp_path / "teacher", "llama", edit=zero_some_channels, rms_norm_eps=1e-12)
    scores = analyse(teacher, text, tmp_path / "scores.pt")
    student = cut(teacher, scores, tmp_path / "student", HIDDEN_SIZE=30)  # two of the others go as well
    record = json.loads((student / "pare.json").read_text())
    kept, _ = losses.what_was_kept(checkpoint_of(teacher), checkpoint_of(student))
    assert kept.tolist() == record["kept"]["hidden"]
    assert {i % 3 for i in kept.tolist()} == {0, 2}
    assert distances(teacher, student)[0] < 1e-6
    student = cut(teacher, scores, tmp_path / "student", HIDDEN_SIZE=36, REFIT=False)
    assert max(distances(teacher, student)) < 1e-5


def test_directions_that_are_kept_are_compared_directly(text, tmp_path):
    teacher = save_checkpoint(tmp_path / "teacher", "mistral", edit=into_a_plane, rms_norm_eps=1e-12)
    more = {"SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 12}
    scores = analyse(teacher, text, tmp_path / "scores.pt", **more)
    student = cut(teacher, scores, tmp_path / "student", HIDDEN_SIZE=36, REFIT_SAMPLES=0)
    kept, _ = losses.what_was_kept(checkpoint_of(teacher), checkpoint_of(student))
    assert kept.shape == (36, 48)
    assert max(distances(teacher, student)) < 1e-4
    student = cut(teacher, scores, tmp_path / "student", HIDDEN_SIZE=24, NUM_HIDDEN_LAYERS=4, REFIT_SAMPLES=4)
    assert distances(teacher, student)[0] < 1e-6


@pytest.mark.parametrize(("dropped", "layer"), [([3, 4], 5), ([5, 6], 3), ([4, 5, 6, 7], 1)])
def test_layers_that_are_kept_are_compared_directly(dropped, layer, text, tmp_path):
    """Up to the first gap the student is its teacher: the states before its layer (last - 1) are the teacher's before
    the same layer."""
    teacher = save_checkpoint(tmp_path / "teacher", "olmo3")
    scores = analyse(teacher, text, tmp_path / "scores.pt")
    more = {"LAYERS_TO_DROP": dropped, "PROTECT_FULL_ATTENTION": False, "REFIT": False}
    student = cut(teacher, scores, tmp_path / "student", **KEEP_ALL | more)
    assert losses.what_was_kept(checkpoint_of(teacher), checkpoint_of(student))[1] == layer
    found = distances(teacher, student)
    assert found[0] < 1e-6
    assert (found[1] < 1e-6) == (dropped != [3, 4])


@pytest.fixture(scope="module")
def rotated(text, tmp_path_factory):
    """A teacher, and a student that keeps directions of it."""
    root = tmp_path_factory.mktemp("rotated")
    teacher = save_checkpoint(root / "teacher", "olmo3")
    more = {"SECOND_MOMENTS": True, "SECOND_MOMENT_SAMPLES": 12}
    scores = analyse(teacher, text, root / "scores.pt", **more)
    return teacher, cut(
        teacher, scores, root / "student", **KEEP_ALL | {"HIDDEN_SIZE": 30, "LAYERS_TO_DROP": [3, 4], "REFIT": None}
    )


def test_only_prunes_own_record_of_a_teacher_of_this_width_counts(rotated, pair, tmp_path):
    assert losses.what_was_kept(checkpoint_of(rotated[0]), checkpoint_of(rotated[1]))[0].shape == (30, 48)
    narrow = save_checkpoint(tmp_path / "narrow", "olmo3", **SMALL)
    assert losses.what_was_kept(checkpoint_of(narrow), checkpoint_of(rotated[1])) == (None, losses.LAYER)
    assert losses.what_was_kept(checkpoint_of(pair[0]), checkpoint_of(pair[1])) == (None, losses.LAYER)
    student = shutil.copytree(pair[1], tmp_path / "student")
    (student / "pare.json").write_text('{"script": "distill.py"}')
    assert losses.what_was_kept(checkpoint_of(pair[0]), checkpoint_of(student)) == (None, losses.LAYER)


def damage_directions(folder, record):
    content = bytearray((folder / "pare" / "directions.safetensors").read_bytes())
    content[-2] ^= 1
    (folder / "pare" / "directions.safetensors").write_bytes(content)


def with_hidden(hidden):
    def edit(folder, record):
        kept = record["kept"] | {"hidden": hidden, "directions": None}
        (folder / "pare.json").write_text(json.dumps(record | {"kept": kept}))

    return edit


def with_layers(layers):
    def edit(folder, record):
        (folder / "pare.json").write_text(json.dumps(record | {"kept": record["kept"] | {"layers": layers}}))

    return edit


DAMAGE = {
    "not JSON": lambda folder, record: (folder / "pare.json").write_text('{"script": "prune'),
    "no record of what was kept": lambda folder, record: (folder / "pare.json").write_text('{"script": "prune.py"}'),
    "a bit of the directions": damage_directions,
    "no directions": lambda folder, record: (folder / "pare" / "directions.safetensors").unlink(),
    "too few channels": with_hidden([1, 2, 3]),
    "no number": with_hidden(["a"] * 30),
    "no channels": with_hidden(None),
    "one number": with_hidden(7),
    "nested": with_hidden([[i] for i in range(30)]),
    "negative": with_hidden([-1, *range(29)]),
    "too few layers": with_layers([0, 1, 2]),
    "layers that are none": with_layers(["0", 1, 2, 5, 6, 7]),
    "layers out of order": with_layers([0, 2, 1, 5, 6, 7]),
    "layers below the first": with_layers([-1, 1, 2, 5, 6, 7]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_is_refused(kind, rotated, text, tmp_path):
    student = shutil.copytree(rotated[1], tmp_path / "student")
    DAMAGE[kind](student, json.loads((student / "pare.json").read_text()))
    with pytest.raises(PareError, match=r"STUDENT = .*HIDDEN_LOSS = True"):
        distilled((rotated[0], student), text, tmp_path / "out", HIDDEN_LOSS=True)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("constant", ["TEACHER", "STUDENT"])
def test_fewer_than_four_layers_are_refused(constant, pair, text, tmp_path):
    shallow = save_checkpoint(tmp_path / "shallow", "olmo3", num_hidden_layers=3)
    both = (shallow, pair[1]) if constant == "TEACHER" else (pair[0], shallow)
    with pytest.raises(PareError, match=f"HIDDEN_LOSS = True needs 4 layers or more: {constant} = .* has 3 layers"):
        distilled(both, text, tmp_path / "out", HIDDEN_LOSS=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def resumed_from_step_3(finished, pair, text, output) -> None:
    shutil.copytree(finished, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    distilled(pair, text, output, HIDDEN_LOSS=True, TRAIN_TOKENS=6 * 128)


def bits(output) -> dict[str, bytes]:
    files = ["model/model.safetensors", *(f"checkpoints/step-00000006/{n}.safetensors" for n in ("model", "optimizer"))]
    return {file: (output / file).read_bytes() for file in files}


def check_figures(output) -> None:
    """The weight of a step is the ratio of the step before, and 0 in the first."""
    steps = [line for line in lines_of(output) if "loss" in line]
    assert len(steps) == 6
    assert steps[0].keys() <= documented_metrics()
    assert [step["hidden_weight"] for step in steps] == [0.0, *(s["loss"] / s["hidden_loss"] for s in steps[:-1])]


def test_a_learned_projection_trains_is_saved_and_is_not_exported(pair, text, tmp_path):
    folder = distilled(pair, text, tmp_path / "straight", HIDDEN_LOSS=True, TRAIN_TOKENS=6 * 128)
    check_figures(tmp_path / "straight")
    steps = [line for line in lines_of(tmp_path / "straight") if "loss" in line]
    assert steps[-1]["hidden_loss"] < 0.97 * steps[0]["hidden_loss"]
    weights, early = (
        load_file(tmp_path / "straight" / "checkpoints" / f"step-0000000{step}" / "model.safetensors")[
            "hidden_projection.weight"
        ]
        for step in (6, 3)
    )
    assert weights.shape == (48, 32)
    assert weights.dtype == torch.float32
    assert (weights - early).abs().max() > 1e-4
    assert load(folder).config.hidden_size == 32  # and no unexpected key
    resumed_from_step_3(tmp_path / "straight", pair, text, tmp_path / "resumed")
    assert bits(tmp_path / "resumed") == bits(tmp_path / "straight")
    check_figures(tmp_path / "resumed")


def test_a_pruned_student_trains_without_a_projection_and_resumes_to_the_same_bits(rotated, text, tmp_path):
    distilled(rotated, text, tmp_path / "straight", HIDDEN_LOSS=True, TRAIN_TOKENS=6 * 128)
    check_figures(tmp_path / "straight")
    checkpoint = load_file(tmp_path / "straight" / "checkpoints" / "step-00000006" / "model.safetensors")
    assert not any("projection" in name for name in checkpoint)
    resumed_from_step_3(tmp_path / "straight", rotated, text, tmp_path / "resumed")
    assert bits(tmp_path / "resumed") == bits(tmp_path / "straight")


def test_off_nothing_is_recorded(rotated, text, tmp_path):
    distilled(rotated, text, tmp_path / "out", TRAIN_TOKENS=128)
    assert not any("hidden" in key for line in lines_of(tmp_path / "out") for key in line)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teachers_width_kept_a_projection_starts_as_the_identity(dtype, pair, text, tmp_path):
    """The teacher as its own student has no distance; also for a loss that needs no teacher."""
    settings = settings_for(pair, text, tmp_path, DTYPE=dtype, LOSS="cross_entropy", GRADIENT_CHECKPOINTING=False)
    student = load(pair[0])
    teacher = load(pair[0]).to(settings.dtype)
    losses.add_projection(student, 48, settings)
    assert torch.equal(student.hidden_projection.weight, torch.eye(48))
    settings.hidden = losses.HiddenLoss(None, weight=0.5)
    batches = distill.step_batches(Rows(4), 0, settings)
    distill.train_step(student, teacher, batches, Optimizer(student), 0, settings)
    assert settings.hidden.figures["hidden_loss"] < (1e-6 if dtype == "float32" else 1e-3)
