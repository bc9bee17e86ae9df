"""An update that is given what sampling computed is the update that computes it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.engine.answers import Pause
from tandem.journal import read_metrics, repeatable
from tandem.learner import Actor
from tandem.model import LanguageModel, load, token_logprobs, tokenizer_of
from tandem.model import product as products
from tandem.model.fused import kept_of
from tandem.model.kept import Kept, worthiest
from tandem.model.product import Linear
from tandem.train import footprint
from tandem.train.kept_bytes import spared
from tandem.train.plan.device import assumed, find
from tandem.train.plan.plan import plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.work import forward, share
from tandem.train.run import train
from tiny_models import FAMILIES, language_model

PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12), (40, 41))
ENDS = frozenset(range(20, 32))
ALL = 2**30
REWARD = f"{Path(__file__).parent / 'data' / 'digit_share.py'}:digit_share"


def asked() -> list[Request]:
    """Five answers to each prompt, of them one of a single token."""
    return [
        Request(tokens=p, key=10 * i + j, max_tokens=1 if j == 3 else None, keep=True)
        for i, p in enumerate(PROMPTS)
        for j in range(5)
    ]


def sampled(engine, params, requests=None):
    """Rows, their masks, lengths and groups, of prompts with the answers that the engine gives."""
    requests = requests or asked()
    rows = [r.tokens + c.tokens for r, c in zip(requests, engine.generate(requests, params))]
    length_B = torch.tensor([len(row) for row in rows])
    prompt_B = torch.tensor([len(r.tokens) for r in requests])
    tokens_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    column_T = torch.arange(tokens_BT.shape[1])
    mask_BT = (column_T >= prompt_B[:, None]) & (column_T < length_B[:, None])
    group_B = torch.tensor([PROMPTS.index(r.tokens) for r in requests])
    return tokens_BT, mask_BT, length_B, prompt_B, group_B


def learned(model: LanguageModel, rows, kept=None, logits_bytes=ALL, shared=True):
    """Log-probabilities and the gradient of their weighted sum, by name."""
    tokens_BT, mask_BT, length_B, prompt_B, group_B = rows
    model.network.zero_grad()
    logp_BT, entropy_BT = token_logprobs(
        model,
        tokens_BT,
        mask_BT,
        length_B,
        prompt_length_B=prompt_B if shared else None,
        group_B=group_B if shared else None,
        temperature=0.8,
        logits_bytes=logits_bytes,
        entropy_gradient=True,
        kept=kept,
    )
    weight_BT = torch.linspace(-1, 2, logp_BT.numel()).view(logp_BT.shape)
    (logp_BT * weight_BT + 0.1 * entropy_BT).sum().backward()
    return logp_BT.detach(), {name: w.grad.clone() for name, w in model.network.named_parameters()}


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    for name, gradient in theirs[1].items():
        apart = (ours[1][name] - gradient).norm() / gradient.norm()
        assert apart < 2e-5, name


def multiplied(monkeypatch) -> list[int]:
    """Widths of the linear layers that compute their output from now on."""
    widths, product = [], products.product

    def watched(x, weight_OI, bias_O=None):
        widths.append(len(weight_OI))
        return product(x, weight_OI, bias_O)

    monkeypatch.setattr(products, "product", watched)
    return widths


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("slots", [64, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradient_are_those_of_the_whole_computation(
    family, slots, shared, monkeypatch
):
    """Prompts once or in each row; with few slots answers wait, and rows move while they decode."""
    model = language_model(family)
    kept = kept_of(model, ALL)
    rows = sampled(EmbeddedEngine(model, slots, kept=kept), SamplingParams(max_tokens=12, stop_tokens=ENDS))
    assert len(set((rows[2] - rows[3]).tolist())) > 3, "answers of many lengths"
    whole = learned(model, rows, shared=shared)
    widths = multiplied(monkeypatch)
    ours = learned(model, rows, kept, shared=shared)
    assert not widths, "no linear layer has computed its output"
    assert_same(ours, whole)
    assert not any(isinstance(m, Linear) and m.given is not None for m in model.network.modules())


def test_samples_are_the_same_whether_anything_is_kept_or_not():
    model, params = language_model("qwen3"), SamplingParams(max_tokens=12, stop_tokens=ENDS)
    plain = EmbeddedEngine(model, 4).generate(asked(), params)
    keeping = EmbeddedEngine(model, 4, kept=kept_of(model, ALL)).generate(asked(), params)
    for one, other in zip(plain, keeping, strict=True):
        assert (one.tokens, one.finish) == (other.tokens, other.finish)
        assert one.logp == pytest.approx(other.logp, abs=1e-5)


@pytest.mark.parametrize("multiplications", [48, 32])
def test_with_little_memory_the_worthiest_products_are_kept(multiplications, monkeypatch):
    """Those onto the hidden state from the feed-forward's 48 channels, then others; the rest is computed."""
    model = language_model()
    lines = sum(map(len, PROMPTS)) + 12 * 12 + 3 + 1
    limit = 4 * lines * 32 * (2 if multiplications == 48 else 3)
    kept = kept_of(model, limit)
    rows = sampled(EmbeddedEngine(model, 64, kept=kept), SamplingParams(max_tokens=12))
    held = sum(table.lines_NO.nbytes for table in kept._tables)
    assert held <= limit
    whole = learned(model, rows)
    widths = multiplied(monkeypatch)
    assert_same(learned(model, rows, kept), whole)
    downs = [layer.mlp.down_proj for layer in model.decoder.layers]
    assert [kept._open[down].layers for down in downs] == [[down] for down in downs]
    assert (held == limit, len(widths)) == (True, 2 * 7 + 1 - 2 - (multiplications == 32))


