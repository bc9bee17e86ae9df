"""State comes back bit for bit; a lock holds one process; an export replaces only exports."""

import copy
import json
import math
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy

from tandem import checkpoint
from tandem.checkpoint.export import MARK
from tandem.errors import RunError


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN and -0.0 included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
        )
    )


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path):
    base = torch.randn(6, 4)
    tensors = {str(t): torch.randn(3, 5).to(t) for t in (torch.float64, torch.float16, torch.bfloat16)}
    tensors |= {
        "odd": torch.tensor([math.nan, -math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 3),
        "none too": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "long": torch.tensor([2**62, -1]),
        "base": base,
        "transposed": base.T,
        "row of it": base[2],
        "the same again": base,
    }
    file = tmp_path / "a.safetensors"
    checkpoint.write_tensors(file, tensors)
    back = checkpoint.read_tensors(file)
    maps = Path("/proc/self/maps")
    assert (
        not maps.exists() or str(file) not in maps.read_text()
    )  # a mapping would keep a deleted file's space
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)
    checkpoint.write_tensors(file, {})
    assert checkpoint.read_tensors(file) == {}


def test_json_returns_every_float_exactly(tmp_path):
    rng = random.Random(0)
    floats = [struct.unpack("d", rng.randbytes(8))[0] for _ in range(5000)]
    floats = [*filter(math.isfinite, floats), -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2]
    value = {
        "floats": floats,
        "big": 2**200,
        "text": "\ud800 \x00 \u2028",
        "none": None,
        "flag": True,
        "": [[]],
    }
    checkpoint.write_json(tmp_path / "a.json", value)
    back = checkpoint.read_json(tmp_path / "a.json")
    assert back == value
    assert [struct.pack("d", x) for x in back["floats"]] == [struct.pack("d", x) for x in floats]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_refuses_numbers_that_are_not_finite_both_ways(tmp_path, bad):
    with pytest.raises(RunError, match=r"a\.json\.kl\[1\]\.coef is"):
        checkpoint.write_json(tmp_path / "a.json", {"kl": [0.0, {"coef": bad}]})
    assert not (tmp_path / "a.json").exists()
    for text in (json.dumps({"x": bad}), '{"x": 1e999}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(RunError, match="not a finite number"):
            checkpoint.read_json(tmp_path / "a.json")


def test_json_refuses_what_it_would_alter(tmp_path):
    for value, where in (
        ({1: 2}, "key 1"),
        ({"a": {"b": b""}}, "a.b: bytes"),
        ([numpy.int64(1)], r"\[0\]: int64"),
    ):
        with pytest.raises(TypeError, match=where):
            checkpoint.write_json(tmp_path / "a.json", value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff\xfe"])
def test_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"a\.json"):
        checkpoint.read_json(tmp_path / "a.json")
    with pytest.raises(RunError, match=r"b\.json is missing"):
        checkpoint.read_json(tmp_path / "b.json")


class Bomb:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def test_a_pickle_under_any_name_is_refused_and_never_loaded(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": Bomb(canary)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps(Bomb(canary)))
    (tmp_path / "c.json").write_bytes(pickle.dumps(Bomb(canary)))
    for read, name in (
        ("read_tensors", "a.safetensors"),
        ("read_tensors", "b.safetensors"),
        ("read_json", "c.json"),
    ):
        with pytest.raises(RunError, match=name):
            vars(checkpoint)[read](tmp_path / name)
    assert not canary.exists()


def small_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 50))


def adamw(model: torch.nn.Module, **options) -> tuple[torch.optim.AdamW, list[str]]:
    """Weights with decay, then biases and norms without, and the names in that order."""
    named = list(model.named_parameters())
    groups = [[(n, p) for n, p in named if p.dim() > 1], [(n, p) for n, p in named if p.dim() <= 1]]
    decays = (0.1, 0.0)
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in g], "weight_decay": w} for g, w in zip(groups, decays)],
        **{"lr": 1e-2, "betas": (0.8, 0.95), **options},
    )
    return optimizer, [n for g in groups for n, _ in g]


