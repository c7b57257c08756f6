"""KL to the teacher against training tokens, for every way to start, every loss, and with half of the layers gone.

    uv run benchmarks/recovery.py [full | part | quick] [FOLDER]

On the bundled teacher and the demo's text, with students of the demo's size: about half of the parameters outside the
embeddings. Prints the tables that are kept in recovery.md and draws recovery.png beside it. `full` (the default) is the
benchmark: each way to start up to 0.8 tokens per student parameter, three learning rates on one seed, then three seeds
at the best of them; losses and half of the layers up to 0.2, three seeds, all at the demo's rate. It takes hours on two
cores. `part` is forward KL alone for the three ways to start, one seed, up to 0.2, at each rate.
`quick` only tries the script out: 0.1, one seed, one rate. Their pictures stay in FOLDER.

A seed draws the calibration rows, the random student and the order of training rows. Ways to start: `random`; `plain`,
Minitron's slicing (norm outputs, block importance, no correction); `default`, prune.py's constants. All runs of a row
have one schedule, whose cosine ends at the last step: figures at fewer tokens are of that schedule and not of one that
ends there. Tokens needed to reach a KL are interpolated between evaluations, linear in the logarithm of tokens.

Each finished run is a line of recovery.jsonl beside this file (of FOLDER/results.jsonl for the other modes): after an
interruption the same command continues, and draws and prints from them alone. Empty it when a script has changed.
FOLDER (by default in the system's temporary folder) keeps the students.
"""

import contextlib
import io
import itertools
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from torch.multiprocessing import get_context

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import demo  # noqa: E402
import distill  # noqa: E402
import importance_analysis  # noqa: E402
import prune  # noqa: E402

PROCESSES = 2  # side by side, one thread each
RATES = (1e-3, 2e-3, 4e-3)  # peaks; the cosine ends at a twentieth, as in the demo
EVERY = 0.025  # tokens per parameter between evaluations
POINTS = (0.05, 0.1, 0.2, 0.4, 0.8)  # tokens per parameter in the tables
DEFAULT = common.read_constants(prune)
PLAIN = {"HIDDEN_METRIC": "norm_outputs", "LAYER_METRIC": "block_importance", "NORM_RESCALE": False, "REFIT": False}
HALF_OF_LAYERS = dict.fromkeys(demo.SIZES) | {"NUM_HIDDEN_LAYERS": 4}
STARTS = {  # a seed's student -> constants of prune.py; "random" has the shape of "plain"
    "plain": demo.SIZES | PLAIN,
    "default": demo.SIZES,
    "plain, half of the layers": HALF_OF_LAYERS | PLAIN,
    "default, half of the layers": HALF_OF_LAYERS,
}
WAYS = ("random", "plain", "default")  # to start; each has its best rate, any other row the demo's
FULL, QUARTER = 1, 0.25  # of a mode's tokens
RUNS = {  # row -> student, LOSS, HIDDEN_LOSS, share of the tokens
    "random initialisation": ("random", "forward_kl", False, FULL),
    "plain Minitron slicing": ("plain", "forward_kl", False, FULL),
    "default": ("default", "forward_kl", False, FULL),
    "default, forward KL": ("default", "forward_kl", False, QUARTER),
    "default, KL + cross-entropy": ("default", "forward_kl_and_cross_entropy", False, QUARTER),
    "default, reverse KL": ("default", "reverse_kl", False, QUARTER),
    "default, cross-entropy": ("default", "cross_entropy", False, QUARTER),
    "half of the layers, plain": ("plain, half of the layers", "forward_kl", False, QUARTER),
    "half of the layers, plain, hidden-state losses": ("plain, half of the layers", "forward_kl", True, QUARTER),
    "half of the layers, default": ("default, half of the layers", "forward_kl", False, QUARTER),
    "half of the layers, default, hidden-state losses": ("default, half of the layers", "forward_kl", True, QUARTER),
}
FIRST = tuple(RUNS)[: len(WAYS)]  # the rows of the ways to start


@dataclass(frozen=True)
class Mode:
    budget: float  # tokens per parameter
    seeds: int
    rates: tuple
    rows: tuple


MODES = {
    "full": Mode(POINTS[-1], 3, RATES, tuple(RUNS)),
    "part": Mode(0.2, 1, RATES, FIRST),
    "quick": Mode(POINTS[1], 1, RATES[1:2], (*FIRST, tuple(RUNS)[-2], tuple(RUNS)[-1])),
}


@dataclass(frozen=True)
class Job:
    row: str
    rate: float
    seed: int
    budget: float


