"""The sections of a run. Each docstring under a field is its documentation: `tandem explain`, docs/config.md.

Sizes are said in these words only: prompts_per_step, answers_per_prompt, updates_per_step, tokens_per_forward.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tandem.config.layout import Layout
from tandem.config.section import Section


class NewModel(Section):
    """The shape of a small Qwen2 model with random weights and a byte-level tokenizer, made on the spot."""

    hidden_size: int = Field(128, gt=0, multiple_of=8)
    """Width of the model."""
    layers: int = Field(2, gt=0)
    """Number of transformer layers."""
    heads: int = Field(4, gt=0)
    """Attention heads; must divide `hidden_size`."""
    kv_heads: int = Field(2, gt=0)
    """Key/value heads; must divide `heads`."""
    max_positions: int = Field(1024, gt=0)
    """Longest prompt plus answer, in tokens."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the random weights. Narrow models learn sooner from more than the usual 0.02."""

    @model_validator(mode="after")
    def _divisible(self) -> "NewModel":
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of heads={self.heads}, "
                f"and heads a multiple of kv_heads={self.kv_heads}"
            )
        size = self.hidden_size // self.heads
        if size % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} and heads={self.heads} make heads of size {size}; positions turn the "
                "numbers of a head in pairs, so set an even size"
            )
        return self


class Lora(Section):
    """Low-rank adapters through PEFT; the reference is then the same model with the adapter off."""

    rank: int = Field(16, gt=0)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the adapter adds alpha/rank * B A."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input in updates; answers and log-probabilities are without."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class Model(Section):
    """The policy, and what of it trains."""

    path: str | None = None
    """Folder (or hub name) of a Hugging Face causal language model. Give this or `model.new`."""
    new: NewModel | None = None
    """Make a small random model instead of loading one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights in the forward pass. With bf16 the optimizer keeps fp32 master weights."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along. Only this key allows it; nothing in the folder can."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        if (self.path is None) == (self.new is None):
            raise ValueError("give exactly one of model.path and model.new")
        return self


class Columns(Section):
    """Which column of the data plays which part."""

    question: str = "question"
    """Column with the question: text, or a list of chat messages (role, content)."""
    truth: str | None = "answer"
    """Column with the checkable answer; null where the reward needs none."""
    system: str | None = None
    """Column with a system message for each row."""


class Data(Section):
    """Questions with checkable answers, and how the model reads them."""

    train: str = Field(...)
    """File (jsonl, json, csv, parquet, arrow, txt), folder of such files, hub name, or `tandem:NAME` for a task
    that the project makes itself (`tandem:addition`, `tandem:countdown`)."""
    eval: str | None = None
    """Held-out questions, in the same forms; null for no evaluation."""
    columns: Columns = Columns()
    truth_after: str | None = None
    """Keep only what follows the last occurrence of this text in the truth (GSM8K: `####`)."""
    template: str = "chat"
    """`chat` (the tokenizer's own chat template), the name of a built-in template (`qwen_r1`, `qwen_math_r1`,
    `plain`, ...), or a YAML file with a template of your own."""
    system: str | None = None
    """System message of rows that bring none of their own; null for the template's."""
    max_prompt_tokens: int = Field(512, gt=0)
    """Prompts longer than this are overlong."""
    on_overlong: Literal["error", "skip", "truncate"] = "error"
    """What to do with an overlong prompt; `truncate` keeps its end. The number is reported."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that lacks a column or has the wrong type. The number is reported."""
    shuffle: bool = True
    """New order every epoch, from the run's seed."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many rows of the training data."""


class Warmup(Section):
    """Supervised training before the first step, on demonstrations of a task that the project makes itself."""

    steps: int = Field(400, gt=0)
    """Optimizer updates."""
    batch: int = Field(64, gt=0)
    """Demonstrations per update."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate; linear warm-up over a tenth of the steps, then cosine to a tenth."""
    wrong_share: float = Field(0.6, ge=0, le=1)
    """Share of the demonstrations that follow the task's wrong method."""