def learn(model, optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(50, (32,), generator=torch.Generator().manual_seed(step))
        cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()


def write_training(model, optimizer, names):
    def write(folder: Path) -> None:
        tensors, state = checkpoint.optimizer_tensors(optimizer, names)
        checkpoint.write_tensors(folder / "model.safetensors", model.state_dict())
        checkpoint.write_tensors(folder / "optimizer.safetensors", tensors)
        checkpoint.write_json(folder / "state.json", state)

    return write


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"foreach": True}, {"lr": torch.tensor(1e-2)}], ids=str
)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, options):
    model = small_model()
    optimizer, names = adamw(model, **copy.deepcopy(options))
    learn(model, optimizer, range(5))
    path = checkpoint.save(tmp_path, 5, write_training(model, optimizer, names), config_hash="", keep=1)
    learn(model, optimizer, range(5, 10))

    again = small_model(seed=1)
    other, names = adamw(again, **copy.deepcopy(options), eps=1e-3)
    learn(again, other, range(3))
    assert checkpoint.newest(tmp_path) == path
    again.load_state_dict(checkpoint.read_tensors(path / "model.safetensors"))
    tensors = checkpoint.read_tensors(path / "optimizer.safetensors")
    checkpoint.restore_optimizer(other, names, tensors, checkpoint.read_json(path / "state.json"))
    assert other.param_groups[0]["eps"] == 1e-8 and other.param_groups[0]["betas"] == (0.8, 0.95)
    learn(again, other, range(5, 10))

    assert all(same(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    left, right = (checkpoint.optimizer_tensors(o, names) for o in (optimizer, other))
    assert left[1] == right[1] and left[0].keys() == right[0].keys()
    assert {"state/exp_avg/2.weight", "state/exp_avg_sq/2.weight", "state/step/2.weight"} <= left[0].keys()
    assert all(same(left[0][key], right[0][key]) for key in left[0])


def test_float32_moments_of_bfloat16_weights_are_not_rounded():
    weight = torch.nn.Parameter(torch.randn(8).bfloat16())
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.randn(8), "exp_avg_sq": torch.rand(8)}
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {**moments, "skips": 2}
    tensors, state = checkpoint.optimizer_tensors(optimizer, ["w"])
    fresh = torch.optim.AdamW([weight])
    checkpoint.restore_optimizer(fresh, ["w"], tensors, json.loads(json.dumps(state)))
    assert fresh.state[weight]["skips"] == 2
    assert all(same(fresh.state[weight][key], moments[key]) for key in moments)
    assert fresh.state[weight]["exp_avg"].data_ptr() != moments["exp_avg"].data_ptr()


def test_state_that_the_checkpoint_lacks_is_dropped():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [n for n, _ in model.named_parameters()]
    learn(model, optimizer, range(2))
    tensors, state = checkpoint.optimizer_tensors(optimizer, names)
    fresh = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    learn(model, fresh, range(2))
    checkpoint.restore_optimizer(fresh, names, tensors, json.loads(json.dumps(state)))
    assert fresh.state_dict() == optimizer.state_dict()


def test_state_of_another_model_or_optimizer_is_refused_and_nothing_changed():
    model = small_model()
    optimizer, names = adamw(model)
    learn(model, optimizer, range(2))
    tensors, state = checkpoint.optimizer_tensors(optimizer, names)
    wide = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 50))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    renamed = [name.replace("2.", "head.") for name in names]
    for target, target_names, reason in (
        (adamw(wide)[0], names, r"0\.weight has shape \[50, 16\].*\[50, 8\]"),
        (adamw(model)[0], renamed, r"head\.weight"),
        (sgd, names, "AdamW, the run uses SGD"),
        (torch.optim.AdamW(model.parameters()), names, "2 groups, the run's 1"),
    ):
        before = str(target.state_dict())
        with pytest.raises(RunError, match=reason):
            checkpoint.restore_optimizer(target, target_names, tensors, state)
        assert str(target.state_dict()) == before
    with pytest.raises(ValueError, match="4 different names for 5"):
        checkpoint.optimizer_tensors(optimizer, [*names[:-1], names[0]])


def draw() -> list[float]:
    """Draws from every shared generator; an odd number of normal ones leaves half a pair behind."""
    python = [random.random(), random.gauss(0, 1)]
    return [
        *python,
        numpy.random.rand(),
        numpy.random.normal(),
        *torch.randn(3).tolist(),
        *torch.rand(2).tolist(),
    ]


def test_random_numbers_go_on_from_a_checkpoint(tmp_path):
    draw()
    tensors, state = checkpoint.rng_state()
    checkpoint.write_tensors(tmp_path / "rng.safetensors", tensors)
    checkpoint.write_json(tmp_path / "rng.json", state)
    expected = [draw() for _ in range(700)]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    tensors = checkpoint.read_tensors(tmp_path / "rng.safetensors")
    checkpoint.restore_rng(tensors, checkpoint.read_json(tmp_path / "rng.json"))
    assert [draw() for _ in range(700)] == expected


