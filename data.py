"""Text: documents of one source or of several, packed rows of tokens, and row i of a run as a function of the seed.

Nothing here is a setting, and importing it does nothing. Shapes: B batch, T tokens of a row, N counted tokens.
"""

import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import re
import shutil
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError

import attention
import common
from common import PareError, first_line, user_path

TEXT_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
PARTS = ("held_out", "train")  # of the text, a file of packed rows each
OPEN_ROWS = 256  # rows that wait for a piece that fits
WAITS = (10, 30, 100, 300)  # seconds, where the Hub cannot be read
READ_AHEAD = 64  # documents of a source: a fast tokenizer works on them in parallel
BYTES_PER_TOKEN = 4 + 4 + 1 / 8  # of a packed row: its token, its position, and whether the next one counts
SPARE_BYTES = 2**26  # what packing leaves free on the disk

# ---------------------------------------------------------------------------------------------------------------------
# Sources

# importance_analysis.py has one source, with a constant for each of its settings.
CONSTANTS_OF_ONE = {"config": "DATASET_CONFIG", "split": "DATASET_SPLIT", "column": "TEXT_COLUMN"}


@dataclass(frozen=True)
class TextSource:
    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None  # None: `messages` where the rows have it, else `text`
    weight: float = 1.0
    constant: str = "DATASETS"

    @property
    def what(self) -> str:
        return f"{self.constant} = {self.name!r}" if self.constant == "DATASET" else f"{self.constant}: {self.name!r}"

    def setting(self, key: str) -> str:
        """How an error names one of its settings, for a message that goes on with what the source has instead."""
        if self.constant == "DATASET":
            return f"{CONSTANTS_OF_ONE[key]} = {getattr(self, key)!r}: {self.what}"
        return f"{self.what} with {key} {getattr(self, key)!r}"


KEYS = {  # of a source in DATASETS -> kinds, and what an error says of them
    "name": ((str,), "text"),
    "config": ((str, type(None)), "text or None"),
    "split": ((str,), "text"),
    "column": ((str, type(None)), "text or None"),
    "weight": ((int, float), "a number greater than 0"),
}


def read_sources(value: str | list, constant: str) -> list[TextSource]:
    """The sources that DATASETS or EVAL_DATASETS names. Raises PareError for one that is malformed or there twice."""
    if not value:
        raise PareError(f"{constant} = {value!r} names no source. Give a file, a folder, a Hub id, or a list of those.")
    sources = [read_source(entry, constant) for entry in (value if isinstance(value, list) else [value])]
    for i, source in enumerate(sources):
        if any(is_same_text(source, other) for other in sources[:i]):
            raise PareError(f"{source.what} is there twice. List it once, with a greater weight.")
    return sources


def is_same_text(a: TextSource, b: TextSource) -> bool:
    names = [user_path(x.constant, x.name) for x in (a, b)]
    same_name = names[0].resolve() == names[1].resolve() if names[0].exists() else a.name == b.name
    same_rows = same_name and (a.config, a.split) == (b.config, b.split)
    return same_rows and (a.column == b.column or None in (a.column, b.column))


def check_held_out(sources: list[TextSource], held_out: list[TextSource]) -> None:
    """Refuse to call text held out that is trained on."""
    for source in held_out:
        if any(is_same_text(source, other) for other in sources):
            raise PareError(
                f"{source.what} is in DATASETS too, so it would not be held out. Name other text, or set "
                "EVAL_DATASETS = None: that holds out the first documents of DATASETS."
            )


def read_source(entry: str | dict, constant: str) -> TextSource:
    if isinstance(entry, str):
        return TextSource(entry, constant=constant)
    if not isinstance(entry, dict) or "name" not in entry:
        raise PareError(f"{constant}: {entry!r} is no source. Give text, or {{'name': ..., 'weight': ...}}.")
    if unknown := [key for key in entry if key not in KEYS]:
        raise PareError(f"{constant}: {entry['name']!r} has a key {unknown[0]!r}; the keys are {', '.join(KEYS)}.")
    for key, value in entry.items():
        kinds, wanted = KEYS[key]
        wrong = not isinstance(value, kinds) or isinstance(value, bool)
        if wrong or (key == "weight" and not 0 < value < math.inf):
            raise PareError(f"{constant}: {entry['name']!r} with {key} {value!r}: it must be {wanted}.")
    return TextSource(**entry, constant=constant)


