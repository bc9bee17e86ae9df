"""Weights arrive whole at an embedded engine with a copy of its own, by every road, or not at all."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from copies import (
    CPU,
    QUERY,
    Changed,
    Lying,
    adapted,
    beside,
    check_probe,
    flip,
    flip_byte,
    group,
    names,
    policy,
    refused_changes,
    send,
)
from small_recipe import environment
from tandem.engine import EmbeddedEngine, Request, SamplingParams, weights
from tandem.engine import roads as roads_module
from tandem.engine.ipc import IpcRoad, joined
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import BroadcastRoad, FilesRoad, MemoryRoad, buckets
from tandem.engine.vllm import VllmEngine
from tandem.engine.weights import ModelWeights, Offer, TensorSpec, checksum, named_tensors
from tandem.errors import RunError
from tandem.model.parallel.folder import adapter_key

REQUESTS = [Request(tokens=(5, 9, 30 + i), key=i) for i in range(3)]
PARAMS = SamplingParams(max_tokens=8)


def receiver(model, road):
    return ReceivingEngine(model, road, slots=4)


def answers(engine):
    return engine.generate(REQUESTS, PARAMS, poll=lambda done, tokens: None)


def same(engine, model) -> None:
    """The engine answers exactly as the embedded engine does on the model itself."""
    assert answers(engine) == answers(EmbeddedEngine(model, 4))


def ends_of(kind, files):
    """A sender's and a receiver's end of a road."""
    if kind != "broadcast":
        road = files if kind == "files" else MemoryRoad()
        return road, road
    road, meeting = group()
    end = BroadcastRoad(**meeting, rank=1, size=2, device=CPU, timeout_s=30)
    with beside(road.connect):
        end.connect()
    return road, end


@pytest.fixture
def objects(monkeypatch):
    """The road by Ray's memory, which is that of this process here: what Ray keeps cannot be changed."""
    pytest.importorskip("ray")
    from tandem.placement.cluster import objects, port

    monkeypatch.setattr(port, "share", lambda tensors: {name: t.clone() for name, t in tensors.items()})
    monkeypatch.setattr(port, "fetch", lambda shared: shared)
    return objects


