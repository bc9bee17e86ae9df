"""What is refused before anything slow: an evaluation that vLLM cannot sample, and files that no converter can cut."""

import pytest

from small_recipe import recipe
from tandem.checkpoint.convert import convert
from tandem.config import load
from tandem.errors import ConfigError
from tandem.train.check import check
from tandem.train.run import Launch, train


def test_an_evaluation_that_vllm_cannot_sample_is_refused_by_its_own_key(tmp_path):
    """It needs no vLLM: whatever is wrong is said before an engine starts."""
    path = recipe(
        tmp_path,
        engine={"kind": "vllm"},
        sampling={"min_answer_tokens": 4},
        eval={"temperature": 0.6},
        journal={"samples": 0, "sinks": ["jsonl"]},
    )
    with pytest.raises(ConfigError, match=r"^eval.temperature=0.6 together with .*min_tokens=4"):
        train(load(path), Launch(recipe=str(path)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["sampling.top_p=0.9", "sampling.temperature=0.7"], "sampling.temperature=0.7 together with "),
        (["sampling.temperature=0.001"], "sampling.temperature=0.001: vLLM samples at "),
        (["eval.temperature=0.6", "sampling.min_answer_tokens=4"], "eval.temperature=0.6 together with "),
        (
            ["engine.max_model_len=20"],
            "prompt and answer take up to 36 tokens, above the engine's limit of 20",
        ),
    ],
)
def test_the_check_refuses_what_the_run_refuses_of_vllm(tmp_path, keys, said):
    path = recipe(tmp_path, engine={"kind": "vllm"}, journal={"samples": 0, "sinks": ["jsonl"]})
    found = [
        line.text for line in check(load(path, keys)) if (line.status, line.name) == ("problem", "engine")
    ]
    with pytest.raises(ConfigError) as refused:
        train(load(path, keys), Launch(recipe=str(path)))
    assert found == [str(refused.value)] and found[0].startswith(said)


@pytest.mark.parametrize("size", [0.0, -1.0, float("inf"), float("nan")])
def test_files_of_no_size_or_without_end_are_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=r"--shard-gb .* must be above 0 and finite"):
        convert(tmp_path, tmp_path / "new", "hf", shard_gb=size)
    assert not (tmp_path / "new").exists()
