"""The whole of Pare on a bundled tiny Olmo 3, on a laptop's CPU, without network.

    uv run demo.py

Scores the teacher in assets/tiny-olmo3 (3.5M parameters, trained on Python's own documentation and sources), prunes it
to half of its non-embedding parameters, distils it, and distils a random student of the same shape on the same tokens
for comparison. Prints one table; writes everything into OUTPUT_DIR. Two to six minutes on two cores.
"""

import hashlib
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import common
import distill
import importance_analysis
import prune

OUTPUT_DIR: str = "demo_output"  # made anew by every run
NUM_SAMPLES: int = 256  # calibration rows of 256 tokens
TRAIN_TOKENS: int = 2**18  # for each of the two students
PROMPT: str = "import os\n\ndef "  # what the greedy samples continue
SAMPLE_TOKENS: int = 60  # length of a sample
SEED: int = 0  # of calibration, the random student and the order of training rows

TEACHER = Path(__file__).resolve().parent / "assets" / "tiny-olmo3"
SIZES = {  # half of the teacher's 2.54M parameters outside the embeddings; in proportion to the 7B's default target
    "HIDDEN_SIZE": 128,
    "INTERMEDIATE_SIZE": 240,
    "NUM_ATTENTION_HEADS": 8,
    "NUM_KEY_VALUE_HEADS": None,
    "NUM_HIDDEN_LAYERS": None,
    "LAYERS_TO_DROP": None,
    "TARGET_PARAMS": None,
}
DISTILLATION = {
    "TOKENS_PER_STEP": 2**10,  # many small steps recover more from the same few tokens
    "MICRO_BATCH_SIZE": 4,
    "LEARNING_RATE": 2e-3,
    "MIN_LEARNING_RATE": 1e-4,
    "WARMUP_STEPS": 20,
    "GRADIENT_CHECKPOINTING": False,
    "EVAL_EVERY": 64,
    "EVAL_TOKENS": 2**14,
    "SAVE_EVERY": 128,
}
HELD_OUT_SHARE = 16  # one document in 16 is held out


def is_held_out(name: str) -> bool:
    """True for about one document name in HELD_OUT_SHARE, the same ones on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def python_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of real text that every Python installation carries.

    The language reference (`pydoc_data.topics`) and the standard library's sources with their docstrings. Tests,
    installed packages and the generated tables of `encodings` stay out. Names do not depend on where Python lies.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        folders = name.split("/")[:-1]
        if {"site-packages", "test", "tests", "encodings", "pydoc_data"}.isdisjoint(folders):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def configure(script, **constants) -> None:
    """Set a script's constants, as a user would at its top."""
    unknown = constants.keys() - common.constants_of(script).keys()
    assert not unknown, unknown
    for name, value in constants.items():
        setattr(script, name, value)


def write_text(folder: Path) -> dict[str, str]:
    """Write train.jsonl and held_out.jsonl, one document a line; return their paths."""
    paths = {"train": folder / "train.jsonl", "held_out": folder / "held_out.jsonl"}
    with paths["train"].open("w") as train, paths["held_out"].open("w") as held_out:
        for name, text in python_documents():
            (held_out if is_held_out(name) else train).write(json.dumps({"text": text}) + "\n")
    return {name: str(path) for name, path in paths.items()}


def write_random_student(pruned: Path, folder: Path) -> None:
    """A checkpoint of the pruned student's shape with random weights: what distillation reaches without pruning."""
    checkpoint = common.find_checkpoint(str(pruned), None, "STUDENT")
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32)
    model.save_pretrained(folder)
    common.copy_companions(pruned, folder)


def greedy_sample(folder: Path, prompt: str) -> str:
    """What the model in `folder` writes after `prompt`."""
    checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
    tokenizer = common.load_tokenizer(checkpoint, "MODEL")
    model = common.load_model(checkpoint, torch.float32, torch.device("cpu"), "MODEL")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def plot(results: dict, runs: dict[str, Path], path: Path) -> None:
    """KL to the teacher while both students train, and where each model ends."""
    figure, (left, right) = common.new_figure(1, 2, (11, 4))
    for name, folder in runs.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        points = [(line["tokens"], line["held_out_kl"]) for line in lines if "held_out_kl" in line]
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(title="KL to the teacher on held-out text (nats per token)", xlabel="training tokens", yscale="log")
    left.legend()
    names = list(results)
    right.barh(names, [results[name]["next_token_agreement"] for name in names], color="tab:blue")
    right.invert_yaxis()
    right.set(title="next-token agreement with the teacher", xlim=(0, 1))
    common.save_figure(figure, path)


