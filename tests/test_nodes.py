"""A cluster of several nodes, all on this machine, which loses one of them in the middle of a run."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from ray_runs import (
    ENDS_S,
    RECIPES,
    SMALL,
    JoinedNodes,
    alive,
    caller,
    driver,
    end,
    family,
    places,
    small,
    steps_done,
    text,
    trajectory,
    wait_until,
)
from small_recipe import recipe, tandem
from tandem.checkpoint import newest
from tandem.config import load
from tandem.config.placement import Placement
from tandem.config.sections import NewModel
from tandem.journal import read_metrics
from tandem.model import LanguageModel
from tandem.model.new import new_network, new_tokenizer
from tandem.placement.copied import weights_root
from tandem.train.run import Launch, train

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

CHANGES = SMALL | {
    "eval": {"every": None},
    # Most of a step is sampling.
    "sampling": {"prompts_per_step": 4, "answers_per_prompt": 4, "max_answer_tokens": 64},
    "model": {"new": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 128}},
}
REWARD = Path(__file__).parents[1] / "benchmarks" / "reward.py"
WIDE_HEADS = NewModel(hidden_size=64, layers=2, heads=2, kv_heads=1, max_positions=256)
"""On a CPU vLLM has no attention for narrower ones."""
VLLM = (
    {"engine.kv_cache_mb": 64, "engine.eager": "true", "engine.max_model_len": 256}
    if find_spec("vllm")
    else {"engine.kind": "embedded"}
)
PLACED = {"kind": "apart", "engines": 2, "spread": True, "backoff_s": 0.1}
COMPARED = 12
"""Steps of which the first few are sampled by all engines."""
SIZE = "--num-cpus=2"
IMPATIENT = """
from tandem.cli import main
from tandem.placement.cluster.engines import Engines

say = Engines._say_if_it_waits

def hurried(self, seat):
    say(self, seat)
    if seat.said:
        self.placement = self.placement.model_copy(update={"start_timeout_s": 1.0})

Engines._say_if_it_waits = hurried
main()
"""
"""The command line, whose time is up when it has said that it waits."""
OVERTAKEN = """
import sys
from pathlib import Path
from tandem.config.placement import Placement
from tandem.placement.cluster import port

port.RETAKE_S = 1.0
remove, others = port.remove_placement_group, []

def overtaken(group):
    remove(group)
    if not others:
        others.append(port.placement_group([{"CPU": 2.0}]))
        assert others[0].wait(30)
    elif len(others) == 1:
        others.append(remove(others[0]))

port.remove_placement_group = overtaken
placement = Placement(kind="apart", engines=3, spread=True, address=sys.argv[1], start_timeout_s=60.0)
cluster = port.Cluster(placement, 4, Path("logs"))
cluster.reserve([{"CPU": 1.0, "GPU": 0.0}] * 4)
print(len(others), "and then", sum(map(cluster.has_room, range(4))), "places on", cluster.nodes, "nodes")
"""
"""Room for all cores, in the middle of which another run takes a node, until it is given up for the time being."""


HOLDING = """
import sys, time
from pathlib import Path
import ray

ray.init(address=sys.argv[1])
group = ray.util.placement_group([{"CPU": 1.0}] * 3)
assert group.wait(30)
Path(sys.argv[2]).touch()
while Path(sys.argv[2]).exists():
    time.sleep(0.05)