@pytest.fixture
def files():
    road = FilesRoad()
    yield road
    road.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_checksum_sees_any_flipped_bit_and_any_exchange(dtype):
    tensor = (100 * torch.rand(5, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    for byte in range(tensor.nbytes):
        for bit in range(8):
            changed = tensor.clone()
            changed.view(torch.uint8).view(-1)[byte] ^= 1 << bit
            assert checksum(changed) != checksum(tensor)
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    assert checksum(swapped) != checksum(tensor)


def test_a_checksum_is_that_of_its_definition_whatever_the_layout_or_the_pieces(monkeypatch):
    monkeypatch.setattr(weights, "WIDTH", 8)
    monkeypatch.setattr(weights, "ROWS", 2)
    for size in (0, 1, 7, 8, 16, 51, 100):
        tensor = torch.randn(size)
        words = tensor.view(torch.int32).tolist()
        expected = sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**64
        assert checksum(tensor) % 2**64 == expected, size
    tensor = torch.randn(30, 7)
    whole = checksum(tensor)
    assert checksum(tensor.t().contiguous().t()) == whole
    monkeypatch.undo()
    assert checksum(tensor) == whole


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_that_modules_share_travels_once(tied):
    specs = ModelWeights(policy(tied=tied)).specs()
    assert ("lm_head.weight" in names(specs)) is not tied
    assert len(set(names(specs))) == len(specs) == len(named_tensors(policy(tied=tied)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["memory", "files", "broadcast"])
def test_the_engine_answers_with_the_weights_it_was_sent(kind, tied, files):
    road, end = ends_of(kind, files)
    engine = receiver(policy(0, tied=tied), end)
    for version in (1, 2):
        sender = policy(version, tied=tied)
        answers(EmbeddedEngine(sender, 4))  # joins the storage of its projections
        send(road, engine, version, ModelWeights(sender), verify=version == 1)
        assert engine.version == version
        same(engine, sender)
        assert check_probe(engine, sender, version, torch.float32) == 0


def test_adapters_of_a_bfloat16_model_arrive_as_they_are(files):
    """They are float32 in trainer and engine, whatever the engine's type is."""
    engine, sender = receiver(adapted(1), files), adapted(2)
    for model in engine.model, sender:
        model.network.to(torch.bfloat16)
        for name, weight in model.module.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    engine.update(files.offer(1, ModelWeights(sender, torch.bfloat16)))
    same(engine, sender)


@pytest.mark.parametrize("kind", ["memory", "files", "broadcast"])
def test_an_adapter_travels_alone(kind, files):
    road, end = ends_of(kind, files)
    engine, sender = receiver(adapted(1), end), adapted(2)
    offer = road.offer(1, ModelWeights(sender))
    assert offer.adapter and all("lora_" in name for name in names(offer.specs))
    send(road, engine, 1, ModelWeights(sender), verify=True)
    same(engine, sender)


def test_an_adapter_of_embedding_and_head_travels_without_what_it_is_added_to(files):
    def made(seed):
        return adapted(seed, tied=False, targets=["q_proj", "embed_tokens", "lm_head"])

    engine, sender = receiver(made(1), files), made(2)
    offer = files.offer(1, ModelWeights(sender))
    sent = names(offer.specs)
    assert all("lora_" in name for name in sent) and any("lm_head" in name for name in sent)
    assert sorted(map(adapter_key, sender.trainable())) == sorted(sent), "as many processes name them"
    engine.update(offer)
    same(engine, sender)


def test_vllm_refuses_adapters_of_experts_by_name():
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    spec = TensorSpec(name=name, shape=(2, 4), dtype="float32")
    offer = Offer(version=0, road="files", specs=(spec,), checksums=None, adapter=True, place="nowhere")
    with pytest.raises(RunError, match=f"no adapters of a mixture's experts, as {name} is"):
        VllmEngine._take_adapter(object.__new__(VllmEngine), offer)


def test_weights_are_cast_for_an_engine_of_another_type(files):
    engine, sender = receiver(policy(0), files), policy(1)
    engine.model.module.bfloat16()
    with pytest.raises(RunError, match=r"is float32 .* and the engine's is bfloat16"):
        engine.update(files.offer(1, ModelWeights(sender)))
    engine.update(files.offer(1, ModelWeights(sender, torch.bfloat16)))
    assert check_probe(engine, sender, 1, torch.bfloat16) > 0


@pytest.mark.parametrize("change", refused_changes())
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(change, files):
    engine, sender = receiver(policy(0), files), policy(1)
    alter, says = refused_changes()[change]
    with pytest.raises(RunError, match=says):
        engine.update(files.offer(1, Changed(sender, alter)))
    assert engine.version == 0
    same(engine, policy(0))


def test_a_flipped_bit_in_a_file_is_refused_and_the_old_weights_stay(files, tmp_path):
    engine, sender = receiver(policy(0), files), policy(1)
    offer = files.offer(1, ModelWeights(sender))
    flip(files.root / "v00000001", sender.network.get_parameter(QUERY))
    with pytest.raises(RunError, match=rf"version 1 by road files: tensor {QUERY} changed on the way"):
        engine.update(offer)
    assert engine.version == 0
    same(engine, policy(0))
    engine.update(files.offer(2, ModelWeights(sender)))
    same(engine, sender)


def test_a_flipped_bit_on_the_way_through_ray_is_refused_by_whoever_takes_it(objects):
    """By the embedded engine, and by what sends the weights on to vLLM."""
    road = objects.ObjectsRoad()
    engine, sender = receiver(policy(0), road), policy(1)
    offer = road.offer(1, ModelWeights(sender))
    (part,) = (part for part in offer.place.parts if QUERY in part)
    part[QUERY].view(torch.uint8)[0, 0] ^= 1
    for take in (lambda: engine.update(offer), lambda: list(objects.ArrivedWeights(offer))):
        with pytest.raises(RunError, match=rf"version 1 by road objects: tensor {QUERY} changed on the way"):
            take()
    same(engine, policy(0))
    part[QUERY].view(torch.uint8)[0, 0] ^= 1
    engine.update(offer)
    same(engine, sender)


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_a_tensor_that_never_comes_is_named(kind, files):
    road = files if kind == "files" else MemoryRoad()
    engine = receiver(policy(0), road)
    with pytest.raises(RunError, match=f"tensor {QUERY} never came"):
        engine.update(road.offer(1, Lying(policy(1)), verify=True))
    same(engine, policy(0))


@pytest.mark.parametrize("kind", ["ipc", "objects", "broadcast", "broadcast by Ray"])
def test_a_sender_whose_tensor_is_not_there_says_so_before_anyone_waits_for_it(kind, objects):
    match kind:
        case "objects":
            offer = partial(objects.ObjectsRoad().offer, 1)
        case "ipc":
            offer = partial(IpcRoad(CPU).offer, 1)
        case "broadcast":
            road, _ = group()
            offer = partial(road.send, road.offer(1, ModelWeights(policy(1))))
        case _:
            pytest.importorskip("ray")
            from tandem.placement.cluster.broadcast import Sender

            offer = partial(Sender("127.0.0.1", CPU, 2).offer, 1)
    road = kind.partition(" ")[0]
    with pytest.raises(RunError, match=f"by road {road}: tensor {QUERY} was announced and never came"):
        offer(Lying(policy(1)))


def test_a_truncated_file_is_named(files):
    engine = receiver(policy(0), files)
    offer = files.offer(1, ModelWeights(policy(1)))
    path = next((files.root / "v00000001").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=f"{path.name} cannot be read"):
        engine.update(offer)
    same(engine, policy(0))


def test_a_broadcast_that_breaks_off_leaves_an_engine_that_refuses(monkeypatch):
    monkeypatch.setattr(roads_module, "BUCKET", 1 << 14)
    road, meeting = group()
    end = BroadcastRoad(**meeting, rank=1, size=2, device=CPU, timeout_s=30)
    with beside(road.connect):
        end.connect()
    engine, sender = receiver(policy(0), end), policy(1)
    plain = BroadcastRoad._broadcast

    def flipping(self, tensor, offer, bucket):
        plain(self, tensor, offer, bucket)
        if self.rank == 1 and tensor.dtype == torch.uint8 and QUERY in names(bucket):
            tensor[-1] ^= 64

    monkeypatch.setattr(BroadcastRoad, "_broadcast", flipping)
    bucket = next(b for b in buckets(ModelWeights(sender).specs(), 1 << 14) if QUERY in names(b))
    with pytest.raises(RunError, match=rf"road broadcast: tensor {bucket[-1].name} changed"):
        send(road, engine, 1, ModelWeights(sender))
    monkeypatch.setattr(BroadcastRoad, "_broadcast", plain)
    assert engine.version == 0
    with pytest.raises(RunError, match="part of version 1"):
        answers(engine)
    send(road, engine, 2, ModelWeights(sender))
    same(engine, sender)


def test_a_sender_that_dies_is_an_error_and_not_a_wait():
    road, meeting = group()
    end = BroadcastRoad(**meeting, rank=1, size=2, device=CPU, timeout_s=30)
    with beside(road.connect):
        end.connect()
    engine = receiver(policy(0), end)
    offer = road.offer(1, ModelWeights(policy(1)))
    road.close()
    with pytest.raises(RunError, match=r"broke off at tensor model.embed_tokens.weight"):
        engine.update(offer)


def test_files_appear_whole_and_old_ones_go(files, monkeypatch):
    monkeypatch.setattr(roads_module, "BUCKET", 1 << 14)
    offers = [files.offer(version, ModelWeights(policy(version))) for version in (1, 2, 3)]
    assert sorted(p.name for p in files.root.iterdir()) == ["v00000002", "v00000003"]
    parts = list((files.root / "v00000003").glob("*.safetensors"))
    assert len(parts) > 3 and max(p.stat().st_size for p in parts) < 80_000
    assert oct(files.root.stat().st_mode & 0o777) == "0o700"

    class Failing(ModelWeights):
        def __iter__(self):
            yield from list(super().__iter__())[:3]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.offer(4, Failing(policy(4)))
    assert sorted(p.name for p in files.root.iterdir()) == ["v00000002", "v00000003"]
    engine = receiver(policy(0), files)
    engine.update(offers[-1])
    same(engine, policy(3))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match=rf"engine.transfer_dir={blocked}"):
        FilesRoad(blocked).offer(1, ModelWeights(policy(0)))


def test_a_given_folder_keeps_what_is_not_a_version(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    road = FilesRoad(tmp_path)
    road.offer(1, ModelWeights(policy(0)))
    road.close()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_probe_names_the_cause(files):
    sender = policy(1)
    engine = receiver(policy(0), files)
    with pytest.raises(RunError, match=r"Cause: the weights"):
        check_probe(engine, sender, 0, torch.float32)
    with pytest.raises(RunError, match=r"Cause: the adapter"):
        check_probe(engine, adapted(1), 0, torch.float32)
    near = policy(0)
    with torch.no_grad():
        near.network.lm_head.weight.mul_(1.5)
    with pytest.raises(RunError, match=r"Cause: the dtype: bfloat16 in the engine, float32 in the trainer"):
        check_probe(engine, near, 0, torch.bfloat16)
    with torch.no_grad():
        engine.model.network.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match=r"is nan for the engine .* Cause: the weights"):
        check_probe(engine, sender, 0, torch.float32)


OFFERING = """
import sys
import torch
from copies import policy
from tandem.engine.ipc import IpcRoad
from tandem.engine.roads import BroadcastRoad
from tandem.engine.weights import ModelWeights

kind, device = sys.argv[1], torch.device(sys.argv[2])
if device.type != "cpu":
    torch.accelerator.set_device_index(device.index)
model = policy(1)
model.module.to(device)
if kind == "ipc":
    road = IpcRoad(device)
    torch.save(road.offer(1, ModelWeights(model)), sys.argv[3])
    print("offered", flush=True)
    sys.stdin.readline()
else:
    road = BroadcastRoad("127.0.0.1", 0, 0, 2, device, timeout_s=120)
    print(road.port, flush=True)
    road.connect()
    road.send(road.offer(1, ModelWeights(model)), ModelWeights(model))
"""


def offering(kind, device, *arguments):
    command = [sys.executable, "-c", OFFERING, kind, str(device), *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment(), **pipes)


def test_offers_of_several_gpus_are_joined():
    base = MemoryRoad().offer(1, ModelWeights(policy(0)))
    parts = [replace(base, place={f"GPU-{i}": [("a", i)]}) for i in range(2)]
    assert joined(parts).place == {"GPU-0": [("a", 0)], "GPU-1": [("a", 1)]}


def test_two_processes_share_the_memory_of_a_machine(tmp_path):
    """Types of all sizes; the engine keeps what it took when the sender is gone, and takes nothing more from it."""
    engine, twin = receiver(policy(0), IpcRoad(CPU)), policy(1)
    with offering("ipc", "cpu", tmp_path / "offer") as process:
        assert process.stdout.readline() == "offered\n"
        offer = torch.load(tmp_path / "offer", weights_only=False)
        engine.update(offer)
        process.stdin.close()
    same(engine, twin)
    with pytest.raises(RunError, match=r"road ipc: its sender is gone, or has let go of it"):
        engine.update(offer)
    same(engine, twin)


def test_memory_of_another_machine_or_version_is_refused_and_a_changed_byte_is_seen():
    road = IpcRoad(CPU)
    engine, sender = receiver(policy(0), road), policy(1)
    elsewhere = replace(road.offer(1, ModelWeights(sender)), place={"gpu box": []})
    with pytest.raises(RunError, match=r"are in the memory of gpu box and the engine's is that of"):
        engine.update(elsewhere)
    old = road.offer(1, ModelWeights(sender))
    new = road.offer(2, ModelWeights(policy(2)))
    with pytest.raises(RunError, match="has let go of it"):
        engine.update(old)
    (handles,) = new.place.values()
    path, _, start = dict(handles)[QUERY]
    flip_byte(Path(path), start)
    with pytest.raises(RunError, match=f"tensor {QUERY} changed on the way"):
        engine.update(new)
    same(engine, policy(0))
    road.close()


SENDER = """
import sys
from copies import CPU, policy
from tandem.engine.roads import BroadcastRoad
from tandem.engine.weights import ModelWeights
road = BroadcastRoad("127.0.0.1", 0, 0, 2, CPU, timeout_s=60)
print(road.port, flush=True)
road.connect()
weights = ModelWeights(policy(1))
road.send(road.offer(1, weights), weights)
"""


def test_two_processes_broadcast():
    with subprocess.Popen(
        [sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        port = int(process.stdout.readline())
        end = BroadcastRoad("127.0.0.1", port, rank=1, size=2, device=CPU, timeout_s=60)
        end.connect()
        engine, twin = receiver(policy(0), end), policy(1)
        announced = ModelWeights(twin)
        engine.update(
            Offer(version=1, road="broadcast", specs=announced.specs(), checksums=None, verify=True)
        )
    assert process.returncode == 0
    same(engine, twin)


@pytest.mark.gpu
def test_two_processes_share_gpu_memory(tmp_path):
    device = torch.device(torch.accelerator.current_accelerator(check_available=True).type, 0)
    model = policy(0)
    model.module.to(device)
    engine, twin = receiver(model, IpcRoad(device)), policy(1)
    with offering("ipc", device, tmp_path / "offer") as process:
        assert process.stdout.readline() == "offered\n"
        engine.update(torch.load(tmp_path / "offer", weights_only=False))
        process.stdin.close()
    assert all(torch.equal(t.cpu(), named_tensors(twin)[n]) for n, t in named_tensors(model).items())


@pytest.mark.gpu
def test_two_gpus_broadcast():
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device(torch.accelerator.current_accelerator().type, 1)
    model = policy(0)
    model.module.to(device)
    with offering("broadcast", f"{device.type}:0") as process:
        end = BroadcastRoad("127.0.0.1", int(process.stdout.readline()), 1, 2, device, timeout_s=120)
        end.connect()
        announced = ModelWeights(policy(1))
        engine = receiver(model, end)
        engine.update(Offer(version=1, road="broadcast", specs=announced.specs(), checksums=None))
    assert all(torch.equal(t.cpu(), announced.tensors[n]) for n, t in named_tensors(model).items())
