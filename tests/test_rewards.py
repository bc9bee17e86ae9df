"""The scorer fills functions by name, sums their scores, and treats failures as the configuration says."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scoring import answer, group, kinds, number
from tandem.config.reward import Reward
from tandem.errors import ConfigError, RunError
from tandem.rewards.scorer import Scorer, overlong
from tandem.rewards.watch import FailureWatch
from tandem.types import Score

pytest_plugins = ["reward_fixtures"]


def test_scores_come_back_in_place_whatever_the_number_of_workers(scorer: Callable[..., Scorer]) -> None:
    groups = [[answer(number(i * j), truth=str(i * j if j % 2 else -1)) for j in range(i)] for i in range(20)]
    expected = [[1.0 if j % 2 else -1.0 for j in range(i)] for i in range(20)]
    for workers in (1, 3):
        scores = scorer("answer_number", workers=workers).score(groups)
        assert [[s.reward for s in g] for g in scores] == expected


def test_a_thousand_short_answers_take_well_under_a_second(scorer: Callable[..., Scorer]) -> None:
    one = scorer("answer_number")
    one.ready()
    start = time.perf_counter()
    scores = one.score([[answer(number(i % 8)) for i in range(8)] for _ in range(128)])
    assert time.perf_counter() - start < 1.0
    assert [s.reward for s in scores[77]] == [-1.0] * 4 + [1.0] + [-1.0] * 3


def test_the_reward_is_the_weighted_sum_and_the_parts_are_unweighted(scorer: Callable[..., Scorer]) -> None:
    one = scorer(
        {"name": "answer_number", "weight": 2.0, "args": {"wrong": 0.0}},
        {"name": "format_tags", "weight": -0.5},
    )
    right, wrong = one.score([[answer("<think>a</think>" + number(4)), answer(number(5))]])[0]
    assert (right.reward, right.parts) == (2.0 - 0.625, {"answer_number": 1.0, "format_tags": 1.25})
    assert (wrong.reward, wrong.parts) == (0.5, {"answer_number": 0.0, "format_tags": -1.0})


def test_any_failed_function_fails_the_answer(own: Path, scorer: Callable[..., Scorer]) -> None:
    scores = scorer("format", f"{own}:behave", f"{own}:one_bad").score([group("fine", "raise", "bad")])[0]
    assert kinds(scores) == [2.0, "error", "invalid"]
    assert scores[0].parts == {"format": 0.0, f"{own}:behave": 1.0, f"{own}:one_bad": 1.0}


def test_a_truth_that_is_no_number_is_an_error_and_not_a_zero(scorer: Callable[..., Scorer]) -> None:
    scores = scorer("answer_number").score([[answer(number(4), truth="four"), answer(number(4))]])[0]
    assert kinds(scores) == ["error", 1.0]
    assert "four" in scores[0].detail


def test_parameters_are_filled_by_name(own: Path, scorer: Callable[..., Scorer]) -> None:
    name = f"{own}:everything"
    asked = answer(
        "abc", truth="4", question="qq", row={"n": 100, "image": b"\x00", "at": object()}, tokens=20
    )
    cut = answer("abc", truth="4", question="qq", row={"n": 0}, tokens=20, finish="length")
    scores = scorer({"name": name, "args": {"bonus": 0.5}}).score([[asked], [cut]])
    assert [s[0].reward for s in scores] == [100 + 20 + 0.5 + 1 + 1 + 2 + 3, 20 + 0.5 + 0 + 1 + 2 + 3]


def test_a_module_on_the_path_of_this_process_is_found_by_the_workers(
    own: Path, scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(own.parent))
    assert scorer("own:behave").score([group("fine")])[0][0].reward == 1.0


def test_paths_and_modules_are_taken_from_the_current_folder(
    own: Path, scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    (own.parent / "json.py").write_text("raise SystemExit('shadowed the standard library')")
    one = scorer("own.py:behave", "own:rank")
    monkeypatch.chdir("/")
    assert kinds(one.score([group("fine", "none")])[0]) == [1.0, "invalid"]


def test_a_group_function_sees_the_whole_group_once(own: Path, scorer: Callable[..., Scorer]) -> None:
    groups = [[answer("a", tokens=t) for t in lengths] for lengths in ([5, 3, 9], [1], [2, 1])]
    scores = scorer(f"{own}:rank", f"{own}:group_later", workers=2).score(groups)
    assert [[s.reward - 2.0 for s in g] for g in scores] == [[1.0, 0.0, 2.0], [0.0], [1.0, 0.0]]


def test_a_list_of_the_wrong_length_fails_its_group_and_names_both_lengths(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    scores = scorer(f"{own}:short").score([group("a", "b", "c")])[0]
    assert kinds(scores) == ["invalid"] * 3
    assert "short: returned 2 scores for 3 answers" in scores[1].detail
    assert kinds(scorer(f"{own}:nothing").score([group("a")])[0]) == ["invalid"]


def test_a_groups_async_answers_are_awaited_together(own: Path, scorer: Callable[..., Scorer]) -> None:
    one = scorer(f"{own}:later", timeout_s=2.0)
    one.ready()
    start = time.monotonic()
    assert kinds(one.score([group(*["ab"] * 16)])[0]) == [2.0] * 16
    assert time.monotonic() - start < 1.5
    one = scorer(f"{own}:later", timeout_s=0.6)
    scores = one.score([group("a", "sleep", "raise"), group("a", "block"), group("a")])
    assert [kinds(g) for g in scores] == [[1.0, "timeout", "error"], ["timeout", "timeout"], [1.0]]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ({"name": "acuracy"}, "did you mean 'accuracy'"),
        ({"name": "nonsense"}, "built-ins: acc,"),
        ({"name": "accuracy", "args": {"rihgt": 1}}, "no parameter rihgt"),
        ({"name": "accuracy", "args": {"truth": "4"}}, "args may not set truth"),
        ({"name": "missing.py:score"}, "there is no file"),
        ({"name": "own.py:not a name"}, "not a function's name"),
        ({"name": "a/b:score"}, "neither a module nor a .py file"),
    ],
)
def test_a_bad_name_is_refused_before_a_worker_starts(function: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Scorer(Reward(functions=[function]), max_answer_tokens=100)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("behve", "has no 'behve'; did you mean 'behave'"),
        ("needs_more", "nothing fills judge, limit"),
        ("both", "take one of them"),
        ("constant", "cannot be called"),
    ],
)
def test_a_function_that_cannot_be_called_is_a_config_error(
    function: str, says: str, own: Path, scorer: Callable[..., Scorer]
) -> None:
    one = scorer(f"{own}:{function}")
    with pytest.raises(ConfigError, match=says):
        one.ready()


def test_a_module_that_fails_to_import_is_a_config_error_with_its_line(
    tmp_path: Path, scorer: Callable[..., Scorer]
) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nraise OSError('no judge model')\n")
    with pytest.raises(ConfigError, match=r"OSError: no judge model \(broken.py:2\)"):
        scorer(f"{tmp_path}/broken.py:score").ready()
    (tmp_path / "deadly.py").write_text("import os\nprint('last words', flush=True)\nos._exit(7)\n")
    with pytest.raises(RunError, match=r"status 7; last output: 'last words'"):
        scorer(f"{tmp_path}/deadly.py:score").ready()


def test_the_same_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="may stand once"):
        Reward(functions=[{"name": "format"}, {"name": "format"}])


def test_on_failure_zero_counts_as_nothing_gained_and_is_still_watched(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    scores = scorer(f"{own}:behave", on_failure="zero", overlong_buffer=50).score([group("raise", "fine")])[0]
    assert (scores[0].reward, scores[0].failure) == (0.0, None)
    assert scores[0].detail.startswith("error: ")
    assert scores[1].detail == ""
    watch = FailureWatch(0.2)
    for _ in range(2):
        watch.observe(scores)
    with pytest.raises(RunError, match=r"3 error.*KeyError"):
        watch.observe(scores)


def test_on_failure_raise_names_function_question_and_reason(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    one = scorer(f"{own}:behave", on_failure="raise")
    with pytest.raises(RunError, match=r"own.py:behave: KeyError.*begins '2\+2\?'"):
        one.score([group("fine", "raise")])
    assert kinds(one.score([group("fine")])[0]) == [1.0]


def test_the_overlong_penalty_is_zero_then_linear_then_full(scorer: Callable[..., Scorer]) -> None:
    assert [overlong(t, 100, 20, 0.5) for t in (0, 80, 90, 100)] == [0.0, 0.0, -0.25, -0.5]
    one = scorer("answer_number", overlong_buffer=20, overlong_penalty=0.5)
    scores = one.score([[answer(number(4), tokens=t) for t in (80, 90, 100)]])[0]
    assert [s.reward for s in scores] == [1.0, 0.75, 0.5]
    assert [s.parts["overlong"] for s in scores] == [0.0, -0.25, -0.5]
    assert [s.merit for s in scores] == [1.0, 1.0, 1.0]


def test_the_watch_stops_at_the_third_bad_step_in_a_row_only() -> None:
    good, late, dead = (
        Score(reward=1.0),
        Score(failure="timeout", detail="f: late"),
        Score(failure="died", detail="f: dead"),
    )
    watch = FailureWatch(0.25)
    bad, border = [good, late, dead, good], [late, good, good, good]
    for step in (bad, bad, border, bad, bad):
        watch.observe(step)
    with pytest.raises(RunError, match=r"3 timeout, 3 died\). The first: f: late"):
        watch.observe(bad)


def test_a_closed_scorer_says_so(scorer: Callable[..., Scorer]) -> None:
    one = scorer("format")
    one.close()
    one.close()
    with pytest.raises(RunError, match="closed"):
        one.score([group("a")])