class Sampling(Section):
    """How many answers are sampled, and from which distribution."""

    prompts_per_step: int = Field(16, gt=0)
    """Questions in one step."""
    answers_per_prompt: int = Field(8, gt=0)
    """Answers sampled to each question: the group."""
    max_answer_tokens: int = Field(256, gt=0)
    """Longest answer."""
    min_answer_tokens: int = Field(0, ge=0)
    """End tokens are held back until an answer has so many tokens."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits, in the sampler and in the trainer alike; 0 is greedy (evaluation only)."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most probable tokens; 0 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the fewest tokens that hold this much probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divides positive logits of tokens seen so far, multiplies negative ones."""
    stop: list[str] = []
    """An answer ends when one of these texts appears in it."""
    stop_tokens: list[Annotated[int, Field(ge=0)]] = []
    """Further end tokens, beside those of the model's generation config."""
    max_lag: int = Field(0, ge=0)
    """Oldest weights a group may come from, in steps behind the trainer: 0 is on-policy."""
    in_flight: bool = False
    """Answers that are being sampled go on with new weights as soon as there are any, for placement.kind=apart with
    max_lag above 0. Each token then has its own version, and what is sampled depends on the clock."""
    slots: int = Field(256, gt=0)
    """Answers that decode at the same time; more wait their turn."""


class Kl(Section):
    """The pull towards the reference."""

    coef: float = Field(0.0, ge=0)
    """Strength of the pull towards the reference (beta); 0 leaves the reference out altogether."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or subtracted from the reward of each token."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """k1 = logp - ref; k2 = (logp - ref)^2 / 2; k3 = exp(ref - logp) - (ref - logp) - 1; abs = |logp - ref|."""
    target: float | None = Field(None, gt=0)
    """Adapt the coefficient so that the KL per token stays here; null for a fixed coefficient."""
    horizon: int = Field(10000, gt=0)
    """Answers over which the adaptive coefficient reacts."""

    @model_validator(mode="after")
    def _gradient(self) -> "Kl":
        if self.coef and self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator=k1 as a loss has zero expected gradient; use k2 or k3, or kl.place=reward"
            )
        if self.target and not self.coef:
            raise ValueError(
                f"kl.target={self.target:g} steers the coefficient by factors, and kl.coef=0 stays 0; begin with a "
                "coefficient above 0, such as 0.01"
            )
        return self


class Clip(Section):
    """Bounds on the importance ratio."""

    low: float | None = Field(0.2, gt=0, lt=1)
    """Ratio is clipped below at 1 - low; null for no bound."""
    high: float | None = Field(0.2, gt=0)
    """Ratio is clipped above at 1 + high; null for no bound."""
    dual: float | None = Field(None, gt=1)
    """Bound on the ratio where the advantage is negative (dual-clip PPO); null for none."""
    kind: Literal["objective", "weight"] = "objective"
    """`objective`: PPO's minimum of clipped and unclipped. `weight`: the clipped ratio is a constant factor of
    the log-probability's gradient (CISPO)."""

    @model_validator(mode="after")
    def _dual_of_the_objective(self) -> "Clip":
        if self.dual and self.kind == "weight":
            raise ValueError(
                f"clip.dual={self.dual:g} is a bound of clip.kind=objective; with weight leave it null"
            )
        return self


