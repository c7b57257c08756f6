"""The losses and their gradients against float64 autograd, their memory, and what bfloat16 costs."""

import pytest
import torch
from conftest import needs_gpu
from test_preflight import Live
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import losses

N, V, H, H_T = 23, 131, 12, 20
CLOSE = (1.0, 0.1, 0.01)  # noise on the teacher's head that makes the student's


def naive_loss(kind, hidden, weight, teacher_hidden, teacher_weight, labels, temperature=1.0, beta=0.5, denominator=1):
    """Full logits under autograd, in the dtype of the arguments."""
    p_log = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    q_log = torch.log_softmax(teacher_hidden @ teacher_weight.T / temperature, dim=-1)
    p, q = p_log.exp(), q_log.exp()
    mixture = (beta * q + (1 - beta) * p).log()
    kl = (q * (q_log - p_log)).sum()
    ce = -p_log.gather(1, labels[:, None]).sum()
    value = {
        "forward_kl": kl,
        "reverse_kl": (p * (p_log - q_log)).sum(),
        "jsd": beta * (q * (q_log - mixture)).sum() + (1 - beta) * (p * (p_log - mixture)).sum(),
        "cross_entropy": ce,
        "forward_kl_and_cross_entropy": kl + ce,
    }[kind]
    return temperature**2 / denominator * value


def relative_error(value, reference) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def loss_inputs(num_tokens=N, closeness=None, dtype=torch.float32):
    """Hidden states, heads and labels in float64, exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    teacher_hidden = torch.randn(num_tokens, H_T, generator=generator, dtype=torch.float64)
    teacher_weight = torch.randn(V, H_T, generator=generator, dtype=torch.float64)
    if closeness is None:
        hidden = torch.randn(num_tokens, H, generator=generator, dtype=torch.float64)
        weight = torch.randn(V, H, generator=generator, dtype=torch.float64) / 2  # logits of about 2
        teacher_weight /= 2
    else:
        hidden = teacher_hidden.clone()
        weight = teacher_weight + closeness * torch.randn(V, H_T, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (num_tokens,), generator=generator)
    return [t.to(dtype).double() for t in (hidden, weight, teacher_hidden, teacher_weight)], labels


def exact(kind, inputs, labels, **options):
    """Loss and gradients of hidden states and head, float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    loss = naive_loss(kind, *leaves, *inputs[2:], labels, **options)
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves]


def chunked(kind, inputs, labels, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    loss = losses.logit_loss(kind, *leaves, *inputs[2:], labels, **options)
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves]


def assert_exact(ours, reference) -> None:
    for gradient, exactly in zip(ours, reference, strict=True):
        assert relative_error(gradient, exactly) < 1e-5


def bytes_of(rows: int, kind: str) -> int:
    """The budget that gives chunks of this many rows."""
    chunk_bytes = 2 * rows * losses.LOSSES[kind].arrays * V * 4
    assert losses.chunk_rows(chunk_bytes // 2, V, torch.float32, losses.LOSSES[kind].arrays) == rows
    return chunk_bytes


KINDS = [(kind, 1.0, 0.5) for kind in losses.LOSSES]
KINDS += [("forward_kl", 2.5, 0.5), ("reverse_kl", 2.5, 0.5), ("jsd", 2.5, 0.1), ("jsd", 1.0, 0.9)]


@pytest.mark.parametrize(("kind", "temperature", "beta"), KINDS)
@pytest.mark.parametrize("rows", [1, 2, 7, 22, 23, 100])
def test_loss_and_gradients_equal_float64_for_any_chunks(rows, kind, temperature, beta):
    inputs, labels = loss_inputs()
    options = {"temperature": temperature, "beta": beta, "denominator": 57}
    value, gradients = exact(kind, inputs, labels, **options)
    chunk_bytes = bytes_of(rows, kind)
    loss, ours = chunked(kind, [tensor.float() for tensor in inputs], labels, chunk_bytes=chunk_bytes, **options)
    assert loss == pytest.approx(value, rel=1e-5)
    assert_exact(ours, gradients)


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_the_incoming_gradient_counts(kind):
    inputs, labels = loss_inputs()
    _, gradients = exact(kind, inputs, labels)
    leaves = [tensor.float().requires_grad_() for tensor in inputs[:2]]
    teacher = [tensor.float() for tensor in inputs[2:]]
    (3 * losses.logit_loss(kind, *leaves, *teacher, labels, denominator=1)).backward()
    for leaf, reference in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad, 3 * reference) < 1e-5


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("num_counted", [1, 2, 9])
def test_tokens_left_out_have_no_part_in_loss_or_gradient(num_counted, kind):
    inputs, labels = loss_inputs()
    counted = torch.randperm(N, generator=torch.Generator().manual_seed(2))[:num_counted]

    def gradients(loss, dtype):
        hidden, weight, teacher_hidden, teacher_weight = (tensor.to(dtype) for tensor in inputs)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        loss(kind, hidden[counted], weight, teacher_hidden[counted], teacher_weight, labels[counted]).backward()
        return [leaf.grad for leaf in leaves]

    options = {"denominator": 1, "chunk_bytes": 4000}
    ours = gradients(lambda *arguments: losses.logit_loss(*arguments, **options), torch.float32)
    left_out = torch.ones(N, dtype=torch.bool)
    left_out[counted] = False
    assert ours[0][left_out].abs().max() == 0
    assert_exact(ours, gradients(naive_loss, torch.float64))


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_a_tied_head_gets_both_gradients(kind):
    """As embedding and as head."""
    inputs, labels = loss_inputs()
    ids = torch.arange(N)

    def gradient(loss, dtype):
        tied, *teacher = (tensor.to(dtype) for tensor in inputs[1:])
        loss(kind, tied.requires_grad_()[ids], tied, *teacher, labels).backward()
        return [tied.grad]

    options = {"denominator": 1, "chunk_bytes": 9000}
    ours = gradient(lambda *arguments: losses.logit_loss(*arguments, **options), torch.float32)
    assert_exact(ours, gradient(naive_loss, torch.float64))


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_a_frozen_head_gets_no_gradient_and_costs_no_product(kind, monkeypatch):
    inputs, labels = loss_inputs()
    _, (of_hidden, _) = exact(kind, inputs, labels)
    hidden, *others = (tensor.float() for tensor in inputs)
    monkeypatch.setattr(losses, "add_product", None)
    losses.logit_loss(kind, hidden.requires_grad_(), *others, labels, denominator=1).backward()
    assert others[0].grad is None
    assert relative_error(hidden.grad, of_hidden) < 1e-5


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_no_counted_token_gives_zero(kind):
    inputs, labels = loss_inputs(num_tokens=0)
    loss, gradients = chunked(kind, [tensor.float() for tensor in inputs], labels, denominator=1)
    assert loss == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("closeness", CLOSE)
