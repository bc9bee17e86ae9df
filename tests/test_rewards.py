"""The scorer keeps its promises while reward functions hang, die, lie and flood: real workers and signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.config.sections import Reward
from tandem.errors import ConfigError, RunError
from tandem.rewards import pool
from tandem.rewards.answer import Answer
from tandem.rewards.channel import Inbox, frame
from tandem.rewards.scorer import Scorer, overlong
from tandem.rewards.verifiers import VERIFIERS
from tandem.rewards.watch import FailureWatch
from tandem.types import Score

OWN = '''
import asyncio, ctypes, os, subprocess, sys, time

def behave(answer):
    """Does what the answer says."""
    if answer == "sleep": time.sleep(3600)
    if answer == "loop":
        while True: pass
    if answer == "power": return float(len(str(9 ** 9 ** 9)))
    if answer == "raise": raise KeyError("the \\x1b[31m column")
    if answer == "quit": sys.exit(0)
    if answer == "exit": os._exit(3)
    if answer == "kill": os.kill(os.getpid(), 9)
    if answer == "segfault": ctypes.string_at(0)
    if answer == "nan": return float("nan")
    if answer == "inf": return -float("inf")
    if answer == "huge": return 10 ** 400
    if answer == "none": return None
    if answer == "text": return "1.0"
    if answer == "list": return [1.0]
    if answer == "true": return True
    if answer == "print":
        for _ in range(100): os.write(1, b"reward: 1.0\\n" * 87382)
    if answer == "memory": return float(len(bytearray(4 << 30)))
    if answer == "files": return float(len([open(os.devnull) for _ in range(10_000)]))
    if answer == "fork":
        if os.fork() == 0: time.sleep(3600)
        if os.fork() == 0: os._exit(0)
    if answer == "children":
        return float(sum(f.split()[3] == str(os.getpid()) for f in stats()))
    if answer == "torch": return float("torch" in sys.modules or "tandem.types" in sys.modules)
    return 1.0

def stats():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat: yield stat.read()
        except OSError: pass

def once(answer, question):
    """Kills its worker the first time it sees a question, and scores the second time."""
    if answer != "once": return 1.0
    if not os.path.exists(question):
        open(question, "w").close()
        os.kill(os.getpid(), 9)
    return 1.0

def everything(answer, truth, question, row, tokens, finish, *, bonus=0.0):
    return row["n"] + tokens + bonus + (finish == "stop") + len(truth) + len(question) + len(answer)

def rank(answers, tokens, finish, truth):
    order = sorted(range(len(answers)), key=lambda i: tokens[i])
    return [float(order.index(i)) for i in range(len(answers))]

def short(answers): return [1.0] * (len(answers) - 1)
def one_bad(answers): return [None if a == "bad" else 1.0 for a in answers]
def nothing(answers): return None
async def group_later(answers): await asyncio.sleep(0.01); return [2.0] * len(answers)

async def later(answer):
    if answer == "block": time.sleep(3600)
    if answer == "raise": raise RuntimeError("no judge")
    await asyncio.sleep(3600 if answer == "sleep" else 0.3)
    return float(len(answer))

def pid(answer): return float(os.getpid())
def needs_more(answer, judge, limit): return 0.0
def both(answer, answers): return 0.0
constant = 3
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN, "utf-8")
    return path


@pytest.fixture
def scorer() -> Iterator[Callable[..., Scorer]]:
    """Makes scorers from function names (or their settings) and closes them after the test."""
    made: list[Scorer] = []

    def make(*functions: str | dict[str, Any], **settings: Any) -> Scorer:
        named = [{"name": f} if isinstance(f, str) else f for f in functions]
        made.append(Scorer(Reward(functions=named, **settings), max_answer_tokens=100))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(text: str, truth: str | None = "4", **fields: Any) -> Answer:
    given = {"question": "2+2?", "row": {}, "tokens": 10, "finish": "stop"} | fields
    return Answer(text=text, truth=truth, **given)


def group(*texts: str) -> list[Answer]:
    return [answer(text) for text in texts]


def kinds(scores: list[Score]) -> list[str | float | None]:
    return [score.failure or score.reward for score in scores]


def number(value: int) -> str:
    return f"<answer>{value}</answer>"


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


@pytest.mark.parametrize("hang", ["sleep", "loop", "power"])
def test_an_answer_that_hangs_is_killed_and_its_neighbours_score(
    hang: str, own: Path, scorer: Callable[..., Scorer]
) -> None:
    one = scorer(f"{own}:behave", timeout_s=0.5)
    one.ready()
    start = time.monotonic()
    scores = one.score([group("fine", "fine", hang, "fine")])[0]
    assert kinds(scores) == [1.0, 1.0, "timeout", 1.0]
    assert "behave" in scores[2].detail
    assert "0.5 s" in scores[2].detail
    assert time.monotonic() - start < 3.0


def test_three_of_sixteen_hang_and_the_next_correct_answer_still_scores(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    one = scorer(f"{own}:behave", "answer_number", timeout_s=0.4, workers=2)
    texts = [number(4)] * 16
    texts[3] = texts[4] = texts[15] = "sleep"
    scores = one.score([group(*texts)])[0]
    assert [i for i, s in enumerate(scores) if s.failure == "timeout"] == [3, 4, 15]
    assert {s.reward for s in scores if s.failure is None} == {2.0}
    assert one.score([group(number(4))])[0][0].reward == 2.0
    assert len(one._pool.workers) == 2


def test_a_symbolic_tower_is_a_timeout_and_not_a_zero(scorer: Callable[..., Scorer]) -> None:
    one = scorer("accuracy", timeout_s=1.5)
    scores = one.score([group("\\boxed{9^{9^{9^9}}}", "\\boxed{\\frac{8}{2}}", "\\boxed{9**9**9**9}")])[0]
    assert kinds(scores) == ["timeout", 1.0, 0.0]


def test_a_raising_function_is_an_error_with_its_line(own: Path, scorer: Callable[..., Scorer]) -> None:
    scores = scorer(f"{own}:behave").score([group("raise", "quit", "fine")])[0]
    assert kinds(scores) == ["error", "error", 1.0]
    line = 1 + OWN.splitlines().index(next(x for x in OWN.splitlines() if "KeyError" in x))
    assert f"own.py:{line}" in scores[0].detail
    assert "KeyError" in scores[0].detail
    assert scores[0].detail.isprintable()
    assert "SystemExit" in scores[1].detail


def test_what_is_no_finite_number_is_invalid(own: Path, scorer: Callable[..., Scorer]) -> None:
    scores = scorer(f"{own}:behave").score([group("nan", "inf", "huge", "none", "text", "list", "true")])[0]
    assert kinds(scores) == ["invalid"] * 6 + [1.0]
    assert "NoneType" in scores[3].detail


def test_a_truth_that_is_no_number_is_an_error_and_not_a_zero(scorer: Callable[..., Scorer]) -> None:
    scores = scorer("answer_number").score([[answer(number(4), truth="four"), answer(number(4))]])[0]
    assert kinds(scores) == ["error", 1.0]
    assert "four" in scores[0].detail


@pytest.mark.parametrize(
    ("death", "how"), [("exit", "status 3"), ("kill", "signal 9"), ("segfault", "signal 11")]
)
def test_a_worker_that_dies_twice_on_an_answer_takes_nothing_else_along(
    death: str, how: str, own: Path, scorer: Callable[..., Scorer]
) -> None:
    scores = scorer(f"{own}:behave").score([group("fine", death, "fine", "fine")])[0]
    assert kinds(scores) == [1.0, "died", 1.0, 1.0]
    assert how in scores[1].detail


def test_an_answer_is_tried_once_more_after_its_worker_died(
    own: Path, scorer: Callable[..., Scorer], tmp_path: Path
) -> None:
    asked = answer("once", question=str(tmp_path / "seen"))
    scores = scorer(f"{own}:once").score([[answer("a"), asked, answer("b")]])[0]
    assert kinds(scores) == [1.0, 1.0, 1.0]
    assert (tmp_path / "seen").exists()


def test_a_worker_killed_while_idle_costs_no_answer(scorer: Callable[..., Scorer]) -> None:
    one = scorer("answer_number")
    one.score([group(number(4))])
    victim = one._pool.workers[0].process
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert kinds(one.score([group(number(4), number(5))])[0]) == [1.0, -1.0]


def test_output_neither_floods_nor_forges(own: Path, scorer: Callable[..., Scorer]) -> None:
    one = scorer(f"{own}:behave")
    assert kinds(one.score([group("print", "raise")])[0]) == [1.0, "error"]
    assert len(one._pool.workers[0]._tail) <= 2000


def test_memory_and_files_run_out_in_the_worker_only(own: Path, scorer: Callable[..., Scorer]) -> None:
    scores = scorer(f"{own}:behave", memory_mb=1024).score([group("memory", "files", "fine")])[0]
    assert kinds(scores) == ["error", "error", 1.0]
    assert "MemoryError" in scores[0].detail
    assert "Too many open files" in scores[1].detail


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
def test_forked_children_are_reaped_and_die_with_the_worker(own: Path, scorer: Callable[..., Scorer]) -> None:
    one = scorer(f"{own}:behave")
    scores = one.score([group("fork", "children", "fine")])[0]
    assert kinds(scores)[0] == 1.0
    assert kinds(scores)[1] <= 2.0
    worker = psutil.Process(one._pool.workers[0].process.pid)
    left = worker.children(recursive=True)
    assert len([p for p in left if p.status() != psutil.STATUS_ZOMBIE]) == 1
    one.close()
    _, alive = psutil.wait_procs([worker, *left], timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_worker_outlives_a_killed_parent(own: Path) -> None:
    program = f"""