class Algorithm(Section):
    """Five choices (advantage, ratio, clip, weight, KL) make an algorithm; a preset names them."""

    preset: str = "grpo"
    """Which file of `recipes/algorithms` (or path to a YAML file) the other keys start from."""
    advantage: Literal["group", "leave_one_out", "discounted", "gae"] = "group"
    """Baseline: mean of the group; mean of the others in the group; none, with rewards to go; what a critic predicts
    before each token (generalized advantage estimation)."""
    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Advantages are divided by the unbiased standard deviation of the group; or they are made to have mean 0 and
    deviation 1 over all tokens of the step."""
    group_baseline: bool = False
    """With advantage=discounted: subtract the mean reward of the group first."""
    discount: float = Field(1.0, gt=0, le=1)
    """Factor per token for rewards to go, with advantage=discounted or gae (gamma)."""
    gae_lambda: float = Field(1.0, ge=0, le=1)
    """With advantage=gae: 1 counts on the rewards that came, 0 on what the critic predicts after the next token."""
    value_clip: float | None = Field(0.2, gt=0)
    """With advantage=gae: the critic gains nothing from moving a value farther than this from where it was at the start
    of the step; null for no bound."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or the geometric mean over the answer (GSPO)."""
    clip: Clip = Clip()
    weight: Literal["sequence_mean", "token_mean", "sequence_sum", "constant"] = "sequence_mean"
    """How token losses add up: mean within the answer then over answers; mean over all tokens of the update;
    sum within, mean over; sum divided by answers times max_answer_tokens (Dr. GRPO)."""
    kl: Kl = Kl()
    entropy: float = Field(0.0, ge=0)
    """Coefficient of the entropy bonus."""
    keep: Literal["all", "mixed"] = "all"
    """`mixed`: dynamic sampling, groups whose rewards are all equal are replaced by fresh ones; a penalty of length
    (reward.overlong_buffer) makes no difference between them."""
    max_refills: int = Field(4, ge=0)
    """Rounds of fresh groups per step under keep=mixed; then the step goes on with what it has."""
    drop_truncated: bool = False
    """Answers that ran into the length limit are left out of the loss."""
    correction: float | None = Field(2.0, gt=0)
    """Cap of the truncated importance weight between the distribution sampled from and the policy at the start
    of the step; null for no correction. It is 1 where the two are the same."""
    old_logp: Literal["auto", "recompute", "rollout"] = "auto"
    """Where the ratio's denominator comes from. `auto`: left out when one update per step makes the ratio 1,
    recomputed by the trainer otherwise; `rollout`: the sampler's own figures."""

    @model_validator(mode="after")
    def _each_key_matters(self) -> "Algorithm":
        per_token = self.advantage in ("discounted", "gae")
        if per_token and self.scale == "group_std":
            raise ValueError(
                f"algorithm.advantage={self.advantage} knows no group_std; use scale=batch_std or none"
            )
        if not per_token and self.discount != 1.0:
            raise ValueError("algorithm.discount needs advantage=discounted or gae")
        if self.advantage != "discounted" and self.group_baseline:
            raise ValueError("algorithm.group_baseline needs advantage=discounted")
        if self.advantage != "gae" and (self.gae_lambda != 1.0 or self.value_clip != 0.2):
            raise ValueError("algorithm.gae_lambda and algorithm.value_clip need advantage=gae")
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW and its learning rate."""

    lr: float = Field(1e-6, ge=0)
    """Peak learning rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; not applied to norms and biases."""
    clip_grad: float | None = Field(1.0, gt=0)
    """Bound on the gradient's 2-norm over all weights; null for none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_updates: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly to its peak."""
    end_lr: float = Field(0.0, ge=0)
    """Learning rate that linear and cosine end at."""
    offload: bool = False
    """Keep the optimizer's state (and master weights) in host memory."""


