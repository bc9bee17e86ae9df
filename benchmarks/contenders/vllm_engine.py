"""vLLM, its engine in this process or in one of its own, where it chooses the allocator; threads are not bound."""

import os
from typing import Any

from job import Answer, Job
from memory import Watch

from contenders.stopwatch import timed

SETTINGS: dict[str, dict[str, Any]] = {
    "in process": {"own_process": "0", "enforce_eager": True},
    "own process": {"own_process": "1", "enforce_eager": True},
    "own process, compiled": {"own_process": "1", "enforce_eager": False},
}
REQUIRES = ("vllm",)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def measure(job: Job) -> dict[str, Any]:
    setting = SETTINGS[job.setting]
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING=setting["own_process"])
    from vllm import LLM, SamplingParams

    engine = LLM(
        job.folder,
        skip_tokenizer_init=True,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[job.dtype],
        max_model_len=max(map(len, job.prompts)) + job.max_tokens,
        max_num_seqs=len(job.prompts) * job.answers,
        disable_log_stats=True,
        seed=job.seed,
        enforce_eager=setting["enforce_eager"],
    )
    # logprobs=0 is the sampled token's alone; no seed per request, which would turn batched sampling off.
    params = SamplingParams(
        n=job.answers,
        temperature=1.0,
        max_tokens=job.max_tokens,
        ignore_eos=True,
        stop_token_ids=job.end_tokens,
        detokenize=False,
        logprobs=0,
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in job.prompts]

    def generate(seed: int) -> list[Answer]:
        """vLLM draws on from the engine's seed."""
        done = engine.generate(inputs, params, use_tqdm=False)
        return [
            Answer(
                prompt=i,
                tokens=list(output.token_ids),
                logp=[step[token].logprob for step, token in zip(output.logprobs, output.token_ids)],
            )
            for i, request in enumerate(done)
            for output in request.outputs
        ]

    # Between two steps of training the weights change: what the cache knows of a prompt is then worth nothing.
    return timed(job, Watch(job.device), generate, engine.reset_prefix_cache)
