"""Text: documents of a dataset, packed rows of tokens, and row i of a run as a function of the seed.

Nothing here is a setting, and importing it does nothing. Shapes: B batch, T tokens of a row, N counted tokens.
"""

import functools
import glob
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError

import common
from common import PareError, first_line, user_path

TEXT_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def open_text(
    dataset: str,
    config: str | None,
    split: str,
    column: str,
    shuffle_seed: int | None = None,
    constant: str = "DATASET",
) -> Iterator[str]:
    """Stream the documents of a dataset: a Hub id, a .jsonl, .json, .parquet or .txt file (one file, one document),
    a folder of those, or a dataset saved to disk.

    With `shuffle_seed` they come in an order that the seed fixes. Checked before anything is yielded: the dataset is
    there, has the split and the column, and is not empty; PareError otherwise, naming `constant`.
    """
    splits = open_splits(dataset, config, constant)
    what = f"{constant} = {dataset!r}"
    if split not in splits:
        raise PareError(f"DATASET_SPLIT = {split!r}: {what} has the splits {', '.join(map(repr, splits))}.")
    rows = splits[split]
    if shuffle_seed is not None:
        # In memory: a dataset saved to disk would get a cache file in its own folder.
        streaming = not hasattr(rows, "__len__")
        rows = rows.shuffle(seed=shuffle_seed, **({"buffer_size": 10_000} if streaming else {"keep_in_memory": True}))
    documents = read_column(rows, column, what)
    first = next(documents, None)
    if first is None:
        raise PareError(f"{what} is empty.")

    return itertools.chain([first], documents)


def read_column(rows: Iterable[dict], column: str, what: str) -> Iterator[str]:
    from datasets.exceptions import DatasetsError

    try:
        for row in rows:
            if column not in row:
                raise PareError(f"TEXT_COLUMN = {column!r}: {what} has the columns {', '.join(map(repr, row))}.")
            text = row[column]
            if not isinstance(text, str):
                raise PareError(f"TEXT_COLUMN = {column!r} of {what} holds {type(text).__name__}, not text.")
            if text:
                yield text
    except PareError:
        raise
    except (ValueError, OSError, HTTPError, DatasetsError) as error:
        raise PareError(f"{what} cannot be read: {first_line(error)}") from None


def open_splits(dataset: str, config: str | None, constant: str) -> dict:
    """The splits of a dataset by name, each an iterable of rows. Local files are one split, `train`."""
    import datasets
    from datasets.exceptions import DatasetsError

    what = f"{constant} = {dataset!r}"
    path = user_path(constant, dataset)
    saved = ("dataset_dict.json", "dataset_info.json", "state.json")
    try:
        if path.is_dir() and any((path / name).is_file() for name in saved):
            found = datasets.load_from_disk(str(path))
            return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        if path.exists():
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in TEXT_FORMATS)
            formats = {TEXT_FORMATS.get(file.suffix) for file in files}
            if len(formats) != 1 or None in formats:
                found = ", ".join(sorted({file.suffix for file in files})) or "none of them"
                raise PareError(
                    f"{what} must be, or hold, files of one kind: {', '.join(TEXT_FORMATS)}; found {found}."
                )
            if not any(file.stat().st_size for file in files):
                raise PareError(f"{what} is empty.")
            options = {"sample_by": "document"} if formats == {"text"} else {}
            names = [glob.escape(str(file)) for file in files]
            return dict(datasets.load_dataset(formats.pop(), data_files={"train": names}, streaming=True, **options))
        if dataset.startswith((".", "/", "~")) or path.suffix in TEXT_FORMATS or dataset.count("/") > 1 or not dataset:
            raise PareError(f"{what} does not exist. Give a file, a folder or a Hub id.")
        return dict(datasets.load_dataset(dataset, config, streaming=True))
    except PareError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise PareError(f"{what} is neither a file here nor a dataset on the Hub ({first_line(error)}).") from None
    except ConnectionError as error:
        raise PareError(
            f"{what} is not a file here, and the Hub could not be reached ({first_line(error)}).\n"
            "A local .jsonl, .parquet or .txt file works too, and `uv run demo.py` needs no network."
        ) from None
    except (ValueError, OSError, RuntimeError, HTTPError, DatasetsError) as error:
        raise PareError(f"{what} with DATASET_CONFIG = {config!r} cannot be opened: {first_line(error)}") from None


def pack_rows(
    documents: Iterable[str], tokenizer, length: int, vocab_size: int, read_ahead: int = 64
) -> Iterator[tuple]:
    """Documents, each ended with the end-of-text token, joined and cut into full rows of `length` tokens.

    Yields (input_ids, position_ids), both of `length` whole numbers. Positions restart at every document, and at the
    start of a row, where what went before is out of sight. The unfinished last row is dropped. `read_ahead` documents
    are taken at a time: a fast tokenizer works on them in parallel.
    """
    eos = tokenizer.eos_token_id
    documents, ids, positions, number = iter(documents), [], [], 0
    while batch := list(itertools.islice(documents, read_ahead)):
        for new in tokenizer(batch, verbose=False)["input_ids"]:
            number += 1
            if not new or new[-1] != eos:
                new = [*new, eos]
            if max(new) >= vocab_size:
                raise PareError(
                    f"DATASET: document {number} holds token {max(new)}, but the model's vocabulary ends at "
                    f"{vocab_size - 1}: the tokenizer beside the model is of another one. Download the model again."
                )
            taken = 0
            while len(ids) + len(new) - taken >= length:
                piece = new[taken : taken + length - len(ids)]
                yield ids + piece, positions + list(range(len(piece)))
                taken += len(piece)
                ids, positions = [], []
            ids += new[taken:]
            positions += range(len(new) - taken)


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows on disk