def test_what_is_worth_more_comes_first_and_what_is_too_large_is_passed_over():
    tables = [(256, 40), (1024, 30), (256, 50), (256, 20)]
    assert worthiest(tables, 200) == [1, 0, 2, 3]
    assert worthiest(tables, 95) == [1, 0, 3]
    assert worthiest(tables, 10) == []


def test_a_head_in_pieces_computes_its_logits():
    model = language_model("llama")
    kept = kept_of(model, ALL)
    rows = sampled(EmbeddedEngine(model, 64, kept=kept), SamplingParams(max_tokens=12))
    assert_same(learned(model, rows, kept, logits_bytes=264 * 4 * 7), learned(model, rows))


def test_rows_that_are_not_there_make_their_micro_batch_compute_everything(monkeypatch):
    model = language_model()
    kept, params = kept_of(model, ALL), SamplingParams(max_tokens=12)
    engine = EmbeddedEngine(model, 64, kept=kept)
    rows = sampled(engine, params)
    changed = (rows[0].clone(), *rows[1:])
    changed[0][4, 3] += 1
    widths = multiplied(monkeypatch)
    ours = learned(model, changed, kept)
    assert len(widths) == 2 * 7 + 1
    assert_same(ours, learned(model, changed))
    kept.forget()
    assert_same(learned(model, rows, kept), learned(model, rows))
    assert len(widths) == 4 * (2 * 7 + 1)


def test_other_calls_leave_what_is_kept_alone(monkeypatch):
    """An evaluation, and one for which there is no room beside the first; a later step begins anew."""
    model = language_model()
    kept, params = kept_of(model, ALL), SamplingParams(max_tokens=12)
    engine = EmbeddedEngine(model, 64, kept=kept)
    rows = sampled(engine, params)
    sampled(engine, params, [replace(r, key=r.key + 1000, keep=False) for r in asked()])
    more = sampled(engine, params, [replace(r, key=r.key + 2000) for r in asked()])
    whole = learned(model, rows)
    widths = multiplied(monkeypatch)
    assert_same(learned(model, rows, kept), whole)
    assert not widths
    learned(model, more, kept)
    assert len(widths) == 2 * 7 + 1, "nothing of it was kept"
    kept.forget()
    again = sampled(engine, params, [replace(r, key=r.key + 2000) for r in asked()])
    whole = learned(model, again)
    widths.clear()
    assert_same(learned(model, again, kept), whole)
    assert not widths


def test_answers_that_find_no_room_to_the_end_are_left_out(monkeypatch):
    model = language_model()
    kept, params = kept_of(model, ALL), SamplingParams(max_tokens=12)
    begin, calls = kept.begin, []

    def scarce(live):
        calls.append(live)
        return begin(live) if len(calls) < 8 else None

    monkeypatch.setattr(kept, "begin", scarce)
    rows = sampled(EmbeddedEngine(model, 64, kept=kept), SamplingParams(max_tokens=12, stop_tokens=ENDS))
    short = rows[2] - rows[3] <= 7
    assert 0 < int(short.sum()) < len(short) and params.max_tokens == int((rows[2] - rows[3]).max())
    mine = tuple(part[short] for part in rows)
    whole = learned(model, mine)
    widths = multiplied(monkeypatch)
    assert_same(learned(model, mine, kept), whole)
    assert not widths
    learned(model, rows, kept)
    assert widths


def test_a_paused_call_keeps_what_is_done_and_a_begun_answer_nothing():
    model = language_model()
    kept, params = kept_of(model, ALL), SamplingParams(max_tokens=12)
    engine, calls = EmbeddedEngine(model, 64, kept=kept), []

    def pause(answers, tokens):
        calls.append(tokens)
        if len(calls) > 4:
            raise Pause

    paused = engine.generate(asked(), params, poll=pause)
    kept.forget()
    engine.generate([replace(r, begun=c) for r, c in zip(asked(), paused)], params)
    assert not kept._line_of


