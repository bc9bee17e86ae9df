"""Files, rows, length limits: nothing lost, nothing doubled, every fault named with its place."""

import csv
import json
import time

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from published import FOLDER, needs
from tandem.config.sections import Data
from tandem.data.prompts import load_prompts
from tandem.data.source import read_rows
from tandem.errors import DataError

GSM8K = FOLDER / "train.jsonl"
ROWS = [
    {"question": "What is 1 + 1?", "answer": "2"},
    {"question": "Wie viel ist 2 + 3? \u2028 \u6570", "answer": "5"},
    {"question": 'Say "a, b".\nThen stop.', "answer": "a, b"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with a few merges learned on the spot; `bos` is known but not added by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([row["question"] for row in ROWS], trainer)
    core.add_special_tokens([AddedToken("<bos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow_stream(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "array.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2), encoding="utf-8"),
    "rows.csv": write_csv,
    "ROWS.PARQUET": write_parquet,
    "stream.arrow": write_arrow_stream,
    "file.arrow": write_arrow_file,
}


def load(path, tokenizer, limit=None, **options):
    options = {"template": "plain", **options}
    return load_prompts(Data(train=str(path), **options), str(path), tokenizer, limit=limit)


def load_lines(path, tokenizer, *lines, **options):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return load(path, tokenizer, **options)


def values(source):
    return [record.values for record in read_rows(str(source))]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_and_prompts(name, tmp_path, tokenizer):
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    assert values(path) == ROWS
    prompts = load(path, tokenizer).prompts
    assert [(p.id, p.text, p.question, p.truth, p.row) for p in prompts] == [
        (i, row["question"], row["question"], row["answer"], row) for i, row in enumerate(ROWS)
    ]
    assert [tokenizer.decode(p.tokens) for p in prompts] == [row["question"] for row in ROWS]


def test_text_file_is_one_question_per_line(tmp_path, tokenizer):
    path = tmp_path / "questions.txt"
    loaded = load_lines(path, tokenizer, "one", "", "two", columns={"truth": None})
    assert [(p.question, p.truth) for p in loaded.prompts] == [("one", None), ("two", None)]


GOOD = '{"question": "q", "answer": "a"}'
BAD_LINES = [
    ('{"question": "q", "answer": "a"', r"not valid JSON \(Expecting ',' delimiter at column"),
    ("[1, 2]", "an array, not an object with named columns"),
    ("null", "null, not an object"),
    ("[" * 100_000, "not valid JSON"),
    (b'{"question": "caf\xe9", "answer": "a"}', r"not UTF-8 text \(byte 0xe9"),
    ('{"answer": "a"}', r"no column 'question' \(data\.columns\.question\); the columns are: answer"),
    ('{"question": "q"}', r"no column 'answer' \(data\.columns\.truth\).*set data\.columns\.truth=null"),
    ('{"question": null, "answer": "a"}', "column 'question': expected text, got None"),
    ('{"question": 3, "answer": "a"}', "column 'question': expected text, got 3"),
    ('{"question": " ", "answer": "a"}', "column 'question': is empty"),
    ('{"question": "\\ud800", "answer": "a"}', "column 'question': holds half a surrogate pair"),
    ('{"question": "q", "answer": null}', "column 'answer': expected text, got None"),
    ('{"question": "q", "answer": true}', "column 'answer': expected text, got True"),
    ('{"question": "q", "answer": NaN}', "column 'answer': nan is no answer"),
    ('{"question": "q", "answer": ["a"]}', r"column 'answer': expected text, got \['a'\]"),
    ('{"question": [], "answer": "a"}', "the last message must be the user's"),
    ('{"question": ["hi"], "answer": "a"}', "message 1: expected an object with role and content"),
    ('{"question": [{"role": "bot", "content": "x"}], "answer": "a"}', "role 'bot' is none of system, user"),
    (
        '{"question": [{"role": "assistant", "content": "x"}], "answer": "a"}',
        "last message must be the user's",
    ),
    (
        '{"question": [{"role": "user", "content": "x"}, {"role": "system", "content": "s"},'
        ' {"role": "user", "content": "x"}], "answer": "a"}',
        "a system message can only come first",
    ),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_bad_row_is_named_by_file_line_and_field_or_skipped_and_counted(line, said, tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{said}.*on_bad_row=skip"):
        load_lines(path, tokenizer, GOOD, line, "", GOOD)
    loaded = load(path, tokenizer, on_bad_row="skip")
    assert [p.id for p in loaded.prompts] == [0, 2]
    assert (loaded.read, loaded.bad) == (3, 1)
    assert loaded.bad_rows[0].startswith(f"{path}:2: ")
    assert f"1 bad left out, the first: {path}:2: " in loaded.sentence()


def test_byte_order_mark_crlf_and_blank_lines_are_no_part_of_the_rows(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n  \r\n{GOOD}\r\n".encode())
    assert [record.place for record in read_rows(str(path))] == [f"{path}:1", f"{path}:4"]
    assert [p.question for p in load(path, tokenizer).prompts] == ["q", "q"]
    table = tmp_path / "train.csv"
    table.write_bytes(b"\xef\xbb\xbfquestion,answer\r\nq,a\r\n\r\nr,b\r\n")
    assert values(table) == [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv", "e.txt"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file_says_so(name, content, tmp_path, tokenizer):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: no rows in it"):
        load(path, tokenizer)


@pytest.mark.parametrize("name", ["u.jsonl", "u.csv", "u.txt"])
def test_utf16_is_refused_with_the_remedy(name, tmp_path, tokenizer):
    path = tmp_path / name
    path.write_text(GOOD, encoding="utf-16")
    with pytest.raises(DataError, match=rf"{name}: is UTF-16 text; save it as UTF-8"):
        load(path, tokenizer)


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1 this is no table"])
def test_damaged_table_is_a_data_error(name, content, tmp_path, tokenizer):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        load(path, tokenizer)


def test_array_that_is_not_json_is_named_by_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"question": "q"},\n{"question" "q"}\n]', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json:3: not valid JSON \(Expecting ':' delimiter"):
        values(path)
    path.write_bytes(b'[\n{"question": "caf\xe9"}]')
    with pytest.raises(DataError, match=r"a\.json:2: not UTF-8"):
        values(path)


def test_json_file_with_one_object_over_many_lines_is_told_what_is_expected(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": ROWS}, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json:1: .*holds an array of rows, or one row on each line"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"only one field", "1 fields where the header has 2"),
        (b'"a" b,c', "not valid CSV"),
        (b"caf\xe9,a", "column 'question' is not UTF-8 text"),
        (b"q,", "column 'answer': is empty"),
    ],
)
def test_bad_csv_row_is_named_by_the_line_it_begins_in(row, said, tmp_path, tokenizer):
    path = tmp_path / "t.csv"
    path.write_bytes(b'question,answer\n"two\nlines",a\n' + row + b"\nq,a\n")
    with pytest.raises(DataError, match=rf"t\.csv:4: {said}"):
        load(path, tokenizer)
    assert [p.question for p in load(path, tokenizer, on_bad_row="skip").prompts] == ["two\nlines", "q"]


def test_csv_header_with_a_column_twice_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"t\.csv:1: the header names a column twice: q, q"):
        load_lines(tmp_path / "t.csv", tokenizer, "q,q", "1,2")


