"""KL to the teacher and loss right after pruning, before any training, for every way of choosing and correcting.

    uv run benchmarks/zero_shot.py [SEEDS]

On the bundled teacher and its held-out text (64 rows of 256 tokens), calibrated on 256 rows of its training text,
drawn anew for each of SEEDS (3) seeds. Rows of the table that is kept in zero_shot.md: random and anti-ranked scores;
the nine aggregations of arXiv 2407.14679 Table 11 (batch, then sequence); Pare's scores sliced only; then NORM_RESCALE,
REFIT and both, and both without each part of the refit. Columns: the sizes of the demo, each axis alone and all
together, also with 2 of 8 layers dropped by block importance. Then those alone, by each metric, sliced only and with
the default corrections; key-value heads averaged; and the KL that is left after the demo's distillation, for plain
slicing and for each part of the refit. The seeds run side by side, one thread each: an hour or two on two cores.
"""

import contextlib
import io
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.multiprocessing import get_context

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import data  # noqa: E402
import demo  # noqa: E402
import distill  # noqa: E402
import importance_analysis  # noqa: E402
import prune  # noqa: E402

AXES = {
    "neurons": {"INTERMEDIATE_SIZE": 240},
    "heads": {"NUM_ATTENTION_HEADS": 8},
    "hidden": {"HIDDEN_SIZE": 128},
    "all three": {"INTERMEDIATE_SIZE": 240, "NUM_ATTENTION_HEADS": 8, "HIDDEN_SIZE": 128},
}
AXES["and 6 of 8 layers"] = AXES["all three"] | {"NUM_HIDDEN_LAYERS": 6}
SWITCHES = ("NORM_RESCALE", "REFIT", "ROTATE", "GREEDY_NEURONS", "REFIT_SAMPLES")
DEFAULT = {name: getattr(prune, name) for name in SWITCHES}
SLICED = DEFAULT | {"NORM_RESCALE": False, "REFIT": False}
ONCE = DEFAULT | {"REFIT_SAMPLES": 0}
CORRECTIONS = {
    "Pare's scores, sliced only": SLICED,
    "+ NORM_RESCALE": SLICED | {"NORM_RESCALE": True},
    "+ REFIT": SLICED | {"REFIT": True},
    "+ both (the default)": DEFAULT,
    "both, not in sequence": ONCE,
    "  and without ROTATE": ONCE | {"ROTATE": False},
    "  and without GREEDY_NEURONS": ONCE | {"GREEDY_NEURONS": False},
    "  and without either": ONCE | {"ROTATE": False, "GREEDY_NEURONS": False},
}
DISTILLED = (
    "+ REFIT",
    "both, not in sequence",
    "  and without ROTATE",
    "  and without GREEDY_NEURONS",
    "  and without either",
)
SEQUENCE = {  # activations (B, T, channels) -> (B, channels)
    "mean": lambda x: x.abs().mean(1),
    "L2": lambda x: x.square().sum(1).sqrt(),
    "var": lambda x: x.var(1, correction=0),
}
BATCH = {  # (samples, channels) -> (channels)
    "L2": lambda x: x.square().sum(0).sqrt(),
    "mean": lambda x: x.abs().mean(0),
    "var": lambda x: x.var(0, correction=0),
}


class Evaluation:
    """KL(teacher || student) and loss in nats per token on held-out rows."""

    def __init__(self, text: str, tokenizer):
        documents = data.open_text(text, None, "train", "text")
        rows = torch.tensor([*data.pack_rows(documents, tokenizer, 256, 3072)])
        self.rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:64]]
        self.teacher = self.log_probs(demo.TEACHER)

    @torch.inference_mode()
    def log_probs(self, folder: Path) -> torch.Tensor:
        checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
        model = common.load_model(checkpoint, torch.float32, torch.device("cpu"), "MODEL")
        return torch.cat([model(input_ids=row, use_cache=False).logits.log_softmax(-1) for row in self.rows.split(16)])

    def __call__(self, folder: Path) -> tuple[float, float]:
        student = self.log_probs(folder)
        kl = (self.teacher.exp() * (self.teacher - student)).sum(-1).mean().item()
        loss = torch.nn.functional.nll_loss(student[:, :-1].flatten(0, 1), self.rows[:, 1:].flatten()).item()
        return kl, loss