class Learner(Section):
    """How a step's answers become updates, and how these fit into memory."""

    updates_per_step: int = Field(1, gt=0)
    """Optimizer updates that a step's answers are cut into."""
    epochs_per_step: int = Field(1, gt=0)
    """Passes over a step's answers."""
    tokens_per_forward: int | None = Field(None, gt=0)
    """Micro-batches hold at most so many tokens, a longer row alone; the result does not depend on it. Null for 1280,
    or for twice the prompt where that is more, so that a long prompt is not computed again for every few of its
    answers. A CPU is fastest with one or two thousand, an accelerator with as many as fit."""
    attention: Literal["padded", "documents"] = "padded"
    """How rows of different lengths attend: side by side, padded, with the kernels of PyTorch; or in one line with
    document masks (FlexAttention), compiled on CUDA. The result is the same."""
    compile: bool = False
    """Compile norms and feed-forward blocks (`torch.compile`) for the update. The first update then takes longer."""
    logits_mb: int = Field(1024, gt=0)
    """Logits of a micro-batch above this size are computed in chunks, and again in the backward pass."""
    keep_mb: int = Field(0, ge=0)
    """MiB for what sampling computed and the first update of a step needs again; the result is the same but for
    rounding. With the embedded engine in one process, in fp32 on a CPU, steps are then faster where products are most
    of them (docs/benchmarks.md has a width of 256), slower with a model as small as the quickstart's. Little of a large
    model fits."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    optimizer: Optimizer = Optimizer()
    layout: Layout = Layout()
    sleep: bool = False
    """With placement.kind=colocated: give the device's memory to the engine while it samples. All models and the
    optimizer state wait in host memory and come back before the update. Where the device is the host they are copied
    all the same, to no use."""
    max_nonfinite: int = Field(3, gt=0)
    """The run stops after so many updates in a row with a loss or gradient that is not finite."""

    def room(self, row: int = 0, prompt: int = 0) -> int:
        """Tokens that a micro-batch may hold whose longest row has `row`, `prompt` of them shared by its answers."""
        return max(row, self.tokens_per_forward or max(1280, 2 * prompt))


class Reference(Section):
    """The model that the KL term pulls to."""

    path: str | None = None
    """Folder of the reference model; null for the policy as it was at the start."""
    refresh_every: int | None = Field(None, gt=0)
    """Copy the policy into the reference every so many steps; null for never."""
    layout: Layout = Layout()

    @model_validator(mode="after")
    def _own_or_moving(self) -> "Reference":
        if self.path and self.refresh_every:
            raise ValueError("reference.path and reference.refresh_every exclude each other")
        return self


class Eval(Section):
    """Accuracy on held-out questions, sampled and greedy."""

    every: int | None = Field(10, gt=0)
    """Steps between evaluations; one more before the first step and after the last. null for none at all."""
    questions: int = Field(200, gt=0)
    """Held-out questions used, from the start of `data.eval`."""
    answers: int = Field(4, gt=0)
    """Answers to each question at `eval.temperature`; accuracy is their mean."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of those answers. A greedy answer is always taken beside them. Neither truncation nor penalty of
    `sampling` applies to either (top_k, top_p, min_p, repetition_penalty)."""
    correct: str | None = None
    """The reward function that says whether an answer is correct (score above 0), or reward.model by its name; null for
    the first function, or the model where there is none. Questions that it does not score (`reward.column`) are not
    in the accuracy."""


class Checkpoint(Section):
    """When the run's state is saved, and how much of it is kept."""

    every: int | None = Field(50, gt=0)
    """Steps between checkpoints; null for only the last. Under Ray one before the first step comes on top."""
    keep: int = Field(2, ge=1)
    """Checkpoints that are kept; older ones go after a newer one was verified."""


class Journal(Section):
    """What a run writes down, and where."""

    sinks: list[Literal["console", "jsonl", "tensorboard", "wandb"]] = ["console", "jsonl"]
    """Where metrics go; `jsonl` (metrics.jsonl) is always written. `wandb` needs the extra of that name, and is offline
    without an account."""
    rollouts: Literal["jsonl", "parquet", "none"] = "jsonl"
    """Format of the rollouts of each step, under `rollouts/`."""
    rollouts_every: int = Field(1, gt=0)
    """Steps between two rollout records."""
    samples: int = Field(3, ge=0)
    """Answers shown on the console before and after the run."""
