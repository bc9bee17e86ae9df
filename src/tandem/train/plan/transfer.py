"""Seconds until the engines have a version of the weights, and what proves that they have."""

from copy import deepcopy
from dataclasses import dataclass

from tandem.config.run import Run
from tandem.model import LanguageModel
from tandem.model.load import DTYPES
from tandem.train.footprint import FLOAT, Shape
from tandem.train.plan.axes import Axes
from tandem.train.plan.device import Rates, Sending
from tandem.train.plan.link import Links
from tandem.train.plan.typical import typical
from tandem.train.plan.way import Way

CHECKSUMS = {"broadcast": 2}
"""Of each tensor, by road: at both ends. Where a road can be read twice an engine looks at all before it takes any."""
TWICE = 3
WIDE = 8
"""Bytes of the integers that a checksum adds up. Each word becomes one, which is read twice."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """From the learners of a run, in one layout, to its engines."""

    run: Run
    shape: Shape
    axes: Axes
    rates: Rates
    links: Links
    gathering: float
    """Seconds in which learners gather what each holds, for a pass of theirs."""

    @property
    def seconds(self) -> float:
        """Of weights, or of a model with one the adapter: they are gathered, and each device of the engines takes all
        of them."""
        if (sending := self.rates.sending) is not None:
            proved = self._probes * self.shape.parameters * sending.probe_s + self._gathered_to_prove()
            return self._gathered() + self._bytes * sending.byte_s + proved
        if self.run.engine.transfer == "ipc":
            return self._gathered() + self._proof()
        stride = 1 if self.links.count <= self.links.per_node else self.links.per_node
        return self._gathered() + self.links.send(self._bytes, stride) + self._proof()

    def _gathered(self) -> float:
        """What several learners hold together, one tensor after the other."""
        parts = self.axes.tensor * self.axes.cut * self.axes.pipeline
        # The whole's time counts the messages of one tensor.
        messages = (self.shape.tensors - 1) * self.links.all_gather(0.0, parts, 1)
        copied = 0.0
        if parts > 1 and self.rates.exchanges is not None:
            # Into the messages, and out of them.
            copied = 2 * self._bytes / self.rates.bandwidth
        return self.links.all_gather(self._bytes, parts, 1) + messages + copied

    def _proof(self) -> float:
        """Checksums at both ends, and the probe; on average, where not every transfer is proved."""
        rates, engine = self.rates, self.run.engine
        sums = CHECKSUMS.get(engine.transfer, TWICE)
        summing = sums * (self._bytes + self._weights * 3 * WIDE) / rates.bandwidth
        held = self.shape.dense + self.shape.expert_parameters + self.shape.head
        reading = held * self._word / rates.bandwidth + rates.step_s + self.shape.layers * rates.layer_s
        return (summing + self._probes * reading) / engine.verify_every + self._gathered_to_prove()

    def _gathered_to_prove(self) -> float:
        """All but one of the passes over the probe are the learners'."""
        return (self._probes - 1) * self.gathering / self.run.engine.verify_every

    @property
    def _word(self) -> int:
        return DTYPES[self.run.engine_dtype].itemsize

    @property
    def _weights(self) -> int:
        """That travel."""
        return self.shape.adapter or self.shape.parameters

    @property
    def _bytes(self) -> int:
        """Of them; an adapter is in float32."""
        return self._weights * (FLOAT if self.shape.adapter else self._word)

    @property
    def _probes(self) -> int:
        """Passes over the probe: by the learner, without its adapter too, and by an engine."""
        return 3 if self.shape.adapter else 2


def sending(run: Run, model: LanguageModel) -> Sending:
    """Of that model, from one process of this machine to an engine's, by the road that the run's weights take."""
    receiver = LanguageModel(deepcopy(model.network), model.tokenizer, model.source)
    receiver.network.to(DTYPES[run.engine_dtype])
    way = Way(run.engine.road(one_process=False, adapter=False), model, receiver)
    every = run.engine.verify_every
    try:
        proved = typical(lambda: way.send(True))
        bare = typical(lambda: way.send(False)) if every > 1 else proved
        probed = typical(way.probe)
        size = way.nbytes
    finally:
        way.close()
    parameters = sum(weight.numel() for weight in model.network.parameters())
    return Sending(
        byte_s=(proved + (every - 1) * bare) / every / size,
        probe_s=probed / 2 / parameters / every,
    )
