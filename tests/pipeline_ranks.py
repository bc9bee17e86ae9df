"""What the processes of a pipeline are asked in a test."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from parallel_ranks import (
    CPU,
    Case,
    a_broken_weight_is_known_to_all,
    go_on,
    save_and_go_on,
    single,
    spread,
    update,
)
from tandem.config.layout import Layout
from tandem.model.parallel.grid import connect
from tandem.placement.ranks import build_reference
from tiny_models import SHAPE

DEEP = {**SHAPE, "num_hidden_layers": 5}
FAMILIES = {
    "qwen2_tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**DEEP, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **DEEP, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**DEEP, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**DEEP, num_attention_heads=4, num_key_value_heads=2)
    ),
}


def case(layout: dict[str, object], family: str = "qwen2_tied", **keys: object) -> Case:
    # The deeper the model, the more the first update's rounding grows in the second.
    keys["optimizer"] = {"lr": 0.2, **keys.get("optimizer", {})}
    return Case(layout={"pipeline": 2, **layout}, family=family, **keys)


CASES = {
    4: {
        "four stages": case({"pipeline": 4}),
        "four stages, untied": case({"pipeline": 4}, "qwen3"),
        "x shard": case({}),
        "gpipe x shard": case({"pipeline_schedule": "gpipe"}),
        "interleaved x shard": case({"pipeline_chunks": 2}, "llama"),
        "x replicate": case({"replicate": 2}),
        "x sequence": case({"tensor": 2}),
        "x tensor": case({"tensor": 2, "sequence": False}, "qwen3"),
        "x context": case({"context": 2}),
        "x shard lora": case({}, lora=True),
    },
    2: {
        "1f1b": case({}),
        "gpipe": case({"pipeline_schedule": "gpipe"}),
        "interleaved": case({"pipeline_chunks": 2}),
        "interleaved gpipe": case({"pipeline_chunks": 2, "pipeline_schedule": "gpipe"}, "qwen3"),
        "uneven": case({"pipeline_layers": [1, 4]}, "qwen3"),
        "interleaved, uneven": case({"pipeline_chunks": 2, "pipeline_layers": [2, 1, 1, 1]}),
        "tied": case({}, "llama"),
        "windowed": case({}, "mistral"),
        "one pack": case({}, learner={"tokens_per_forward": 4096}),
        "a row at a time": case({}, learner={"tokens_per_forward": 1}),
        "lora": case({}, lora=True),
        "interleaved lora": case({"pipeline_chunks": 2}, lora=True),
        "recomputed, head in chunks": case({}, learner={"checkpointing": True}, chunks=True),
        "gradients on the host": case({"offload_gradients": True}, optimizer={"offload": True}),
        "clipped": case({}, optimizer={"clip_grad": 0.05}),
    },
}


def everything(rank: int, world: int, address: str, place: str) -> None:
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    folder = Path(place)
    for name, made in CASES[world].items():
        update(made, folder, folder / f"{world} {name}", rank)
    saved = folder / "saved"
    if world == 2:
        go_on(case({"pipeline_layers": [1, 4]}), folder, saved, "other stages", rank)
        go_on(Case(layout={}, family="qwen2_tied", optimizer={"lr": 0.2}), folder, saved, "shard", rank)
        a_broken_weight_is_known_to_all(case({}, "qwen3"), folder, rank)
    else:
        save_and_go_on(case({}), folder, saved, rank)
        reference_in_another_layout(folder)
        export_while_training(folder)


def reference_in_another_layout(folder: Path) -> None:
    """From stages to shards and back."""
    for ours, other in (
        (case({}), Layout(tensor=2)),
        (Case(layout={}, family="qwen2_tied"), Layout(pipeline=2)),
    ):
        _, part = single(ours, folder)
        actor = spread(ours, folder)
        start_BT = actor.logprobs(part)
        reference = build_reference(ours.run(folder), other, actor)
        actor.update([part], 0.05)
        assert torch.allclose(reference.logprobs(part), start_BT, atol=1e-5)
        assert not torch.allclose(actor.logprobs(part), start_BT, atol=1e-2)
        reference.refresh(actor)
        assert torch.allclose(reference.logprobs(part), actor.logprobs(part), atol=1e-5)


def export_while_training(folder: Path) -> None:
    for name in ("whole", "adapter"):
        made = case({"pipeline_chunks": 2}, lora=name == "adapter")
        _, part = single(made, folder)
        actor = spread(made, folder)
        actor.update([part, part], 0.05)
        actor.model.save_merged(folder / f"export {name}")
        actor.model.save(folder / f"kept {name}")
        logp_BT = actor.logprobs(part)
        if torch.distributed.get_rank() == 0:
            save_file({"logp_BT": logp_BT}, folder / f"export {name}.safetensors")
