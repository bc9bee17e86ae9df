"""What the workers of a run are told of its models: whole paths, and to an engine of vLLM no weights."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
from transformers import AutoConfig

from conftest import random_model, saved
from small_recipe import recipe
from tandem.config import load
from tandem.errors import ConfigError
from tandem.model import load as load_model
from tandem.model import tokenizer_of
from tandem.placement import copied
from tandem.placement.cluster.build import with_absolute_paths

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def test_models_that_are_folders_here_reach_workers_by_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/policy", "models/judge", "critic"):
        (tmp_path / name).mkdir(parents=True)
    run = load(
        recipe(
            tmp_path,
            model={"path": "models/policy", "new": None},
            reference={"path": "owner/on-the-hub"},
            critic={"path": "~/critic"},
            reward={"model": {"path": "./models/judge"}},
        )
    )
    told = with_absolute_paths(run)
    assert told.model.path == f"{tmp_path}/models/policy"
    assert told.reference.path == "owner/on-the-hub"
    assert told.critic.path == f"{tmp_path}/critic"
    assert told.reward.model is not None and told.reward.model.path == f"{tmp_path}/models/judge"
    assert run.model.path == "models/policy"


def test_a_run_without_given_models_stays_as_it_is(tmp_path):
    run = load(recipe(tmp_path))
    assert with_absolute_paths(run) == run


@dataclass
class Started:
    """In place of vLLM: what it would have been started with."""

    folder: str
    config: Any
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def beginning(cls, folder: str, config: Any, **options: Any) -> "Started":
        return cls(folder, config, options)

    def connect(self, road: str) -> None:
        self.options["road"] = road


@needs_ray
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_an_engine_of_vllm_is_started_without_a_look_at_weights(tmp_path, monkeypatch, lora):
    """It learns the same as from the loaded model, from a folder that has no weights."""
    from tandem.placement.cluster import engine_worker

    folder = saved(tmp_path / "policy", random_model())
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    run = load(
        recipe(tmp_path, model={"path": str(folder), "new": None, "lora": lora}, engine={"kind": "vllm"})
    )
    whole = load_model(run.model, tokenizer_of(run.model), engine_worker.pick("cpu"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(copied, "VllmEngine", Started.beginning)
    started = engine_worker.vllm(run, tmp_path / "engine-0.log")
    assert isinstance(started, Started)
    assert started.options["stop_tokens"] == whole.stop_tokens >= {7, 9}
    assert started.options["fill"] is (lora is not None) and started.options["lora"] == run.model.lora
    assert (started.folder == str(folder)) is (lora is not None)
    described = AutoConfig.from_pretrained(started.folder)
    assert described.architectures == [type(whole.network).__name__]
    assert described.hidden_size == whole.network.config.hidden_size


@needs_ray
def test_a_new_model_is_described_to_vllm_too(tmp_path, monkeypatch):
    from tandem.placement.cluster import engine_worker

    run = load(recipe(tmp_path, engine={"kind": "vllm"}))
    monkeypatch.setattr(copied, "VllmEngine", Started.beginning)
    started = engine_worker.vllm(run, tmp_path / "engine-0.log")
    assert AutoConfig.from_pretrained(started.folder).architectures == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize(("placement", "said"), [
    ({"learners": 2, "engines": 2}, "on the devices of engine.tensor_parallel=2 learners; set placement.engines=1"),
    ({"learners": 3, "engines": 1}, "placement.learners=3 and placement.engines=1: .* set placement.learners=2"),
    ({"learners": 1, "engines": 1}, "set placement.learners=2"),
    ({"learners": 4, "engines": 1}, "set placement.engines=2"),
    ({"learners": 4, "engines": 2, "gpus": 0.5}, r"placement.gpus=0.5: .* learners with one GPU each"),
    ({"learners": 4, "engines": 2, "gpus": 1}, None),
    ({"learners": 1, "engines": 1, "kind": "apart"}, None),
], ids=str)  # fmt: skip
def test_an_engine_of_several_devices_needs_as_many_learners_to_lie_on(tmp_path, placement, said):
    engine = {"kind": "vllm", "tensor_parallel": 2}
    path = recipe(tmp_path, engine=engine, placement={"kind": "colocated"} | placement)
    if said is None:
        load(path)
        return
    with pytest.raises(ConfigError, match=said):
        load(path)


@needs_ray
def test_files_between_nodes_need_a_folder_that_all_see(tmp_path):
    from tandem.placement.cluster.places import check_road

    placed = {"placement": {"kind": "apart"}}
    run = load(recipe(tmp_path, engine={"transfer": "files"}, **placed))
    with pytest.raises(ConfigError, match=r"transfer=files: the processes are on 2 nodes, .*transfer_dir"):
        check_road(run, nodes=2)
    check_road(run, nodes=1)
    check_road(load(recipe(tmp_path, engine={"transfer": "auto"}, **placed)), nodes=2)
    shared = {"transfer": "files", "transfer_dir": str(tmp_path)}
    check_road(load(recipe(tmp_path, engine=shared, **placed)), nodes=2)
