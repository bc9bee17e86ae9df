"""Every metric a run may log: formula, unit, how to read it. A name that is not here cannot be logged."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    formula: str
    unit: str
    meaning: str


def metric(name: str) -> Metric | None:
    """The table's row for a name; `reward/parts/accuracy` has that of `reward/parts/<function>`."""
    if name in METRICS:
        return METRICS[name]
    return next((METRICS[row] for row, pattern in _PATTERNS.items() if pattern.fullmatch(name)), None)


def repeatable(name: str) -> bool:
    """Whether a repeated run logs the same value; clock and memory differ from run to run."""
    row = metric(name)
    return row is not None and row.unit not in ("s", "tokens/s", "MiB")


def throughput(prompt_tokens: int, answer_tokens: int, seconds: Mapping[str, float]) -> dict[str, float]:
    """Token rates of a step from its counts and its `timing/*` values."""
    rates = {"e2e_tps": ("all", prompt_tokens + answer_tokens)}
    rates |= {
        "update_tps": ("update", prompt_tokens + answer_tokens),
        "rollout_tps": ("rollout", answer_tokens),
    }
    return {
        name: tokens / seconds[f"timing/{stage}"]
        for name, (stage, tokens) in rates.items()
        if seconds.get(f"timing/{stage}", 0) > 0
    }


def document_metrics() -> str:
    """docs/metrics.md, whole."""
    parts = [_INTRODUCTION]
    for title, rows in _SECTIONS.items():
        parts += [f"## {title}\n", "| name | value | unit | meaning |", "|---|---|---|---|"]
        parts += [f"| `{n}` | {_cell(m.formula)} | {m.unit} | {_cell(m.meaning)} |" for n, m in rows.items()]
        parts.append("")
    parts += [_ELSEWHERE, "| here | elsewhere | difference |", "|---|---|---|"]
    parts += [f"| `{here}` | {there} | {difference} |" for here, there, difference in _NAMES_ELSEWHERE]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_INTRODUCTION = """\
# Metrics

Generated from `src/tandem/journal/metrics.py`; a name that is not in these tables cannot be logged.

Each step is one line of `metrics.jsonl` in the run folder, a JSON object with `step` and the metrics that
apply to it; TensorBoard and W&B get the same names. A value that is not finite is written as null and its
name listed under `nonfinite`. "Answers" are all answers of the step, "tokens" the sampled ones unless said
otherwise; answers whose scoring failed are in no reward, advantage or loss figure. Metrics of the update are
means over the updates of the step unless said otherwise. w is the loss weight of a token
(`algorithm.weight`), A the advantage, r the importance ratio exp(logp - old_logp).
"""

_ELSEWHERE = """\
## Names elsewhere

Other systems log the same facts under these names.
"""

_NAMES_ELSEWHERE = (
    (
        "reward/mean",
        "`grpo/score/mean` (MindSpeed-RL), `critic/score/mean` (verl), `reward` (TRL)",
        "always the raw weighted sum; never a value that was normalized within the group",
    ),
    ("reward/max, reward/min", "`grpo/score/max`, `grpo/score/min` (MindSpeed-RL)", "as above"),
    ("reward/parts/<function>", "`<verifier>_rewards/mean` (MindSpeed-RL)", "unweighted"),
    ("advantage/mean", "`grpo/rewards/mean` (MindSpeed-RL)", "near 0 by construction; says little"),
    (
        "actor/pg_loss",
        "`actor/pg_loss` (MindSpeed-RL, verl)",
        "the policy-gradient term alone and signed; MindSpeed-RL logs the absolute value of the whole loss",
    ),
    (
        "actor/ppo_kl",
        "`actor/ppo_kl` (MindSpeed-RL, verl)",
        "the same mean of old - new; it is no true KL and can be negative",
    ),
    ("actor/lr", "`grpo/lr` (MindSpeed-MM)", "none"),
    ("grad_norm", "`actor/grad_norm` (MindSpeed-RL, verl)", "none"),
    ("e2e_tps", "`e2e_tps`, `tokens/p/s` (MindSpeed-RL)", "from sums of real lengths, not from the longest"),
    (
        "rollout_tps",
        "`vllm_tps` (MindSpeed-RL)",
        "generated tokens only; MindSpeed-RL counts the prompt as generated",
    ),
    (
        "timing/<stage>",
        "`timing/<stage>` (MindSpeed-RL)",
        "`timing/reward` and `timing/non_overlap_reward` are its `rule_reward`; the reference comes and goes with the "
        "learner, without an `onload` of its own",
    ),
    ("frac_zero_std", "`frac_reward_zero_std` (TRL)", "none"),
)