# ---------------------------------------------------------------------------------------------------------------------
# Students and runs, in processes of one thread


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def folder_of(start: str, seed: int, folder: Path) -> Path:
    return folder / f"seed{seed}" / start.replace(",", "").replace(" ", "_")


def count_of(student: Path) -> int:
    """Parameters, embeddings included."""
    infos = common.tensor_infos(common.find_checkpoint(str(student), None, "STUDENT"), "STUDENT")
    return common.count_parameters({name: info.shape for name, info in infos.items()})[0]


def prepare(seed: int, folder: Path) -> None:
    """Text, scores and students of a seed, unless they are there."""
    own = folder / f"seed{seed}"
    if (own / "complete").exists():
        return
    torch.set_num_threads(1)
    own.mkdir(parents=True, exist_ok=True)
    text, scores = demo.write_text(own), own / "scores.pt"
    calibration = {"NUM_SAMPLES": demo.NUM_SAMPLES, "SEQUENCE_LENGTH": 256, "BATCH_SIZE": 16, "SEED": seed}
    calibration |= {"MODEL": str(demo.TEACHER), "DATASET": text["train"], "DATASET_CONFIG": None}
    demo.configure(importance_analysis, SCORES_PATH=str(scores), DEVICE="cpu", **calibration)
    quietly(importance_analysis.main)
    for start, constants in STARTS.items():
        paths = {"SCORES_PATH": str(scores), "OUTPUT_DIR": str(folder_of(start, seed, folder))}
        demo.configure(prune, **DEFAULT | {"MODEL": str(demo.TEACHER), "DEVICE": "cpu"} | paths | constants)
        quietly(prune.main)
    demo.SEED = seed
    demo.write_random_student(folder_of("plain", seed, folder), folder_of("random", seed, folder))
    (own / "complete").touch()


def run(job: Job, folder: Path) -> dict:
    """Distil one student; the line of results.jsonl."""
    torch.set_num_threads(1)
    started = time.monotonic()
    start, loss, hidden_loss, _ = RUNS[job.row]
    student, own = folder_of(start, job.seed, folder), folder / f"seed{job.seed}"
    parameters, constants = count_of(student), demo.DISTILLATION
    per_step = constants["TOKENS_PER_STEP"]
    every = round(EVERY * parameters / per_step)
    tokens = every * round(job.budget / EVERY) * per_step
    output = folder / "runs" / f"{job.row} {job.rate:g} {job.seed} {job.budget:g}".replace(",", "").replace(" ", "_")
    constants = constants | {"LEARNING_RATE": job.rate, "MIN_LEARNING_RATE": job.rate / 20, "LOSS": loss}
    constants |= {"TEACHER": str(demo.TEACHER), "STUDENT": str(student), "OUTPUT_DIR": str(output), "DEVICE": "cpu"}
    constants |= {"DATASETS": str(own / "train.jsonl"), "EVAL_DATASETS": str(own / "held_out.jsonl")}
    constants |= {"EVAL_EVERY": every, "SAVE_EVERY": 10 * every, "TRAIN_TOKENS": tokens, "SEQUENCE_LENGTH": 256}
    demo.configure(distill, SEED=job.seed, HIDDEN_LOSS=hidden_loss, **constants)
    quietly(distill.main)
    num_rows = len(datasets.Dataset.from_file(str(output / "data" / "train.arrow")))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "held_out_kl" in line]
    result = {
        **describe(job),
        "parameters": parameters,
        "tokens": tokens,
        "seconds": time.monotonic() - started,
        "passes": tokens / (num_rows * 256),
        "kl": [round(line["held_out_kl"], 5) for line in evaluations],  # held out, every EVERY tokens per parameter
        "loss": evaluations[-1]["held_out_loss"],
        "teacher_loss": evaluations[-1]["teacher_loss"],
    }
    shutil.rmtree(output)
    return result


def describe(job: Job) -> dict:
    """What tells one run's line from another's."""
    return vars(job) | {"versions": f"torch {torch.__version__}, transformers {transformers.__version__}"}


class Results:
    """Finished runs, found again by what they are of."""

    def __init__(self, folder: Path, path: Path):
        self.folder, self.path = folder, path
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [json.loads(line) for line in lines]

    def of(self, job: Job) -> dict | None:
        wanted = describe(job)
        return next((line for line in self.lines if wanted.items() <= line.items()), None)

    def run_all(self, jobs: list[Job], pool) -> None:
        """Run what is not there yet."""
        missing, done = [job for job in jobs if self.of(job) is None], 0
        pool.map(prepare_here, [(seed, self.folder) for seed in sorted({job.seed for job in missing})], chunksize=1)
        for result in pool.imap_unordered(run_here, [(job, self.folder) for job in missing]):
            self.lines.append(result)
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            done += 1
            print(
                f"{result['row']}, rate {result['rate']:g}, seed {result['seed']}: KL {result['kl'][-1]:.3f} after "
                f"{result['tokens']:,} tokens, {result['seconds']:.0f} s; {done} of {len(missing)}",
                file=sys.stderr,
                flush=True,
            )