@pytest.mark.parametrize(("truth", "read"), [("x", "x"), (" x\n", "x"), (7, "7"), (-0.5, "-0.5"), (0, "0")])
def test_truth_is_text_or_number(truth, read, tmp_path, tokenizer):
    loaded = load_lines(tmp_path / "t.jsonl", tokenizer, json.dumps({"question": "q", "answer": truth}))
    assert loaded.prompts[0].truth == read


def test_truth_after_keeps_what_follows_the_last_marker(tmp_path, tokenizer):
    def truth_of(answer):
        line = json.dumps({"question": "q", "answer": answer})
        return load_lines(tmp_path / "t.jsonl", tokenizer, line, truth_after="####").prompts[0].truth

    assert truth_of("4 #### 5\n#### 1,234 \n") == "1,234"
    with pytest.raises(DataError, match=r"t\.jsonl:1: column 'answer': 'no mark' does not hold '####'"):
        truth_of("no mark")
    with pytest.raises(DataError, match=r"t\.jsonl:1: column 'answer': nothing follows the last '####'"):
        truth_of("5 #### ")


def test_columns_are_taken_by_name(tmp_path, tokenizer):
    line = '{"prompt": "q", "gold": "g", "persona": "Be kind."}'
    columns = {"question": "prompt", "truth": "gold", "system": "persona"}
    (prompt,) = load_lines(tmp_path / "t.jsonl", tokenizer, line, columns=columns).prompts
    assert (prompt.text, prompt.question, prompt.truth) == ("Be kind.\nq", "q", "g")