def pack_to_disk(path: Path, num_rows: int, description: str, rows) -> int:
    """Write at most `num_rows` packed rows to an Arrow file; return how many there were."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"input_ids": List(Value("int32")), "position_ids": List(Value("int32"))})
    progress = common.Progress(num_rows, "rows", description)
    count = 0
    with ArrowWriter(path=str(path), features=features) as writer:
        for input_ids, position_ids in itertools.islice(rows, num_rows):
            writer.write({"input_ids": input_ids, "position_ids": position_ids})
            progress.update(1)
            count += 1
        if count:
            writer.finalize()
    progress.close()
    return count


def file_state(dataset: str) -> list:
    """Names, sizes and times of a local dataset's files: tells whether it changed. Empty for a Hub id."""
    path = Path(dataset).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def prepare_data(folder: Path, teacher: common.Checkpoint, settings) -> tuple:
    """Held-out and training rows as memory-mapped datasets, packed once and reused while nothing changed, and the
    hashes of their files.

    The held-out part is the text of EVAL_DATASET, or the first documents of DATASET, which then are not trained on.
    """
    import datasets

    tokenizer = common.load_tokenizer(teacher, "TEACHER")
    key = {
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
        "files": [file_state(name) for name in (settings.dataset, settings.eval_dataset) if name],
        **{name: getattr(settings, name) for name in ("dataset", "dataset_config", "dataset_split", "text_column")},
        **{name: getattr(settings, name) for name in ("eval_dataset", "sequence_length", "eval_tokens", "seed")},
        "train_rows": settings.num_steps * settings.rows_per_step,
    }
    record = folder / "pare.json"
    paths = {part: folder / f"{part}.arrow" for part in ("held_out", "train")}
    there = record.is_file() and all(path.is_file() for path in paths.values())
    if not there or json.loads(record.read_text())["key"] != key:
        length, vocab_size = settings.sequence_length, teacher.config.vocab_size

        def text(name, constant, seed=None):
            columns = settings.dataset_config, settings.dataset_split, settings.text_column
            return open_text(name, *columns, shuffle_seed=seed, constant=constant)

        documents = text(settings.dataset, "DATASET", settings.seed)
        held_out, source = documents, "DATASET"
        if settings.eval_dataset is not None:
            held_out, source = text(settings.eval_dataset, "EVAL_DATASET"), "EVAL_DATASET"
        parts = {  # held-out text is read one document at a time: what is read ahead is lost to training
            "held_out": (source, max(1, settings.eval_tokens // length), held_out, 1),
            "train": ("DATASET", key["train_rows"], documents, 64),
        }
        with common.new_folder(folder, "distill.py") as temporary:
            for part, (constant, num_rows, part_documents, read_ahead) in parts.items():
                rows = pack_rows(part_documents, tokenizer, length, vocab_size, read_ahead)
                if not pack_to_disk(temporary / f"{part}.arrow", num_rows, f"packing {part} text", rows):
                    raise PareError(
                        f"{constant} = {getattr(settings, constant.lower())!r} has too little text for one {part} row "
                        f"of SEQUENCE_LENGTH = {length}. Give it more text, or lower SEQUENCE_LENGTH or EVAL_TOKENS."
                    )
            common.write_json(temporary / "pare.json", {"script": "distill.py", "key": key})
    rows = [datasets.Dataset.from_file(str(path)).with_format("numpy") for path in paths.values()]
    return *rows, {part: common.hash_file(path) for part, path in paths.items()}


def row_indices(step: int, rows_per_step: int, num_rows: int, seed: int) -> list[int]:
    """The training rows of a step: a pure function of the seed. Each pass over the rows has an order of its own."""
    indices = []
    for i in range(step * rows_per_step, (step + 1) * rows_per_step):
        epoch, place = divmod(i, num_rows)
        indices.append(epoch_order(epoch, num_rows, seed)[place])
    return indices


@functools.lru_cache(maxsize=2)
def epoch_order(epoch: int, num_rows: int, seed: int) -> list[int]:
    """A permutation of the rows, fixed by the seed and the epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


def counted(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: True where the next token is in the same document of the same row."""
    mask = torch.zeros_like(position_ids, dtype=torch.bool)
    mask[:, :-1] = position_ids[:, 1:] == position_ids[:, :-1] + 1
    return mask


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64
    counted: torch.Tensor  # (N,) int64: where the counted tokens are among the B·T


def fetch(rows, indices, device: torch.device) -> Batch:
    """Some rows on the device. What counts is found before the transfer, so that nobody waits for the device."""
    columns = rows[list(indices)]
    input_ids, position_ids = (torch.as_tensor(columns[name]).long() for name in ("input_ids", "position_ids"))
    where = counted(position_ids).flatten().nonzero().squeeze(1)
    return Batch(*(tensor.to(device) for tensor in (input_ids, position_ids, where)))