@torch.inference_mode()
def aggregations(rows: torch.Tensor) -> dict[tuple[str, str], dict]:
    """(batch, sequence) -> mlp, attention, hidden of the paper's places (norm outputs for the hidden channels)."""
    checkpoint = common.find_checkpoint(str(demo.TEACHER), None, "MODEL")
    model = common.load_model(checkpoint, torch.float32, torch.device("cpu"), "MODEL").base_model
    family, seen = checkpoint.family, {}
    for index, layer in enumerate(model.layers):
        for key, place in (("mlp", common.NEURONS_AT), ("attention", common.HEADS_AT)):
            hook = lambda module, args, name=(key, index): keep(name, args[0])  # noqa: E731
            layer.get_submodule(place).register_forward_pre_hook(hook)
        for norm in (family.attention_norm, family.feedforward_norm):
            hook = lambda module, args, output, name=("hidden", index, norm): keep(name, output)  # noqa: E731
            layer.get_submodule(norm).register_forward_hook(hook)

    def keep(name, x):
        for sequence, reduce in SEQUENCE.items():
            seen.setdefault((name, sequence), []).append(reduce(x).double())

    for batch in rows.split(16):
        model(input_ids=batch, use_cache=False)
    found = {}
    for batch, reduce in BATCH.items():
        for sequence in SEQUENCE:
            scores = {name: reduce(torch.cat(parts)) for (name, s), parts in seen.items() if s == sequence}
            stacked = {
                key: [x for name, x in scores.items() if name[0] == key] for key in ("mlp", "attention", "hidden")
            }
            heads = torch.stack(stacked["attention"]).unflatten(1, (-1, checkpoint.head_dim)).norm(dim=-1)
            found[batch, sequence] = {
                "mlp": torch.stack(stacked["mlp"]).float(),
                "attention": heads.float(),
                "hidden": torch.stack(stacked["hidden"]).sum(0).float(),
            }
    return found


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


class Seed:
    """One calibration: scores by name, and what pruning by them gives."""

    def __init__(self, folder: Path, seed: int):
        text = demo.write_text(folder)
        tokenizer = common.load_tokenizer(common.find_checkpoint(str(demo.TEACHER), None, "MODEL"), "MODEL")
        self.folder, self.path, self.seed = folder, folder / "scores.pt", seed
        self.text, self.held_out = text["train"], text["held_out"]
        self.evaluation = Evaluation(self.held_out, tokenizer)
        settings = {"MODEL": str(demo.TEACHER), "DATASET": self.text, "SCORES_PATH": str(self.path), "SEED": seed}
        settings |= {"NUM_SAMPLES": 256, "SEQUENCE_LENGTH": 256, "BATCH_SIZE": 16, "DATASET_CONFIG": None}
        demo.configure(importance_analysis, DEVICE="cpu", **settings)
        quietly(importance_analysis.main)
        self.scores = torch.load(self.path, weights_only=True)
        documents = data.open_text(self.text, None, "train", "text", shuffle_seed=seed)
        rows = importance_analysis.calibration_rows(documents, tokenizer, 256, 256, 3072, self.text)
        self.aggregations = aggregations(rows)
        self.generator = torch.Generator().manual_seed(seed)

    def prune(self, scores: dict, **constants) -> tuple[float, float]:
        common.save_scores(dict(scores), self.path)
        sizes = dict.fromkeys((*prune.SIZE_NAMES, "LAYERS_TO_DROP", "TARGET_PARAMS"))
        settings = {"MODEL": str(demo.TEACHER), "SCORES_PATH": str(self.path), "OUTPUT_DIR": str(self.folder / "out")}
        more = {"LAYER_METRIC": "block_importance", "CONTIGUOUS_LAYERS": False, "PROTECT_FULL_ATTENTION": False}
        demo.configure(prune, DEVICE="cpu", **sizes | settings | more | SLICED | constants)
        return self.evaluation(quietly(prune.main))

    def distil(self, scores: dict, **constants) -> tuple[float, float]:
        """KL and loss of the student after the demo's distillation."""
        self.prune(scores, **AXES["all three"] | constants)
        output = self.folder / "distilled"
        shutil.rmtree(output, ignore_errors=True)
        settings = {"TEACHER": str(demo.TEACHER), "STUDENT": str(self.folder / "out"), "OUTPUT_DIR": str(output)}
        settings |= {"DATASETS": self.text, "SEQUENCE_LENGTH": 256, "SEED": self.seed}
        settings |= demo.DISTILLATION | {"EVAL_DATASETS": self.held_out, "EVAL_EVERY": 1000, "SAVE_EVERY": 1000}
        demo.configure(distill, DEVICE="cpu", TRAIN_TOKENS=demo.TRAIN_TOKENS, **settings)
        quietly(distill.main)
        return self.evaluation(output / "model")

    def changed(self, change) -> dict:
        return self.scores | {
            key: change(self.aggregations["L2", "mean"][key]) for key in ("mlp", "attention", "hidden")
        }

    def width_rows(self) -> dict[str, tuple[dict, dict]]:
        """Title -> scores and constants."""
        random = self.changed(lambda score: torch.rand(score.shape, generator=self.generator))
        anti = self.changed(lambda score: score.max() - score)
        rows = {"random": (random, SLICED), "anti-ranked": (anti, SLICED)}
        rows |= {f"({batch}, {seq})": (self.scores | s, SLICED) for (batch, seq), s in self.aggregations.items()}
        return rows | {title: (self.scores, constants) for title, constants in CORRECTIONS.items()}

    def layer_rows(self) -> dict[str, tuple[float, float]]:
        order = torch.randperm(8, generator=self.generator)[:2].tolist()
        scores = self.scores["layer"]
        drop = {"random": order, "most important (anti-ranked)": sorted(scores, key=scores.get)[-2:]}
        rows = {title: self.prune(self.scores, LAYERS_TO_DROP=layers) for title, layers in drop.items()}
        for metric in prune.LAYER_METRICS:
            for block in (False, True):
                constants = {"LAYER_METRIC": metric, "CONTIGUOUS_LAYERS": block, "NUM_HIDDEN_LAYERS": 6}
                rows[metric + (", one block" if block else "")] = self.prune(self.scores, **constants)
            constants = {"LAYER_METRIC": metric, "NUM_HIDDEN_LAYERS": 6}
            rows[f"{metric}, default"] = self.prune(self.scores, **DEFAULT | constants)
        return rows

    def distilled_rows(self) -> dict[str, tuple[float, float]]:
        plain = self.scores | self.aggregations["L2", "mean"]
        rows = {"(L2, mean), sliced only": (plain, SLICED), "+ both (the default)": (self.scores, DEFAULT)}
        rows |= {title: (self.scores, CORRECTIONS[title]) for title in DISTILLED}
        return {title: self.distil(scores, **constants) for title, (scores, constants) in rows.items()}

    def average_rows(self) -> dict[str, tuple[float, float]]:
        """10 query heads on 5 key-value heads: similar heads averaged, by outputs or by weights, or neighbours."""
        sizes = {"NUM_ATTENTION_HEADS": 10, "NUM_KEY_VALUE_HEADS": 5}
        grouping, rows = prune.group_heads, {}
        neighbours = lambda distances, size: torch.arange(len(distances)).view(-1, size).tolist()  # noqa: E731
        for title, groups in (("similar heads", grouping), ("neighbours", neighbours)):
            prune.group_heads = groups
            rows[f"{title}, sliced only"] = self.prune(self.scores, **sizes)
            rows[f"{title}, REFIT"] = self.prune(self.scores, **sizes | ONCE)
            rows[f"{title}, default"] = self.prune(self.scores, **sizes | DEFAULT)
        prune.group_heads = grouping
        return rows