def open_text(
    dataset: str,
    config: str | None,
    split: str,
    column: str,
    shuffle_seed: int | None = None,
    constant: str = "DATASET",
) -> Iterator[str]:
    """Stream the documents of one dataset of text; see `open_source`."""
    return open_source(TextSource(dataset, config, split, column, constant=constant), shuffle_seed)


def open_source(source: TextSource, shuffle_seed: int | None = None) -> Iterator[str | list[dict]]:
    """Stream the documents of a source: a Hub id, a .jsonl, .json, .parquet or .txt file (one file, one document), a
    folder of those, or a dataset saved to disk. A document is text, or a chat: a list of {"role", "content"}.

    With `shuffle_seed` they come in an order that the seed fixes. Checked before anything is yielded: the dataset is
    there, has the split and the column, and is not empty; PareError otherwise, naming the constant.
    """
    splits = open_splits(source)
    if source.split not in splits:
        raise PareError(f"{source.setting('split')} has the splits {', '.join(map(repr, splits))}.")
    rows = splits[source.split]
    if shuffle_seed is not None:
        # In memory: a dataset saved to disk would get a cache file in its own folder.
        options = {"keep_in_memory": True} if hasattr(rows, "__len__") else {"buffer_size": 10_000}
        if "max_buffer_input_shards" in inspect.signature(rows.shuffle).parameters:
            options["max_buffer_input_shards"] = 1  # each open parquet file takes gigabytes
        rows = rows.shuffle(seed=shuffle_seed, **options)
    is_local = user_path(source.constant, source.name).exists()
    documents = read_column(rows if is_local else patiently(rows, source), source)
    first = next(documents, None)
    if first is None:
        raise PareError(f"{source.what} is empty.")

    return itertools.chain([first], documents)


class BadRows:
    """Rows of a source that are of no use: the first is named and passed over, and up to one in a hundred after it;
    more, or one before any good row, is a mistake in the choice of the source."""

    def __init__(self):
        self.count = 0

    def add(self, number: int, good: int, error: PareError) -> None:
        """Row `number` after `good` good ones."""
        self.count += 1
        if not good or self.count > 1 + number / 100:
            raise error
        if self.count == 1:
            print(f"row {number} as read is passed over, and others like it: {error}", flush=True)


def patiently(rows: Iterable[dict], source: TextSource) -> Iterator[dict]:
    """The rows of a source on the Hub. Where the network fails for longer than its client tries again, they are read
    anew after a while, up to where they were: their order is the same."""
    number = failures = 0
    while True:
        try:
            for row in itertools.islice(iter(rows), number, None):
                number, failures = number + 1, 0
                yield row
            return
        except (OSError, HTTPError) as error:
            if failures == len(WAITS):
                raise
            print(f"{source.what}: {first_line(error)}; trying again in {WAITS[failures]} seconds", flush=True)
            time.sleep(WAITS[failures])
            failures += 1


def read_column(rows: Iterable[dict], source: TextSource) -> Iterator[str | list[dict]]:
    """The documents, all of the first one's kind; those that are empty are passed over."""
    from datasets.exceptions import DatasetsError

    is_kind, bad, good = None, BadRows(), 0
    try:
        for number, row in enumerate(rows, 1):
            if source.column is None:
                source = replace(source, column="messages" if "messages" in row else "text")
            if source.column not in row:
                raise PareError(f"{source.setting('column')} has the columns {', '.join(map(repr, row))}.")
            document = row[source.column]
            if is_kind is None:  # importance_analysis.py scores text only
                is_kind = is_chat if isinstance(document, list) and source.constant != "DATASET" else is_text
            if not is_kind(document):
                what = f"{source.setting('column')} holds {type(document).__name__}, not {NAMES_OF_KINDS[is_kind]}."
                bad.add(number, good, PareError(what))
            elif document:
                good += 1
                yield document
    except PareError:
        raise
    except (ValueError, OSError, HTTPError, DatasetsError) as error:
        raise PareError(f"{source.what} cannot be read: {first_line(error)}") from None


def is_text(document) -> bool:
    return isinstance(document, str)


def is_chat(document) -> bool:
    return isinstance(document, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in document
    )


NAMES_OF_KINDS = {is_text: "text", is_chat: "chats (lists of {'role': ..., 'content': ...})"}