def test_system_message_of_the_row_goes_before_the_configs(tmp_path, tokenizer):
    dialog = {"question": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}
    lines = [
        json.dumps(row)
        for row in (dialog | {"s": "x"}, {"question": "q", "s": "s"}, {"question": "q", "s": None})
    ]
    loaded = load_lines(
        tmp_path / "t.jsonl", tokenizer, *lines, columns={"truth": None, "system": "s"}, system="config"
    )
    assert [p.text for p in loaded.prompts] == ["own\nq", "s\nq", "config\nq"]


def test_question_of_a_dialog_is_the_users_last_message(tmp_path, tokenizer):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three")]
    row = {"question": [{"role": role, "content": content} for role, content in turns], "answer": "a"}
    write_parquet(tmp_path / "t.parquet", [row])
    (prompt,) = load(tmp_path / "t.parquet", tokenizer).prompts
    assert (prompt.question, prompt.text) == ("three", "onetwothree")


def lengths_of(*words):
    """Lines whose prompts have so many tokens: `%` merges with nothing in the tokenizer of this file."""
    return [json.dumps({"question": "%" * count, "answer": "a"}) for count in words]


def test_overlong_prompt_is_an_error_with_place_length_and_remedy(tmp_path, tokenizer):
    said = (
        r"2 of 4 prompts are longer than data\.max_prompt_tokens=5: "
        r".*t\.jsonl:2 \(6 tokens\), .*t\.jsonl:4 \(9 tokens\); "
        r"raise the limit, or set data\.on_overlong to skip or truncate"
    )
    with pytest.raises(DataError, match=said):
        load_lines(tmp_path / "t.jsonl", tokenizer, *lengths_of(5, 6, 4, 9), max_prompt_tokens=5)


def test_overlong_prompts_are_skipped_and_counted(tmp_path, tokenizer):
    loaded = load_lines(
        tmp_path / "t.jsonl", tokenizer, *lengths_of(5, 6, 4, 9), max_prompt_tokens=5, on_overlong="skip"
    )
    assert [(p.id, len(p.tokens)) for p in loaded.prompts] == [(0, 5), (2, 4)]
    assert (loaded.overlong, loaded.read, loaded.lengths) == (2, 4, (4, 4.5, 5))
    assert "2 prompts from" in loaded.sentence() and "2 overlong left out" in loaded.sentence()


def test_truncation_keeps_the_end_of_the_prompt_and_its_bos_token(tmp_path, tokenizer):
    line = json.dumps({"question": "%%%%123", "answer": "a"})
    cut = {"max_prompt_tokens": 4, "on_overlong": "truncate"}
    loaded = load_lines(tmp_path / "t.jsonl", tokenizer, line, *lengths_of(4), **cut)
    assert [p.text for p in loaded.prompts] == ["%123", "%%%%"]
    assert loaded.prompts[0].question == "%%%%123"
    assert [tokenizer.decode(p.tokens) for p in loaded.prompts] == ["%123", "%%%%"]
    assert loaded.overlong == 1 and "1 overlong cut to their end" in loaded.sentence()
    own = tmp_path / "bos.yaml"
    own.write_text("bos: always", encoding="utf-8")
    loaded = load_lines(tmp_path / "t.jsonl", tokenizer, line, template=str(own), **cut)
    assert loaded.prompts[0].text == "<bos>123"