"""
"""Takes three cores until its file is gone."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[JoinedNodes]:
    """A head without cores and two nodes of two, by the commands of docs/cluster.md; who ends one starts another."""
    with JoinedNodes(tmp_path_factory.mktemp("nodes"), "--num-cpus=0", SIZE, SIZE) as joined:
        yield joined


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The first steps in one process."""
    folder = tmp_path_factory.mktemp("whole")
    path = recipe(folder, **CHANGES | {"steps": COMPARED})
    train(load(path), Launch(recipe=str(path)))
    return trajectory(folder / "run")[:COMPARED]


def kill_node(pid: int) -> None:
    """End the Ray node that a process belongs to, all at once, as when a machine fails."""
    raylet = psutil.Process(pid).parent()
    assert raylet is not None and raylet.name() == "raylet"
    for process in [raylet, *raylet.children(recursive=True)]:
        end(process.pid)


def goes_on(run: Path) -> None:
    then = max(steps_done(run), COMPARED)
    wait_until("the run has gone on", lambda: steps_done(run) >= then + 3)


def held_against(whole: list[dict], ours: list[dict]) -> None:
    """All steps of `whole`, or the few that there are."""
    for row, other in zip(ours[:COMPARED], whole[: len(ours)], strict=True):
        assert row["step"] == other["step"] and row["version"] == other["version"]
        assert row["reward/mean"] == other["reward/mean"]
        # Rows that are computed together with others are rounded otherwise.
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("more", [
    {"placement.learners": 1, "placement.engines": 2, "algorithm.kl.coef": 0.0},
    {
        "placement.learners": 2,
        "placement.engines": 1,
        "learner.layout": "{pipeline: 2}",
        "model.lora": "{rank: 4}",
        "model.dtype": "fp32",
    },
])  # fmt: skip
def test_a_cluster_joined_by_address_runs_its_recipe(nodes, tmp_path, more):
    """No folder is shared: all weights, or those of an adapter that two learners hold together, reach vLLM through
    Ray, and every answer is of the version that it should be, in float32 and in the recipe's bfloat16. The recipe's
    reference is there where it is free. The address is the recipe's `auto`, so what RAY_ADDRESS says."""
    folder = tmp_path / "model"
    tokenizer = new_tokenizer()
    LanguageModel(new_network(WIDE_HEADS, tokenizer, 0), tokenizer, "base").save(folder)
    questions = tmp_path / "train.jsonl"
    rows = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(20)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = small(tmp_path, **{
        "model.path": folder,
        "data.train": questions,
        "data.template": "plain",
        "learner.optimizer.lr": 3e-3,
        "reference.refresh_every": "null",
        "placement.spread": "true",
        "reward.functions": f"[{{name: '{REWARD}:scrambled'}}]",
        **VLLM,
        **more,
    })  # fmt: skip
    said = tmp_path / "said"
    command = ("-m", "tandem", "train", RECIPES / "cluster.yaml", *overrides)
    with driver(nodes, said, *command, RAY_ADDRESS=nodes.address) as process:
        assert process.wait(timeout=ENDS_S) == 0, said.read_text()
    assert len({node for lives in places(tmp_path).values() for node, _ in lives}) == 2
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward/mean" in row]
    assert [row["version"] for row in rows] == [1, 2, 3] and all(row["actor/updates"] == 1 for row in rows)
    gaps = [row["rollout/logp_gap_max"] for row in rows]
    near = 1e-4 if "model.dtype" in more else 0.05
    assert gaps[0] < near < min(gaps[1:]), "then the answers are of the version before"
    assert [row["rollout/lag_max"] for row in rows] == [0, 1, 1]
    moved = [row.get("kl/reference", 0.0) > 0 for row in rows]
    assert moved == [False, *["model.lora" in more] * 2]


@pytest.mark.parametrize(("changed", "said"), [({}, "in"), ({"RAY_AUTH_MODE": "disabled"}, "refused")])
def test_only_who_has_the_token_is_let_into_the_cluster(nodes, changed, said):
    assert caller(nodes.address, nodes.environ | changed) == said


def test_a_run_with_another_token_ends_with_what_to_do(nodes, tmp_path):
    (tmp_path / "token").write_text("b" * 64)
    environ = nodes.environ | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    placed = {"kind": "apart", "address": nodes.address}
    ended = tandem("train", recipe(tmp_path, placement=placed), env=environ)
    assert ended.returncode == 2
    assert (
        f"placement.address={nodes.address}: Ray cannot be reached or started: Failed to connect"
        in ended.stderr
    )
    assert "the same token must be set; see docs/cluster.md" in ended.stderr


