"""The supervised loop: a stage is a builder of batches and the cross-entropy of their marked tokens."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tandem.algorithms import weights
from tandem.config.sections import Learner, Warmup
from tandem.config.sections import Optimizer as OptimizerConfig
from tandem.data import tasks
from tandem.learner import MIB, micro_batches
from tandem.model import LanguageModel, token_logprobs
from tandem.model.finite import check_updated
from tandem.optimizer import Optimizer
from tandem.types import Prompt, pad


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Right-padded texts; `mask_BT` marks the tokens to learn."""

    tokens_BT: Tensor
    mask_BT: Tensor
    length_B: Tensor


def demonstrations(
    task: tasks.Task,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int,
    wrong_share: float,
    seed: int,
) -> Iterator[Examples]:
    """Endless batches of prompts with worked answers, of which `wrong_share` follow the wrong method."""
    rng = random.Random(seed)
    while True:
        chosen = rng.choices(prompts, k=batch)
        methods = [task.wrong if rng.random() < wrong_share else task.right for _ in chosen]
        texts = [method(dict(prompt.row)) for method, prompt in zip(methods, chosen)]
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [[*p.tokens, *answer, tokenizer.eos_token_id] for p, answer in zip(chosen, answers)]
        masks = [[t >= len(p.tokens) for t in range(len(row))] for p, row in zip(chosen, rows)]
        yield Examples(
            tokens_BT=pad(rows, torch.long),
            mask_BT=pad(masks, torch.bool, False),
            length_B=torch.tensor([len(row) for row in rows]),
        )


def supervise(
    model: LanguageModel,
    batches: Iterator[Examples],
    optimizer: OptimizerConfig,
    steps: int,
    *,
    learner: Learner,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Train on `steps` batches; `on_step(step, metrics)` follows each and may raise to stop."""
    model.module.train()
    trainer = Optimizer(model.trainable(), optimizer, steps)
    for step, examples in zip(range(steps), batches):
        weight_BT = weights(examples.mask_BT, "token_mean", 0)
        trainer.zero_grad()
        loss = 0.0
        for rows in micro_batches(examples.length_B, learner):
            device = model.device
            logp_BT, _ = token_logprobs(
                model,
                examples.tokens_BT[rows].to(device),
                examples.mask_BT[rows].to(device),
                examples.length_B[rows].to(device),
                temperature=1.0,
                logits_bytes=learner.logits_mb * MIB,
            )
            part = -(logp_BT * weight_BT[rows].to(device)).sum()
            part.backward()
            loss += part.item()
        rate = trainer.lr
        trainer.step(trainer.gradient_norm())
        check_updated(model, rate, "warmup.lr")
        on_step(step, {"warmup/loss": loss, "warmup/lr": rate})


def warmup_optimizer(warmup: Warmup) -> OptimizerConfig:
    return OptimizerConfig(
        lr=warmup.lr,
        betas=(0.9, 0.98),
        schedule="cosine",
        warmup_updates=max(1, warmup.steps // 10),
        end_lr=warmup.lr / 10,
    )
