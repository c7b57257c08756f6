"""The README tells the truth about constants, keys and commands."""

import re

import pytest
from conftest import ROOT

import common
import demo
import distill
import importance_analysis
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
