"""Models at work: where they are found, what they are asked, how their answers reach the terminal."""

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from small_recipe import recipe
from tandem.checkpoint import newest
from tandem.checkpoint.swap import discard
from tandem.cli import app
from tandem.config import load
from tandem.config.sections import Lora
from tandem.data.prompts import load_prompts
from tandem.data.template import open_template
from tandem.engine import decode
from tandem.errors import ConfigError, DataError, RunError
from tandem.model import LanguageModel
from tandem.model.load import existing
from tandem.model.new import new_tokenizer
from tandem.talk.chat import Chat, converse
from tandem.talk.evaluate import Result
from tandem.talk.generate import dialog, generate, read_prompts
from tandem.talk.place import locate
from tandem.talk.speaker import Speaker, open_speaker
from tandem.talk.text import TextStream, escaped
from tandem.train.evaluation import Evaluation
from tandem.train.run import train
from tiny_models import chain, script, spelled


def call(*arguments: object, **options: str):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a template and a system message of its own."""
    folder = tmp_path_factory.mktemp("trained")
    path = recipe(
        folder,
        data={"template": "qwen_r1", "system": "Add.", "truth_after": None},
        model={"new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 512}},
    )
    assert call("train", path).exit_code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    lora = Lora(rank=4, alpha=64.0).model_dump()
    path = recipe(folder, model={"lora": lora}, eval={"every": None}, learner={"optimizer": {"lr": 0.05}})
    assert call("train", path).exit_code == 0
    return folder / "run"


def greedy(speaker: Speaker, prompt: str, tokens: int = 12) -> str:
    return next(generate(speaker, [prompt], speaker.params(tokens, 0.0), answers=1, seed=0)).answer


# Where a model lies.


def test_a_checkpoints_model_is_exported_while_its_run_goes_on(trained, tmp_path):
    target = tmp_path / "exported"
    done = call("export", trained, target)
    assert done.exit_code == 0 and f"written: {target}" in done.output
    theirs = load_file(newest(trained / "checkpoints") / "model" / "model.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert call("export", newest(trained / "checkpoints"), target).exit_code == 0, "an export is replaced"
    nothing = call("export", tmp_path, target)
    assert nothing.exit_code == 2 and "has no checkpoint; give the folder of a run that has" in nothing.output


def test_an_export_takes_no_place_of_a_model_that_the_run_loads(trained, tmp_path):
    base = tmp_path / "base"
    assert call("export", trained, base).exit_code == 0
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["model"] |= {"path": str(base), "new": None}
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path / "tuned"), "steps": 1}))
    assert call("train", path).exit_code == 0
    before = {file: file.read_bytes() for file in base.iterdir()}
    refused = call("export", tmp_path / "tuned", base)
    assert refused.exit_code == 2 and f"{base} is model.path of this run; export to" in refused.stderr
    assert {file: file.read_bytes() for file in base.iterdir()} == before


def test_a_run_folder_means_its_export_then_its_newest_checkpoint(trained, tmp_path):
    assert locate(str(trained)).folder == str(trained / "model")
    assert locate(str(trained / "model")).run is None
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "model")
    place = locate(str(copy))
    assert place.folder is None and place.checkpoint == copy / "checkpoints" / "step_00000004"
    assert locate(str(place.checkpoint)).checkpoint == place.checkpoint
    exported, resumed = (open_speaker(locate(str(f)), "cpu") for f in (trained, copy))
    ours, theirs = exported.model.network.state_dict(), resumed.model.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_that_went_on_after_its_export_means_its_newest_checkpoint(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert locate(str(copy)).folder is not None
    (copy / "checkpoints" / "step_00000004").rename(copy / "checkpoints" / "step_00000006")
    with pytest.raises(RunError, match="step_00000006"):
        locate(str(copy))  # The name is not the one that it was sealed with.
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"steps": 6}))
    assert locate(str(copy)).folder is not None


def test_a_checkpoint_that_is_named_is_verified(trained, tmp_path):
    copy = tmp_path / "step_00000004"
    shutil.copytree(newest(trained / "checkpoints"), copy)
    weights = bytearray((copy / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(RunError, match=r"is broken: .*model.safetensors"):
        locate(str(copy))


def test_a_run_folder_cannot_switch_on_its_own_code(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    config = (copy / "config.yaml").read_text()
    assert "trust_remote_code: false" in config
    (copy / "config.yaml").write_text(config.replace("trust_remote_code: false", "trust_remote_code: true"))
    for command in (["generate", copy, "1+1"], ["eval", copy]):
        refused = call(*command)
        assert refused.exit_code == 2 and "say --trust-remote-code if you know" in refused.output
        assert call(*command, "--trust-remote-code").exit_code == 0


def test_an_adapter_speaks_alike_from_its_checkpoint_and_merged(adapted):
    from_checkpoint = open_speaker(locate(str(adapted / "checkpoints" / "step_00000004")), "cpu")
    merged = open_speaker(locate(str(adapted)), "cpu")
    assert isinstance(from_checkpoint.model.module, PeftModel)
    said = greedy(from_checkpoint, "27+35")
    assert said == greedy(merged, "27+35")
    with from_checkpoint.model.base():
        assert said != greedy(from_checkpoint, "27+35"), "the adapter changed nothing: the test shows nothing"


@pytest.mark.parametrize("reader", ["talk.place.load", "talk.evaluate.load", "talk.speaker.load"])
def test_a_checkpoint_that_is_retired_while_it_is_read_is_told(trained, tmp_path, monkeypatch, reader):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "model")
    checkpoint = newest(copy / "checkpoints")
    room, _, name = reader.rpartition(".")
    real = getattr(import_module(f"tandem.{room}"), name)

    def slowly(*given, **options):
        discard(checkpoint)
        return real(*given, **options)

    monkeypatch.setattr(f"tandem.{reader}", slowly)
    done = call("eval", copy)
    assert done.exit_code == 1, done.output
    assert f"error: {checkpoint} was retired by its run while it was read; the same command" in done.stderr


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.rmdir(), "there is no such folder"),
        (lambda p: (p / "notes.txt").touch(), "has no config.json; it holds notes.txt"),
        (lambda p: (p / "adapter_config.json").touch(), "holds an adapter without its model"),
        (lambda p: (p / "config.yaml").touch(), "neither an exported model nor a checkpoint"),
    ],
)
def test_a_folder_without_a_model_says_what_it_is(tmp_path, make: Callable[[Path], None], said):
    folder = tmp_path / "here"
    folder.mkdir()
    make(folder)
    with pytest.raises(ConfigError, match=said):
        locate(str(folder))


@pytest.mark.parametrize(
    ("given", "near"),
    [("runs/quickstrat", "runs/quickstart"), ("./runs/quick", "runs/quickstart"), ("a/b/c", "")],
)
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, given, near):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        locate(given)
    with pytest.raises(ConfigError) as model:
        existing(given)
    assert f"{given}: there is no such folder; give" in str(refused.value)
    assert f"model.path={given} does not exist; give" in str(model.value)
    for said in (str(refused.value), str(model.value)):
        assert said.endswith(f"Near: {near}" if near else "run" if "run" in said else "model")
    assert locate("someone/model").folder == existing("someone/model") == "someone/model"


# What a model is asked, and what it says.


def test_a_model_is_asked_as_it_was_trained(trained):
    speaker = open_speaker(locate(str(trained)), "cpu")
    data = load(trained / "config.yaml").data
    for prompt in load_prompts(data, data.train, speaker.model.tokenizer, limit=5).prompts:
        assert speaker.prompt(dialog(speaker, prompt.question)) == prompt.tokens
    plain = open_speaker(locate(str(trained / "model")), "cpu")
    assert decode(plain.model.tokenizer, plain.prompt(dialog(plain, "1+1"))) == "user\n1+1\nassistant\n"


def test_greedy_answers_are_those_of_transformers(random_folder):
    speaker = open_speaker(locate(str(random_folder)), "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(random_folder, attn_implementation="eager")
    for raw in (False, True):
        speaker = open_speaker(locate(str(random_folder)), "cpu", raw=raw)
        tokens = torch.tensor([speaker.prompt(dialog(speaker, "What is 4+4?"))])
        out = theirs.generate(tokens, do_sample=False, max_new_tokens=20)[0, tokens.shape[1] :].tolist()
        assert greedy(speaker, "What is 4+4?", 20) == decode(speaker.model.tokenizer, out)
    assert decode(speaker.model.tokenizer, tokens[0].tolist()) == "What is 4+4?"


def test_answers_end_where_the_positions_end(random_folder, caplog):
    speaker = open_speaker(locate(str(random_folder)), "cpu", raw=True)
    prompt = "x" * 250
    reply = next(generate(speaker, [prompt], speaker.params(99, 1.0), answers=1, seed=3))
    assert (reply.tokens, reply.finish) == (6, "length") and "cut after 6 tokens" in caplog.text
    with pytest.raises(DataError, match="256 tokens, and the model has 256 positions"):
        next(generate(speaker, ["x" * 256], speaker.params(99, 1.0), answers=1, seed=3))


def test_half_precision_is_kept_as_it_is_stored(random_folder, tmp_path):
    assert open_speaker(locate(str(random_folder)), "cpu").model.network.dtype == torch.float32
    shutil.copytree(random_folder, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(random_folder).bfloat16().save_pretrained(tmp_path / "half")
    assert open_speaker(locate(str(tmp_path / "half")), "cpu").model.network.dtype == torch.bfloat16


def test_a_model_without_a_chat_template_needs_raw(random_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(random_folder, folder)
    (folder / "chat_template.jinja").unlink()
    refused = call("generate", folder, "hello")
    assert refused.exit_code == 2 and "--raw" in refused.stderr
    assert call("generate", folder, "hello", "--raw", "--max-tokens", 2).exit_code == 0


# Text for a terminal.


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.feed(token) for token in tokens), stream.rest()]


def test_a_character_appears_whole_and_at_once():
    rng, tokenizer = random.Random(0), new_tokenizer()
    alphabet = "a \n<>/|\u00e9\u20ac\u4e2d\u0627\U0001f600\U0001f468\u200d\u0301"
    for _ in range(50):
        text = "".join(rng.choices(alphabet, k=30))
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert len(tokens) > len(text), "no character has several tokens: the test shows nothing"
        out = pieces(TextStream(tokenizer), tokens)
        assert [p for p in out if p] == list(text)


def test_bytes_that_are_no_text_come_out_as_the_decoder_writes_them():
    rng, tokenizer = random.Random(1), new_tokenizer()
    for _ in range(30):
        tokens = rng.choices(range(256), k=60)
        assert "".join(pieces(TextStream(tokenizer), tokens)) == decode(tokenizer, tokens)


def test_text_cannot_steer_the_terminal():
    assert escaped("a\x1b[31mb\n\u202ec" + "d" * 700) == "a\\x1b[31mb\n\\u202ec" + "d" * 700


# Conversations.


class Terminal:
    """What was shown, piece by piece."""

    def __init__(self, at_piece: Callable[[int], None] = lambda number: None) -> None:
        self.pieces: list[str] = []
        self.notices: list[str] = []
        self.at_piece = at_piece

    def say(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.at_piece(len(self.pieces))


def chat_with(model: LanguageModel, terminal: Terminal, *, turns: int = 3, tokens: int = 40) -> Chat:
    template = open_template("chat", model.tokenizer)
    speaker = Speaker(model=model, template=template, system=None)
    return Chat(
        speaker,
        speaker.params(tokens, 0.0),
        system=None,
        history_turns=turns,
        seed=0,
        say=terminal.say,
        notice=terminal.notices.append,
    )


def reciter(text: str, max_positions: int = 128) -> LanguageModel:
    """A model that answers everything with the same text."""
    model = chain({}, max_positions)
    tokens = spelled(model, "\n" + text)
    return chain(script(tokens, model.tokenizer.eos_token_id), max_positions)


def asked(chat: Chat) -> str:
    """The dialog as the next question would show it to the model."""
    return chat.speaker.model.tokenizer.decode(chat._tokens({"role": "user", "content": "NEXT"}))


def test_an_answer_streams_in_whole_characters_and_is_remembered():
    terminal = Terminal()
    chat = chat_with(reciter("n\u00e9\u20ac!"), terminal)
    assert chat.ask("hello") == "n\u00e9\u20ac!"
    assert terminal.pieces == ["n", "\u00e9", "\u20ac", "!", "\n"]
    assert asked(chat).count("hello") == 1 and "n\u00e9\u20ac!" in asked(chat)


def test_history_holds_the_last_turns_and_clear_empties_it():
    terminal = Terminal()
    chat = chat_with(reciter("ok", 512), terminal, turns=2)
    lines = iter(["one", "two", "three", "", "CLEAR", "four", "quit", "five"])
    seen: list[str] = []

    def read() -> str:
        seen.append(asked(chat))
        return next(lines)

    converse(chat, read)
    present = [[w for w in ("one", "two", "three", "four") if w in text] for text in seen]
    assert present == [[], ["one"], ["one", "two"], ["two", "three"], ["two", "three"], [], ["four"]]
    assert next(lines) == "five", "quit did not leave"


def test_without_history_every_question_stands_alone():
    chat = chat_with(reciter("ok"), Terminal(), turns=0)
    chat.ask("one")
    assert "one" not in asked(chat)


def test_the_oldest_turns_go_when_the_positions_are_full():
    terminal = Terminal()
    chat = chat_with(reciter("ok"), terminal, turns=9)
    for word in ("first", "second"):
        chat.ask(word + "." * 20)
    assert not terminal.notices
    chat.ask("third" + "." * 20)
    assert terminal.notices == ["the oldest turn is forgotten: the model has 128 positions"]
    assert "first" not in asked(chat) and "second" in asked(chat) and "third" in asked(chat)
    remembered = asked(chat)
    converse(chat, iter(["x" * 200, "exit"]).__next__)
    assert "shorten it" in terminal.notices[-1] and len(terminal.notices) == 2
    assert asked(chat) == remembered, "a question that is refused costs no turn"


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on():
    def interrupt(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    terminal = Terminal(interrupt)
    before = signal.getsignal(signal.SIGINT)
    chat = chat_with(reciter("abcdefgh"), terminal)
    assert chat.ask("go") == "abc"
    assert "abc" in asked(chat) and "abcd" not in asked(chat)
    assert chat.ask("again") == "abcdefgh"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_no_text_is_refused_and_the_talk_goes_on():
    def read() -> str:
        line = next(lines)
        return line.decode() if isinstance(line, bytes) else line

    terminal = Terminal()
    lines = iter(["a\udcff", b"a\xff", "hello", "exit"])
    converse(chat_with(reciter("ok"), terminal), read)
    assert terminal.notices == [
        "the text 'a\\udcff' is not UTF-8 (at character 2, '\\udcff'); write it in UTF-8",
        "what was typed is not UTF-8 text (byte 2); write it in UTF-8",
    ]
    assert "".join(terminal.pieces) == "ok\n"


def test_a_prompt_or_a_limit_that_is_none_is_wrong_usage(trained):
    refused = call("generate", trained, "a\udcff")
    assert refused.exit_code == 2 and "is not UTF-8 (at character 2" in refused.stderr, refused.output
    for value in ("0", "-1", "nan", "1.5"):
        assert call("generate", trained, "1+1", "--top-p", value).exit_code == 2
    for option, value in [("--temperature", "nan"), ("--temperature", "inf"), ("--min-p", "nan")]:
        assert call("generate", trained, "1+1", option, value).exit_code == 2
    assert "inf divides nothing" in call("generate", trained, "1+1", "--temperature", "inf").stderr
    assert "0 leaves no token to sample" in call("generate", trained, "1+1", "--top-p", 0).stderr


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_leave(leave):
    def read() -> str:
        raise leave

    terminal = Terminal()
    converse(chat_with(reciter("ok"), terminal), read)
    assert terminal.pieces == ["\n"]


def test_the_chat_command_talks_and_leaves(trained):
    done = call("chat", trained, "--greedy", "--max-tokens", 4, input="1+2\nclear\n1+2\nexit\n")
    assert done.exit_code == 0, done.output
    answers = done.output.split("you> ")
    assert answers[1] == answers[3] and len(answers[1]) > 1 and "history is empty" in answers[2]
    ended = call("chat", trained, "--max-tokens", 4, input="1+2\n")
    assert ended.exit_code == 0


# Evaluation.


def test_eval_gives_the_figures_that_training_ended_with(trained, tmp_path):
    done = call("eval", trained, "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "figures.json").read_text())
    end = json.loads((trained / "summary.json").read_text())["end"]
    assert record["figures"] == end
    assert 0 < end["eval/accuracy"] < 1, "figures that cannot differ show nothing"
    assert f"sampled {end['eval/accuracy']:.3f}" in done.output
    assert record["settings"]["questions"] == 8 and record["settings"]["temperature"] == 1.0


def test_eval_of_a_plain_folder_needs_a_recipe_and_takes_its_settings(trained, tmp_path):
    refused = call("eval", trained / "model")
    assert refused.exit_code == 2 and "--recipe" in refused.stderr
    settings = trained / "config.yaml"
    figures = []
    for seed in (0, 0, 1):
        target = tmp_path / "figures.json"
        done = call("eval", trained / "model", "--recipe", settings, f"seed={seed}", "--json", target)
        assert done.exit_code == 0, done.output
        figures.append(json.loads(target.read_text())["figures"])
    assert figures[0] == figures[1] == json.loads((trained / "summary.json").read_text())["end"]
    assert figures[2] != figures[0]


@pytest.mark.parametrize(
    "key", ["model.path=other", "model.new.layers=2", "engine.kind=vllm", "placement.kind=apart"]
)
def test_eval_refuses_what_would_change_nothing(trained, key):
    said = {"model": "eval measures the model that it is given", "engine": "eval samples in this process"}
    expected = f"{key}: {said['model' if key.startswith('model') else 'engine']}"
    settings = trained / "config.yaml"
    for where in ([trained], [trained / "model", "--recipe", settings]):
        refused = call("eval", *where, key)
        assert refused.exit_code == 2 and expected in refused.stderr, refused.output
    if key.startswith("model"):
        assert f"tandem eval MODEL --recipe {settings}" in refused.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.temperature=0.5", "leave it out; eval.temperature is that of its answers"),
        ("sampling.top_p=0.9", "no evaluation depends on sampling.top_p; leave it out"),
        ("learner.optimizer.lr=1", "no evaluation depends on learner.optimizer.lr"),
        ("learner.logits_mb=64", "no evaluation depends on learner.logits_mb"),
        ("steps=3", "no evaluation depends on steps"),
        ("eval.every=2", "no evaluation depends on eval.every"),
        ("evel.questions=3", "evel (override): unknown key. Did you mean eval?"),
    ],
)
def test_eval_refuses_a_key_that_it_does_not_depend_on(trained, override, said):
    refused = call("eval", trained, override)
    assert refused.exit_code == 2 and said in refused.stderr, refused.output


def test_eval_takes_whole_sections_and_the_keys_that_it_depends_on(trained, tmp_path):
    section = "eval={questions: 3, answers: 2}"
    done = call("eval", trained, section, "reward.functions.0.weight=2", "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["settings"]["questions"] == 3
    assert record["figures"]["eval/reward"] == 2 * record["figures"]["eval/accuracy"]


def test_eval_lets_a_recipe_be_given_the_model_that_is_measured(trained):
    folder = trained / "model"
    done = call(
        "eval",
        folder,
        "--recipe",
        trained / "config.yaml",
        "model.new=null",
        f"model.path={folder}",
        "warmup=null",
    )
    assert done.exit_code == 2 and "model.new=null: eval measures" in done.stderr
    recipe = trained.parent / "needs.yaml"
    values = yaml.safe_load((trained / "config.yaml").read_text())
    recipe.write_text(yaml.safe_dump(values | {"warmup": None, "model": {"path": None}}))
    assert call("eval", folder, "--recipe", recipe, f"model.path={folder}").exit_code == 0


def test_eval_of_a_run_that_is_not_done_takes_the_model_of_its_checkpoint(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "model")
    other = yaml.safe_load((trained / "config.yaml").read_text())
    other["model"]["new"]["hidden_size"] = 64
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    target = tmp_path / "figures.json"
    done = call("eval", folder, "--recipe", tmp_path / "other.yaml", "--json", target)
    assert done.exit_code == 0, done.output
    assert (
        json.loads(target.read_text())["figures"] == json.loads((trained / "summary.json").read_text())["end"]
    )


def test_figures_of_answers_that_could_not_be_scored_are_null(tmp_path):
    evaluation = Evaluation(figures={"eval/accuracy": math.nan, "eval/response_length": 4.0}, greedy=[])
    Result(evaluation=evaluation, settings={}, seconds=1.0).write(tmp_path / "figures.json")
    text = (tmp_path / "figures.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["figures"] == {"eval/accuracy": None, "eval/response_length": 4.0}


def test_a_prompt_of_a_file_ends_with_its_line_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a\u2028b\u0085c\fd\r\n\nnext\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a\u2028b\u0085c\fd", "next"]


def test_eval_without_questions_says_which_key_is_missing(trained):
    done = call("eval", trained, "data.eval=null")
    assert done.exit_code == 2 and "data.eval is null" in done.stderr


def test_a_run_is_left_as_it_was_by_talking_and_measuring(make_run, quiet, tmp_path):
    run = make_run()
    train(run, quiet)
    folder = Path(run.run_dir)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert call("generate", folder, "1+1", "--max-tokens", 3).exit_code == 0
    assert call("eval", folder, "data.eval=tandem:addition:test", "eval.questions=2").exit_code == 0
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
