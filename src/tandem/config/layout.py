"""How a model lies on many processes: the axes, and what of it waits in host memory."""

from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tandem.config.section import Section


class Layout(Section):
    """How one model lies on its processes. Their number is pipeline x replicate x shard x context x tensor."""

    replicate: int = Field(1, gt=0)
    """Whole copies of the sharded model, each with its share of the sequences; gradients are summed between them
    once per update. Use it where `shard` would reach over a slow network."""
    shard: int | None = Field(None, gt=0)
    """Processes that hold a part of every weight and gather it when it is used (FSDP2), each with its share of
    the sequences; null for the processes that the other axes leave over."""
    tensor: int = Field(1, gt=0)
    """Processes that split every layer: attention heads, the MLP's width, the vocabulary. Must divide these and the
    key heads."""
    sequence: bool = True
    """With tensor > 1: what lies between the split parts of a layer is split along the tokens. Saves memory at equal
    communication."""
    context: int = Field(1, gt=0)
    """Processes that split the tokens of a sequence; attention is split by heads meanwhile (Ulysses). Times `tensor`
    it must divide the attention heads."""
    expert: int = Field(1, gt=0)
    """Of a mixture of experts: of the processes that `shard` x `context` gives, how many neighbours split the experts
    among them and send each other the tokens that belong there. Must divide their number and that of the experts.
    With `tensor` each process of a tensor group has the same experts, for its own part of the tokens."""
    pipeline: int = Field(1, gt=0)
    """Groups of processes that hold the model's layers in turn and pass on what they make of a micro-batch; all other
    axes are within such a group. More micro-batches (`tokens_per_forward` smaller) leave fewer processes waiting."""
    pipeline_chunks: int = Field(1, gt=0)
    """Stages on each process of the pipeline. With more than one they are interleaved: less waiting, more traffic."""
    pipeline_layers: list[Annotated[int, Field(gt=0)]] | None = None
    """Layers of each stage, in order, `pipeline` x `pipeline_chunks` numbers; null for equal ones. The last stage also
    computes the output head."""
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """1f1b goes back through a micro-batch as soon as it can, and holds few of them; gpipe goes forward through all
    first."""
    offload_parameters: bool = False
    """Keep each process's part of the weights in host memory; layers visit the device while they compute. Gradients
    then arrive in host memory too. Without effect where the device is the host."""
    offload_gradients: bool = False
    """Add up the gradients of micro-batches in host memory."""

    def sizes(self, world: int) -> tuple[int, int, int, int]:
        """(replicate, shard, context, tensor) of each of the pipeline's parts when there are `world` processes;
        ValueError where the product of all cannot be that."""
        others = self.pipeline * self.replicate * self.context * self.tensor
        shard = self.shard or max(1, world // others)
        if others * shard != world:
            raise ValueError(
                f"pipeline={self.pipeline} x replicate={self.replicate} x shard={self.shard or 'rest'} x context="
                f"{self.context} x tensor={self.tensor} does not give {world} processes: set the axes so that their "
                f"product is {world}"
            )
        if (shard * self.context) % self.expert:
            raise ValueError(f"expert={self.expert} does not divide shard={shard} x context={self.context}")
        return self.replicate, shard, self.context, self.tensor

    @model_validator(mode="after")
    def _one_home(self) -> "Layout":
        if self.offload_parameters and self.offload_gradients:
            raise ValueError("offload_parameters takes the gradients along: leave offload_gradients false")
        return self

    @model_validator(mode="after")
    def _axes_agree(self) -> "Layout":
        if self.expert > 1 and self.tensor > 1 and not self.sequence:
            raise ValueError(
                f"expert={self.expert} with tensor={self.tensor} needs sequence=true: each process sends the tokens "
                "that lie with it to the experts"
            )
        if self.pipeline == 1 and (self.pipeline_chunks > 1 or self.pipeline_layers):
            raise ValueError("pipeline_chunks and pipeline_layers need pipeline > 1")
        stages = self.pipeline * self.pipeline_chunks
        if self.pipeline_layers and len(self.pipeline_layers) != stages:
            raise ValueError(
                f"pipeline_layers={self.pipeline_layers} has {len(self.pipeline_layers)} numbers; give {stages}, one "
                "for each stage (pipeline x pipeline_chunks)"
            )
        return self

    def stage_layers(self, layers: int) -> list[range]:
        """The layers of each stage of a model with so many; ValueError where they are not shared out exactly."""
        stages = self.pipeline * self.pipeline_chunks
        counts = self.pipeline_layers or [layers // stages + (s < layers % stages) for s in range(stages)]
        if sum(counts) != layers or not all(counts):
            raise ValueError(f"{stages} stages of {counts} layers do not make up the model's {layers} layers")
        ends = list(accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts)]
