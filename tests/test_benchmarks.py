"""The benchmarks run, refuse figures that mean nothing, and their page says what the raw results say."""

import json
import random
import sys
from pathlib import Path

import bound
import document
import gate
import grpo_step
import lengths
import pytest
import regression
import rollout
import scaling
import torch
import transfer
from contenders import tandem_engine, trl_gradient
from contenders.stopwatch import until_end
from contest import Entry, Row, best, check, race, ratio
from job import Answer, Job
from safetensors.torch import load_file, save_file
from shape import FIRST_WORD, QWEN, Shape, small, text, tokenizer

from published import FOLDER, needs
from tandem.model.kept import Kept

ROOT = Path(__file__).parents[1]
GSM8K = FOLDER / "train.jsonl"
TINY = ["--hidden", "64", "--layers", "1", "--prompts", "4", "--answers", "2", "--tokens", "8"]
ONCE = ["--rounds", "1", "--repeats", "1"]


@pytest.fixture(scope="module")
def shape() -> Shape:
    return small(64, 1, vocab=512)


@pytest.fixture(scope="module")
def folder(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shape")
    shape.write(made)
    return made


def job(folder: Path, **changes: object) -> Job:
    rng = random.Random(1)
    settings = {
        "folder": str(folder),
        "prompts": [[rng.randrange(FIRST_WORD, 512) for _ in range(n)] for n in (5, 9)],
        "answers": 3,
        "max_tokens": 12,
        "end_tokens": [],
        "setting": "default",
        "repeats": 1,
        "seed": 0,
        "threads": 2,
        "device": "cpu",
        "dtype": "fp32",
    }
    return Job(**{**settings, **changes})


def run_script(main, folder: Path, monkeypatch, capsys, *arguments: str) -> tuple[dict, dict]:
    """The last line of a benchmark, and its results file."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *TINY, *ONCE, "--out", str(folder), *arguments])
    main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    return last, json.loads((folder / f"{last['benchmark']}-64.json").read_text())


# The scripts, whole.


def test_sampling_is_raced_and_gated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout.transformers_generate, "ON", {"cpu": ("log-probabilities",)})
    options = ["--cases", "equal", "--python", "vllm_engine=/bin/false"]
    last, record = run_script(rollout.main, tmp_path, monkeypatch, capsys, *options)
    rows = {(r["contender"], r["setting"]): r for r in record["cases"]["equal"]["rows"]}
    ours, theirs = rows["tandem_engine", "default"], rows["transformers_generate", "log-probabilities"]
    assert ours["tokens"] == theirs["tokens"] == [4 * 2 * 8]
    assert last["ratio_vs_transformers"] == pytest.approx(
        ours["tokens_per_second"] / theirs["tokens_per_second"], rel=1e-2
    )
    assert last["ratio_vs_vllm"] is last["ratio_vs_trl"] is last["memory_ratio_vs_trl"] is None
    assert "exit status 1" in rows["vllm_engine", "in process"]["not_run"]
    verdict = record["cases"]["equal"]["gate"]["tandem_engine, default"]
    assert verdict["passed"] and 0 < verdict["logp_error"] < 1e-5
    assert ours["memory"][0]["peak_mb"] > ours["memory"][0]["loaded_mb"] > 50


def test_a_step_is_raced(tmp_path, monkeypatch, capsys):
    options = [
        "--cases",
        "beta_0.04",
        "--python",
        "trl_step=/bin/false",
        "--python",
        "trl_gradient=/bin/false",
    ]
    last, record = run_script(grpo_step.main, tmp_path, monkeypatch, capsys, *options)
    case = record["cases"]["beta_0.04"]
    ours, theirs = case["rows"][:2], case["rows"][2:]
    assert [row["setting"] for row in ours] == ["default", "keep_mb=512"]
    assert all(row["median_seconds"] > 0 and row["tokens"] == [4 * 2 * 8] for row in ours)
    assert case["phases"]["timing/reference_model"] > 0
    assert all("exit status" in row["not_run"] for row in theirs)
    assert "trl_gradient" in case["gate"]["not_run"]
    assert last["ratio_vs_trl"] is last["memory_ratio_vs_trl"] is None


def test_transfers_are_timed_by_road_and_proof(tmp_path, monkeypatch, capsys):
    size = ["--hidden", "64", "--layers", "2", "--vocab", "400", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *size, "--out", str(tmp_path)])
    transfer.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    roads, proofs = ("memory", "ipc", "files", "broadcast"), ("none", "checksums", "checksums and probe")
    assert list(last["seconds"]) == [f"{road}, {proof}" for road in roads for proof in proofs]
    case = json.loads((tmp_path / "transfer-64.json").read_text())["cases"]["one engine"]
    assert case["bytes"] == 4 * (2 * (64 * 64 * 3 + 64 * 2 + 3 * 64 * 256 + 2 * 64) + 400 * 64 + 64)
    assert all(len(row["seconds"]) == 2 and row["median_seconds"] > 0 for row in case["rows"])
    assert document.transfer_table(case).count("| checksums and probe |") == 4


@pytest.mark.alone
def test_the_engine_stays_ahead_of_generate(tmp_path):
    assert regression.speed_ratio(tmp_path) >= regression.LEAST


# The gates.


def test_the_gate_passes_samples_and_refuses_anything_else(folder, shape):
    task = job(folder, max_tokens=40)
    good = tandem_engine.generator(task, tandem_engine.loaded(task))(0)
    assert gate.sampled(task, good).passed
    off = [Answer(prompt=a.prompt, tokens=a.tokens, logp=[p - 1e-3 for p in a.logp]) for a in good]
    assert not gate.sampled(task, off).passed
    greedy = [Answer(prompt=a.prompt, tokens=greedy_tokens(task, a), logp=[]) for a in good]
    verdict = gate.sampled(task, greedy)
    assert verdict.deviations > gate.SAMPLED and not verdict.passed
    swapped = [Answer(prompt=1 - a.prompt, tokens=a.tokens, logp=a.logp) for a in good]
    assert not gate.sampled(task, swapped).passed


def greedy_tokens(task: Job, like: Answer) -> list[int]:
    from contenders.transformers_generate import loaded

    model = loaded(task)
    out = model.generate(
        torch.tensor([task.prompts[like.prompt]]), do_sample=False, max_new_tokens=len(like.tokens)
    )
    return out[0, len(task.prompts[like.prompt]) :].tolist()


def test_gradients_that_differ_are_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ours = {
        "gradient.a": torch.randn(30, generator=generator),
        "gradient.b": torch.randn(4, 4, generator=generator),
        "loss": torch.tensor(0.5),
    }
    save_file(ours, tmp_path / "ours")

    def verdict(**changes: torch.Tensor) -> bool:
        save_file({**ours, **changes}, tmp_path / "theirs")
        return gate.same_gradient(tmp_path / "ours", tmp_path / "theirs")["passed"]

    assert verdict()
    assert verdict(**{"gradient.a": ours["gradient.a"] * (1 + 1e-6)})
    assert not verdict(**{"gradient.a": ours["gradient.a"] * 1.001})
    assert not verdict(loss=torch.tensor(0.5002))
    assert not verdict(**{"gradient.c": torch.zeros(1)})


def test_the_sampled_batch_is_one_that_trl_can_score(folder, tmp_path, monkeypatch):
    """What is handed over says the same as what Tandem trained on: a textbook loss of it has Tandem's gradient, which
    is made of what sampling computed."""
    from contenders import tandem_gradient
    from contenders.transformers_generate import loaded

    task, shares, forget = job(folder, prompts_per_step=2, beta=0.04, setting="keep_mb=512"), [], Kept.forget

    def forgets(self):
        shares.append(self.spared)
        forget(self)

    monkeypatch.setattr(Kept, "forget", forgets)
    tandem_gradient.measure(task)
    assert shares[0] == 1
    inputs = trl_gradient.inputs(task, load_file(Path(task.folder) / "tandem.grad"))
    model = loaded(task)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=real, position_ids=positions).logits[:, -width - 1 : -1]
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    back = inputs["ref_per_token_logps"] - logp
    token_loss = -(logp - logp.detach()).exp() * inputs["advantages"][:, None]
    token_loss = token_loss + task.beta * (back.exp() - back - 1)
    mask = inputs["completion_mask"]
    loss = ((token_loss * mask).sum(-1) / mask.sum(-1)).mean()
    loss.backward()
    gradients = {f"gradient.{name}": w.grad for name, w in model.named_parameters()}
    save_file({**gradients, "loss": loss.detach()}, tmp_path / "textbook")
    verdict = gate.same_gradient(Path(task.folder) / "tandem.grad", tmp_path / "textbook")
    assert verdict["passed"], verdict
    assert max(len(set(row)) for row in [inputs["advantages"].tolist()]) == 6


# The race.


QUICK = """#!{python}
import json, sys
name, task, result = sys.argv[3:]
job = json.load(open(task))
open({log!r}, "a").write(name + " " + str(job["seed"]) + "\\n")
report = {{"seconds": [2.0], "tokens": [job["max_tokens"]], "memory": {{}}, "versions": {{}}}}
json.dump(report, open(result, "w"))
"""


def test_contenders_take_turns_and_a_missing_one_is_asked_once(folder, tmp_path):
    quick, log = tmp_path / "python", tmp_path / "log"
    quick.write_text(QUICK.format(python=sys.executable, log=str(log)))
    quick.chmod(0o755)
    entries = [Entry(contender=name, setting="s") for name in ("a", "missing", "b")]
    pythons = {"a": str(quick), "b": str(quick), "missing": "/bin/false"}
    a, missing, b = race(entries, job(folder), 2, tmp_path, pythons)
    assert log.read_text().split("\n")[:-1] == ["a 0", "b 0", "a 1", "b 1"], "in turns, each round anew"
    assert a.seconds == b.seconds == [2.0, 2.0] and a.rate == 6.0
    assert missing.not_run == "failed with exit status 1: it said nothing" and len(missing.load) == 1


def test_ratios_are_of_tokens_per_second_to_the_fastest_setting():
    def row(contender: str, setting: str, seconds: list[float]) -> Row:
        entry = Entry(contender=contender, setting=setting)
        return Row(entry=entry, seconds=seconds, tokens=[100] * len(seconds))

    ours = row("tandem_engine", "default", [1.0, 2.0, 9.0])
    rows = [ours, row("x", "slow", [8.0]), row("x", "fast", [4.0]), row("x", "void", [1.0])]
    rows[-1].void("why")
    assert best(rows, "x") is rows[2]
    assert ratio(best(rows, "tandem_engine"), best(rows, "x")) == 2.0
    assert ratio(ours, best(rows, "nobody")) is None


def test_a_contender_that_made_fewer_tokens_is_void(folder):
    task = job(folder)
    entry = Entry(contender="x", setting="y")
    full, short = (Row(entry=entry, seconds=[1.0], tokens=[count]) for count in (2 * 3 * 12, 71))
    check([full, short], task)
    assert full.not_run is None and full.seconds
    assert short.not_run is not None and not short.seconds
    assert short.public() == {"contender": "x", "setting": "y", "not_run": short.not_run}


def test_answers_end_with_their_end_token():
    assert until_end([5, 6, 7, 6], [6]) == [5, 6]
    assert until_end([5, 6], []) == [5, 6]


# The workload.


def test_words_and_ids_say_the_same():
    for vocab in (512, 20_000):
        words = tokenizer(vocab)
        ids = [FIRST_WORD, vocab - 1, *random.Random(0).choices(range(FIRST_WORD, vocab), k=300)]
        assert words(text(ids))["input_ids"] == ids
        assert words.eos_token_id == vocab and words.pad_token_id == 0


def test_the_shapes_have_the_sizes_they_claim(folder, shape):
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    matrices = sum(w.numel() for name, w in weights.items() if w.ndim == 2)
    assert matrices == shape.matmul_parameters, "tied: the embedding is the head"
    assert round(small(256, 4).matmul_parameters / 1e6, 1) == 4.5
    # Published: 0.49 B parameters, 0.36 B of them not in the embedding; 1.54 B and 1.31 B.
    half, more = QWEN["qwen2.5-0.5b"], QWEN["qwen2.5-1.5b"]
    assert (round(half.matmul_parameters / 1e9, 2), round(half.block_parameters / 1e9, 2)) == (0.49, 0.36)
    assert (round(more.matmul_parameters / 1e9, 2), round(more.block_parameters / 1e9, 2)) == (1.54, 1.31)


def test_the_bound_counts_weights_cache_and_prompts():
    """One answer of two tokens to a prompt of three, by hand; bandwidth 1 and operations free, then the reverse."""
    tiny = Shape(name="t", hidden=4, layers=1, heads=2, kv_heads=1, intermediate=8, vocab=10, dtype="bf16")
    blocks = 2 * 4 * 2 * (2 + 1) + 3 * 4 * 8
    n = blocks + 40
    cache = 2 * 1 * 1 * 2 * 2
    assert bound.rollout_seconds(tiny, [3], 1, 2, (1e30, 1.0)) == 2 * 2 * n + (3 + 4) * cache
    attention = 4 * 1 * 2 * 2
    assert bound.rollout_seconds(tiny, [3], 1, 2, (1.0, 1e30)) == 2 * 2 * n + 7 * attention + 2 * blocks * 3


@needs(GSM8K)
def test_the_recorded_lengths_are_those_of_the_data():
    assert lengths.histogram(GSM8K) == lengths.recorded()


# The page.


@pytest.mark.alone
def test_stages_that_sleep_overlap_with_lag_alone():
    ahead, in_turns = (min(scaling.sleeping(0.1, 0.1, lag, 4)) for lag in (1, 0))
    assert 0.1 <= ahead < 0.15 and in_turns >= 0.2
    case = {"rows": scaling.overlap_rows(1)}
    assert document.scaling_table(case).count("| 0.3 | 0.15 | 1 |") == 1


def test_the_page_is_made_from_the_raw_results():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == document.document(), "run: make docs"


def test_the_page_shows_figures_ratios_and_what_was_not_run(tmp_path):
    def row(contender: str, setting: str, rate: float) -> dict:
        memory = {"step_mb": 1000 / rate, "peak_mb": 50.0, "children_mb": 1.0}
        return {
            "contender": contender,
            "setting": setting,
            "median_seconds": 100 / rate,
            "tokens_per_second": rate,
            "seconds": [100 / rate, 200 / rate],
            "tokens": [100, 100],
            "load": [9.0],
            "memory": [memory],
        }

    case = {
        "prompts": [5, 9],
        "answers": 3,
        "max_tokens": 12,
        "rows": [
            row("tandem_engine", "default", 500.0),
            row("transformers_generate", "log-probabilities", 200.0),
            {"contender": "vllm_engine", "setting": "in process", "not_run": "vllm is not installed"},
        ],
        "gate": {"tandem_engine, default": {"logp_error": 2e-7}},
    }
    record = {
        "benchmark": "rollout",
        "command": "python benchmarks/rollout.py",
        "date": "2026-01-02T03:04:05",
        "hardware": {"cpu": "Chip", "cores": 2, "threads": 2, "accelerator": None},
        "versions": {"python": "3.12", "torch": "2", "tandem": "abc"},
        "shape": {"name": "256", "parameters": 4.5e6, "dtype": "fp32"},
        "rounds": 1,
        "repeats": 2,
        "cases": {"equal": case},
    }
    (tmp_path / "rollout-256.json").write_text(json.dumps(record))
    page = document.document(tmp_path)
    assert "| Tandem | default | **500** (250 to 500) | 2e-07 | - |" in page
    assert "| Transformers | log-probabilities | **200** (100 to 200) | none returned | 2.50x |" in page
    assert "| vLLM | in process | vllm is not installed | - | - |" in page
    assert "did other work at the time" in page
    assert "Not run: no accelerator. `python benchmarks/rollout.py --device cuda" in page
    assert "Not run: no result yet. `python benchmarks/grpo_step.py --hidden 256" in page
