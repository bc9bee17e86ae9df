"""What the processes that split a mixture's experts are asked in a test."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from parallel_ranks import (
    CPU,
    Case,
    go_on,
    reads_at_most,
    save_and_go_on,
    single,
    spread,
    take_over_from_one,
    update,
)
from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.model.parallel.grid import connect
from tandem.placement.ranks import build_reference
from tandem.types import take
from tiny_models import SHAPE

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS, head_dim=16, norm_topk_prob=True)
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SHAPE, **HEADS, **EXPERTS, shared_expert_intermediate_size=40)
    ),
    # Its folder calls them otherwise than the model does, and the router too.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **{**SHAPE, "intermediate_size": 24}, **HEADS, num_local_experts=8, num_experts_per_tok=2
        )
    ),
    # Often no token of a micro-batch goes to any expert of a process.
    "one choice": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, **HEADS, **{**EXPERTS, "num_experts_per_tok": 1}, head_dim=16)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Mixture(Case):
    """`targets` of the adapter, where there is one."""

    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])

    def model(self, folder: Path) -> Model:
        made = super().model(folder)
        if made.lora is None:
            return made
        return made.model_copy(update={"lora": made.lora.model_copy(update={"targets": self.targets})})


def case(layout: dict[str, object], family: str = "qwen3_moe", **keys: object) -> Case:
    return Mixture(layout=layout, family=family, **keys)


EVERYWHERE = {"lora": True, "targets": "all-linear"}
"""Adapters on attention, experts and routers."""


CASES = {
    4: {
        "expert of 4": case({"expert": 4}),
        "expert x shard": case({"expert": 2}),
        "expert x replicate": case({"expert": 2, "replicate": 2}),
        "expert x context": case({"expert": 4, "context": 2}),
        "expert x pipeline": case({"expert": 2, "pipeline": 2}),
        "expert x shard lora": case({"expert": 2}, lora=True),
        "expert x tensor": case({"expert": 2, "tensor": 2}),
        "shared expert x tensor": case({"expert": 2, "tensor": 2}, "qwen2_moe"),
        "mixtral x tensor": case({"expert": 2, "tensor": 2}, "mixtral"),
        "expert x tensor lora": case({"expert": 2, "tensor": 2}, lora=True),
        "adapted experts of 4": case({"expert": 4}, **EVERYWHERE),
        "adapted experts x shard": case({"expert": 2}, **EVERYWHERE),
        "adapted experts x tensor": case({"expert": 2, "tensor": 2}, **EVERYWHERE),
        "few visitors": case({"expert": 4}, "one choice", learner={"tokens_per_forward": 1}),
    },
    2: {
        "expert": case({"expert": 2}),
        "shared expert": case({"expert": 2}, "qwen2_moe"),
        "mixtral": case({"expert": 2}, "mixtral"),
        "mixtral lora": case({"expert": 2}, "mixtral", lora=True),
        "shard": case({}),
        "pipeline": case({"pipeline": 2}),
        "mixtral x pipeline": case({"pipeline": 2}, "mixtral"),
        "expert lora": case({"expert": 2}, lora=True),
        "sequence": case({"tensor": 2}),
        "tensor, shared expert": case({"tensor": 2, "sequence": False}, "qwen2_moe"),
        "adapted experts": case({"expert": 2}, **EVERYWHERE),
        "adapted experts, sharded": case({}, **EVERYWHERE),
        "adapted mixtral": case({"expert": 2}, "mixtral", **EVERYWHERE),
        "adapted down, recomputed": case(
            {"expert": 2}, lora=True, targets=["down_proj"], learner={"checkpointing": True}
        ),
        "expert, recomputed": case({"expert": 2}, learner={"checkpointing": True}),
        "expert, one row": case({"expert": 2}, rows=1),
    },
}


SAVED = {"saved": {}, "saved adapter": EVERYWHERE, "saved mixtral": {"family": "mixtral"}}


EXPORTED = {"qwen3_moe": "saved", "mixtral": "saved mixtral"}
"""What many processes export without a change, and a checkpoint of the same family."""


FROM_ONE = {"expert": {"expert": 2}, "shard": {}, "tensor": {"tensor": 2}}


def everything(rank: int, world: int, address: str, place: str) -> None:
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    folder = Path(place)
    for name, made in CASES[world].items():
        update(made, folder, folder / f"{world} {name}", rank)
    if world == 4:
        nobody_comes(folder)
        for name, keys in SAVED.items():
            save_and_go_on(case({"expert": 2}, **keys), folder, folder / name, rank)
        return
    for name, keys in SAVED.items():
        go_on(case({"expert": 2}, **keys), folder, folder / name, "expert", rank)
        go_on(case({}, **keys), folder, folder / name, "shard", rank)
    for layout, sizes in FROM_ONE.items():
        take_over_from_one(case(sizes, **EVERYWHERE), folder, f"adapter {layout}", rank)
    for family in ("qwen3_moe", "qwen2_moe", "mixtral"):
        reads_at_most(0.52, case({"expert": 2}, family), folder)
    reference_in_another_layout(folder)
    for family in EXPORTED:
        spread(case({"expert": 2}, family), folder).model.save_merged(folder / f"export {family}")
    keep_an_adapter(folder)


def nobody_comes(folder: Path) -> None:
    """Experts without a token have a gradient too, or the processes that share them would not be in step. The plain
    implementation leaves out what has no token."""
    made = case({"expert": 4}, "one choice")
    _, part = single(made, folder)
    actor = spread(made, folder)
    actor.model.network.set_experts_implementation("eager")
    shortest = part.length_B.argmin()[None]
    actor._accumulate(take(part, shortest), 0.05)
    assert all(weight.grad is not None for weight in actor.model.trainable().values())


def reference_in_another_layout(folder: Path) -> None:
    made = case({"expert": 2})
    _, part = single(made, folder)
    actor = spread(made, folder)
    start_BT = actor.logprobs(part)
    reference = build_reference(made.run(folder), Layout(), actor)
    actor.update([part], 0.05)
    assert torch.allclose(reference.logprobs(part), start_BT, atol=1e-5)
    reference.refresh(actor)
    assert torch.allclose(reference.logprobs(part), actor.logprobs(part), atol=1e-5)


def keep_an_adapter(folder: Path) -> None:
    """As PEFT has it, and merged; beside them what the model says of the experience, and without it."""
    made = case({"expert": 2}, **EVERYWHERE)
    _, part = single(made, folder)
    actor = spread(made, folder)
    start_BT = actor.logprobs(part)
    actor.update([part, part], 0.05)
    actor.model.save(folder / "kept adapter")
    actor.model.save_merged(folder / "merged adapter")
    logp_BT = actor.logprobs(part)
    assert not torch.allclose(logp_BT, start_BT, atol=1e-3)
    with actor.model.base():
        assert torch.allclose(actor.logprobs(part), start_BT, atol=1e-5)
    if torch.distributed.get_rank() == 0:
        save_file({"logp_BT": logp_BT}, folder / "kept adapter.safetensors")