_RUN = {
    "step": Metric("passes of the loop so far", "steps", "0 is before the first update"),
    "version": Metric(
        "version of the weights after the step", "versions", "one more with each step, updates or not"
    ),
    "epoch": Metric(
        "questions drawn for this step and those before / questions in the data", "epochs", "fractional"
    ),
}

_REWARD = {
    "reward/mean": Metric("mean of the reward", "reward", "raw weighted sum of the parts; should rise"),
    "reward/std": Metric(
        "unbiased standard deviation of the reward", "reward", "over answers, not within groups"
    ),
    "reward/max": Metric("largest reward", "reward", ""),
    "reward/min": Metric("smallest reward", "reward", ""),
    "reward/parts/<function>": Metric(
        "mean of one reward function, or of the reward model's scores",
        "its own",
        "before its weight, over the answers that it scored; `overlong` is the length penalty",
    ),
    "reward/failures": Metric(
        "answers whose scoring failed", "answers", "not a low reward: no reward at all"
    ),
    "reward/failures/timeout": Metric("failures: over `reward.timeout_s`", "answers", ""),
    "reward/failures/error": Metric("failures: the function raised", "answers", ""),
    "reward/failures/invalid": Metric(
        "failures: not a finite number", "answers", "of a function or the model"
    ),
    "reward/failures/died": Metric("failures: the process died twice", "answers", ""),
    "frac_zero_std": Metric(
        "groups whose rewards are all equal / groups",
        "share",
        "such a group teaches nothing; near 1 means the task is too easy or too hard. With one answer per prompt it "
        "is 1",
    ),
}

_ADVANTAGE = {
    "advantage/mean": Metric("mean of A over tokens", "1", "near 0 by construction for group baselines"),
    "advantage/std": Metric("unbiased standard deviation of A over tokens", "1", ""),
    "advantage/zero_share": Metric(
        "tokens with A = 0 / tokens",
        "share",
        "tokens without a gradient, those of answers left out among them",
    ),
}

_LENGTH = {
    "response_length/mean": Metric("mean answer length, end token included", "tokens", ""),
    "response_length/max": Metric("longest answer", "tokens", ""),
    "response_length/min": Metric("shortest answer", "tokens", ""),
    "prompt_length/mean": Metric("mean prompt length", "tokens", ""),
    "prompt_length/max": Metric("longest prompt", "tokens", ""),
    "prompt_length/min": Metric("shortest prompt", "tokens", ""),
    "truncated_share": Metric(
        "answers cut at `sampling.max_answer_tokens` / answers", "share", "high values hide right answers"
    ),
}

_ROLLOUT = {
    "rollout/logp_gap_mean": Metric(
        "mean of |sampler's logp - trainer's logp|",
        "nat",
        "same weights, same tokens: rounding only; more means that sampler and trainer disagree. With sampling.max_lag "
        "above 0 the policy's own motion too, with model.lora.dropout what it drops. Where an update is given what "
        "sampling computed (learner.keep_mb) only each 20th one shows it",
    ),
    "rollout/logp_gap_max": Metric("largest |sampler's logp - trainer's logp|", "nat", "as above"),
    "rollout/lag_mean": Metric("mean of current version - oldest version in the answer", "versions", ""),
    "rollout/lag_max": Metric("largest current version - oldest version in an answer", "versions", ""),
    "rollout/token_lag_mean": Metric(
        "mean of current version - version that chose a token, over tokens",
        "versions",
        "with sampling.in_flight",
    ),
    "rollout/carried_share": Metric(
        "answers with tokens of more than one version / answers", "share", "with sampling.in_flight"
    ),
    "rollout/refills": Metric("rounds of fresh groups under algorithm.keep=mixed", "rounds", ""),
    "rollout/dropped_groups": Metric("groups left out under algorithm.keep=mixed", "groups", ""),
    "correction/mean": Metric(
        "mean truncated importance weight, min(exp(trainer - sampler), algorithm.correction)",
        "1",
        "1 where the answer was drawn from the policy itself",
    ),
    "correction/capped_share": Metric("tokens whose weight hit the cap / tokens", "share", ""),
}

