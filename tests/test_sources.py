"""Sources: files, folders, hub data sets and tasks give their rows; what is missing or in doubt is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.data.source import read_rows
from tandem.errors import DataError

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def values(source):
    return [record.values for record in read_rows(str(source))]


def test_task_of_the_project_by_name():
    train, held_out = values("tandem:addition"), values("tandem:addition:test")
    for row in (*train[:50], *held_out[:50]):
        a, b = row["question"].split("+")
        assert int(row["answer"]) == int(a) + int(b)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    with pytest.raises(DataError, match="no such task"):
        values("tandem:nothing")


def test_folder_reads_the_files_of_its_most_frequent_format_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / ".hidden.jsonl", ROWS)
    (tmp_path / "LICENSE.txt").write_text("words", encoding="utf-8")
    records = list(read_rows(str(tmp_path)))
    assert [record.values for record in records] == ROWS
    assert [Path(record.place).name for record in records] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]


def test_folder_of_save_to_disk_is_read_without_its_bookkeeping(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == ROWS


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.jsonl", "test.jsonl"], r"different splits \(test\.jsonl, train\.jsonl\); name the file"),
        (["a.jsonl", "b.csv"], r"1 \.jsonl and 1 \.csv files; name the file"),
        (["notes.md"], r"no data files \(\.jsonl, .*it holds notes\.md"),
    ],
)
def test_folder_that_leaves_a_doubt_is_refused(names, said, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=said):
        values(tmp_path)


def test_missing_file_is_named_in_full_with_the_nearest_names(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"\({tmp_path}/trian\.jsonl\); did you mean train\.jsonl\?"):
        values("trian.jsonl")
    with pytest.raises(DataError, match=rf"there is no {tmp_path}/no/such, the path ends at {tmp_path}$"):
        values("no/such/train.jsonl")


def test_slash_after_a_file_name_is_forgiven(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert values(f"{tmp_path}/train.jsonl/") == ROWS


def test_unknown_format_names_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"rows\.xlsx: unknown format '\.xlsx'; known are \.jsonl, \.json, \.csv"
    ):
        values(tmp_path / "rows.xlsx")


HUB = """
import time
from tandem.data.source import read_rows
from tandem.errors import DataError
start = time.monotonic()
try:
    print([(r.place, r.values["answer"]) for r in read_rows(NAME)])
except DataError as error:
    print("DataError", error)
print(f"{time.monotonic() - start:.1f}")
"""


def hub(name, **environment):
    """What reading a hub name in a fresh process prints, and its seconds (import of the library apart)."""
    outcome = subprocess.run(
        [sys.executable, "-c", HUB.replace("NAME", repr(name))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    *said, seconds = outcome.stdout.strip().splitlines()
    return "\n".join(said), float(seconds)


def test_hub_name_without_a_network_fails_in_seconds_with_a_remedy():
    # Port 9 of this machine refuses connections: an unreachable hub, whatever network there is.
    said, seconds = hub("owner/name:train", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert said.startswith("DataError owner/name:train: no such file or folder")
    assert "the Hugging Face hub give a data set 'owner/name'" in said and "set HF_HUB_OFFLINE=1" in said
    assert seconds < 10


def test_hub_data_set_is_read_by_name_configuration_and_split_from_the_cache(tmp_path):
    from datasets import load_dataset

    folder, cache = tmp_path / "demo", tmp_path / "cache"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    load_dataset(str(folder), split="train", cache_dir=str(cache))
    (cache / "demo").rename(cache / "owner___demo")  # where the library keeps what it has from the hub
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    said, _ = hub("owner/demo/default:train", **offline)
    assert said == str(
        [(f"owner/demo/default:train, row {i}", row["answer"]) for i, row in enumerate(ROWS, 1)]
    )
    said, _ = hub("owner/demo:tset", **offline)
    assert "split 'tset') cannot be loaded: Unknown split" in said


def test_a_dataset_script_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(canary)!r}, 'w')", encoding="utf-8")
    for source in (tmp_path / "evil", tmp_path / "evil" / "evil.py"):
        with pytest.raises(DataError):
            values(source)
    assert not canary.exists()
