"""An engine that samples from a copy of the actor's weights, in the actor's process."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tandem.config.engine import Engine
from tandem.config.run import Run
from tandem.engine import Completion, Request, SamplingParams
from tandem.engine.probe import probe_of
from tandem.engine.roads import SHARED, FilesRoad, MemoryRoad
from tandem.engine.vllm import VllmEngine, check_params
from tandem.engine.weights import ModelWeights
from tandem.model import LanguageModel
from tandem.model.load import DTYPES, existing
from tandem.placement.cluster.guard import Guard

FOLDER = "engine"
"""Below the run folder: the configuration that vLLM starts from; the weights come from the actor."""


class CopiedEngine:
    """Every version of the weights is offered, taken and proved before it serves. It sleeps while nobody samples,
    where `engine.sleep` says so, and is given its weights again when it wakes."""

    def __init__(
        self, model: LanguageModel, engine: VllmEngine, road: str, root: Path, config: Engine
    ) -> None:
        self.model, self.engine, self.config = model, engine, config
        self.road = MemoryRoad() if road == "memory" else FilesRoad(root)
        self._sent = 0
        self._slept = False
        with ExitStack() as stack:
            stack.callback(engine.close)
            if isinstance(self.road, FilesRoad):
                guard = Guard()
                stack.callback(guard.close)
                guard.remove(root)
                stack.callback(self.road.close)
            engine.connect(road)
            self.send(0)
            self._open = stack.pop_all()

    def send(self, version: int) -> None:
        """The engine samples from the model as it is now; RunError names a tensor that did not arrive whole."""
        self._sent += 1
        verify = self.config.verifies(self._sent)
        offer = self.road.offer(version, ModelWeights(self.model, self.engine.dtype), verify=verify)
        self.engine.update(offer)
        self._slept = False
        if verify:
            probe = probe_of(self.model, self.engine.dtype)
            probe.check("engine", version, self.engine.score([probe.tokens])[0])

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None],
        on_done: Callable[[int, Completion], None],
    ) -> list[Completion]:
        if self._slept:
            self.send(self.engine.version)
        done = self.engine.generate(requests, params, poll=poll, on_done=on_done)
        if self.config.sleep:
            self.engine.sleep()
            self._slept = True
        return done

    def close(self) -> None:
        """End the engine, and remove weights that lie in files."""
        self._open.close()


def vllm_beside(run: Run, model: LanguageModel, params: SamplingParams) -> CopiedEngine:
    """vLLM in this process, with the weights that the actor has now; ConfigError where it cannot sample as asked."""
    check_params(params)
    folder = Path(run.run_dir).absolute()
    engine = vllm_engine(run, model, folder / FOLDER)
    road = run.engine.road(one_process=True, adapter=run.model.lora is not None)
    return CopiedEngine(model, engine, road, weights_root(run, folder), run.engine)


def weights_root(run: Run, folder: Path) -> Path:
    """Where versions of the weights lie: a folder that belongs to the run folder, so that a run that was killed leaves
    nothing that the next one does not remove. It is in the user's folder, or in this machine's shared memory."""
    parent = run.engine.transfer_dir
    if parent is None and not SHARED.is_dir():
        return folder / "weights"
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Path(parent or SHARED).absolute() / f"tandem-weights-{os.getuid()}-{name}"


def vllm_engine(run: Run, model: LanguageModel, folder: Path) -> VllmEngine:
    """vLLM for the weights of such a model. It reads the base of an adapter where the run has it, and else only the
    configuration, which it gets in `folder`."""
    adapter = run.model.lora is not None
    return VllmEngine(
        existing(run.model.path) if adapter else str(described(model, folder)),
        run.engine,
        dtype=DTYPES[run.engine_dtype],
        tokenizer=model.tokenizer,
        stop_tokens=model.stop_tokens,
        lora=run.model.lora,
        trust_remote_code=run.model.trust_remote_code,
        fill=adapter,
    )


def described(model: LanguageModel, folder: Path) -> Path:
    """A folder with the model's configuration and no weights."""
    # As `save_pretrained` of the network does it.
    model.network.config.architectures = [type(model.network).__name__]
    model.network.config.save_pretrained(folder)
    return folder
