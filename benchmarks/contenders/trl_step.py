"""TRL's GRPOTrainer, its default options changed wherever that makes it faster."""

import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

from job import Job
from memory import Watch
from reward import scrambled_all
from shape import text

SETTINGS = {"1 micro-batch": 1, "4 micro-batches": 4, "8 micro-batches": 8}
"""How many times a step's answers are cut: gradient_accumulation_steps, the batch per device to match."""
REQUIRES = ("trl",)


def measure(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return steps(job, Path(folder))


def steps(job: Job, folder: Path) -> dict[str, Any]:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When the run begins, and when each step ends."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.marks.append(time.perf_counter())

    counted: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        counted.append(sum(map(len, completion_ids)))
        return scrambled_all(completions)

    # What TRL imports belongs to the process, not to the step.
    importlib.import_module("trl.trainer.grpo_trainer")
    model = policy(job)
    watch = Watch(job.device)
    clock = Clock()
    trainer(job, folder, model, reward, [clock]).train()
    seconds = [after - before for before, after in zip(clock.marks, clock.marks[1:])]
    return {"seconds": seconds[1:], "tokens": counted[1:], "memory": watch.report()}


def policy(job: Job) -> Any:
    """In bf16 its weights and moments are bf16 too, which is faster than fp32 weights under autocast."""
    from contenders.transformers_generate import loaded

    return loaded(job).train()


def trainer(job: Job, folder: Path, model: Any, reward: Any, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    cuts = SETTINGS[job.setting]
    answers = job.prompts_per_step * job.answers
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=1 + job.repeats,
        per_device_train_batch_size=answers // cuts,
        gradient_accumulation_steps=cuts,
        num_generations=job.answers,
        max_completion_length=job.max_tokens,
        beta=job.beta,
        # The KL term of the GRPO paper, as Tandem's preset has it; TRL's default adds the ratio as a factor.
        use_bias_correction_kl=False,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=job.dtype == "bf16",
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device != "cpu",
        shuffle_dataset=False,
        seed=job.seed,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text(prompt)} for prompt in job.prompts]),
        processing_class=AutoTokenizer.from_pretrained(job.folder),
        callbacks=callbacks,
    )