def print_markdown(title: str, columns: list[str], table: dict[str, list[list[tuple]]]) -> None:
    """table: row -> column -> (KL, loss) of each seed. Prints mean KL ± half the range, and the mean loss."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in table.items():
        texts = []
        for results in cells:
            kls, losses = zip(*results, strict=True)
            spread = (max(kls) - min(kls)) / 2
            texts.append(f"{sum(kls) / len(kls):.3f} ± {spread:.3f} ({sum(losses) / len(losses):.2f})")
        print(f"| {name} | {' | '.join(texts)} |", flush=True)


def run_seed(seed: int) -> tuple[list[dict], float]:
    """The four tables of one seed: row -> (KL, loss) of each column; and the teacher's loss."""
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        one, widths = Seed(Path(folder), seed), {}
        for title, (scores, constants) in one.width_rows().items():
            widths[title] = [one.prune(scores, **sizes | constants) for sizes in AXES.values()]
            print(f"seed {seed}: {title} {widths[title]}", file=sys.stderr, flush=True)
        tables = [widths]
        for rows in (one.layer_rows, one.average_rows, one.distilled_rows):
            tables.append({title: [result] for title, result in rows().items()})
            print(f"seed {seed}: {tables[-1]}", file=sys.stderr, flush=True)
        print(f"seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return tables, one.evaluation(demo.TEACHER)[1]


def main(num_seeds: int) -> None:
    with get_context("spawn").Pool(num_seeds) as pool:
        seeds, losses = zip(*pool.map(run_seed, range(num_seeds), chunksize=1), strict=True)
    tables = [  # row -> column -> (KL, loss) of each seed
        {title: list(zip(*(table[title] for table in same), strict=True)) for title in same[0]}
        for same in zip(*seeds, strict=True)
    ]
    print("`uv run benchmarks/zero_shot.py`\n")
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{num_seeds} seeds; cells: KL to the teacher ± half its range (loss); the teacher's loss is {losses[0]:.3f}")
    print_markdown("scores (batch, sequence)", list(AXES), tables[0])
    print_markdown("2 of 8 layers dropped by", ["layers"], tables[1])
    print_markdown("10 key-value heads averaged to 5", ["heads"], tables[2])
    print_markdown(f"after distillation on {demo.TRAIN_TOKENS} tokens", ["all three"], tables[3])
    plain, default = (
        sum(kl for kl, _ in tables[0][title][list(AXES).index("all three")]) / num_seeds
        for title in ("(L2, mean)", "+ both (the default)")
    )
    print(f"\nDefault / plain slicing (L2, mean), all three: {default:.3f} / {plain:.3f} = {default / plain:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