def test_room_that_another_run_takes_first_is_waited_for_with_nothing_held(nodes, tmp_path):
    said = tmp_path / "said"
    with driver(nodes, said, "-c", OVERTAKEN, nodes.address) as process:
        assert process.wait(timeout=ENDS_S) == 0, said.read_text()
    assert "2 and then 4 places on 2 nodes" in text(said)


def test_room_that_another_run_holds_is_waited_for_and_said(nodes, whole, tmp_path):
    """Three cores of four are held until it has said so; then there is room for all: two pairs of a learner and an
    engine, each on a node of its own, which are the run of one process."""
    said, held = tmp_path / "said", tmp_path / "held"
    holding = tmp_path / "holding"
    with driver(nodes, held, "-c", HOLDING, nodes.address, holding):
        wait_until("the other run holds them", holding.exists)
        placed = PLACED | {"address": nodes.address, "kind": "colocated", "learners": 2}
        path = recipe(tmp_path, **CHANGES | {"steps": 2}, placement=placed)
        with driver(nodes, said, "-m", "tandem", "train", path) as process:
            wait_until("it says that it waits", lambda: "room on the cluster" in text(said))
            assert "room on the cluster: 4 CPU needed, up to 2 on one node, 1 free on all" in text(said)
            holding.unlink()
            assert process.wait(timeout=ENDS_S) == 0, said.read_text()
    lives = places(tmp_path)
    assert all(lives[f"learner-{i}"][0][0] == lives[f"engine-{i}"][0][0] for i in range(2))
    assert lives["learner-0"][0][0] != lives["learner-1"][0][0]
    held_against(whole, [row for row in trajectory(tmp_path / "run") if "reward/mean" in row])


def test_a_killed_driver_leaves_nothing_on_a_cluster_that_is_not_its_own(nodes, tmp_path):
    """The words of docs/cluster.md for a smaller model; with weights in files, of which something could stay."""
    said, run = tmp_path / "said", tmp_path / "run"
    overrides = small(tmp_path, **{
        "steps": 5000,
        "warmup": "null",
        "model.new.hidden_size": 64,
        "engine.transfer": "files",
        "engine.transfer_dir": tmp_path / "shared",
        "placement.address": nodes.address,
        "placement.engines": 2,
        "placement.spread": "true",
    })  # fmt: skip
    with driver(nodes, said, "-m", "tandem", "train", RECIPES / "node.yaml", *overrides) as process:
        wait_until("two steps are done", lambda: steps_done(run) >= 2)
        assert len({node for lives in places(tmp_path).values() for node, _ in lives}) == 2
        workers = [psutil.Process(pid) for lives in places(tmp_path).values() for _, pid in lives]
        own = family(process.pid)
        left = weights_root(load(RECIPES / "node.yaml", overrides), run)
        assert list(left.glob("v*"))
        end(process.pid)
    assert len(workers) == 3 and len(own) > 1
    wait_until("all processes of the run are gone", lambda: not alive([*workers, *own]), 30)
    wait_until("and its weights", lambda: not left.exists(), 30)
    assert caller(nodes.address, nodes.environ) == "in", "the cluster is there"


