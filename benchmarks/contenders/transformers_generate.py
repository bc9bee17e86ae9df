"""Transformers' `generate`: a left-padded batch with all answers to all prompts, cache and sdpa on."""

from typing import Any

from job import Answer, Job
from memory import Watch

from contenders.stopwatch import Generate, timed, until_end

SETTINGS: dict[str, dict[str, Any]] = {
    "log-probabilities": {"output_scores": True, "return_dict_in_generate": True},
    "tokens only": {},
    "static cache": {
        "cache_implementation": "static",
        "output_scores": True,
        "return_dict_in_generate": True,
    },
}
ON = {"cpu": ("log-probabilities", "tokens only"), "accelerator": tuple(SETTINGS)}
"""Settings that are raced. On a CPU a static cache is slower."""
REQUIRES = ("transformers",)


def measure(job: Job) -> dict[str, Any]:
    model = loaded(job)
    return timed(job, Watch(job.device), generator(job, model))


def loaded(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.dtype]
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(job.device).eval()


def generator(job: Job, model: Any) -> Generate:
    import torch

    rows = [i for i in range(len(job.prompts)) for _ in range(job.answers)]
    longest = max(map(len, job.prompts))
    pad = model.generation_config.pad_token_id

    def padded(i: int) -> list[int]:
        return [pad] * (longest - len(job.prompts[i])) + job.prompts[i]

    def real(i: int) -> list[int]:
        return [0] * (longest - len(job.prompts[i])) + [1] * len(job.prompts[i])

    extra = SETTINGS[job.setting]
    if job.end_tokens:
        extra = {**extra, "eos_token_id": job.end_tokens}

    @torch.inference_mode()
    def generate(seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        out = model.generate(
            torch.tensor([padded(i) for i in rows], device=model.device),
            attention_mask=torch.tensor([real(i) for i in rows], device=model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=job.max_tokens,
            **extra,
        )
        if "output_scores" not in extra:
            kept = [until_end(tokens, job.end_tokens) for tokens in out[:, longest:].tolist()]
            return [Answer(prompt=i, tokens=tokens, logp=[]) for i, tokens in zip(rows, kept)]
        logp = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).tolist()
        kept = [until_end(tokens, job.end_tokens) for tokens in out.sequences[:, longest:].tolist()]
        return [Answer(prompt=i, tokens=t, logp=p[: len(t)]) for i, t, p in zip(rows, kept, logp)]

    return generate
