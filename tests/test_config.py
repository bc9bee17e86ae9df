"""Loading, refusing, documenting and comparing configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config_file import SMALL, refusal, write
from tandem.config import difference, dump, load, preset_names
from tandem.config.load import FREE_ON_RESUME
from tandem.config.schema import keys
from tandem.errors import ConfigError

ROOT = Path(__file__).parents[1]
REQUIRED = {name: ["model.path=models/any", "data.train=train.jsonl"] for name in ("gsm8k", "cluster")}
"""What a recipe leaves to its user."""


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "runs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_survives_a_round_trip(path, tmp_path):
    run = load(path, REQUIRED.get(path.stem, []))
    assert run.run_dir == f"runs/{path.stem}"
    assert load(write(tmp_path, dump(run))) == run


def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path, SMALL + "run_dir: ~/x\n")
    run = load(file, ["engine.kind=vllm", "engine.transfer_dir=~/weights"])
    assert (run.run_dir, run.engine.transfer_dir) == (f"{tmp_path}/x", f"{tmp_path}/weights")


def test_a_file_without_run_dir_runs_in_a_folder_of_its_name(tmp_path):
    assert load(write(tmp_path, SMALL, "adder.yaml")).run_dir == "runs/adder"
    assert load(write(tmp_path, SMALL + "run_dir: elsewhere\n")).run_dir == "elsewhere"


def test_preset_then_extended_then_file_then_override_win_in_this_order(tmp_path):
    write(
        tmp_path,
        SMALL + "algorithm: {preset: dapo, entropy: 0.1, max_refills: 7}\nsteps: 1\nseed: 1\n",
        "a.yaml",
    )
    write(tmp_path, "steps: 2\nseed: 2\n", "sub/b.yaml")
    path = write(tmp_path, "extends: [a.yaml, sub/b.yaml]\nseed: 3\nalgorithm: {entropy: 0.2}\n")
    run = load(path, ["algorithm.clip.high=0.5"])
    assert (run.steps, run.seed) == (2, 3)
    assert (run.algorithm.preset, run.algorithm.max_refills, run.algorithm.entropy) == ("dapo", 7, 0.2)
    assert (run.algorithm.clip.low, run.algorithm.clip.high) == (0.2, 0.5)
    assert run.algorithm.keep == "mixed"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learner.optimizer.lr=1e-6", 1e-6),
        ("learner.optimizer.lr=3", 3.0),
        ("learner.optimizer.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("learner.checkpointing=true", True),
        ("eval.every=null", None),
        ("sampling.stop=['</answer>', 'a=b']", ["</answer>", "a=b"]),
        ("data.system=say $5 or ${x}", "say $5 or ${x}"),
        ("model.path=null", None),
        ("reward.functions.0.weight=2.5", 2.5),
        ("reward.functions[0].name=acc", "acc"),
        ("reward.functions=[{name: x}, {name: y}]", None),
        ("warmup.steps=5", 5),
    ],
)
def test_an_override_is_yaml_typed_and_reaches_any_key(override, value, tmp_path):
    run = load(write(tmp_path, SMALL), [override])
    if override.startswith("reward.functions="):
        assert [f.name for f in run.reward.functions] == ["x", "y"]
        return
    found = run.model_dump()
    for part in override.partition("=")[0].replace("[0]", ".0").split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    assert found == value and type(found) is type(value)


def test_values_are_never_read_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_PROBE", "leaked-from-environment")
    run = load(
        write(tmp_path, SMALL + "device: ${oc.env:TANDEM_PROBE}\n"), ["data.system=${oc.env:TANDEM_PROBE}"]
    )
    assert run.device == run.data.system == "${oc.env:TANDEM_PROBE}"
    assert "leaked" not in dump(run)


def test_a_value_that_holds_a_secret_of_the_environment_is_refused_unseen(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_API_KEY", "CANARY-0123456789")
    monkeypatch.setenv("TOKENIZER_PATH", "tandem:addition")
    message = refusal(write(tmp_path, SMALL), "reward.functions.0.args.key=CANARY-0123456789")
    assert (
        "reward.functions.0.args.key (override): holds the value of the environment variable PROBE_API_KEY"
        in message
    )
    assert "CANARY" not in message
    assert "CANARY" not in refusal(
        write(tmp_path, SMALL), "nokey=CANARY-0123456789", "steps=CANARY-0123456789"
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sampling.promts_per_step", "sampling.prompts_per_step"),
        ("learner.optimiser.lr", "learner.optimizer"),
        ("sampling.lr", "learner.optimizer.lr"),
        ("temprature", "sampling.temperature"),
        ("algorithm.kl.coefficient", "algorithm.kl.coef"),
        ("reward.functions.0.wieght", "reward.functions[].weight"),
        ("extend", "extends"),
    ],
)
def test_an_unknown_key_is_refused_with_its_origin_and_the_key_that_was_meant(typed, meant, tmp_path):
    message = refusal(write(tmp_path, SMALL), f"{typed}=1")
    (line,) = [line for line in message.splitlines() if "unknown key" in line]
    named = line.split()[0]
    assert typed == named or typed.startswith(f"{named}.")
    assert "(override)" in line and meant in line.partition("Did you mean")[2]
    assert "tandem explain" in message


def test_a_key_unlike_any_other_gets_no_suggestion(tmp_path):
    assert "zzqx (override): unknown key.\n" in refusal(write(tmp_path, SMALL), "zzqx=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampling.top_p=3", "sampling.top_p=3 (override): expected number above 0 and at most 1"),
        ("steps=1.5", "steps=1.5 (override): expected whole number at least 0"),
        ("steps=true", "steps=true (override): expected whole number at least 0"),
        ("steps='16'", 'steps="16" (override): expected whole number at least 0'),
        ("eval.every=0", "eval.every=0 (override): expected whole number above 0, or null"),
        ("learner.optimizer.betas=[0.9]", "expected list of 2 numbers"),
        ("learner.optimizer.betas=[1.5, 2]", "expected list of 2 numbers at least 0 and below 1"),
        ("learner.optimizer.lr=.inf", "lr=Infinity (override): expected finite number at least 0"),
        ("critic.optimizer.weight_decay=.nan", "expected finite number at least 0"),
        ("sampling.temperature=.inf", "expected finite number at least 0"),
        ("placement.engine_timeout_s=.inf", "expected finite number above 0"),
        ("placement.gpus=.inf", "expected finite number at least 0, or null"),
        ("reward.timeout_s=1e300", "expected number above 0 and at most 86400"),
        (
            "reward.functions.0.weight=.nan",
            "reward.functions.0.weight=NaN (override): expected finite number",
        ),
        (
            "reward.functions.0.args.deep=[1, {a: .nan}]",
            "reward.functions.0.args (override): {'deep': [1, {'a': nan}]}: inf and nan cannot be written",
        ),
        ("seed=9223372036854775808", "expected whole number at least 0 and below 9223372036854775808"),
        ("sampling.stop_tokens=[3, -1]", "expected list of whole numbers at least 0"),
        ("algorithm.clip.low=1.5", "expected number above 0 and below 1, or null"),
        ("algorithm.ratio=word", 'algorithm.ratio="word" (override): expected one of `token`, `sequence`'),
        ("model.lora.targets=3", "model.lora.targets=3 (override): expected list of text or `all-linear`"),
        ("device=0", "device=0 (override): expected text; quote it to make it text"),
        ("sampling=4", "sampling=4 (override): expected section"),
        (
            "reward.functions=[]",
            "reward (override): nothing scores an answer: name a function in reward.functions",
        ),
        ("reward.model.name=judge", "reward.model.path: missing; expected text"),
        ("reward.model={path: x, name: answer_number}", "may stand once, and none be 'overlong'"),
        ("reward.model={path: x, name: a b}", "reward.model.name='a b': use letters, digits"),
        ("reward.functions=[3]", "reward.functions.0=3 (override): expected list of sections"),
        ("reward.functions=[{}]", "reward.functions.0.name: missing; expected text"),
        ("data=null", "data=null (override): expected section"),
        ("model.new.hidden_size=12", "expected whole number above 0 and a multiple of 8"),
        ("journal.sinks=[printer]", "expected list of `console`, `jsonl`, `tensorboard`, `wandb`"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(override, expected, tmp_path):
    message = refusal(write(tmp_path, SMALL), override)
    assert expected in message
    assert "pydantic" not in message and "validation error" not in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.path=x"], "exactly one of model.path and model.new"),
        (["model.new=null"], "exactly one of model.path and model.new"),
        (["model.new.heads=3"], "hidden_size=128 must be a multiple of heads=3"),
        (["model.new.hidden_size=24", "model.new.heads=8"], "make heads of size 3; positions"),
        (["algorithm.kl.estimator=k1"], "zero expected gradient"),
        (["algorithm.kl.coef=0", "algorithm.kl.target=0.1"], "kl.coef=0 stays 0"),
        (
            ["algorithm.clip.dual=3", "algorithm.clip.kind=weight"],
            "clip.dual=3 is a bound of clip.kind=objective",
        ),
        (["reference.path=x", "reference.refresh_every=3"], "exclude each other"),
        (
            ["learner.updates_per_step=3"],
            "learner.updates_per_step=3 must divide sampling.prompts_per_step=16",
        ),
        (["sampling.temperature=0"], "sampling.temperature=0 is greedy"),
        (["sampling.min_answer_tokens=300"], "sampling.min_answer_tokens is above"),
        (["reward.overlong_buffer=300"], "reward.overlong_buffer is above"),
        (["data.train=x.jsonl", "warmup.steps=3"], "warmup needs model.new and a task"),
        (
            ["reward.column=kind"],
            "reward.column='kind' chooses between reward.functions and reward.model, and there is no reward.model",
        ),
        (
            ["reward.column=kind", "reward.functions=[]", "reward.model.path=x"],
            "there is no reward.functions",
        ),
        (["eval.correct=other"], "eval.correct='other' is not one of reward.functions"),
        (["model.lora.rank=4", "reference.refresh_every=3"], "reference.refresh_every needs full weights"),
    ],
)
def test_values_that_exclude_each_other_are_refused(overrides, said, tmp_path):
    assert said in refusal(write(tmp_path, SMALL), *overrides)


def test_all_problems_come_in_one_message_a_line_each_with_their_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "steps: -1\nmodel: {new: {}}\n", "base.yaml")
    text = "extends: base.yaml\ndata:\n  trian: x\n  limit: 0\nreward: {functions: [{name: a}]}\n"
    text += "algorithm: {preset: grop}\n"
    message = refusal(write(tmp_path, text), "noequals", "sampling.slots=x")
    lines = message.splitlines()
    assert lines[0].endswith("run.yaml: 7 problems in the configuration")
    assert {line.strip() for line in lines[1:-1]} == {
        "noequals: an override is written section.key=value",
        f"algorithm.preset=grop: no such preset. Did you mean grpo? Presets: {', '.join(preset_names())}; "
        "or a path to a YAML file (run.yaml:6)",
        "steps=-1 (base.yaml:1): expected whole number at least 0",
        "data.train: missing; expected text",
        "data.trian (run.yaml:3): unknown key. Did you mean data.train?",
        "data.limit=0 (run.yaml:4): expected whole number above 0, or null",
        'sampling.slots="x" (override): expected whole number above 0',
    }


def test_a_missing_file_names_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SMALL, "quick.yaml")
    assert "quik.yaml: no such file. Near: quick.yaml" in refusal(Path("quik.yaml"))
    assert "absent.yaml: no such file" in refusal(write(tmp_path, "extends: absent.yaml\n" + SMALL))
    assert "is a folder" in refusal(tmp_path)


def test_extends_on_the_command_line_is_sent_to_a_file(tmp_path):
    said = refusal(write(tmp_path, SMALL), "extends=base.yaml", "sede=1")
    assert "extends=base.yaml: only a file extends others; write `extends: base.yaml` into one" in said
    assert "sede (override): unknown key" in said and "1 problem" not in said


def test_extends_in_a_circle_is_refused_with_the_circle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: [c.yaml]\n", "b.yaml")
    write(tmp_path, "extends: a.yaml\n", "c.yaml")
    assert "extends goes in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml" in refusal(Path("a.yaml"))


def test_one_file_may_be_extended_twice_without_being_a_circle(tmp_path):
    write(tmp_path, SMALL, "root.yaml")
    write(tmp_path, "extends: root.yaml\nsteps: 4\n", "left.yaml")
    write(tmp_path, "extends: root.yaml\nseed: 5\n", "right.yaml")
    run = load(write(tmp_path, "extends: [left.yaml, right.yaml]\n"))
    assert (run.steps, run.seed) == (4, 5)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [1\nseed: 2\n", "run.yaml:2: not valid YAML"),
        ("steps: 1\nsteps: 2\n", "run.yaml:2: steps is given twice, first in line 1"),
        ("data:\n  train: x\n  train: y\n", "run.yaml:3: data.train is given twice, first in line 2"),
        ("- steps\n", "expected `key: value` lines, found list"),
        ("? [1, 2]\n: 3\n", "run.yaml:1: a key must be a word"),
        ("a: &x\n  b: *x\n", "contains itself"),
        ("steps: !!python/object/apply:os.getcwd []\n", "run.yaml:1: not valid YAML"),
        ("extends: {a: b}\n", "extends={'a': 'b'}: expected a path or a list of paths"),
        (BOMB, "more than 100,000 keys"),
    ],
)
def test_text_that_is_no_configuration_is_refused_with_its_line(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(write(tmp_path, text))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"steps: 1\ndevice: \xff\n")
    assert "not UTF-8 text (byte 17)" in refusal(path)


def test_a_dump_is_whole_and_loads_again(tmp_path):
    awkward = ["1e-6", "on", "null", "a: b", "é\n中", "3", ""]
    overrides = [
        "algorithm.preset=rloo",
        f"sampling.stop={json.dumps(awkward)}",
        "reward.functions.0.args={table: {x: [1, 2.5e-3, null, true]}}",
        "learner.optimizer.lr=1e-6",
        "model.lora.rank=4",
    ]
    run = load(write(tmp_path, SMALL), overrides)
    assert run.sampling.stop == awkward
    spelled_out = yaml.safe_load(dump(run))
    assert spelled_out["algorithm"]["preset"] == "rloo"
    assert spelled_out["algorithm"]["kl"] == run.algorithm.kl.model_dump()
    assert load(write(tmp_path, dump(run), "again/config.yaml")) == run


def test_difference_names_what_a_resumed_run_must_not_change(tmp_path):
    path = write(tmp_path, SMALL)
    old = load(path)
    changed = [
        "learner.optimizer.lr=2e-6",
        "warmup.steps=3",
        "reward.functions=[{name: answer_number, weight: 2}]",
        "algorithm.preset=dr_grpo",
        "reward.model={path: judge, weight: 2}",
    ]
    new = load(path, changed)
    said = difference(old, new)
    assert "learner.optimizer.lr: 1e-06 -> 2e-06" in said
    assert "warmup.steps: (not set) -> 3" in said
    assert "reward.functions.0.weight: 1.0 -> 2" in said or "reward.functions.0.weight: 1.0 -> 2.0" in said
    assert 'algorithm.weight: "sequence_mean" -> "constant"' in said
    assert 'reward.model.path: (not set) -> "judge"' in said and not [s for s in said if "model.layout" in s]
    assert all(
        line.split(":")[0].split(".")[0] in {"learner", "warmup", "reward", "algorithm"} for line in said
    )


@pytest.mark.parametrize("keys", [
    [],
    ["algorithm.preset=rloo"],
    ["algorithm.preset=dapo"],
    ["algorithm.advantage=discounted", "algorithm.scale=none", "algorithm.group_baseline=true"],
])  # fmt: skip
def test_an_answer_that_is_compared_with_none_is_refused(tmp_path, keys):
    path = write(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"answers_per_prompt=1: .* alone it teaches nothing"):
        load(path, ["sampling.answers_per_prompt=1", *keys])
    alone = ["algorithm.advantage=discounted", "algorithm.scale=none"]
    assert load(path, ["sampling.answers_per_prompt=1", *alone]).rollouts_per_step > 0


def test_difference_lets_pass_what_may_change_on_resume(tmp_path):
    path = write(tmp_path, SMALL)
    judged = ["reward.model.path=x"]
    free = [
        "run_dir=x",
        "steps=7",
        "device=cpu",
        "threads=3",
        "profile=true",
        "eval.every=3",
        "checkpoint.keep=5",
        "journal.samples=1",
        "learner.tokens_per_forward=99",
        "learner.keep_mb=99",
        "learner.layout.context=2",
        "reference.layout.context=2",
        "critic.layout.tensor=2",
        "reward.workers=4",
        "reward.model.layout.context=2",
    ]
    colocated = ["placement.kind=colocated", "learner.sleep=true"]  # where profile=true is refused
    vllm = ["engine.kind=vllm"]
    engine = [
        "engine.transfer=files",
        "engine.transfer_dir=x",
        "engine.verify_every=2",
        "engine.tensor_parallel=2",
        "engine.gpu_memory_utilization=0.5",
        "engine.kv_cache_mb=99",
        "engine.sleep=true",
    ]
    assert len(free) + len(colocated) + len(engine) == len(FREE_ON_RESUME)
    assert difference(load(path, judged), load(path, judged + free)) == []
    assert difference(load(path), load(path, colocated)) == []
    assert difference(load(path, vllm), load(path, vllm + engine)) == []
    assert FREE_ON_RESUME and all(key in keys() for key in FREE_ON_RESUME)


def test_loading_needs_no_heavy_library(tmp_path):
    code = (
        "import sys; from tandem.config import load; load(sys.argv[1]);"
        "slow = {'torch', 'transformers', 'datasets', 'matplotlib', 'tensorboard'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    path = str(write(tmp_path, SMALL))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
