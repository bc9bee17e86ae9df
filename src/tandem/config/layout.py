"""How a model lies on many processes: the axes, and what of it waits in host memory."""

from pydantic import Field, model_validator

from tandem.config.section import Section


class Layout(Section):
    """How one model lies on its processes. Their number is the product of all axes."""

    replicate: int = Field(1, gt=0)
    """Whole copies of the sharded model, each with its share of the sequences; gradients are summed between them
    once per micro-batch. Use it where `shard` would reach over a slow network."""
    shard: int | None = Field(None, gt=0)
    """Processes that hold a part of every weight and gather it when it is used (FSDP2), each with its share of
    the sequences; null for the processes that the other axes leave over."""
    tensor: int = Field(1, gt=0)
    """Processes that split every layer: attention heads, the MLP's width, the vocabulary. Must divide all three."""
    sequence: bool = True
    """With tensor > 1: what lies between the split parts of a layer is split along the tokens. Saves memory at equal
    communication."""
    context: int = Field(1, gt=0)
    """Processes that split the tokens of a sequence; attention is split by heads meanwhile (Ulysses). Times `tensor`
    it must divide the attention heads."""
    offload_parameters: bool = False
    """Keep each process's part of the weights in host memory; layers visit the device while they compute. Gradients
    then arrive in host memory too. Without effect where the device is the host."""
    offload_gradients: bool = False
    """Add up the gradients of micro-batches in host memory."""

    def sizes(self, world: int) -> tuple[int, int, int, int]:
        """(replicate, shard, context, tensor) on `world` processes; ValueError where their product cannot be that."""
        others = self.replicate * self.context * self.tensor
        shard = self.shard or max(1, world // others)
        if others * shard != world:
            raise ValueError(
                f"replicate={self.replicate} x shard={self.shard or 'rest'} x context={self.context} x tensor="
                f"{self.tensor} does not give {world} processes: set the axes so that their product is {world}"
            )
        return self.replicate, shard, self.context, self.tensor

    @model_validator(mode="after")
    def _one_home(self) -> "Layout":
        if self.offload_parameters and self.offload_gradients:
            raise ValueError("offload_parameters takes the gradients along: leave offload_gradients false")
        return self
