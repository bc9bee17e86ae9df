"""Reward functions hang, die, lie and flood; every other answer still gets its score. Real workers and signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from scoring import answer, group, kinds, number
from tandem.errors import RunError
from tandem.rewards import pool
from tandem.rewards.channel import Inbox, frame
from tandem.rewards.scorer import Scorer

pytest_plugins = ["reward_fixtures"]


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
    lines = own.read_text("utf-8").splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "raise KeyError" in text)
    assert f"own.py:{line}" in scores[0].detail
    assert "KeyError" in scores[0].detail
    assert scores[0].detail.isprintable()
    assert "SystemExit" in scores[1].detail


def test_what_is_no_finite_number_is_invalid(own: Path, scorer: Callable[..., Scorer]) -> None:
    scores = scorer(f"{own}:behave").score([group("nan", "inf", "huge", "none", "text", "list", "true")])[0]
    assert kinds(scores) == ["invalid"] * 6 + [1.0]
    assert "NoneType" in scores[3].detail


def test_a_number_that_32_bits_do_not_hold_is_invalid_alone_and_as_a_sum(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    name = f"{own}:behave"
    scores = scorer(name).score([group("large", "largest")])[0]
    assert kinds(scores) == ["invalid", 3.4e38] and "returned -1e+308" in scores[0].detail
    (score,) = scorer({"name": name, "weight": -1.5}).score([group("largest")])[0]
    assert score.failure == "invalid" and "the weighted sum of" in score.detail
    penalized = scorer(name, overlong_buffer=100, overlong_penalty=1e300)
    assert kinds(penalized.score([group("fine")])[0]) == ["invalid"]


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
from tandem.config.reward import Reward
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


def test_an_interrupted_call_leaves_nothing_for_the_next_one(
    own: Path, scorer: Callable[..., Scorer]
) -> None:
    one = scorer(f"{own}:behave", timeout_s=30.0)
    one.ready()
    main = threading.main_thread().ident
    assert main is not None
    # Where tests run in several processes, those ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            one.score([group("sleep", "fine")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert kinds(one.score([group("none", "fine")])[0]) == ["invalid", 1.0]


def test_a_worker_started_in_a_thread_that_ended_is_replaced(scorer: Callable[..., Scorer]) -> None:
    made: list[Scorer] = []
    thread = threading.Thread(target=lambda: made.append(scorer("answer_number", workers=2)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert kinds(made[0].score([group(number(4), number(5))])[0]) == [1.0, -1.0]


def test_a_replacement_that_hangs_in_its_imports_is_not_waited_for_for_ever(
    tmp_path: Path, scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom pathlib import Path\n\n"
        f"seen = Path({str(tmp_path / 'seen')!r})\nagain = seen.exists()\nseen.touch()\ntime.sleep(600 * again)\n\n"
        "def wait(answer: str) -> float:\n    time.sleep(600)\n    return 1.0\n"
    )
    one = scorer(f"{tmp_path / 'slow.py'}:wait", timeout_s=0.5, workers=1)
    one.ready()
    monkeypatch.setattr(pool, "START_S", 2.0)
    began = time.monotonic()
    with pytest.raises(RunError, match="did not import its functions within 2 s"):
        one.score([group("first", "second")])
    assert time.monotonic() - began < 20


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