def run_here(arguments: tuple) -> dict:
    return run(*arguments)


def prepare_here(arguments: tuple) -> None:
    prepare(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def curve(result: dict) -> list[tuple[float, float]]:
    """(tokens per parameter, KL), the untrained student first; exact multiples of EVERY, from whole steps."""
    return [(i * EVERY, kl) for i, kl in enumerate(result["kl"])]


def kl_at(result: dict, point: float) -> float:
    return next(kl for x, kl in curve(result) if math.isclose(x, point, abs_tol=1e-9))


def tokens_to_reach(points: list[tuple[float, float]], target: float) -> tuple[float, bool]:
    """Where a curve of (tokens, KL), from 0 tokens on, first comes down to `target`, and whether that is exact.

    Linear in log tokens between evaluations. Not exact: the first evaluation after the start is there already, or
    (then infinity) none is.
    """
    if points[0][1] <= target:
        return 0.0, True
    for (before, above), (after, kl) in itertools.pairwise(points):
        if kl <= target:
            share = (above - target) / (above - kl)
            return (before * (after / before) ** share, True) if before else (after, False)
    return math.inf, False


def best_rate(way: str, mode: Mode, results: Results) -> float:
    """By the KL at the end, on the first seed."""
    row = FIRST[WAYS.index(way)]
    return min(mode.rates, key=lambda rate: curve(results.of(Job(row, rate, 0, mode.budget)))[-1][1])


def seeds_of(row: str, mode: Mode, rates: dict, results: Results) -> list[dict]:
    return [results.of(job_of(row, mode, rates, seed)) for seed in range(mode.seeds)]


def spread_text(values: list[float], digits: int = 3) -> str:
    text = f"{sum(values) / len(values):.{digits}f}"
    return text + (f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else "")


def print_markdown(header: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_rates(mode: Mode, results: Results) -> None:
    rows = []
    for row in FIRST:
        kls = [curve(results.of(Job(row, rate, 0, mode.budget)))[-1][1] for rate in mode.rates]
        best = min(kls)
        rows.append([row, *(f"**{kl:.3f}**" if kl == best and len(kls) > 1 else f"{kl:.3f}" for kl in kls)])
    print_markdown([f"KL after {mode.budget:g} tokens per parameter, seed 0", *(f"{r:g}" for r in mode.rates)], rows)


def print_runs(mode: Mode, found: dict[str, list[dict]], rates: dict) -> None:
    points = [point for point in POINTS if point <= mode.budget]
    rows = []
    for row, seeds in found.items():
        within = [point for point in (0, *points) if point <= mode.budget * RUNS[row][3]]
        cells = [spread_text([kl_at(result, point) for result in seeds]) for point in within]
        cells += [""] * (1 + len(points) - len(within))
        loss = spread_text([result["loss"] for result in seeds], 2)
        rate = job_of(row, mode, rates, 0).rate
        rows.append([row, f"{seeds[0]['parameters'] / 1e6:.2f}M", f"{rate:g}", *cells, loss])
    points = [f"{point:g}" for point in (0, *points)]
    print_markdown(["KL after tokens per parameter", "parameters", "rate", *points, "loss at the end"], rows)


def share_text(share: float, exact: bool) -> str:
    return f"{share:.2f}" if exact else "never" if share == math.inf else f"under {share:.2f}"


def print_shares(mode: Mode, found: dict[str, list[dict]]) -> None:
    """Tokens that the default needs for plain slicing's KL, of those that plain slicing needed."""
    plain, default = (found[FIRST[WAYS.index(way)]] for way in ("plain", "default"))
    rows = []
    for point in [point for point in POINTS if point <= mode.budget]:
        needed = [tokens_to_reach(curve(b), kl_at(a, point)) for a, b in zip(plain, default, strict=True)]
        bar = "0.5" if point <= 0.2 else "0.75" if point == 0.8 else ""
        cells = [share_text(tokens / point, exact) for tokens, exact in needed]
        met = "yes" if bar and all(tokens / point <= float(bar) for tokens, _ in needed) else "no" if bar else ""
        rows.append([f"{point:g}", ", ".join(cells), bar, met])
    print_markdown(["plain slicing's tokens per parameter", "share that the default needs", "at most", "met"], rows)


def print_orders(found: dict[str, list[dict]]) -> None:
    """What should be lower than what at the end, by how much, in how many seeds."""
    random, plain, default = FIRST
    pairs = [(plain, random), (default, random), (default, plain)]
    forward, both, reverse, text = (row for row in RUNS if row.startswith("default, "))
    pairs += [(forward, both), (both, text), (forward, text), (forward, reverse)]
    halves = ("half of the layers, plain", "half of the layers, default")
    pairs += [(f"{row}, hidden-state losses", row) for row in halves]
    rows = []
    for low, high in pairs:
        if low in found and high in found:
            kls = [[curve(result)[-1][1] for result in found[row]] for row in (low, high)]
            ratios = [a / b for a, b in zip(*kls, strict=True)]
            below = sum(ratio <= 1 for ratio in ratios)
            rows.append([low, high, spread_text(ratios), f"{below} of {len(ratios)}"])
    print_markdown(["KL at the end of", "over that of", "ratio", "at or below it"], rows)


def plot(mode: Mode, found: dict[str, list[dict]], path: Path) -> None:
    """KL against tokens per parameter, a line for each way to start, its seeds' range as a band."""
    figure, axes = common.new_figure(1, 1, (7, 4.5))
    for row in FIRST:
        seeds = [curve(result) for result in found[row]]
        x = [point for point, _ in seeds[0][1:]]
        kls = list(zip(*([kl for _, kl in seed[1:]] for seed in seeds), strict=True))
        untrained = sum(seed[0][1] for seed in seeds) / len(seeds)
        label = f"{row} (untrained: {untrained:.2f})"
        line = axes.plot(x, [sum(values) / len(values) for values in kls], marker=".", label=label)[0]
        axes.fill_between(x, [min(v) for v in kls], [max(v) for v in kls], color=line.get_color(), alpha=0.2)
    ticks = [point for point in (EVERY, *POINTS) if point <= mode.budget]
    seeds = f"{mode.seeds} seeds, mean and range" if mode.seeds > 1 else "one seed"
    axes.set(title=f"KL to the teacher on held-out text (nats per token), {seeds}", xlabel="tokens per parameter")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.minorticks_on()
    axes.legend()
    common.save_figure(figure, path)


def print_all(name: str, mode: Mode, rates: dict, results: Results) -> None:
    found = {row: seeds_of(row, mode, rates, results) for row in mode.rows}
    plot(mode, found, (ROOT / "benchmarks" if name == "full" else results.folder) / "recovery.png")
    every = [result for seeds in found.values() for result in seeds]
    print(f"`uv run benchmarks/recovery.py{'' if name == 'full' else ' ' + name}`\n")
    print(f"{platform.machine()}, {PROCESSES} processes of one thread, {describe(Job('', 0, 0, 0))['versions']}")
    seeds = f"{mode.seeds} seeds; cells: mean ± half the range" if mode.seeds > 1 else "one seed"
    print(f"{seeds}; the teacher's loss is ", end="")
    print(f"{every[0]['teacher_loss']:.3f}")
    print("Figures before the last are of a schedule that ends at the last, not there.")
    print(f"The longest run goes over its training text {max(result['passes'] for result in every):.2f} times.")
    print_rates(mode, results)
    print_runs(mode, found, rates)
    print_shares(mode, found)
    print_orders(found)


def job_of(row: str, mode: Mode, rates: dict, seed: int) -> Job:
    start, _, _, share = RUNS[row]
    rate = rates[start] if row in FIRST else demo.DISTILLATION["LEARNING_RATE"]
    return Job(row, rate, seed, mode.budget * share)


def main(name: str, folder: Path) -> None:
    kept = ROOT / "benchmarks" / "recovery.jsonl" if name == "full" else folder / "results.jsonl"
    mode, results = MODES[name], Results(folder, kept)
    folder.mkdir(parents=True, exist_ok=True)
    first = [Job(row, rate, 0, mode.budget) for row in FIRST for rate in mode.rates]
    with get_context("spawn").Pool(PROCESSES) as pool:
        results.run_all(first, pool)
        rates = {way: best_rate(way, mode, results) for way in WAYS}
        rest = [job_of(row, mode, rates, seed) for seed in range(mode.seeds) for row in mode.rows]
        results.run_all(rest, pool)
        pool.close()
        pool.join()
    print_all(name, mode, rates, results)


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument in MODES]
    folders = [argument for argument in sys.argv[1:] if argument not in MODES]
    main(*names or ["full"], Path(*folders or [tempfile.gettempdir() + "/pare_recovery"]))
