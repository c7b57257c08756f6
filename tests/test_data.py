"""Sources and their weights, chats, best-fit packing, and what lies on disk."""

import itertools
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, build_tokenizer

import common
import data
import distill
from common import PareError

# ---------------------------------------------------------------------------------------------------------------------
# Packing


def documents_of(lengths, wanted=None) -> list[data.Document]:
    """Documents of these lengths in which no token occurs twice."""
    ends = [*itertools.accumulate(lengths, initial=0)]
    return [
        data.Document(np.arange(start, end, dtype=np.int32), np.ones(end - start, bool) if wanted is None else wanted)
        for start, end in itertools.pairwise(ends)
    ]


def lengths_of(rows) -> list[list[int]]:
    return [[len(piece.ids) for piece in row] for row in rows]


def test_joined_rows_hold_every_token():
    """What importance_analysis.py scores on: documents joined, no padding."""
    tokenizer = build_tokenizer()
    rows = list(data.pack_rows(DOCUMENTS, tokenizer, 50, 300))
    stream = [token for document in DOCUMENTS for token in [*tokenizer(document)["input_ids"], 0]]
    assert [token for ids in rows for token in ids] == stream[: len(stream) // 50 * 50]
    assert {len(ids) for ids in rows} == {50}


@pytest.mark.parametrize("open_rows", [1, 3, 256])
@pytest.mark.parametrize("seed", range(6))
def test_best_fit_loses_no_token_and_cuts_only_documents_longer_than_a_row(seed, open_rows):
    generator = np.random.default_rng(seed)
    length = int(generator.integers(2, 40))
    lengths = [int(n) for n in generator.integers(1, [5, length, 3 * length + 1][seed % 3] + 1, 200)]
    documents = documents_of(lengths)
    rows = list(data.best_fit(documents, length, 10_000, open_rows))
    assert all(sum(sizes) <= length for sizes in lengths_of(rows))
    found = Counter(tuple(piece.ids.tolist()) for row in rows for piece in row)
    expected = Counter()
    for document in documents:
        pieces = [document.ids[start : start + length] for start in range(0, len(document.ids), length)]
        expected.update(tuple(piece.tolist()) for piece in pieces if len(piece) > 1)  # one token predicts nothing
    assert found == expected
    again = data.best_fit(iter(documents), length, 10_000, open_rows)
    assert lengths_of(again) == lengths_of(rows)


def test_a_piece_goes_where_the_least_room_is_left_and_the_fullest_row_comes_out_first():
    """By hand, rows of 10 tokens: 3 fits beside 6 and beside 7, and fills the latter; 2 goes to the 6."""
    assert lengths_of(data.best_fit(documents_of([6, 7, 3, 2]), 10, 99, 256)) == [[7, 3], [6, 2]]
    # Two may wait: the third row to be opened sends the fullest out, and the piece that it could have held comes late.
    assert lengths_of(data.best_fit(documents_of([8, 6, 7, 2, 4]), 10, 99, open_rows=2)) == [[8], [6, 4], [7, 2]]
    # Of two with equal room the one that waits longer.
    rows = list(data.best_fit(documents_of([6, 6, 4]), 10, 99, 256))
    assert [piece.ids[0] for piece in rows[0]] == [0, 12]
    # A document of 25 is two full rows and a rest, which waits like any other piece.
    assert lengths_of(data.best_fit(documents_of([25, 5]), 10, 99, 256)) == [[10], [10], [5, 5]]


def test_packing_stops_where_one_more_row_would_be_needed():
    documents = iter(documents_of([6, 7, 3, 8, 9, 2]))
    assert lengths_of(data.best_fit(documents, 10, 3, 256)) == [[7, 3], [8], [6]]
    assert len(next(documents).ids) == 2  # no document is read beyond the one without a place
    assert len(list(data.best_fit(documents_of([35]), 10, 2, 256))) == 2


def test_pieces_in_which_nothing_is_to_be_predicted_are_left_out():
    wanted = np.array([True] + [False] * 13 + [True])
    (rows,) = data.best_fit([data.Document(np.arange(15, dtype=np.int32), wanted)], 10, 99, 256)
    assert [piece.ids.tolist() for piece in rows] == [[10, 11, 12, 13, 14]]
    assert not list(data.best_fit(documents_of([1, 1]), 10, 99, 256))


def test_padding_never_counts_and_positions_restart():
    wanted = np.array([False, True, False, True])
    pieces = [*documents_of([3]), data.Document(np.array([7, 8, 9, 10], np.int32), wanted)]
    row = data.build_row(pieces, 10, filler=99)
    assert row["input_ids"].tolist() == [0, 1, 2, 7, 8, 9, 10, 99, 99, 99]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert np.flatnonzero(row["counted"]).tolist() == [0, 1, 3, 5]
    assert {name: column.dtype for name, column in row.items()} == {
        "input_ids": np.int32,
        "position_ids": np.int32,
        "counted": bool,
    }


def test_a_batch_counts_what_the_column_says(tmp_path):
    rows = [documents_of([3]), documents_of([4, 2])]
    count, num_tokens = data.pack_to_disk(tmp_path / "x.arrow", rows, 2, 8, filler=5)
    assert (count, num_tokens) == (2, 9)
    stored = datasets.Dataset.from_file(str(tmp_path / "x.arrow")).with_format("numpy")
    batch = data.fetch(stored, [1, 0], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5, 5, 5], [0, 1, 2, 5, 5, 5, 5, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.counted.tolist() == [0, 1, 2, 4, 8, 9]


def test_row_order_is_a_permutation_of_every_epoch_and_a_function_of_the_seed():
    steps = [data.row_indices(step, 4, 12, seed=3) for step in range(6)]
    first, second = [*itertools.chain(*steps[:3])], [*itertools.chain(*steps[3:])]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert data.row_indices(4, 4, 12, seed=3) == steps[4]
    assert data.row_indices(4, 4, 12, seed=4) != steps[4]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_the_next_document_comes_from_the_source_with_the_fewest_tokens_for_its_weight():
    """By hand: weights 2 and 1, of equals the first, and the second alone once the first is dry."""
    sources = [iter(documents_of([4, 6, 2])), iter(documents_of([3, 5, 1, 1]))]
    taken = [(number, len(document.ids)) for number, document in data.mix(sources, [2, 1])]
    assert taken == [(0, 4), (1, 3), (0, 6), (1, 5), (0, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [3, 1e-3]])
def test_shares_of_tokens_follow_the_weights_within_one_document(weights):
    generator = np.random.default_rng(0)
    sources = [iter(documents_of([int(n) for n in generator.integers(1, 90, 5000)])) for _ in weights]
    given, longest = [0] * len(weights), 89
    for number, document in itertools.islice(data.mix(sources, weights), 3000):
        given[number] += len(document.ids)
        level = min(tokens / weight for tokens, weight in zip(given, weights, strict=True))
        for tokens, weight in zip(given, weights, strict=True):
            assert tokens <= level * weight + longest + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Chats

TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
# As Olmo 3's: the end-of-text token in the place of <|end|> after the last turn.
LAST = "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% else %}<|end|>\n{% endif %}"
ENDED = TURNS.replace("<|end|>\n", LAST) + PROMPT
# As those of models that think: thoughts are dropped from all turns but the last.
FORGETFUL = TURNS.replace("m.content", "m.content if loop.last else m.content.split('THOUGHT ')[-1]") + PROMPT
TAGGED = (
    "{% for m in messages %}{% set text = m.content if loop.last else m.content.split('THOUGHT ')[-1] %}"
    "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{%- generation -%}{{ text }}<|end|>{% endgeneration %}{% else %}"
    "{{ text }}<|end|>{% endif %}{% endfor %}" + PROMPT
)
ROLES = ("system", "user", "assistant", "tool")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Dogs?"},
    {"role": "assistant", "content": "THOUGHT Yes, dogs."},
    {"role": "user", "content": "Cats met?"},
    {"role": "assistant", "content": "None met."},
]
SOURCE = data.TextSource("chats.jsonl")


def chat_tokenizer(template: str | None):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", *(f"<|{role}|>" for role in ROLES)]})
    tokenizer.chat_template = template
    return tokenizer


def read_chats(chats, template, vocab_size=1000) -> list[data.Document]:
    tokenizer = chat_tokenizer(template)
    return list(data.read_documents(iter(chats), SOURCE, tokenizer, vocab_size, "TEACHER = 'x'"))


def wanted_text(document, tokenizer) -> list[str]:
    """The runs of wanted tokens, decoded."""
    runs = itertools.groupby(
        zip(document.wanted.tolist(), document.ids.tolist(), strict=True), key=lambda pair: pair[0]
    )
    return [tokenizer.decode([token for _, token in run]) for wanted, run in runs if wanted]


@pytest.mark.parametrize(
    ("template", "turns", "end"),
    [
        (TURNS + PROMPT, ["THOUGHT Yes, dogs.<|end|>\n", "None met.<|end|>\n"], "\n<|endoftext|>"),
        (ENDED, ["THOUGHT Yes, dogs.<|end|>", "None met.<|endoftext|>"], "met.<|endoftext|>"),
        (TAGGED, ["Yes, dogs.<|end|>", "None met.<|end|>"], "<|end|><|endoftext|>"),
    ],
    ids=["turns", "ended", "tagged"],
)
def test_what_the_assistant_wrote_is_wanted_and_nothing_else(template, turns, end):
    tokenizer = chat_tokenizer(template)
    (document,) = read_chats([CHAT], template)
    text = tokenizer.decode(document.ids)
    assert text.startswith("<|system|>\nBe brief.<|end|>")  # no token of its own in front
    assert text.endswith(end)
    assert text.count("<|endoftext|>") == 1
    assert wanted_text(document, tokenizer) == turns


def test_of_a_chat_whose_earlier_turns_are_rewritten_the_last_turn_is_wanted():
    (document,) = read_chats([CHAT], FORGETFUL)
    assert wanted_text(document, chat_tokenizer(None)) == ["None met.<|end|>\n"]


def test_a_template_that_writes_the_date_writes_the_same_every_day():
    (document,) = read_chats([CHAT], "Today is {{ strftime_now('%d %b %Y') }}." + TURNS + PROMPT)
    tokenizer = chat_tokenizer(None)
    assert tokenizer.decode(document.ids).startswith("Today is 26 Jul 2024.<|system|>")
    assert wanted_text(document, tokenizer) == ["THOUGHT Yes, dogs.<|end|>\n", "None met.<|end|>\n"]


def test_of_many_files_one_is_open_at_a_time_for_shuffling(monkeypatch):
    seen = []

    class Stream:
        def shuffle(self, seed, buffer_size, max_buffer_input_shards=10):
            seen.append((seed, max_buffer_input_shards))
            return iter([{"text": "Dogs met."}])

    class Old(Stream):
        def shuffle(self, seed, buffer_size):
            seen.append((seed, None))
            return iter([{"text": "Dogs met."}])

    for kind in (Stream, Old):
        stream = kind()
        monkeypatch.setattr(data, "open_splits", lambda source, stream=stream: {"train": stream})
        assert list(data.open_source(data.TextSource("org/data"), shuffle_seed=7)) == ["Dogs met."]
    assert seen == [(7, 1), (7, None)]


class Unsteady:
    """Ten rows; reading ends in an error after 3, 3 and 7 of them, as often as it is told."""

    def __init__(self, errors):
        self.errors = list(errors)

    def __iter__(self):
        end, error = self.errors.pop(0) if self.errors else (10, None)
        yield from ({"text": f"Document {i}."} for i in range(end))
        if error:
            raise error


def test_a_network_that_fails_for_a_while_costs_no_row(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    errors = [(3, ConnectionError("gone")), (3, TimeoutError("still gone")), (7, OSError("502"))]
    monkeypatch.setattr(data, "open_splits", lambda source: {"train": Unsteady(errors)})
    read = list(data.open_source(data.TextSource("org/data")))
    assert read == [f"Document {i}." for i in range(10)]
    assert slept == [10, 30, 10]
    assert "DATASETS: 'org/data': still gone; trying again in 30 seconds" in capsys.readouterr().out


def test_a_network_that_is_gone_for_good_is_one_message(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(data, "open_splits", lambda source: {"train": Unsteady([(3, OSError("gone"))] * 9)})
    with pytest.raises(PareError, match=r"DATASETS: 'org/data' cannot be read: gone"):
        list(data.open_source(data.TextSource("org/data")))
    assert slept == list(data.WAITS)


def test_only_texts_get_the_special_tokens_that_the_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer(TURNS + PROMPT)
    begin = tokenizer.convert_tokens_to_ids("<|tool|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|tool|> $A", special_tokens=[("<|tool|>", begin)])
    text, chat = (next(data.read_documents(iter([row]), SOURCE, tokenizer, 1000, "")) for row in ("Dogs met.", CHAT))
    assert text.ids[0] == begin
    assert begin not in chat.ids


def test_each_piece_of_a_document_has_the_beginning_that_the_tokenizer_gives_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer(None)
    tokenizer.bos_token = "<|tool|>"
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|tool|> $A", special_tokens=[("<|tool|>", begin)])
    text, length = " ".join(f"Dogs met {i} cats." for i in range(40)), 16
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert whole[0] == begin
    assert len(whole) > 4 * length
    (document,) = data.read_documents(iter([text]), SOURCE, tokenizer, 1000, "")
    pieces = list(data.cut(document, length))
    assert all(piece.ids[0] == begin for piece in pieces)
    assert [len(piece.ids) for piece in pieces[:-1]] == [length] * (len(pieces) - 1)
    assert [token for piece in pieces for token in piece.ids[1:]] == whole[1 : 1 + sum(len(p.ids) - 1 for p in pieces)]
    assert len(whole) - sum(len(piece.ids) - 1 for piece in pieces) <= 2  # but a last token that nothing predicts
    assert [piece.wanted.tolist() for piece in pieces[:2]] == [[True] * length, [False] * 2 + [True] * (length - 2)]
    rows = list(data.pack_rows([text, text], tokenizer, length, 1000))
    assert all(ids[0] == begin and len(ids) == length for ids in rows)
    joined = [token for ids in rows for token in ids[1:] if token != begin]
    assert joined == [token for token in (whole + whole) if token != begin][: len(joined)]


def test_a_token_across_the_border_of_a_turn_belongs_to_where_it_begins():
    """` met` is one token, and the assistant's turn begins inside it."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "dogs m"}, {"role": "assistant", "content": "et dogs"}]
    tokenizer = chat_tokenizer(template)
    assert " met" in [tokenizer.decode([token]) for token in tokenizer("dogs met dogs")["input_ids"]]
    (document,) = read_chats([chat], template)
    assert wanted_text(document, tokenizer) == [" dogs"]


def test_chats_with_several_answers_in_a_row_and_with_the_answer_first():
    answers = [{"role": "assistant", "content": "Yes."}, {"role": "tool", "content": "5"}]
    (document,) = read_chats([[*answers, *answers[:1], *answers[:1]]], TURNS + PROMPT)
    assert wanted_text(document, chat_tokenizer(None)) == ["Yes.<|end|>\n", "Yes.<|end|>\n", "Yes.<|end|>\n"]


def test_chats_without_an_answer_are_passed_over_and_a_source_of_them_is_refused():
    question = [{"role": "user", "content": "Anyone?"}]
    assert len(read_chats([question, CHAT, question], TURNS + PROMPT)) == 1
    with pytest.raises(PareError, match=r"DATASETS: 'chats.jsonl' .*'assistant'"):
        read_chats([question], TURNS + PROMPT)


def test_chats_that_the_teacher_cannot_read():
    with pytest.raises(PareError, match=r"DATASETS: 'chats.jsonl' .*TEACHER = 'x' has no chat template"):
        read_chats([CHAT], None)
    thinking = PROMPT.replace("\n", "\nTHOUGHT ")  # the prompt for an answer holds more than what stands before one
    with pytest.raises(PareError, match=r"'chats.jsonl': .*TEACHER = 'x' rewrites earlier turns.*generation"):
        read_chats([[{"role": "user", "content": "Dogs?"}, *CHAT[4:]]], TURNS + thinking)
    with pytest.raises(PareError, match=r"'chats.jsonl': .*TEACHER = 'x' refuses a chat \(no system"):
        read_chats([CHAT], "{{ raise_exception('no system') }}")


@pytest.mark.parametrize(("good", "bad"), [(0, 1), (1, 1), (1, 2), (150, 2), (150, 3)])
def test_one_bad_row_in_a_hundred_is_passed_over(good, bad, monkeypatch, capsys):
    """Texts that are none, and chats that the template refuses; the first is named, too many are refused."""
    template, none = TURNS.replace("m.content", "'' + m.content"), [{"role": "assistant", "content": None}]
    texts = [*["Dogs met."] * good, *[None] * bad]
    monkeypatch.setattr(data, "open_splits", lambda source: {"train": [{"text": text} for text in texts]})
    for read, rows, message in (
        (lambda rows: list(data.open_source(SOURCE)), texts, "holds NoneType, not"),
        (lambda rows: read_chats(rows, template), [*[CHAT] * good, *[none] * bad], "refuses a chat"),
    ):
        if not good or bad > 1 + (good + bad) / 100:
            with pytest.raises(PareError, match=message):
                read(rows)
        else:
            assert len(read(rows)) == good
            assert f"row {good + 1} as read is passed over" in (said := capsys.readouterr().out)
            assert message in said


def test_a_token_outside_the_vocabulary_is_named_with_its_row_and_source(monkeypatch):
    monkeypatch.setattr(data, "READ_AHEAD", 2)
    chats = [[{"role": "assistant", "content": word}] for word in ("ab", "ab", "ab", "The cats")]
    tokenizer = chat_tokenizer(TURNS)
    largest = max(tokenizer.apply_chat_template(chats[0])["input_ids"])
    read_chats(chats[:3], TURNS, largest + 1)
    with pytest.raises(PareError, match=rf"DATASETS: 'chats.jsonl', row 1 .*token {largest},.*ends at {largest - 1}"):
        read_chats(chats, TURNS, largest)
    texts = ["ab", "ab", "ab", "The cats"]
    with pytest.raises(PareError, match=r"DATASETS: 'chats.jsonl', row 4 .*token \d+, .*ends at 255"):
        list(data.read_documents(iter(texts), SOURCE, tokenizer, 256, "TEACHER = 'x'"))


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows on disk


@pytest.fixture
def teacher(checkpoints, tmp_path):
    """A checkpoint whose tokenizer has a chat template, for a test to change."""
    shutil.copytree(checkpoints["olmo3"], tmp_path / "teacher")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TURNS + PROMPT
    tokenizer.save_pretrained(tmp_path / "teacher")
    return common.find_checkpoint(str(tmp_path / "teacher"), None, "TEACHER")


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """Three files: documents and papers are text, `chats` is what it says."""
    rows = {
        "documents": [{"text": document} for document in DOCUMENTS],
        "papers": [{"body": document.replace("Document", "Paper").replace("dogs", "birds")} for document in DOCUMENTS],
        "chats": [
            {"messages": [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
            for i in range(60)
        ],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def prepare(teacher, output, train, held_out=None, begun=None, **more):
    settings = {
        "datasets": data.read_sources(train, "DATASETS"),
        "eval_datasets": held_out and data.read_sources(held_out, "EVAL_DATASETS"),
        "sequence_length": 64,
        "eval_tokens": 512,
        "num_steps": 20,
        "rows_per_step": 4,
        "train_tokens": 20 * 4 * 64,
        "seed": 0,
        "output_dir": str(output),
    }
    pack = data.prepare_data(Path(output) / "data", teacher, SimpleNamespace(**settings | more), begun)
    hashes = pack()
    assert pack() == hashes
    return *data.open_rows(Path(output) / "data"), hashes


def names_in(rows, tokenizer) -> set[str]:
    """The names of documents, papers and chats that begin in some rows, as `Paper 7`."""
    import re

    text = " ".join(tokenizer.decode(row) for row in rows["input_ids"])
    return set(re.findall(r"(?:Document|Paper|Number) \d+(?=[.?])", text))


def test_a_run_keeps_its_rows_whatever_becomes_of_the_text(teacher, sources, tmp_path, monkeypatch, capsys):
    """Touched, changed or gone; without them, or for another run, they are packed anew."""
    held_out, _, begun = prepare(teacher, tmp_path, sources["documents"])
    text = Path(sources["documents"]).read_text()
    for change in (lambda path: os.utime(path, (1, 1)), lambda path: path.write_text(text[:-200]), os.remove):
        change(Path(sources["documents"]))
        capsys.readouterr()
        again = prepare(teacher, tmp_path, sources["documents"], begun=begun)
        assert again[2] == begun
        assert (again[0][:]["input_ids"] == held_out[:]["input_ids"]).all()
        assert "has changed since; the run goes on with its own rows" in capsys.readouterr().out
    with pytest.raises(PareError, match="does not exist"):
        prepare(teacher, tmp_path, sources["documents"])
    Path(sources["documents"]).write_text(text[text.index("\n") + 1 :])
    assert prepare(teacher, tmp_path, sources["documents"])[2] != begun


def test_rows_that_another_machine_cannot_see(tmp_path):
    with pytest.raises(PareError, match=r"OUTPUT_DIR: .*all machines must see the same"):
        data.open_rows(tmp_path / "data")


@pytest.mark.parametrize("read_ahead", [1, 7, 64])
def test_held_out_documents_are_never_trained_on(read_ahead, teacher, sources, tmp_path, monkeypatch, capsys):
    """Text of two sources and chats, held out in proportion to the weights; the same rows whatever is read ahead."""
    train = [sources["documents"], {"name": sources["papers"], "column": "body", "weight": 2}, sources["chats"]]
    hashes = [prepare(teacher, tmp_path / "first", train)[2]]
    monkeypatch.setattr(data, "READ_AHEAD", read_ahead)
    capsys.readouterr()
    held_out, rows, more = prepare(teacher, tmp_path / "second", train)
    assert hashes == [more]
    tokenizer = build_tokenizer()
    names = [names_in(part, tokenizer) for part in (held_out, rows)]
    assert not names[0] & names[1]
    for kind in ("Document", "Paper", "Number"):
        assert all(any(name.startswith(kind) for name in part) for part in names), kind
    assert (len(held_out), len(rows)) == (8, 80)
    printed = capsys.readouterr().out
    assert "88 rows of 64 tokens" in printed
    shares = [float(line.split("%")[0]) for line in printed.splitlines() if "% from " in line]
    assert len(shares) == 6
    assert shares[3:] == pytest.approx([25, 50, 25], abs=5)


def test_only_answers_and_text_are_counted(teacher, sources, tmp_path):
    _, rows, _ = prepare(teacher, tmp_path / "out", [sources["documents"], sources["chats"]])
    tokenizer = build_tokenizer()
    chats = text = 0
    for row in rows:
        ends = np.flatnonzero(row["position_ids"] == 0)
        for start, end in itertools.pairwise([*ends, 64]):
            ids, counted = row["input_ids"][start:end], row["counted"][start:end]
            assert not counted[-1]
            predicted = tokenizer.decode(ids[1:][counted[:-1]])
            if "<|user|>" in tokenizer.decode(ids):
                chats += 1
                assert predicted.startswith("It is ")
                assert "Number" not in predicted
            elif (ids == 0).all():
                assert not counted.any()
            else:
                text += 1
                assert counted[:-1].all()
    assert min(chats, text) > 5


def test_the_evaluation_text_may_come_from_several_sources(teacher, sources, tmp_path):
    evaluated = [{"name": sources["papers"], "column": "body"}, sources["chats"]]
    held_out, rows, _ = prepare(teacher, tmp_path / "out", sources["documents"], evaluated)
    kinds = [{name.split()[0] for name in names_in(part, build_tokenizer())} for part in (held_out, rows)]
    assert kinds == [{"Paper", "Number"}, {"Document"}]


def test_packed_text_is_used_again_without_a_look_at_its_source(teacher, sources, tmp_path, monkeypatch):
    train = [sources["documents"], sources["chats"]]
    first = prepare(teacher, tmp_path / "out", train)
    monkeypatch.setattr(data, "open_splits", None)  # whoever opens a source now fails
    assert prepare(teacher, tmp_path / "out", train)[2] == first[2]


def lowercase(path, **_):
    """The same vocabulary, another way to it."""
    file = path / "teacher" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))


CHANGES = {  # what may change between two runs -> how
    "the tokenizer": lowercase,
    "a file": lambda path, **_: (path / "documents.jsonl").write_text(json.dumps({"text": DOCUMENTS[0] * 20}) + "\n"),
    "the chat template": lambda path, **_: (path / "teacher" / "chat_template.jinja").write_text("!" + TURNS + PROMPT),
    "a weight": lambda train, **_: train[1].update(weight=3),
    "the seed": lambda settings, **_: settings.update(seed=1),
    "the length of rows": lambda settings, **_: settings.update(sequence_length=32),
    "the held-out tokens": lambda settings, **_: settings.update(eval_tokens=128),
    "the steps": lambda settings, **_: settings.update(num_steps=3),
    "the order of the sources": lambda train, **_: train.reverse(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_packed_text_is_made_anew_when_something_changed(what, teacher, sources, tmp_path):
    train, settings = [{"name": sources["documents"]}, {"name": sources["chats"]}], {}
    first = prepare(teacher, tmp_path / "out", train)[2]
    CHANGES[what](path=tmp_path, train=train, settings=settings)
    assert prepare(teacher, tmp_path / "out", train, **settings)[2] != first


def test_a_run_on_text_and_chats(teacher, sources, tmp_path):
    """From the constants to the card, on rows of which some are padded and some chats."""
    for name, value in {
        "TEACHER": str(teacher.folder),
        "STUDENT": str(teacher.folder),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "SEQUENCE_LENGTH": 32,
        "TRAIN_TOKENS": 2 * 128,
        "TOKENS_PER_STEP": 128,
        "MICRO_BATCH_SIZE": 2,
        "EVAL_TOKENS": 128,
        "DEVICE": "cpu",
    }.items():
        setattr(distill, name, value)
    more = [{"name": sources["papers"], "column": "body", "weight": 0.5}, sources["chats"]]
    common.override_constants(distill, [f"DATASETS={more}"])
    folder = distill.main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert f"`{sources['papers']}`, `{sources['chats']}`" in " ".join((folder / "README.md").read_text().split())
