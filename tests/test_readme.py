"""The README tells the truth about constants, keys and commands."""

import re
from dataclasses import fields

import pytest
from conftest import ROOT, documented_metrics
from test_preflight import checkpoint, olmo, settings_for

import attention
import common
import data
import demo
import distill
import importance_analysis
import preflight
import prune

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", [importance_analysis, prune, distill, demo])
def test_every_constant_is_in_the_table_of_its_script(script):
    section = README[README.index(f"### `{script.__name__}.py`") :].split("\n### ")[0].split("\n## ")[0]
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \|", section, flags=re.MULTILINE)
    assert rows == [(name, repr(getattr(script, name))) for name in common.constants_of(script)]


def test_every_constant_has_a_comment():
    for script in (importance_analysis, prune, distill, demo):
        assert all(common.constants_of(script).values()), script.__name__


def test_score_keys_are_documented():
    more = ("layer", "norms", "angular_distance_mean", "layer_perplexity", "perplexity", "meta")
    assert all(f"| `{key}` |" in README for key in (*common.SCORE_TENSORS, *more))


def test_ci_calls_the_readmes_test_command():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "uv run pytest" in commands
    assert "uv run pytest" in README


def test_the_top_level_is_flat():
    allowed = {
        *("README.md", "LICENSE", "pyproject.toml", "uv.lock", "common.py", "demo.py", "distill.py", "prune.py"),
        *("importance_analysis.py", "refit.py", "losses.py", "data.py", "checkpoints.py", "sharding.py"),
        *("attention.py", "quantization.py", "preflight.py"),
        *("tests", "benchmarks", "assets"),
    }
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    top = {path.split("/")[0] for path in listed.splitlines()}
    assert top <= allowed | {".gitignore", ".ci"}


def test_the_keys_of_a_source_are_in_the_table():
    section = README[README.index("`DATASETS` is one source, or a list") :].split("\n\nWhere the column")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE)
    defaults = {field.name: field.default for field in fields(data.TextSource)}
    assert [key for key, _ in rows] == list(data.KEYS)
    assert [default for _, default in rows[1:]] == [f"`{defaults[key]!r}`" for key, _ in rows[1:]]


def test_the_keys_of_metrics_in_the_table_exist():
    """That every key is in the table is seen where runs are made: test_distill.py, hidden_loss, never_lose."""
    source = (ROOT / "distill.py").read_text() + (ROOT / "losses.py").read_text()
    assert len(documented_metrics()) > 15
    assert all(f'"{key}"' in source for key in documented_metrics())


PROMISES = """
1. Killing Pare at any instant, including during a save, never costs more than the steps since the last checkpoint.
2. A resumed run is bit-identical to an uninterrupted one (same machine, same package versions, same constants):
   weights, optimizer, losses. Tested at atol=0.
3. A checkpoint whose bytes changed is never loaded; Pare falls back to the one before and says so.
4. A non-finite loss or gradient never reaches the weights, and a model with non-finite weights is never saved.
5. Pare executes no code from model or data files: no pickle is ever read, no remote code is ever run.
6. Every error a user can cause names the file, the constant and the value that would work.
"""


def test_the_six_promises_stand_word_for_word_and_their_tests_exist():
    section = README[README.index("Six promises") :].split("\n### ")[0]
    for promise in re.split(r"\n(?=\d\.)", PROMISES.strip()):
        assert " ".join(promise.split()) in " ".join(section.split())
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_never_lose.py", "test_bad_input.py"))
    named = re.findall(r"`(test_\w+)`", section)
    assert len(named) >= 6
    assert all(f"def {name}(" in tests for name in named), named


def test_the_forecast_in_the_readme_is_the_one_that_is_printed():
    models = [checkpoint(config) for config in olmo(32)]
    settings = settings_for("cuda", SEQUENCE_LENGTH=4096, MICRO_BATCH_SIZE=2, TOKENS_PER_STEP=distill.TOKENS_PER_STEP)
    settings.implementation = attention.VARLEN
    for world, gigabytes in ((1, 79), (2, 48), (4, 30), (8, 21)):
        assert round(sum(preflight.memory_parts(*models, settings, world).values()) / 1e9) == gigabytes
    assert "on each of 1, 2, 4 or 8 GPUs: 79, 48, 30 or 21 GB" in " ".join(README.split())
    parts = preflight.memory_parts(*models, settings, 1)
    for name, size in {**parts, "memory": sum(parts.values())}.items():
        assert not size or re.search(rf"^  {name} +{size / 1e9:.2f} GB$", README, flags=re.MULTILINE), (name, size)
    assert f"{settings.num_steps} steps of {distill.TOKENS_PER_STEP} tokens (32 micro-batches of 2 x 4096)" in README