def summarise(evaluation: dict, folder: Path) -> dict:
    """One row of the table from a held-out evaluation of distill.py and the model's folder."""
    checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
    shapes = {name: info.shape for name, info in common.tensor_infos(checkpoint, "MODEL").items()}
    total, without_embeddings = common.count_parameters(shapes)
    return {
        "parameters": total,
        "parameters_without_embeddings": without_embeddings,
        "held_out_loss": evaluation["held_out_loss"],
        "kl_to_teacher": evaluation["held_out_kl"],
        "next_token_agreement": evaluation["held_out_agreement"],
        "sample": greedy_sample(folder, PROMPT),
    }


def print_results(results: dict) -> None:
    rows = [["", "parameters", "without embeddings", "held-out loss", "KL to teacher", "agreement"]]
    for name, result in results.items():
        counts = [f"{result[key] / 1e6:.2f}M" for key in ("parameters", "parameters_without_embeddings")]
        figures = [f"{result['held_out_loss']:.3f}", f"{result['kl_to_teacher']:.3f}"]
        rows.append([name, *counts, *figures, f"{result['next_token_agreement']:.1%}"])
    print("\nOn held-out text (nats per token; agreement: same most likely next token as the teacher):")
    common.print_table(rows)
    print(f"\nGreedy continuations of {PROMPT!r}:")
    for name, result in results.items():
        print(f"\n[{name}]\n{PROMPT}{result['sample']}")


def main() -> Path:
    started = time.monotonic()
    script = sys.modules[__name__]
    common.check_positive(common.read_constants(script), "NUM_SAMPLES", "TRAIN_TOKENS", "SAMPLE_TOKENS")
    output = common.output_path("OUTPUT_DIR", OUTPUT_DIR)
    common.check_own_folder(output, "OUTPUT_DIR", "demo.py")
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    common.write_json(output / "pare.json", common.run_record(script))
    text = write_text(output)
    common_constants = {"SEQUENCE_LENGTH": 256, "SEED": SEED, "DEVICE": "cpu"}

    print("=== importance_analysis.py", flush=True)
    configure(
        importance_analysis,
        MODEL=str(TEACHER),
        DATASET=text["train"],
        DATASET_CONFIG=None,
        NUM_SAMPLES=NUM_SAMPLES,
        BATCH_SIZE=16,
        SCORES_PATH=str(output / "importance_scores.pt"),
        **common_constants,
    )
    scores = importance_analysis.main()

    print("\n=== prune.py", flush=True)
    configure(
        prune, MODEL=str(TEACHER), SCORES_PATH=str(scores), OUTPUT_DIR=str(output / "pruned"), DEVICE="cpu", **SIZES
    )
    pruned = prune.main()
    write_random_student(pruned, output / "random")

    runs = {"pruned + distilled": output / "distilled", "random + distilled": output / "random_distilled"}
    for student, folder in zip((pruned, output / "random"), runs.values(), strict=True):
        print(f"\n=== distill.py STUDENT={student}", flush=True)
        configure(
            distill,
            TEACHER=str(TEACHER),
            STUDENT=str(student),
            OUTPUT_DIR=str(folder),
            DATASETS=text["train"],
            EVAL_DATASETS=text["held_out"],
            TRAIN_TOKENS=TRAIN_TOKENS,
            **DISTILLATION,
            **common_constants,
        )
        distill.main()

    records = {name: json.loads((folder / "model" / "pare.json").read_text()) for name, folder in runs.items()}
    before, after = records["pruned + distilled"]["before"], records["pruned + distilled"]["after"]
    itself = {"held_out_loss": before["teacher_loss"], "held_out_kl": 0.0, "held_out_agreement": 1.0}
    results = {
        "teacher": summarise(itself, TEACHER),
        "pruned": summarise(before, pruned),
        "pruned + distilled": summarise(after, runs["pruned + distilled"] / "model"),
        "random + distilled": summarise(records["random + distilled"]["after"], runs["random + distilled"] / "model"),
    }
    common.write_json(output / "results.json", results)
    plot(results, runs, output / "results.png")
    print_results(results)
    print(f"\nWrote {output}/results.json and {output}/results.png in {time.monotonic() - started:.0f} seconds.")
    return output


if __name__ == "__main__":
    common.run(sys.modules[__name__])