def test_row_of_ten_megabytes_is_overlong_and_no_more(tmp_path, tokenizer):
    big = json.dumps({"question": "word " * 2_000_000, "answer": "a"})
    started = time.monotonic()
    loaded = load_lines(tmp_path / "t.jsonl", tokenizer, GOOD, big, GOOD, on_overlong="skip")
    assert [p.id for p in loaded.prompts] == [0, 2] and loaded.overlong == 1
    (whole,) = load_lines(tmp_path / "t.jsonl", tokenizer, big, on_overlong="truncate").prompts
    assert whole.tokens == tuple(tokenizer.encode("word " * 1000)[-512:])
    assert time.monotonic() - started < 20
    path = tmp_path / "t.csv"
    write_csv(path, [{"question": "word " * 2_000_000, "answer": "a"}])
    assert len(values(path)[0]["question"]) == 10_000_000


def test_source_without_a_usable_row_says_why(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"none of its 2 rows gives a prompt: 1 are bad \(the first: .*t\.jsonl:1: "
    ):
        load_lines(
            tmp_path / "t.jsonl",
            tokenizer,
            "{}",
            *lengths_of(9),
            max_prompt_tokens=5,
            on_bad_row="skip",
            on_overlong="skip",
        )


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path, tokenizer):
    loaded = load_lines(tmp_path / "t.jsonl", tokenizer, GOOD, GOOD, "{", limit=2)
    assert (loaded.read, len(loaded.prompts)) == (2, 2)


def test_fingerprint_changes_with_any_question_truth_or_order_and_with_nothing_else(tmp_path, tokenizer):
    def of(*rows, **options):
        lines = [json.dumps(row) for row in rows]
        return load_lines(
            tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", tokenizer, *lines, **options
        ).fingerprint

    first = of(*ROWS)
    assert first == of(*(row | {"note": 1} for row in ROWS))
    changed = [{**ROWS[0], "answer": "3"}, *ROWS[1:]]
    assert len({first, of(*ROWS[:2]), of(*reversed(ROWS)), of(*changed), of(*ROWS, limit=1)}) == 5


@needs(GSM8K)
def test_gsm8k_gives_every_question_with_its_gold_in_seconds(tokenizer):
    started = time.monotonic()
    loaded = load(GSM8K, tokenizer, truth_after="####", template="qwen_r1", max_prompt_tokens=2000)
    assert time.monotonic() - started < 15
    assert (len(loaded.prompts), loaded.read, loaded.bad, loaded.overlong) == (7473, 7473, 0, 0)
    assert [p.truth for p in loaded.prompts[:5]] == ["72", "10", "5", "42", "624"]
    assert loaded.prompts[0].question.startswith("Natalia sold clips to 48 of her friends in April")
    assert sum("," in p.truth for p in loaded.prompts) == sum(
        "," in json.loads(line)["answer"].split("####")[1] for line in GSM8K.open(encoding="utf-8")
    )


def test_a_column_within_another_is_named_with_a_dot(tokenizer, tmp_path):
    """As in the files of verl. A column that has the whole name comes first."""
    row = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
    }
    columns = {"question": "prompt", "truth": "reward_model.ground_truth"}
    file = tmp_path / "verl.jsonl"

    def truths(*rows):
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return [p.truth for p in load(file, tokenizer, columns=columns, template="plain").prompts]

    assert truths(row, row | {"reward_model.ground_truth": "5"}) == ["4", "5"]
    with pytest.raises(
        DataError, match=r"no column 'ground_truth' \(data.columns.truth\); the columns are: style"
    ):
        truths(row | {"reward_model": {"style": "rule"}})