def test_float32_gradients_close_to_the_teacher(closeness, kind):
    """Where p - q is a small difference of large numbers: no worse than full float32 logits, and never negative."""
    inputs, labels = loss_inputs(closeness=closeness)
    _, gradients = exact(kind, inputs, labels)
    naive = [tensor.float().requires_grad_() for tensor in inputs[:2]]
    naive_loss(kind, *naive, *(tensor.float() for tensor in inputs[2:]), labels).backward()
    loss, ours = chunked(kind, [tensor.float() for tensor in inputs], labels, denominator=1, chunk_bytes=20_000)
    assert loss >= 0
    for gradient, theirs, reference in zip(ours, naive, gradients, strict=True):
        error = relative_error(gradient, reference)
        assert error < 1e-4
        assert error < 1.2 * relative_error(theirs.grad, reference) + 1e-6


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("closeness", CLOSE)
def test_bfloat16_gradients_close_to_the_teacher(closeness, kind):
    """At most 1 % off, and never further than the naive computation, whose logits are rounded to bfloat16."""
    inputs, labels = loss_inputs(closeness=closeness, dtype=torch.bfloat16)
    _, gradients = exact(kind, inputs, labels)
    low = [tensor.bfloat16() for tensor in inputs]
    naive = [tensor.clone().requires_grad_() for tensor in low[:2]]
    naive_loss(kind, *naive, *low[2:], labels).backward()
    leaves = [low[0].clone().requires_grad_(), low[1].float().requires_grad_()]
    losses.logit_loss(kind, *leaves, *low[2:], labels, denominator=1, chunk_bytes=20_000).backward()
    for leaf, theirs, reference in zip(leaves, naive, gradients, strict=True):
        error = relative_error(leaf.grad, reference)
        assert error < 0.01
        assert error <= relative_error(theirs.grad, reference)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_entries_that_the_teacher_rules_out_leave_the_loss_finite(kind):
    """A logit of -inf: probability 0 times logarithm -inf is 0."""
    inputs, labels = loss_inputs()
    ruled_out = inputs[3].clone()
    ruled_out[7] = 0
    hidden = torch.cat([inputs[2], torch.ones(N, 1, dtype=torch.float64)], dim=1).float()
    head = torch.cat([ruled_out, torch.zeros(V, 1, dtype=torch.float64)], dim=1).float()
    head[7, -1] = -torch.inf
    loss, gradients = chunked(kind, [*(t.float() for t in inputs[:2]), hidden, head], labels, denominator=1)
    head[7, -1] = -200.0  # as good as
    close, close_gradients = chunked(kind, [*(t.float() for t in inputs[:2]), hidden, head], labels, denominator=1)
    assert loss == pytest.approx(close, rel=1e-6)
    for gradient, reference in zip(gradients, close_gradients, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_jsd_between_disjoint_distributions_does_not_overflow():
    """Logarithms hundreds apart, both ways: JSD is the entropy of the coin that mixes them (log 2 for an even one)."""
    z = torch.zeros(1, 4)
    z[0, 0] = 500
    other = z.flip(1)
    loss, gradient = losses.jsd(z.log_softmax(-1), other.log_softmax(-1), None, 0.5)
    assert loss.item() == pytest.approx(0.6931472, rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_a_chunk_compiles_to_one_graph(kind):
    """Also where rows of the gradient are padded: in two, the gradient would be written and read once more."""
    torch._dynamo.reset()
    counters.clear()
    inputs, labels = loss_inputs()
    options = {"denominator": 9, "chunk_bytes": 30_000, "compile": True}
    with pytest.MonkeyPatch.context() as patch:
        compiled = torch.compile(losses.chunk_gradient, dynamic=True, backend="eager")
        patch.setattr(losses, "compiled_chunk_gradient", lambda: compiled)
        chunked(kind, [tensor.float() for tensor in inputs], labels, **options)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_compiled_equals_eager():
    inputs, labels = loss_inputs()
    inputs = [tensor.float() for tensor in inputs]
    for kind in ("forward_kl", "jsd"):
        eager, fused = (
            chunked(kind, inputs, labels, denominator=9, chunk_bytes=30_000, compile=compile)
            for compile in (False, True)
        )
        assert fused[0] == pytest.approx(eager[0], rel=1e-6)
        for a, b in zip(fused[1], eager[1], strict=True):
            assert relative_error(a, b.double()) < 1e-5


def test_the_head_gradient_is_rewritten_once_per_large_chunk(monkeypatch):
    """Two levels: in bfloat16 the gradients of several small chunks go into one product."""
    inputs, labels = loss_inputs(num_tokens=64)
    rows = []
    original = losses.add_product
    monkeypatch.setattr(losses, "add_product", lambda total, a, b: (rows.append(len(a)), original(total, a, b)))
    low = [tensor.bfloat16() for tensor in inputs]
    chunked("forward_kl", low, labels, denominator=1, chunk_bytes=bytes_of(4, "forward_kl"))
    # Small chunks of 4 rows; three arrays of 4 bytes each against one of 2, whose rows are padded from 131 to 192.
    assert rows == [16, 16, 16, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", losses.LOSSES)
def test_the_chunk_budget_is_kept(kind, dtype, monkeypatch):
    """All that is alive at once, beside the gradients and the head in bfloat16; the logits of all would be far more."""
    monkeypatch.setattr(losses, "operand", lambda tensor, dtype: tensor)  # as on a GPU, which needs no float32 heads
    monkeypatch.setattr(losses, "project", lambda a, b, dtype, out: out.fill_(1))
    monkeypatch.setattr(losses, "add_product", lambda total, a, b: None)
    num_tokens, hidden_size, vocab_size, budget = 4096, 8, 1000, 2**20
    inputs = [torch.ones(n, hidden_size, dtype=dtype) for n in (num_tokens, vocab_size) * 2]
    inputs[1] = inputs[1].float()
    labels = torch.zeros(num_tokens, dtype=torch.long)
    leaves = [tensor.requires_grad_() for tensor in inputs[:2]]
    with Live() as live:
        live.add([*inputs, labels])
        outside = live.now
        losses.logit_loss(kind, *leaves, *inputs[2:], labels, denominator=1, chunk_bytes=budget)
    outside += num_tokens * hidden_size * dtype.itemsize + vocab_size * hidden_size * 4  # the gradients
    outside += vocab_size * hidden_size * dtype.itemsize * (dtype != torch.float32)  # the head
    assert 0.7 * budget < live.peak - outside < 1.02 * budget, (live.peak - outside) / budget
    assert num_tokens * vocab_size * 4 > 8 * budget


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.name():
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.count += len(a) * b.numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_four_matrix_products_and_none_twice(kind):
    """Logits of both, the gradient of the hidden states, that of the head: nothing is computed again for a gradient."""
    inputs, labels = loss_inputs(num_tokens=64)
    leaves = [tensor.float().requires_grad_() for tensor in inputs[:2]]
    teacher = [tensor.float() for tensor in inputs[2:]]
    with Products() as products:
        options = {"denominator": 1, "chunk_bytes": bytes_of(8, kind)}
        losses.logit_loss(kind, *leaves, *teacher, labels, **options).backward()
    assert products.count == 64 * V * (3 * H + H_T * losses.LOSSES[kind].has_teacher)


@needs_gpu
@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("closeness", CLOSE)
def test_bfloat16_gradients_on_gpu(closeness, kind):
    """Logits straight to float32: at most 1 % gradient error with the student close to the teacher."""
    inputs, labels = loss_inputs(closeness=closeness, dtype=torch.bfloat16)
    _, gradients = exact(kind, inputs, labels)
    low = [tensor.bfloat16().cuda() for tensor in inputs]
    leaves = [low[0].clone().requires_grad_(), low[1].float().requires_grad_()]
    losses.logit_loss(kind, *leaves, *low[2:], labels.cuda(), denominator=1, chunk_bytes=20_000).backward()
    for leaf, reference in zip(leaves, gradients, strict=True):
        assert relative_error(leaf.grad.cpu(), reference) < 0.01