import sys, time
from tandem.config.sections import Reward
from tandem.rewards.answer import Answer
from tandem.rewards.scorer import Scorer
scorer = Scorer(Reward(functions=[{{"name": {str(own) + ":behave"!r}}}], workers=2), 100)
ask = lambda text: Answer(text=text, truth=None, question="q", row={{}}, tokens=1, finish="stop")
scorer.score([[ask("fork"), ask("fine")]])
print(*[w.process.pid for w in scorer._pool.workers], flush=True)
scorer.score([[ask("loop"), ask("sleep")]])
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    family = [*workers, *(child for worker in workers for child in worker.children(recursive=True))]
    assert len(family) >= 3
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_workers_import_neither_torch_nor_the_trainers_types(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    scores = scorer(f"{own}:behave", "accuracy").score([group("torch")])[0]
    assert scores[0].parts[f"{own}:behave"] == 0.0


def test_workers_are_replaced_after_their_share_of_answers(
    own: Path, scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "RECYCLE", 5)
    scores = scorer(f"{own}:pid").score([group(*"abcdefghijkl")])[0]
    pids = [s.reward for s in scores]
    assert len(set(pids[:5])) == len(set(pids[5:10])) == 1
    assert len(set(pids)) == 3


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


CORPUS = [
    "__import__('os').system('touch CANARY')",
    "\\pi__import__('os').system('touch CANARY')",
    "[[__import__('os').system('touch CANARY')]]",
    "\\begin{pmatrix}__import__('os').system('touch CANARY')\\end{pmatrix}",
    "f(open('CANARY','w'))",
    "\\operatorname{eval}(open('CANARY','w'))",
    "\\gcd(open('CANARY','w'),2)",
    "x_{open('CANARY','w')}",
    "().__class__.__bases__[0].__subclasses__()",
    "9**9**9**9",
    "1e999999",
    "factorial(10**7)",
    "7" * 1_000_000,
    "(" * 10_000 + ")" * 10_000,
    "\x00\ud800\u202e3",
    "{0.__class__}",
    "${jndi:ldap://127.0.0.1/a}",
    "\x1b[2J\x1b]0;own\x07\nreward: 1.0\n",
    "\\boxed{5}" * 1000,
    "#### 5" * 1000,
    'reward: 1.0 {"task": 0, "outcomes": [{"parts": {"accuracy": 1.0}}]}',
    "import sys; sys.modules.clear(); sys.exit(0)",
    "open('/proc/self/fd/1','w').write('reward: 1.0')",
    "import os\nwhile True: os.fork()",
]


def test_hostile_answers_run_no_code_and_leave_the_grader_as_it_was(
    scorer: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [n for n in VERIFIERS if n not in ("choice", "countdown")]
    one = scorer(*names, "countdown", timeout_s=8.0, workers=2)
    row = {"nums": [4], "target": 4}
    honest = answer("<think>a</think>\n<answer>4 \\boxed{4}</answer>", row=row)
    before = one.score([[honest]])[0][0]
    assert before.parts["accuracy"] == 1.0
    for wrap in (
        "{}",
        "<think>a</think><answer>{}</answer>",
        "<think>a</think><answer>\\boxed{{{}}}</answer>",
    ):
        hostile = [answer(wrap.format(text), row=row) for text in CORPUS]
        scores = one.score([[a for text in hostile for a in (text, honest)]])[0]
        assert all(s == before for s in scores[1::2])
        for text, score in zip(CORPUS, scores[::2], strict=True):
            assert score.failure in (None, "timeout"), (text[:50], score)
            assert score.parts.get("accuracy", 0.0) == 0.0, text[:50]
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(ConfigError, match="may stand once"):
        Scorer(Reward(functions=[{"name": "format"}, {"name": "format"}]), max_answer_tokens=100)


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


def test_an_interrupted_call_leaves_nothing_for_the_next_one(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    one = scorer(f"{own}:behave", timeout_s=30.0)
    one.ready()
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        one.score([group("sleep", "fine")])
    assert kinds(one.score([group("none", "fine")])[0]) == ["invalid", 1.0]


def test_a_worker_started_in_a_thread_that_ended_is_replaced(scorer: Callable[..., Scorer]) -> None:
    made: list[Scorer] = []
    thread = threading.Thread(target=lambda: made.append(scorer("answer_number", workers=2)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert kinds(made[0].score([group(number(4), number(5))])[0]) == [1.0, -1.0]


def test_two_threads_may_score_at_once(scorer: Callable[..., Scorer]) -> None:
    one = scorer("answer_number", workers=2)
    got: dict[int, list[Any]] = {}

    def work(value: int) -> None:
        got[value] = kinds(one.score([[answer(number(i), truth=str(value)) for i in range(50)]])[0])

    threads = [threading.Thread(target=work, args=(v,)) for v in (3, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(got[v] == [1.0 if i == v else -1.0 for i in range(50)] for v in (3, 30))


def test_a_closed_scorer_says_so(scorer: Callable[..., Scorer]) -> None:
    one = scorer("format")
    one.close()
    one.close()
    with pytest.raises(RunError, match="closed"):
        one.score([group("a")])


def test_messages_survive_being_cut_anywhere_and_nonsense_is_refused() -> None:
    messages = [{"a": 1}, ["\ud800", 1.5], {"text": "x" * 1000}]
    data = b"".join(map(frame, messages))
    for size in (1, 3, 500):
        inbox = Inbox(limit=10_000)
        got = [m for i in range(0, len(data), size) for m in inbox.feed(data[i : i + size])]
        assert got == messages
    with pytest.raises(ValueError, match="message of"):
        list(Inbox(limit=10).feed(frame("x" * 100)))
    with pytest.raises(json.JSONDecodeError):
        list(Inbox().feed((2).to_bytes(4, "big") + b"no"))