def test_the_generator_of_an_absent_accelerator_is_reported(caplog):
    tensors, state = checkpoint.rng_state()
    checkpoint.restore_rng({**tensors, "rng/accelerator/absent/0": torch.zeros(16, dtype=torch.uint8)}, state)
    assert "rng/accelerator/absent/0" in caplog.text


@pytest.mark.gpu
def test_random_numbers_of_the_accelerator_go_on_from_a_checkpoint():
    device = torch.accelerator.current_accelerator()
    state = checkpoint.rng_state()
    expected = torch.randn(1000, device=device)
    checkpoint.restore_rng(*state)
    assert torch.equal(torch.randn(1000, device=device), expected)


HOLDER = """
import os, sys, time
from pathlib import Path
from tandem.checkpoint import lock

with lock(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def start(code: str, *args: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    holder = start(HOLDER, folder)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(
            RunError, match=f"process {holder.pid} on {socket.gethostname()}.*another run_dir"
        ):
            checkpoint.lock(folder).__enter__()
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        os.kill(child, 0)
        assert json.loads((folder / "lock").read_text())["pid"] == holder.pid
        with checkpoint.lock(folder):
            assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_is_released_at_the_end_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), checkpoint.lock(tmp_path):
            with pytest.raises(RunError, match=f"process {os.getpid()} on"):
                checkpoint.lock(tmp_path).__enter__()
            raise KeyError
    assert (tmp_path / "lock").read_text() == ""


def test_the_room_can_be_imported_where_there_is_no_fcntl(tmp_path):
    code = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from tandem import checkpoint
from tandem.errors import RunError
try:
    checkpoint.lock(Path(sys.argv[1])).__enter__()
except RunError as error:
    print(error)
"""
    assert "POSIX" in start(code, tmp_path).communicate()[0]


def qwen(folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(
        folder
    )


def test_an_export_is_a_plain_folder_that_loads_and_others_may_read(tmp_path):
    from transformers import AutoModelForCausalLM

    target = checkpoint.export(qwen, tmp_path / "out" / "model")
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert {"config.json", "model.safetensors"} <= {path.name for path in target.iterdir()}
    assert len({path.stat().st_mode & 0o666 for path in [target, *target.iterdir()]}) == 1
    assert AutoModelForCausalLM.from_pretrained(target).config.hidden_size == 16


def test_an_export_replaces_an_older_one_only_when_complete(tmp_path):
    def version(text, error=None):
        def save(folder):
            (folder / f"{text}.txt").write_text(text)
            if error:
                raise error
            (folder / "config.json").write_text("{}")

        return save

    target = checkpoint.export(version("one"), tmp_path / "model")
    for error, kind in ((OSError(28, "No space left on device"), RunError), (KeyError("a bug"), KeyError)):
        with pytest.raises(kind):
            checkpoint.export(version("two", error), target)
        assert [path.name for path in tmp_path.iterdir()] == ["model"] and (target / "one.txt").exists()
    with pytest.raises(RunError, match=r"without config\.json"):
        checkpoint.export(lambda folder: None, target)
    checkpoint.export(version("two"), target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in target.iterdir()) == [MARK, "config.json", "two.txt"]
    target.rename(tmp_path / "model.old-0123456789ab")  # as a kill between the two renames leaves it
    with pytest.raises(KeyError):
        checkpoint.export(version("three", KeyError()), target)
    assert (target / "two.txt").exists()


def test_an_export_never_replaces_what_is_no_export(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    qwen(tmp_path / "downloaded")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    names = ("notes", "notes/thesis.tex", "downloaded", "adapter")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in names:
        with pytest.raises(RunError, match=r"exists and is no export of Tandem's .* remove it, or export to"):
            checkpoint.export(qwen, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_that_something_was_added_to_is_kept(tmp_path):
    target = checkpoint.export(qwen, tmp_path / "model")
    (target / "logs").mkdir()
    checkpoint.export(qwen, target)
    (target / "logs").mkdir()
    (target / "logs" / "notes.txt").write_text("of the user")
    with pytest.raises(RunError, match=r"holds what no export wrote: logs/notes\.txt; remove it, or export"):
        checkpoint.export(qwen, target)
    assert (target / "logs" / "notes.txt").read_text() == "of the user"