def open_splits(source: TextSource) -> dict:
    """The splits of a dataset by name, each an iterable of rows. Local files are one split, `train`."""
    import datasets
    from datasets.exceptions import DatasetsError

    dataset, what = source.name, source.what
    path = user_path(source.constant, dataset)
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
        return dict(datasets.load_dataset(dataset, source.config, streaming=True))
    except PareError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise PareError(f"{what} is gated: accept its terms on the Hub, then run `uv run hf auth login`.") from None
        raise PareError(f"{what} is neither a file here nor a dataset on the Hub ({first_line(error)}).") from None
    except ConnectionError as error:
        raise PareError(
            f"{what} is not a file here, and the Hub could not be reached ({first_line(error)}).\n"
            "A local .jsonl, .parquet or .txt file works too, and `uv run demo.py` needs no network."
        ) from None
    except (ValueError, OSError, RuntimeError, HTTPError, DatasetsError) as error:
        raise PareError(f"{source.setting('config')} cannot be opened: {first_line(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Documents as tokens


class Document(NamedTuple):
    """A document, or a piece of one. Its first token is never predicted, whatever `wanted` says."""

    ids: np.ndarray  # (T,) int32
    wanted: np.ndarray  # (T,) bool: True where the token is to be predicted
    begins: bool = False  # with the beginning-of-text token, which some models need at the start of each piece


def check_ids(ids: list[int], vocab_size: int, what: str) -> None:
    if max(ids) >= vocab_size:
        raise PareError(
            f"{what} holds token {max(ids)}, but the model's vocabulary ends at {vocab_size - 1}: "
            "the tokenizer beside the model is of another one. Download the model again."
        )


def tokenize_texts(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids, each ended with the end-of-text token."""
    eos = tokenizer.eos_token_id
    return [ids if ids and ids[-1] == eos else [*ids, eos] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def read_documents(
    rows: Iterator[str | list[dict]], source: TextSource, tokenizer, vocab_size: int, model: str
) -> Iterator[Document]:
    """A source's rows as tokens. Of a text every token is wanted, of a chat those that the assistant wrote."""
    number, found, bad = 0, False, BadRows()
    while batch := list(itertools.islice(rows, READ_AHEAD)):
        if isinstance(batch[0], str):
            documents = [(ids, [True] * len(ids)) for ids in tokenize_texts(batch, tokenizer)]
        else:
            documents = tokenize_chats(batch, source, tokenizer, model)
        for document in documents:
            number += 1
            if isinstance(document, PareError):
                bad.add(number, number - 1 - bad.count, document)
                continue
            ids, wanted = document
            check_ids(ids, vocab_size, f"{source.what}, row {number} as read,")
            if any(wanted):
                found = True
                begins = ids[0] == tokenizer.bos_token_id
                yield Document(np.array(ids, np.int32), np.array(wanted, bool), begins)
    if not found:
        raise PareError(f"{source.what} holds chats without any message of the role 'assistant': nothing to learn.")


# Some templates write the day's date: rows packed another day would be others.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def tokenize_chats(chats: list[list[dict]], source: TextSource, tokenizer, model: str) -> list[tuple | PareError]:
    """Token ids of chats in the tokenizer's chat template, and for each token whether the assistant wrote it; or what
    is wrong with a chat.

    The template brings the special tokens; only a missing end-of-text token is added at the end, and is not wanted:
    nobody's turn holds it. Turns are found by `assistant_turns`, or else by the template's {% generation %} tags.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        lacks = "chat template" if not tokenizer.chat_template else "fast tokenizer"
        raise PareError(f"{source.what} holds chats, but {model} has no {lacks}. Give text, or a chat model's TEACHER.")
    documents, template = [], tokenizer.get_chat_template()
    has_tags = GENERATION_TAG.search(template)
    render = functools.partial(
        tokenizer.apply_chat_template, chat_template=FIXED_DATE * ("strftime_now" in template) + template
    )
    for chat in chats:
        try:
            whole = render(chat, tokenize=False)
        except (TemplateError, TypeError) as error:
            what = f"{source.what}: the chat template of {model} refuses a chat ({first_line(error)})."
            documents.append(PareError(what))
            continue
        turns = assistant_turns(chat, whole, tokenizer.eos_token, render)
        found = [turn for turn in turns if turn]
        if len(found) == len(turns) or (found and not has_tags):
            encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids = encoded["input_ids"]
            wanted = [any(first <= start < end for first, end in found) for start, _ in encoded["offset_mapping"]]
        elif has_tags:
            encoded = render(chat, return_dict=True, return_assistant_tokens_mask=True)
            ids, wanted = encoded["input_ids"], [mask == 1 for mask in encoded["assistant_masks"]]
        else:
            what = (
                f"{source.what}: the chat template of {model} rewrites earlier turns and has no {{% generation %}} "
                "tags, so what the assistant wrote cannot be told.\n"
                "Give text, chats of one turn, or a template with the tags."
            )
            documents.append(PareError(what))
            continue
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, wanted = [*ids, tokenizer.eos_token_id], [*wanted, False]
        documents.append((ids, wanted))
    return documents


def assistant_turns(chat: list[dict], whole: str, end_of_text: str, render: Callable) -> list[tuple[int, int] | None]:
    """(first, end) of each of the assistant's turns among the characters of `whole`, the rendered chat.

    What the template writes before turn i and the prompt for it must begin what it writes up to turn i, and that must
    begin the whole; between the two lies the turn. None for a turn where that does not hold: the template looks ahead,
    as those do that drop an earlier turn's thoughts.
    """
    numbers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if not numbers:
        return []
    try:
        heads = render([chat[:i] for i in numbers], tokenize=False, add_generation_prompt=True)
        upto = render([chat[: i + 1] for i in numbers], tokenize=False)
    except (TemplateError, TypeError):
        return [None] * len(numbers)
    turns = []
    for head, text in zip(heads, upto, strict=True):
        # Olmo 3 ends the last turn with the end-of-text token, the earlier ones with another in its place: it counts.
        body = text if whole.startswith(text) else text.removesuffix(end_of_text)
        exact = body.startswith(head) and whole.startswith(body)
        turns.append((len(head), len(body) + (body != text)) if exact else None)
    return turns


def mix(sources: list[Iterator[Document]], weights: list[float]) -> Iterator[tuple[int, Document]]:
    """(number of the source, document): next comes the source that has given the fewest tokens for its weight.

    Of equals the first; a source that runs dry drops out.
    """
    given, left = [0] * len(sources), list(range(len(sources)))
    while left:
        number = min(left, key=lambda i: given[i] / weights[i])
        document = next(sources[number], None)
        if document is None:
            left.remove(number)
            continue
        given[number] += len(document.ids)
        yield number, document


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack_rows(documents: Iterable[str], tokenizer, length: int, vocab_size: int) -> Iterator[list[int]]:
    """Documents, each ended with the end-of-text token, joined and cut into full rows of `length` tokens.

    Yields `length` token ids. At the start of a row stands a beginning-of-text token if the tokenizer puts one before
    documents. The unfinished last row is dropped.
    """
    documents, ids, number = iter(documents), [], 0
    while batch := list(itertools.islice(documents, READ_AHEAD)):
        for new in tokenize_texts(batch, tokenizer):
            number += 1
            check_ids(new, vocab_size, f"DATASET: document {number}")
            begin = new[:1] if new[0] == tokenizer.bos_token_id else []
            while len(ids) + len(new) >= length:
                piece, rest = new[: length - len(ids)], new[length - len(ids) :]
                yield ids + piece
                new, ids = begin + rest if rest else [], []
            ids += new


def cut(document: Document, length: int) -> Iterator[Document]:
    """The document in pieces of at most `length` tokens, without those in which nothing is to be predicted. Each has
    the beginning-of-text token if the document has it; the token after one that was put there is not predicted."""
    for start in (0, *range(length, len(document.ids), length - document.begins)):
        repeats = document.begins and start > 0
        ids, wanted = (part[start : start + length - repeats] for part in document[:2])
        if repeats:
            ids, wanted = np.concatenate([document.ids[:1], ids]), np.concatenate([[False, False], wanted[1:]])
        if wanted[1:].any():
            yield Document(ids, wanted, document.begins)


def best_fit(documents: Iterable[Document], length: int, num_rows: int, open_rows: int) -> Iterator[list[Document]]:
    """At most `num_rows` rows, each a list of pieces that together have at most `length` tokens (arXiv 2404.10830).

    Only documents longer than a row are cut. A piece goes whole into the open row with the least room that holds it,
    else into a new one. A row comes out when it is full, and the fullest when more than `open_rows` wait. Ends when a
    piece would need one row more than `num_rows`, or the documents are over; then what is still open comes out.
    """
    waiting = []  # (room, number, pieces), the fullest first
    num_left = num_rows  # rows that may still be opened
    numbers = itertools.count()  # of equal rooms the one that has waited longest is first
    for piece in itertools.chain.from_iterable(cut(document, length) for document in documents):
        place = bisect_left(waiting, (len(piece.ids),))
        if place < len(waiting):
            room, _, pieces = waiting.pop(place)
        elif num_left:
            room, pieces = length, []
            num_left -= 1
        else:
            break
        pieces.append(piece)
        room -= len(piece.ids)
        if room == 0:
            yield pieces
        else:
            insort(waiting, (room, next(numbers), pieces))
            if len(waiting) > open_rows:
                yield waiting.pop(0)[2]
    for _, _, pieces in waiting:
        yield pieces


def build_row(pieces: list[Document], length: int, filler: int) -> dict[str, np.ndarray]:
    """The columns of a row. What the pieces leave free holds the token `filler`, as a document that never counts."""
    row = {
        "input_ids": np.full(length, filler, np.int32),
        "position_ids": np.empty(length, np.int32),
        "counted": np.zeros(length, bool),  # the next token is in the same document and is to be predicted
    }
    start = 0
    for piece in pieces:
        end = start + len(piece.ids)
        row["input_ids"][start:end] = piece.ids
        row["position_ids"][start:end] = np.arange(end - start)
        row["counted"][start : end - 1] = piece.wanted[1:]
        start = end
    row["position_ids"][start:] = np.arange(length - start)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows on disk


def pack_to_disk(path: Path, rows: Iterable[list[Document]], num_rows: int, length: int, filler: int) -> tuple:
    """Write rows to an Arrow file; return how many there were and how many tokens of text they hold."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    kinds = {"input_ids": "int32", "position_ids": "int32", "counted": "bool"}
    progress = common.Progress(num_rows, "rows", f"packing {path.stem} text")
    count = num_tokens = 0
    with ArrowWriter(path=str(path), features=Features({n: List(Value(kind)) for n, kind in kinds.items()})) as writer:
        for pieces in rows:
            writer.write(build_row(pieces, length, filler))
            progress.update(1)
            count += 1
            num_tokens += sum(len(piece.ids) for piece in pieces)
        if count:
            writer.finalize()
    progress.close()
    return count, num_tokens


def file_state(dataset: str) -> list:
    """Names, sizes and times of a local dataset's files: tells whether it changed. Empty for a Hub id."""
    path = Path(dataset).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def tokenizer_hash(tokenizer) -> str:
    """Of all that decides which tokens a text becomes."""
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    state = [whole, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


def check_room(folder: Path, num_rows: int, length: int, settings) -> None:
    """Say what packing will write and where; PareError where the disk has no room for it."""
    needed = math.ceil(num_rows * length * BYTES_PER_TOKEN)
    free = shutil.disk_usage(common.existing_parent(folder)).free
    print(
        f"text to pack into {folder}: at most {num_rows:,} rows of {length} tokens, {needed / 1e9:.2f} GB; "
        f"{free / 1e9:.2f} GB are free"
    )
    if free < needed + SPARE_BYTES:
        raise PareError(
            f"OUTPUT_DIR = {settings.output_dir!r}: the packed text takes up to {needed / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free there.\nMake room, choose another OUTPUT_DIR, or lower TRAIN_TOKENS = "
            f"{settings.train_tokens}."
        )


def open_mixture(sources: list[TextSource], tokenizer, seed: int | None, teacher: common.Checkpoint) -> Iterator:
    """Documents of all sources by their weights. All are opened at once, so that a mistake is found before packing."""
    model = f"TEACHER = {teacher.name!r}"
    opened = [(open_source(source, seed), source) for source in sources]
    documents = [read_documents(rows, s, tokenizer, teacher.config.vocab_size, model) for rows, s in opened]
    return mix(documents, [source.weight for source in sources])


def write_part(path: Path, mixture: Iterator, sources: list[TextSource], num_rows: int, length: int, filler: int):
    """Pack a part of the text, and say how full its rows are and what each source gave."""
    given = [0] * len(sources)

    def documents() -> Iterator[Document]:
        for number, document in mixture:
            given[number] += len(document.ids)
            yield document

    count, num_tokens = pack_to_disk(path, best_fit(documents(), length, num_rows, OPEN_ROWS), num_rows, length, filler)
    if not count:
        names = ", ".join(repr(source.name) for source in sources)
        raise PareError(
            f"{sources[0].constant}: {names} has too little text for one {path.stem} row of SEQUENCE_LENGTH = {length}."
            " Give it more text, or lower SEQUENCE_LENGTH or EVAL_TOKENS."
        )
    print(f"{path.stem} text: {count:,} rows, {1 - num_tokens / (count * length):.2%} of their tokens are padding")
    if len(sources) > 1:
        for source, tokens in zip(sources, given, strict=True):
            print(f"  {tokens / sum(given):.2%} from {source.name}")


def open_rows(folder: Path) -> list:
    """Held-out and training rows, as prepare_data left them: memory-mapped datasets."""
    import datasets

    paths = [folder / f"{part}.arrow" for part in PARTS]
    if not all(path.is_file() for path in paths):
        raise PareError(f"OUTPUT_DIR: {folder} is not there; all machines must see the same OUTPUT_DIR.")
    return [datasets.Dataset.from_file(str(path)).with_format("numpy") for path in paths]


def prepare_data(folder: Path, teacher: common.Checkpoint, settings, begun: dict | None = None) -> Callable:
    """Open the text and look for room; returns a function that packs held-out and training rows into `folder` and
    returns the hashes of the files. They are packed once, and again when something has changed. Files with the hashes
    `begun`, which a run began with, serve it whatever has changed since.

    The held-out part is the text of EVAL_DATASETS, or the first documents of DATASETS, which then are not trained on.
    """
    tokenizer = common.load_tokenizer(teacher, "TEACHER")
    length, train, held_out = settings.sequence_length, settings.datasets, settings.eval_datasets
    counts = (max(1, settings.eval_tokens // length), settings.num_steps * settings.rows_per_step)
    num_rows = dict(zip(PARTS, counts, strict=True))
    sources = [*train, *(held_out or [])]
    key = {
        "tokenizer": tokenizer_hash(tokenizer),
        "sources": [asdict(source) for source in sources],
        "files": [file_state(source.name) for source in sources],
        "num_rows": num_rows,
        "sequence_length": length,
        "seed": settings.seed,
        "open_rows": OPEN_ROWS,
    }
    record = folder / "pare.json"
    paths = {part: folder / f"{part}.arrow" for part in num_rows}
    there = record.is_file() and all(path.is_file() for path in paths.values())
    same = there and json.loads(record.read_text())["key"] == key
    if there and begun and not same and hashes_of(paths) == begun:
        print(f"the text, or what packs it, has changed since; the run goes on with its own rows in {folder}")
        return lambda: begun
    if same:
        return lambda: hashes_of(paths)
    shutil.rmtree(common.temporary_folder(folder), ignore_errors=True)  # of a killed run
    check_room(folder, sum(num_rows.values()), length, settings)
    mixture = open_mixture(train, tokenizer, settings.seed, teacher)
    first = (mixture, train) if held_out is None else (open_mixture(held_out, tokenizer, None, teacher), held_out)

    @functools.cache
    def pack() -> dict[str, str]:
        with common.new_folder(folder, "distill.py") as temporary:
            for part, text in {"held_out": first, "train": (mixture, train)}.items():
                write_part(temporary / f"{part}.arrow", *text, num_rows[part], length, tokenizer.eos_token_id)
            common.write_json(temporary / "pare.json", {"script": "distill.py", "key": key})
        return hashes_of(paths)

    return pack


def hashes_of(paths: dict[str, Path]) -> dict[str, str]:
    return {part: common.hash_file(path) for part, path in paths.items()}


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


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64
    counted: torch.Tensor  # (N,) int64: where the counted tokens are among the B·T
    documents: attention.Documents


def fetch(rows, indices, device: torch.device) -> Batch:
    """Some rows on the device."""
    columns = rows[list(indices)]
    input_ids, position_ids = (torch.as_tensor(columns[name]).long() for name in ("input_ids", "position_ids"))
    return make_batch(input_ids, position_ids, torch.as_tensor(columns["counted"]), device)


def make_batch(input_ids: torch.Tensor, position_ids: torch.Tensor, counted: torch.Tensor, device) -> Batch:
    """From (B, T) on the CPU, counted as booleans. What counts, and where documents start, is found before the
    transfer, so that nobody waits for the device."""
    where = counted.flatten().nonzero().squeeze(1)
    tensors = [attention.to_device(tensor, device) for tensor in (input_ids, position_ids, where)]
    return Batch(*tensors, attention.find_documents(position_ids, device))
