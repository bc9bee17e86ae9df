"""New weights reach answers in the making: what each token says of its version, the bound on it, and what it costs."""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean

import psutil
import pytest
import torch

from ray_runs import SMALL, end, hanging, pids
from slow_engines import DIGITS, SlowEngine, ThreadWorker, first_done, parcel
from small_recipe import recipe
from tandem.config import load
from tandem.config.placement import Placement
from tandem.config.sections import Model
from tandem.engine import Request, SamplingParams
from tandem.engine.probe import policy_logp
from tandem.errors import ConfigError
from tandem.journal import read_metrics
from tandem.model import load as load_model
from tandem.model import tokenizer_of
from tandem.placement.cluster.ahead import AheadStream, Line
from tandem.placement.cluster.build import RemoteRoles, threads
from tandem.placement.cluster.lost import EnginesLost, WorkerLost
from tandem.rollout import group_from, group_record
from tandem.train.run import Launch, save_merged, train
from tandem.train.session import Session
from test_stream import make, model, scorer  # noqa: F401

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
PLACEMENT = {"kind": "apart", "cpus": 1, "backoff_s": 0.1}
SAMPLING_S, TRAINING_S, TOKENS, STEPS = 0.8, 0.5, 40, 8


@pytest.fixture
def slow(monkeypatch):
    """Engines of this process: `(count, token_s) -> (Engines, the slow ones)`."""
    from tandem.placement.cluster import engines
    from tandem.placement.cluster.broadcast import Reading

    monkeypatch.setattr(engines.port, "first_done", first_done)
    closing = []

    def built(count: int, token_s: float, shorter: int = 0, backoff_s: float = 0.0):
        made = []

        def spawn(number: int) -> ThreadWorker:
            made.append(SlowEngine(token_s, shorter))
            return ThreadWorker(made[-1], f"engine {number}")

        placement = Placement(kind="apart", engines=count, backoff_s=backoff_s, engine_timeout_s=1.0)
        idle = lambda: None  # noqa: E731
        closing.append(engines.Engines(spawn, lambda number: "", placement, Reading(None, None), idle, idle))
        return closing[-1], made

    yield built
    for each in closing:
        each.close()


def in_flight(tokens: int) -> dict:
    sampling = {"max_lag": 1, "in_flight": True, "max_answer_tokens": tokens}
    return {"sampling": sampling, "placement": {"kind": "apart"}}


def checked(rollout) -> set[int]:
    """Every token is by the weights that its version says."""
    chosen = rollout.versions[rollout.prompt_length :]
    assert rollout.tokens[rollout.prompt_length :] == tuple(DIGITS[v % 10] for v in chosen)
    assert list(chosen) == sorted(chosen)
    return set(chosen)


@pytest.mark.alone
@needs_ray
def test_a_step_takes_as_long_as_the_slower_stage_and_answers_are_carried(make, slow):  # noqa: F811
    stream = make("?" * 12, **in_flight(TOKENS))
    engines, made = slow(2, SAMPLING_S / TOKENS)
    stream.sampler.engine = engines
    line = Line()
    beside = AheadStream(stream, line)
    began, mixed = 0.0, []
    for version in range(STEPS + 1):
        engines.offer(parcel(version))
        line.submit(engines.settle)
        groups = beside.take(version)
        began = began or time.monotonic()
        assert beside.last["rollout/lag_max"] <= 1
        seen = [checked(r) for g in groups for r in g.rollouts]
        mixed.append(sum(len(versions) == 2 for versions in seen) / len(seen))
        assert beside.last["rollout/carried_share"] == mixed[-1]
        time.sleep(TRAINING_S)
    line.close()
    per_step = (time.monotonic() - began - TRAINING_S) / STEPS
    assert sum(share == 1 for share in mixed) >= STEPS - 2, f"carried across an update: {mixed}"
    stage_s = TOKENS * mean(wait for engine in made for wait in engine.waits)
    assert SAMPLING_S <= stage_s < 1.5 * SAMPLING_S
    assert per_step <= 1.15 * stage_s, f"{per_step:.3f} s, the slower stage takes {stage_s:.3f} s"


@needs_ray
def test_an_engine_that_is_lost_time_and_again_is_replaced_after_a_wait_that_doubles(slow, monkeypatch):
    def lost(*_):
        raise WorkerLost("it was killed")

    monkeypatch.setattr(SlowEngine, "generate", lost)
    engines, made = slow(1, 0.01, backoff_s=0.1)
    engines.update(parcel(0))
    with pytest.raises(EnginesLost, match=r"lost 4 times in a row \(placement.restarts=3\)"):
        engines.generate(
            [Request(tokens=(1,), key=1)],
            SamplingParams(max_tokens=2),
            poll=lambda *_: None,
            on_done=lambda *_: None,
        )
    waits = [later.made - earlier.made for earlier, later in pairwise(made)]
    assert len(waits) == 3 and all(wait >= 0.1 * 2**i for i, wait in enumerate(waits)), waits
    assert [engine.version for engine in made] == [0] * 4, "none was asked before it had the weights"


