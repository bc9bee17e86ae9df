"""Converted weights in Megatron-Core itself: its own models take them as they are and compute what Transformers' do.

Megatron-Core is no dependency: `pip install --no-deps megatron-core==0.16.1`.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from convert_models import SHAPE, network, saved
from parallel_ranks import launch
from tandem.checkpoint.convert import convert
from tandem.model.parallel.grid import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("megatron") is None or find_spec("megatron.core") is None,
        reason="Megatron-Core is not installed: pip install --no-deps megatron-core==0.16.1",
    ),
]

CPU, WORLD = torch.device("cpu"), 4
TOKENS_BT = torch.randint(SHAPE["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True, slots=True)
class Case:
    family: str
    layout: dict[str, Any] = field(default_factory=dict)
    """Options of the conversion; processes beyond its ranks hold the same once more."""


CASES = {
    "qwen2 whole": Case("qwen2_untied"),
    "qwen2 tied": Case("qwen2_tied"),
    "llama whole": Case("llama"),
    "qwen3 whole": Case("qwen3"),
    "qwen3_moe whole": Case("qwen3_moe"),
    "mixtral whole": Case("mixtral"),
    "qwen2 tp2": Case("qwen2_untied", {"tensor_parallel": 2}),
    "llama pp2": Case("llama", {"pipeline_parallel": 2}),
    "qwen2 tied padded tp2pp2": Case(
        "qwen2_tied", {"tensor_parallel": 2, "pipeline_parallel": 2, "pad_vocab_multiple": 100}
    ),
    "qwen3 tp2pp2 virtual": Case(
        "qwen3", {"tensor_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2}
    ),
    "llama uneven": Case("llama", {"pipeline_parallel": 2, "layers_per_stage": "1,3"}),
    "qwen3_moe ep4": Case("qwen3_moe", {"expert_parallel": 4}),
    "mixtral tp2pp2": Case("mixtral", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "qwen3_moe tp2pp2ep2etp1": Case(
        "qwen3_moe",
        {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
    ),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """Every case converted, and what Megatron's model made of it, all in one launch."""
    folder = tmp_path_factory.mktemp("megatron")
    for family in {case.family for case in CASES.values()}:
        saved(folder / family, family)
    for name, case in CASES.items():
        convert(folder / case.family, folder / name, "megatron", **case.layout, say=lambda line: None)
    launch(everything, WORLD, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_megatrons_model_computes_what_that_of_transformers_does(computed, name):
    with torch.no_grad():
        wanted_BTV = network(CASES[name].family)(TOKENS_BT).logits
    found_BTV = load_file(computed / f"{name}.safetensors")["logits"]
    assert wanted_BTV.std() > 0.5
    torch.testing.assert_close(found_BTV[..., : SHAPE["vocab_size"]], wanted_BTV, rtol=0, atol=1e-4)
    assert not found_BTV[..., SHAPE["vocab_size"] :].any()


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_names_and_shapes_that_its_model_has(computed, name):
    folders = {path.name for path in (computed / name / "release").iterdir()}
    reports = [json.loads((computed / f"{name} {rank}.json").read_text()) for rank in range(WORLD)]
    assert {report["folder"] for report in reports} == folders
    for report in reports:
        assert report["held"] == report["expected"]


def everything(rank: int, world: int, address: str, place: str) -> None:
    """What every process does: its rank of each case, read into Megatron's model."""
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    without_cuda()
    for name in CASES:
        values = json.loads((Path(place) / name / "megatron_arguments.json").read_text())
        with Stage(values) as stage, torch.no_grad():
            report = stage.read(Path(place) / name / "release")
            Path(place, f"{name} {rank}.json").write_text(json.dumps(report))
            logits_BTV = stage.logits()
            if logits_BTV is not None and stage.reports:
                save_file({"logits": logits_BTV}, Path(place) / f"{name}.safetensors")


def without_cuda() -> None:
    """Megatron-Core asks for the current device and for random numbers of the accelerator even where it uses neither,
    and in its router for a product that is only defined with Transformer Engine."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: CPU
    torch.Tensor.cuda = lambda self, *_, **__: self
    tracker = SimpleNamespace(fork=lambda *_: nullcontext())
    for module in (tensor_parallel, tensor_parallel.random, tensor_parallel.layers):
        module.get_cuda_rng_tracker = lambda: tracker
    moe_utils.te_general_gemm = None


def transformer_config(values: dict[str, Any]) -> Any:
    """As Megatron's `core_transformer_config_from_args` takes it from arguments of these names."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {entry.name for entry in fields(TransformerConfig)}
    dtype = getattr(torch, values["params_dtype"])
    given = {name: value for name, value in values.items() if name in known}
    given |= {
        "layernorm_epsilon": values["norm_epsilon"],
        "num_moe_experts": values.get("num_experts"),
        "gated_linear_unit": values["swiglu"],
        "activation_func": F.silu,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    if chunk := values.get("num_layers_per_virtual_pipeline_stage"):
        per_stage = values["num_layers"] // values["pipeline_model_parallel_size"]
        given["virtual_pipeline_model_parallel_size"] = per_stage // chunk
    counts = [sum(chunks) for chunks in values["layers_per_stage"]]
    if len(set(counts)) > 1:
        given["num_layers_in_first_pipeline_stage"] = counts[0]
    return TransformerConfig(**given)


class Stage:
    """This process's part of a model in Megatron's groups of processes, which are gone when it closes."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.config = transformer_config(values)

    def __enter__(self) -> "Stage":
        from megatron.core import parallel_state as state

        config = self.config
        state.initialize_model_parallel(
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            config.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        )
        self.state = state
        self.tensor, self.pipeline, self.expert = (
            state.get_tensor_model_parallel_rank(),
            state.get_pipeline_model_parallel_rank(),
            state.get_expert_model_parallel_rank(),
        )
        self.first, self.last = self.pipeline == 0, self.pipeline == config.pipeline_model_parallel_size - 1
        count = config.virtual_pipeline_model_parallel_size or 1
        self.chunks = [self.built(number, count) for number in range(count)]
        return self

    def __exit__(self, *cause: object) -> None:
        self.state.destroy_model_parallel()

    @property
    def reports(self) -> bool:
        """Of processes with the same results, the first."""
        return self.tensor == 0 and self.state.get_data_parallel_rank() == 0

    def built(self, number: int, count: int) -> Any:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        values, chunk = self.values, number if count > 1 else None
        return GPTModel(
            self.config,
            get_gpt_decoder_block_spec(
                self.config,
                use_transformer_engine=values["transformer_impl"] == "transformer_engine",
                normalization=values["normalization"],
                vp_stage=chunk,
            ),
            values["padded_vocab_size"],
            values["max_position_embeddings"],
            pre_process=self.first and number == 0,
            post_process=self.last and number == count - 1,
            parallel_output=False,
            share_embeddings_and_output_weights=not values["untie_embeddings_and_output_weights"],
            position_embedding_type=values["position_embedding_type"],
            rotary_base=values["rotary_base"],
            vp_stage=chunk,
        ).eval()

    def read(self, release: Path) -> dict[str, Any]:
        """Load the file of this rank; what is in it and what the model has."""
        name = f"mp_rank_{self.tensor:02d}"
        name += f"_{self.pipeline:03d}" if self.config.pipeline_model_parallel_size > 1 else ""
        name += f"_{self.expert:03d}" if self.config.expert_model_parallel_size > 1 else ""
        content = torch.load(release / name / "model_optim_rng.pt", weights_only=True)
        keys = ["model"] if len(self.chunks) == 1 else [f"model{i}" for i in range(len(self.chunks))]
        report = {"folder": name, "held": [], "expected": []}
        for key, model in zip(keys, self.chunks, strict=True):
            report["held"].append(shapes(content[key]))
            report["expected"].append(shapes(model.state_dict()))
            model.load_state_dict(content[key], strict=True)
        return report

    def logits(self) -> Tensor | None:
        """Through the chunks of all stages in turn; only the last stage has logits."""
        B, T = TOKENS_BT.shape
        positions_BT = torch.arange(T).expand(B, T)
        hidden_TBH = torch.empty(T, B, self.values["hidden_size"])
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)[None, None]
        before = self.state.get_pipeline_model_parallel_prev_rank
        after = self.state.get_pipeline_model_parallel_next_rank
        for model in self.chunks:
            if not model.pre_process:
                dist.recv(hidden_TBH, before())
                model.set_input_tensor(hidden_TBH.clone())
            made = model(TOKENS_BT, positions_BT, mask)
            if model.post_process:
                return made
            dist.send(made.contiguous(), after())
        return None


def shapes(tensors: dict[str, Any]) -> dict[str, list[int]]:
    """But for `_extra_state`, where Transformer Engine keeps scales: Megatron's own layers have the name, and nothing
    in it, and take files without it."""
    assert all(value is None for name, value in tensors.items() if name.endswith("_extra_state"))
    return {name: list(value.shape) for name, value in tensors.items() if not name.endswith("_extra_state")}
