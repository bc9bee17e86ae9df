"""The column that says whether functions or the model score a row: its values, and what is said of others."""

import json
import re
from pathlib import Path

import pytest

from tandem.config.sections import Data
from tandem.data.prompts import PromptSet, load_prompts
from tandem.errors import DataError
from tandem.model.new import new_tokenizer


def load_kinds(path: Path, *kinds: object, on_bad_row: str = "error") -> PromptSet:
    """Rows with these values of the column `kind`, as JSON."""
    path.write_text("".join(f'{{"question": "q", "answer": "a", "kind": {kind}}}\n' for kind in kinds))
    data = Data(train=str(path), template="plain", on_bad_row=on_bad_row)
    return load_prompts(data, str(path), new_tokenizer(), reward_column="kind")


def test_the_column_says_who_scores_a_row(tmp_path):
    kinds = ["1", "0", '"rule"', '"model"', '" 1"', '"0"', "1.0", "0.0"]
    loaded = load_kinds(tmp_path / "rows.jsonl", *kinds)
    assert [p.scored_by for p in loaded.prompts] == ["rule", "model"] * 4
    data = Data(train=str(tmp_path / "rows.jsonl"), template="plain")
    assert {p.scored_by for p in load_prompts(data, data.train, new_tokenizer()).prompts} == {None}


@pytest.mark.parametrize("kind", ["null", "2", '"Rule"', "true", "[1]", "{}", "0.5", "NaN"])
def test_another_value_of_the_column_is_a_bad_row(kind, tmp_path):
    shown = re.escape(str(json.loads(kind)))
    said = rf"rows\.jsonl:2: column 'kind' \(reward\.column\): expected 1 or rule, 0 or model, got '?{shown}'?; mend"
    with pytest.raises(DataError, match=said):
        load_kinds(tmp_path / "rows.jsonl", 0, kind)
    assert load_kinds(tmp_path / "rows.jsonl", 0, kind, on_bad_row="skip").bad == 1


def test_a_row_without_the_column_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}')
    said = r"rows\.jsonl:1: no column 'kind' \(reward\.column\); .* question, answer; set reward\.column=null"
    with pytest.raises(DataError, match=said):
        load_prompts(
            Data(train=str(path), template="plain"), str(path), new_tokenizer(), reward_column="kind"
        )


def test_a_row_that_the_model_scores_needs_no_truth(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"question": "q", "kind": 0}',
        '{"question": "q", "kind": 0, "answer": " "}',
        '{"question": "q", "kind": 0, "answer": 7}',
    ]
    path.write_text("\n".join(rows))
    data = Data(train=str(path), template="plain")
    loaded = load_prompts(data, str(path), new_tokenizer(), reward_column="kind")
    assert [p.truth for p in loaded.prompts] == [None, None, "7"]
    path.write_text('{"question": "q", "kind": 1}')
    with pytest.raises(DataError, match="no column 'answer'"):
        load_prompts(data, str(path), new_tokenizer(), reward_column="kind")