class OneLong:
    """Of each call the first answer is long. Calls are kept in the order they were made, with the keys of their answers
    and when they ended."""

    def __init__(self, engines, slow) -> None:
        self.engines, self.slow, self.calls = engines, slow, []

    def generate(self, requests, *rest, **more):
        call = [[r.key for r in requests], math.inf]
        self.calls.append(call)
        for each in self.slow:
            each.long.add(requests[0].key)
        done = self.engines.generate(requests, *rest, **more)
        call[1] = time.monotonic()
        return done


@needs_ray
def test_while_a_long_answer_is_sampled_the_next_steps_are_begun(make, slow):  # noqa: F811
    """Each answer once, of the weights that its versions say, none older than allowed, and steps in their order."""
    stream = make("?" * 12, **in_flight(TOKENS))
    engines, made = slow(2, SAMPLING_S / TOKENS, shorter=TOKENS - 8)
    engines.update(parcel(0))
    assert len(made) == 2, "engines that are told which answers are long are there"
    stream.sampler.engine = longs = OneLong(engines, made)
    line = Line(threads(stream.sampler.run))
    beside = AheadStream(stream, line)
    asked = make("?" * 12, **in_flight(TOKENS))
    for version in range(STEPS):
        engines.offer(parcel(version))
        line.submit(engines.settle)
        groups = beside.take(version)
        assert [g.prompt for g in groups] == [asked.prompts.prompts[i] for i in asked.ask()[0]]
        assert beside.last["rollout/lag_max"] <= 1
        for group in groups:
            lengths = [len(r.tokens) - r.prompt_length for r in group.rollouts if checked(r)]
            assert lengths == [TOKENS if group is groups[0] and not i else 8 for i in range(6)]
    line.close()
    begun = [min(each.begun.get(k, math.inf) for each in made for k in keys) for keys, _ in longs.calls]
    early = sum(then < end for (_, end), then in zip(longs.calls, begun[1:]) if end < math.inf)
    assert early >= STEPS // 2, f"{early} of {STEPS} steps ended after the next one was begun"


@needs_ray
def test_groups_keep_their_versions_through_a_checkpoint(make, slow):  # noqa: F811
    stream = make("?" * 12, **in_flight(10))
    engines, _ = slow(1, 0.05)
    stream.sampler.engine = engines
    line = Line()
    beside = AheadStream(stream, line)
    engines.offer(parcel(0))
    beside.take(0)
    time.sleep(0.1)
    engines.offer(parcel(1))
    groups = beside.newest
    line.close()
    assert {len(checked(r)) for g in groups for r in g.rollouts} == {2}
    records = json.loads(json.dumps([group_record(g) for g in groups]))
    assert [group_from(r, stream.prompts) for r in records] == groups


@needs_ray
def test_what_ends_one_call_ends_those_beside_it_with_the_same_cause(slow, monkeypatch):
    engines, _ = slow(1, 0.01)
    engines.offer(parcel(0))

    def fail(self, *asked):
        while len(engines._jobs) < 2:
            time.sleep(0.001)
        raise WorkerLost("it has no memory")

    def ask(key):
        quiet = {"poll": lambda answers, tokens: None, "on_done": lambda index, completion: None}
        return engines.generate([Request(tokens=(1,), key=key)], SamplingParams(max_tokens=5), **quiet)

    monkeypatch.setattr(SlowEngine, "generate", fail)
    with ThreadPoolExecutor(2) as pool:
        for call in [pool.submit(ask, key) for key in range(2)]:
            with pytest.raises(EnginesLost, match=r"engine 0 was lost 4 times in a row .* it has no memory"):
                call.result()


@needs_ray
def test_an_engine_that_dies_or_hangs_while_it_is_paused_is_replaced(slow, caplog):
    """Its answers go on from where they last were known to be, or begin anew."""
    engines, made = slow(2, 0.02)
    engines.offer(parcel(0))
    struck = []

    def poll(answers, tokens):
        if not struck and tokens:
            struck.append(time.monotonic())
            made[0].dead.set()
            made[1].pause = lambda version: None  # deaf, and silent from now on
            made[1].progress = lambda number, heard: made[0].progress(0, 0).__class__(tokens=1, answers=[])
            engines.offer(parcel(1))

    requests = [Request(tokens=(i,), key=i) for i in range(6)]
    done = engines.generate(
        requests, SamplingParams(max_tokens=100), poll=poll, on_done=lambda index, completion: None
    )
    assert len(made) == 4 and struck
    assert "it was killed\nanother process takes its place" in caplog.text
    silent = r"engine \d had no news of \d answers for 1 s \(placement.engine_timeout_s\); its log: no log\n"
    assert re.search(silent, caplog.text)
    for completion in done:
        assert completion.tokens == tuple(DIGITS[v] for v in completion.versions)
        assert len(completion.tokens) == 100 and completion.versions[-1] == 1


