"""The arithmetic of the benchmarks (their figures are in benchmarks/)."""

import math
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import distill

sys.path.insert(0, str(ROOT / "benchmarks"))

import recovery
import step_cost


def test_tokens_to_reach_a_kl_lie_between_the_evaluations():
    points = [(0, 3.0), (1, 2.0), (2, 1.0), (4, 1.5), (8, 0.5)]
    assert recovery.tokens_to_reach(points, 4.0) == (0.0, True)
    assert recovery.tokens_to_reach(points, 2.5) == (1, False)
    tokens, exact = recovery.tokens_to_reach(points, 1.5)
    assert tokens == pytest.approx(math.sqrt(2))
    assert exact
    assert recovery.tokens_to_reach(points, 1.0) == (2, True)
    assert recovery.tokens_to_reach(points, 0.4) == (math.inf, False)


def test_every_run_of_a_mode_has_steps_and_ends_at_a_point_of_the_tables():
    for name, mode in recovery.MODES.items():
        for row in mode.rows:
            evaluations = mode.budget * recovery.RUNS[row][3] / recovery.EVERY
            assert evaluations == pytest.approx(round(evaluations))
            assert evaluations >= 1, (name, row)


def test_attended_pairs_are_those_of_the_mask():
    rows = step_cost.RandomRows(4, 96, 50)
    batch = distill.fetch(rows, [0, 2, 3], torch.device("cpu"))
    documents = (batch.position_ids == 0).cumsum(1)
    distance = torch.arange(96)[:, None] - torch.arange(96)
    same = documents[:, :, None] == documents[:, None, :]
    assert documents.max() == step_cost.DOCUMENTS
    for window in (None, 7):
        seen = same & (distance >= 0) & (distance < (window or 96))
        assert step_cost.attended_pairs(batch.position_ids, window) == seen.sum().item()


def test_flop_are_those_that_torch_counts():
    """Without attention's products, which torch counts for whole rows."""
    layers = {"num_hidden_layers": 4, "layer_types": step_cost.SMALL["layer_types"][:4]}
    config = transformers.Olmo3Config(**step_cost.SMALL | step_cost.SMALL_STUDENT | layers)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    rows = step_cost.RandomRows(1, 64, 50)
    batch = distill.fetch(rows, [0], torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        distill.hidden_states(model, batch, torch.float32).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    linear = sum(flop for kernel, flop in counted.items() if "attention" not in str(kernel))
    pairs = sum(
        step_cost.attended_pairs(batch.position_ids, 256 if kind == "sliding_attention" else None)
        for kind in config.layer_types
    )
    ours = step_cost.forward_flop(config, model.base_model.layers, batch.position_ids) - 4 * 384 * pairs
    assert linear == 3 * ours


ROWS = [  # of the table, as the benchmark calls them
    *("random initialisation", "plain Minitron slicing", "default", "default, forward KL"),
    *("default, KL + cross-entropy", "default, reverse KL", "default, cross-entropy", "half of the layers, plain"),
    *("half of the layers, plain, hidden-state losses", "half of the layers, default"),
    "half of the layers, default, hidden-state losses",
]


def test_the_table_of_recovery_is_that_of_the_benchmark(monkeypatch):
    """Every cell from the lines that benchmarks/recovery.py wrote, whatever the versions installed here."""
    monkeypatch.setattr(recovery, "describe", vars)
    readme, mode = (ROOT / "README.md").read_text(), recovery.MODES["full"]
    results = recovery.Results(ROOT, ROOT / "benchmarks" / "recovery.jsonl")
    rates = {way: recovery.best_rate(way, mode, results) for way in recovery.WAYS}
    section = readme[readme.index("## What distillation wins back") :].split("\n\nThe first three")[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    points = [float(cell) for cell in table[0][1:]]
    assert len(table) == 12
    for row, cells in zip(ROWS, table[1:], strict=True):
        seeds = recovery.seeds_of(row, mode, rates, results)
        for point, cell in zip(points, cells[1:], strict=True):
            if cell:
                mean = sum(recovery.kl_at(result, point) for result in seeds) / len(seeds)
                assert cell == f"{mean:.3f}", (row, point)