_UPDATE = {
    "actor/loss": Metric(
        "pg_loss + kl coefficient * kl_loss - entropy coefficient * entropy",
        "loss",
        "what is minimized, signed",
    ),
    "actor/pg_loss": Metric(
        "sum of w * policy-gradient loss",
        "loss",
        "signed; about 0 on-policy with group baselines whatever is learned: no measure of progress",
    ),
    "actor/kl_loss": Metric(
        "sum of w * KL estimate to the reference, without coefficient",
        "nat",
        "0 unless algorithm.kl.place=loss",
    ),
    "actor/entropy": Metric(
        "mean entropy of the next-token distribution over tokens",
        "nat",
        "falls as the policy commits; a fall to 0 ends exploration. As all figures of an update and logp_gap it is of "
        "the answers with a gradient (others are not computed), and absent in a step without any",
    ),
    "actor/pg_clipfrac": Metric(
        "tokens (of whole answers, if the ratio is per sequence) whose clip takes effect / all",
        "share",
        "0 on the first update of an on-policy step",
    ),
    "actor/pg_clipfrac_low": Metric("the part of pg_clipfrac below 1 - algorithm.clip.low", "share", ""),
    "actor/pg_clipfrac_high": Metric("the part of pg_clipfrac above 1 + algorithm.clip.high", "share", ""),
    "actor/ppo_kl": Metric(
        "mean of old_logp - logp over tokens",
        "nat",
        "k1 estimate of how far the policy moved within the step; can be negative",
    ),
    "actor/ratio_mean": Metric("mean of r over tokens", "1", "1 on-policy"),
    "actor/ratio_max": Metric("largest r of the step", "1", ""),
    "actor/lr": Metric("learning rate of the last update", "1", ""),
    "actor/updates": Metric("optimizer updates in the step", "updates", ""),
    "actor/skipped_nonfinite": Metric(
        "updates skipped because loss or gradient was not finite", "updates", "should be 0"
    ),
    "actor/skipped_empty": Metric(
        "updates skipped because no token had a weight and an advantage", "updates", "no signal in the data"
    ),
    "grad_norm": Metric("2-norm of the gradient before clipping", "1", "over all trained weights"),
    "kl/coef": Metric("KL coefficient in use", "1", "moves only with algorithm.kl.target"),
    "kl/reference": Metric(
        "mean of the KL estimate to the reference over tokens",
        "nat",
        "what algorithm.kl.target is held against",
    ),
}

_CRITIC = {
    "critic/value_loss": Metric(
        "sum of w * max((V - R)^2, (clipped V - R)^2) / 2", "reward^2", "only with algorithm.advantage=gae"
    ),
    "critic/value_clipfrac": Metric("tokens where algorithm.value_clip binds / tokens", "share", ""),
    "critic/explained_variance": Metric(
        "1 - Var(R - V) / Var(R) over tokens, before the update",
        "1",
        "1 is a perfect prediction, 0 none, below 0 worse than none; should rise. 0 if all R are equal",
    ),
    "critic/values/mean": Metric("mean of V over tokens", "reward", "before the update"),
    "critic/values/max": Metric("largest V", "reward", ""),
    "critic/values/min": Metric("smallest V", "reward", ""),
    "critic/returns/mean": Metric("mean of R = V + A over tokens", "reward", "A before it is scaled"),
    "critic/returns/max": Metric("largest R", "reward", ""),
    "critic/returns/min": Metric("smallest R", "reward", ""),
    "critic/grad_norm": Metric("2-norm of the critic's gradient before clipping", "1", ""),
    "critic/lr": Metric("learning rate of the critic's last update", "1", ""),
    "critic/updates": Metric("the critic's optimizer updates in the step", "updates", ""),
    "critic/skipped_nonfinite": Metric(
        "updates skipped because loss or gradient was not finite", "updates", "should be 0"
    ),
    "critic/skipped_empty": Metric("updates skipped because no token is trained", "updates", ""),
}