def test_a_run_without_any_engine_saves_what_it_has_and_the_same_command_goes_on(nodes, whole, tmp_path):
    """Its one engine takes a whole node, and is lost with it."""
    run, said = tmp_path / "run", tmp_path / "said"
    placed = PLACED | {"address": nodes.address, "engines": 1, "cpus": 2}
    path = recipe(tmp_path, **CHANGES | {"steps": 5000}, placement=placed)
    with driver(nodes, said, "-c", IMPATIENT, "train", path) as process:
        wait_until("some steps are done", lambda: steps_done(run) >= 3)
        kill_node(places(tmp_path)["engine-0"][0][1])
        assert process.wait(timeout=ENDS_S) == 1, said.read_text()
    assert "with room for it (2 CPU); no other is left, so the run ends after 600 s" in text(said)
    assert "no engine is left: for 1 s (placement.start_timeout_s) no node of the cluster had room" in text(
        said
    )
    assert "engine 0, which takes 2 CPU. Add a node that has, and the same command goes on" in text(said)
    done = steps_done(run)
    assert newest(run / "checkpoints", strict=True).name == f"step_{done:08d}"
    steps = max(done + 1, COMPARED)
    with driver(nodes, said, "-m", "tandem", "train", path, f"steps={steps}") as process:
        short = "asks for 4 CPU in all and the cluster has 2; waits up to 600 s for nodes that join"
        wait_until("it waits for a node", lambda: short in text(said))
        nodes.start(f"--address={nodes.address}", SIZE)
        assert process.wait(timeout=ENDS_S) == 0, said.read_text()
    ours = trajectory(run)
    assert [row["step"] for row in ours if "reward/mean" in row] == list(range(steps))
    held_against(whole, ours)


def test_engines_of_a_lost_node_are_made_up_for_and_go_on_one_by_one_where_there_is_room(
    nodes, whole, tmp_path
):
    """The node that is left has room for none of the two, and the one that joins for one. With the learner's node the
    run ends, behind a checkpoint."""
    run, said = tmp_path / "run", tmp_path / "said"
    # The fewest nodes that will do: the learner with an engine, and the other engines.
    placed = PLACED | {"address": nodes.address, "spread": False, "engines": 3}
    path = recipe(tmp_path, **CHANGES | {"steps": 5000, "checkpoint": {"every": 5}}, placement=placed)
    with driver(nodes, said, "-m", "tandem", "train", path) as process:
        wait_until("some steps are done", lambda: steps_done(run) >= 3)
        first = places(tmp_path)
        ((stays, learner),) = first.pop("learner-0")
        lost = [name for name, ((node, _),) in first.items() if node != stays]
        assert len(lost) == 2
        kill_node(first[lost[0]][0][1])
        for number in (int(name.removeprefix("engine-")) for name in lost):
            words = f"engine {number} waits for a node with room for it (1 CPU); the run goes on with 1 of 3 engines"
            wait_until("the driver says so", lambda words=words: words in text(said))
        goes_on(run)

        def back() -> list[str]:
            return [places(tmp_path)[name][-1][0] for name in lost if len(places(tmp_path)[name]) == 2]

        nodes.start(f"--address={nodes.address}", "--num-cpus=1")
        wait_until("one has a place", back)
        goes_on(run)
        kill_node(learner)
        assert process.wait(timeout=ENDS_S) == 1, said.read_text()
    assert re.search(
        rf"learner 0 \(node {stays} at [\d.]+, pid {learner}\) (died during `\w+`|is lost with)", text(said)
    )
    assert f"goes on from its last checkpoint in {run}/checkpoints" in text(said)
    assert newest(run / "checkpoints", strict=True) is not None
    (joined,) = back()
    assert joined not in (stays, first[lost[0]][0][0])
    held_against(whole, trajectory(run))


def test_an_engine_that_is_being_made_is_waited_for_by_one_that_has_no_room():
    """Neither serves yet, and the time for room is up."""
    from tandem.errors import RunError
    from tandem.placement.cluster.broadcast import Reading
    from tandem.placement.cluster.engines import Engines

    lacks = ["1 CPU", ""]
    placement = Placement(kind="apart", engines=2)
    engines = Engines(
        lambda number: None,
        lambda number: lacks[number],
        placement,
        Reading(None, None),
        lambda: None,
        lambda: None,
    )
    for seat in engines.seats:
        seat.losses = 1
    assert engines._waits_for_room(engines.seats[0])
    lacks[1] = "1 CPU"
    with pytest.raises(
        RunError, match=r"no engine is left: for 600 s .* had room for engine 0, which takes 1 CPU"
    ):
        engines._waits_for_room(engines.seats[0])
