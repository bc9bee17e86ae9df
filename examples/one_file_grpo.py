"""GRPO in one file, with nothing hidden: no cache, no packing, no workers. Slow, and right.

A test holds it to `tandem train`: with the same model, questions and seed both sample the same answers and end at
the same weights. Read it to know what the trainer computes.

    python examples/one_file_grpo.py MODEL_FOLDER QUESTIONS.jsonl --steps 20

MODEL_FOLDER is a Hugging Face causal language model with a chat template; each line of QUESTIONS.jsonl has a
"question" and an "answer". Shapes: B answers, T tokens, V vocabulary entries.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MASK = (1 << 64) - 1


def reward(answer: str, truth: str) -> float:
    """1 for the right number between <answer> tags, 0 for anything else."""
    found = re.findall(r"<answer>(-?\d+)</answer>", answer)
    return float(bool(found) and found[-1] == truth)


def mix(x: int) -> int:
    """SplitMix64: from a counter to 64 random bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def uniform(parts: tuple[int, ...], position: int) -> float:
    """A random number in [0, 1) that depends on (seed, question, sample) and position alone."""
    state, step = 0, 0x9E3779B97F4A7C15
    for part in parts:
        state = mix((state + step + part) & MASK)
    return (mix((state + (position + 1) * step) & MASK) >> 41) * 2.0**-23


@torch.no_grad()
def sample(model, prompt: list[int], key: tuple[int, ...], end: int, max_tokens: int) -> list[int]:
    """One answer, token by token: the first token whose cumulative probability exceeds a uniform number."""
    answer: list[int] = []
    while len(answer) < max_tokens and end not in answer:
        logits_V = model(torch.tensor([prompt + answer])).logits[0, -1].float()
        cumulative_V = logits_V.softmax(-1).cumsum(-1)
        threshold = uniform(key, len(answer)) * cumulative_V[-1:]
        answer.append(int(torch.searchsorted(cumulative_V, threshold, right=True)))
    return answer


def logprobs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probability of each token of the answer: the logits at t-1 predict token t."""
    logits_TV = model(torch.tensor([prompt + answer])).logits[0].float()
    logp_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    return logp_TV.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def grpo_step(model, optimizer, tokenizer, questions, serial: int, args) -> float:
    """Sample a group of answers to each question, compare them with each other, and make one update."""
    answers, losses = [], []
    for i, row in enumerate(questions):
        chat = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for j in range(args.answers):
            key = (args.seed, 0, serial + i, row["id"], j)
            answer = sample(model, prompt, key, tokenizer.eos_token_id, args.max_tokens)
            text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers.append((prompt, answer, reward(text, row["answer"])))
    rewards = torch.tensor([r for _, _, r in answers], dtype=torch.float64).view(-1, args.answers)
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = (centred / (rewards.std(-1, keepdim=True) + 1e-6)).flatten()
    for (prompt, answer, _), advantage in zip(answers, advantages.tolist()):
        logp_T = logprobs(model, prompt, answer)
        ratio_T = (logp_T - logp_T.detach()).exp()  # 1 in value: there is one update per step
        losses.append(-(ratio_T * advantage).mean() / len(answers))
    if bool((advantages == 0).all()):
        return float(rewards.mean())
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(rewards.mean())


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description="GRPO in one file")
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(args.model),
        AutoTokenizer.from_pretrained(args.model),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    lines = Path(args.questions).read_text(encoding="utf-8").splitlines()
    rows = [{"id": i, **json.loads(line)} for i, line in enumerate(lines)]
    rewards = []
    for step in range(args.steps):
        serial = step * args.prompts
        questions = [rows[k % len(rows)] for k in range(serial, serial + args.prompts)]
        rewards.append(grpo_step(model, optimizer, tokenizer, questions, serial, args))
        print(f"step {step}  reward {rewards[-1]:.3f}")
    return model, rewards


if __name__ == "__main__":
    main()