_TIME = {
    "timing/all": Metric("the whole step", "s", "evaluation and saving are not in it"),
    "timing/rollout": Metric("sampling the answers", "s", ""),
    "timing/non_overlap_rollout": Metric(
        "waiting for answers, with nothing to train on",
        "s",
        "what sampling beside training does not hide; in one process all of it. With Ray timing/rollout runs on its "
        "own clock",
    ),
    "timing/reward": Metric("reward functions", "s", "most of it while others are still being sampled"),
    "timing/non_overlap_reward": Metric(
        "waiting for reward functions after the last answer, and after the reward model",
        "s",
        "what of timing/reward sampling does not hide",
    ),
    "timing/reward_model": Metric("scores of the reward model", "s", "absent without one"),
    "timing/non_overlap_reward_model": Metric(
        "waiting for the reward model after the last answer",
        "s",
        "what sampling does not hide: with placement.kind=apart it works on groups as their answers are complete; "
        "elsewhere all of it",
    ),
    "timing/old_log_p": Metric(
        "log-probabilities before the update", "s", "about 0 where they are not needed"
    ),
    "timing/reference_model": Metric("log-probabilities of the reference", "s", "about 0 without one"),
    "timing/non_overlap_reference_model": Metric(
        "waiting for the reference after the last answer",
        "s",
        "what sampling does not hide: with placement.kind=apart, sampling.max_lag=0 and algorithm.keep=all the "
        "reference works on groups as their answers are complete; elsewhere all of it",
    ),
    "timing/critic_model": Metric("values of the critic", "s", "about 0 without one"),
    "timing/non_overlap_critic_model": Metric(
        "waiting for the critic after the last answer", "s", "as timing/non_overlap_reference_model"
    ),
    "timing/adv": Metric("advantages and weights", "s", ""),
    "timing/non_overlap_adv": Metric("the same", "s", "nothing hides it"),
    "timing/update": Metric("all updates of the policy in the step", "s", ""),
    "timing/update_critic": Metric("all updates of the critic in the step", "s", "about 0 without one"),
    "timing/resharding_to_infer": Metric(
        "gathering the weights and the engines' taking them, proof included",
        "s",
        "absent where sampler and trainer have the same weights",
    ),
    "timing/resharding_to_train": Metric(
        "engines going to sleep and learners waking",
        "s",
        "with Ray only; 0 where they share no device. Learners going to sleep is in timing/rollout",
    ),
    "timing/eval": Metric("evaluation", "s", ""),
    "timing/save": Metric("checkpoint", "s", ""),
    "e2e_tps": Metric("(prompt + answer tokens) / timing/all", "tokens/s", "of the whole run"),
    "update_tps": Metric("(prompt + answer tokens) / timing/update", "tokens/s", "of the whole run"),
    "rollout_tps": Metric(
        "answer tokens / timing/rollout", "tokens/s", "generated tokens only, of the whole run"
    ),
    "memory/rss_mb": Metric("resident memory of the process", "MiB", "workers not included"),
    "memory/device_mb": Metric("peak of tensors on the accelerator", "MiB", "0 on the CPU"),
}

_EVAL = {
    "eval/accuracy": Metric(
        "mean correctness of sampled answers",
        "share",
        "over eval.questions x eval.answers at eval.temperature, without questions that eval.correct does not score; "
        "should rise",
    ),
    "eval/greedy_accuracy": Metric("mean correctness of one greedy answer per question", "share", ""),
    "eval/reward": Metric("mean reward of the sampled answers", "reward", ""),
    "eval/response_length": Metric("mean length of the sampled answers", "tokens", ""),
    "eval/truncated_share": Metric("sampled answers that were cut / all", "share", ""),
}

_WARMUP = {
    "warmup/update": Metric("supervised updates so far", "updates", "the axis of the other two"),
    "warmup/loss": Metric("mean cross-entropy over answer tokens", "nat", "should fall"),
    "warmup/lr": Metric("learning rate", "1", ""),
}

_SECTIONS = {
    "Run": _RUN,
    "Reward": _REWARD,
    "Advantage": _ADVANTAGE,
    "Length": _LENGTH,
    "Rollout": _ROLLOUT,
    "Update": _UPDATE,
    "Critic": _CRITIC,
    "Time and memory": _TIME,
    "Evaluation": _EVAL,
    "Warm-up": _WARMUP,
}

METRICS: dict[str, Metric] = {name: row for rows in _SECTIONS.values() for name, row in rows.items()}
_PATTERNS = {name: re.compile(re.sub(r"<\w+>", ".+", name)) for name in METRICS if "<" in name}