def run_in(folder: Path, monkeypatch, **changes):
    """A run whose weights of every version are kept; returns it, its metrics and its rollout records by step."""
    serve = RemoteRoles.serve

    def kept(self, version):
        serve(self, version)
        place = folder / f"version{version}"
        if not place.exists():
            self.on_learners(save_merged, place)

    monkeypatch.setattr(RemoteRoles, "serve", kept)
    # One answer at a time: sampling a step takes longer than an update, so that weights always find some in flight.
    sampling = {"max_lag": 1, "in_flight": True, "slots": 1, "max_answer_tokens": 90}
    known = SMALL | {
        "steps": 5,
        "eval": {"every": None},
        "algorithm": {"kl": {"coef": 0.0}},
        "sampling": sampling,
        "placement": PLACEMENT,
    }
    path = recipe(folder, **known | changes)
    run = load(path)
    train(run, Launch(recipe=str(path), allow_config_change=True))
    files = sorted((folder / "run" / "rollouts").glob("step_*.jsonl"))
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "reward/mean" in row]
    return run, rows, [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def held_against_their_weights(folder: Path, run, records) -> int:
    """Each token has the log-probability that its version's weights give it in a plain forward pass, and is not too
    old; returns the number of answers with more than one version."""
    mixed, loaded = 0, {}
    for step, rows in enumerate(records):
        for row in rows:
            versions = row["versions"]
            assert min(versions) >= step - run.sampling.max_lag and max(versions) <= step
            first = row["sampled"].index(True)
            for version in set(versions):
                if version not in loaded:
                    config = Model(path=str(folder / f"version{version}"), dtype="fp32")
                    loaded[version] = load_model(config, tokenizer_of(config), torch.device("cpu"), seed=0)
                theirs = policy_logp(loaded[version], tuple(row["tokens"]))[first - 1 :]
                for ours, its, logp in zip(versions, theirs, row["policy_logp"], strict=True):
                    assert ours != version or logp == pytest.approx(its, abs=1e-4)
            mixed += len(set(versions)) > 1
    return mixed


@needs_ray
def test_tokens_are_of_the_weights_that_their_version_says(tmp_path, monkeypatch):
    """By files to one engine; then by broadcasts to two, of which one is killed and one hangs. No answer of the last
    steps can be begun by either, so others take their places."""
    run_in(tmp_path, monkeypatch, steps=5)
    hang, hit, after = hanging(monkeypatch), [], Session.after

    def strike(self, step, *rest):
        after(self, step, *rest)
        if step in (5, 7):
            hit.append(pids(tmp_path / "run", "engine")[-1 if step == 5 else 1])
            (end if step == 5 else hang)(hit[-1])

    monkeypatch.setattr(Session, "after", strike)
    run, rows, records = run_in(
        tmp_path,
        monkeypatch,
        steps=11,
        placement=PLACEMENT | {"engines": 2},
        engine={"transfer": "broadcast"},
    )
    by_files = held_against_their_weights(tmp_path, run, records[:5])
    assert held_against_their_weights(tmp_path, run, records) > by_files > 0
    assert len(rows) == run.steps and max(row["rollout/lag_max"] for row in rows) == 1
    assert max(row["rollout/carried_share"] for row in rows) > 0
    for step, (row, answers) in enumerate(zip(rows, records)):
        lags = [step - version for answer in answers for version in answer["versions"]]
        assert row["rollout/token_lag_mean"] == pytest.approx(sum(lags) / len(lags))
    assert len(set(hit)) == 2 and not any(psutil.pid_exists(pid) for pid in hit)
    assert len(set(pids(tmp_path / "run", "engine"))) > 3


@needs_ray
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_goes_on_with_new_weights_in_the_middle_of_an_answer(tmp_path, monkeypatch):
    """With a lag of two, and few answers at a time."""
    run, rows, records = run_in(
        tmp_path,
        monkeypatch,
        # On a CPU vLLM has no attention for narrower heads.
        model={"new": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 256}},
        sampling={"max_lag": 2, "in_flight": True, "max_answer_tokens": 90},
        engine={"kind": "vllm", "kv_cache_mb": 64, "eager": True, "max_model_len": 192, "max_num_seqs": 4},
    )
    assert held_against_their_weights(tmp_path, run, records) > 0
    assert len(rows) == run.steps and max(row["rollout/lag_max"] for row in rows) <= 2


@pytest.mark.parametrize("changes", [
    {"placement": {"kind": "inline"}, "sampling": {"max_lag": 1}},
    {"placement": {"kind": "apart"}, "sampling": {"max_lag": 0}},
])  # fmt: skip
def test_where_nothing_is_in_flight_it_is_refused(tmp_path, changes):
    changes["sampling"]["in_flight"] = True
    with pytest.raises(ConfigError, match=r"needs placement\.kind=apart and sampling\.max_lag"):
        load(recipe(tmp_path, **changes))