def test_what_cannot_be_given_is_not_kept():
    assert kept_of(language_model("mistral"), ALL) is None
    short = language_model()
    short.network.bfloat16()
    assert kept_of(short, ALL) is None
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    adapted = LanguageModel(get_peft_model(language_model().network, lora), short.tokenizer, "adapted")
    assert kept_of(adapted, ALL) is None


def test_a_run_that_keeps_is_the_run_that_does_not_but_for_rounding(random_folder, make_run, quiet, tmp_path):
    """Two updates a step: the second has other weights than sampling had."""
    rows = {}
    for keep_mb in (64, 0):
        learner = {"keep_mb": keep_mb, "updates_per_step": 2, "optimizer": {"lr": 1e-4}}
        reward = {"functions": [{"name": REWARD}]}
        run = make_run(random_folder, run_dir=str(tmp_path / str(keep_mb)), reward=reward, learner=learner)
        train(run, quiet)
        rows[keep_mb] = read_metrics(tmp_path / str(keep_mb) / "metrics.jsonl")
    for one, other in zip(rows[64], rows[0], strict=True):
        names = {name for name in other if repeatable(name)}
        assert names == {name for name in one if repeatable(name)}
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    norms = [[row["grad_norm"] for row in each] for each in rows.values()]
    assert min(norms[0]) > 0 and norms[0] != norms[1], "it was used"


def test_every_so_many_updates_nothing_is_given(random_folder, make_run, quiet, monkeypatch):
    """Then what the trainer makes of an answer can be held against what the sampler made."""
    begun, given, accumulate = [], Kept.given, Actor._accumulate

    def begins(self, *arguments):
        begun.append([])
        return accumulate(self, *arguments)

    def gives(self, *arguments):
        begun[-1].append(arguments[0])
        return given(self, *arguments)

    monkeypatch.setattr("tandem.learner.PROOF_EVERY", 3)
    monkeypatch.setattr(Actor, "_accumulate", begins)
    monkeypatch.setattr(Kept, "given", gives)
    learner, reward = {"keep_mb": 64}, {"functions": [{"name": REWARD}]}
    train(make_run(random_folder, steps=5, reward=reward, learner=learner), quiet)
    assert [len(each) > 0 for each in begun] == [False, True, True, False, True]


@pytest.mark.parametrize("keep_mb", [512, 1])
def test_the_estimate_is_what_is_kept(adding_folder, make_run, keep_mb):
    run = make_run(
        adding_folder,
        learner={"keep_mb": keep_mb},
        sampling={"prompts_per_step": len(PROMPTS), "answers_per_prompt": 5, "max_answer_tokens": 12},
    )
    shape = footprint.shape_of(run.model, None)
    found = spared(run, shape, 4)
    model = load(run.model, tokenizer_of(run.model), torch.device("cpu"))
    kept = kept_of(model, keep_mb * footprint.MIB)
    even = [(*p, *range(50, 54 - len(p))) if len(p) < 4 else p[:4] for p in PROMPTS]
    requests = [Request(tokens=p, key=i, keep=True) for p in even for i in range(5)]
    EmbeddedEngine(model, 64, kept=kept).generate(requests, SamplingParams(max_tokens=12))
    assert sum(table.lines_NO.nbytes for table in kept._tables) == found.bytes <= keep_mb * footprint.MIB
    assert (found.share == 1) == (keep_mb == 512) and found.share > 0.1
    assert spared(make_run(adding_folder), shape, 4).bytes == 0
    lagging = make_run(adding_folder, learner={"keep_mb": keep_mb}, sampling={"max_lag": 1})
    assert spared(lagging, shape, 4).bytes == 0


def test_a_plan_of_one_cpu_counts_what_the_update_is_spared(adding_folder, make_run):
    """Of several devices none is: their engines have weights of their own."""
    rates = replace(assumed(find("h200"), "fp32"), host_memory=0.0)
    found = {}
    for count, keep_mb in ((1, 512), (1, 0), (2, 512)):
        run = make_run(adding_folder, learner={"keep_mb": keep_mb})
        lengths = lengths_of(run, 20, 10)
        made = plan(run, rates, count=count, per_node=2, lengths=lengths, top=10**3)
        found[count, keep_mb] = made.offers[0]
        assert len({o.load.together.lasting.get("kept from sampling") for o in made.offers}) == 1
    keeping, plain, two = found.values()
    shape = footprint.shape_of(run.model, None)
    whole = spared(run, shape, lengths.longest_prompt)
    products = forward(shape, share(run, lengths, 1)).products
    less = plain.passes["update"].products - keeping.passes["update"].products
    assert whole.share == 1 and less == pytest.approx(products / rates.forward)
    more = keeping.load.stays - plain.load.stays
    assert more == whole.bytes == keeping.load.together.lasting["kept from sampling"] > 0
    assert "kept from sampling" not in two.load.together.lasting
