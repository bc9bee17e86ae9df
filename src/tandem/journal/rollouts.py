"""Every answer of a step, as one file per step: what was asked, said, sampled and scored."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.config.secret import redact
from tandem.errors import DataError

if TYPE_CHECKING:
    from tandem.types import Group, Rollout

_NAME = re.compile(r"step_(\d+)\.(?:jsonl|parquet)")


def write(
    folder: Path,
    step: int,
    groups: Sequence["Group"],
    form: str,
    advantages: Sequence[float] | None = None,
) -> Path:
    """Writes `step_00000012.jsonl` (or .parquet), whole or not at all; `advantages` has one per answer."""
    rows = records(step, groups, advantages)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.{form}"
    partial = path.with_suffix(f".{form}.tmp")
    WRITERS[form](partial, rows)
    partial.replace(path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The records of one file, in the order of their prompts and samples."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        rows = parquet.read_table(path).to_pylist()
        return [row | {"parts": dict(row["parts"])} for row in rows]
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not a rollout record ({error.msg}); remove the file") from None
    return rows


def rewind(folder: Path, step: int) -> None:
    """Removes the files of later steps, and half-written ones."""
    for path in folder.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if path.suffix == ".tmp" or (match and int(match[1]) > step):
            path.unlink()


def records(
    step: int, groups: Sequence["Group"], advantages: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """One plain mapping per answer. `logp`, `policy_logp` and `versions` go with the sampled tokens, in order."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for sample, rollout in enumerate(group.rollouts):
            head = {"step": step, "prompt_id": group.prompt.id, "sample": sample}
            text = {
                "question": group.prompt.question,
                "prompt": group.prompt.text,
                "answer": rollout.text,
                "truth": group.prompt.truth,
            }
            advantage = None if advantages is None else _finite(advantages[len(rows)])
            rows.append(head | text | _score(rollout) | {"advantage": advantage} | _tokens(rollout))
    assert advantages is None or len(advantages) == len(rows), "one advantage per answer"
    return rows


def _score(rollout: "Rollout") -> dict[str, Any]:
    score = rollout.score
    if score is None:
        return {"reward": None, "failure": None, "detail": "", "parts": {}}
    return {
        "reward": _finite(score.reward),
        "failure": score.failure,
        "detail": redact(score.detail) if score.detail else "",
        "parts": {name: _finite(value) for name, value in score.parts.items()},
    }


def _tokens(rollout: "Rollout") -> dict[str, Any]:
    chosen = [i for i, sampled in enumerate(rollout.sampled) if sampled]
    return {
        "finish": rollout.finish,
        "oldest_version": rollout.oldest_version,
        "newest_version": rollout.newest_version,
        "versions": [rollout.versions[i] for i in chosen],
        "tokens": list(rollout.tokens),
        "sampled": list(rollout.sampled),
        "logp": [_finite(rollout.logp[i]) for i in chosen],
        "policy_logp": [_finite(rollout.policy_logp[i]) for i in chosen],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, allow_nan=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    text, number, tokens = pa.string(), pa.float64(), pa.list_(pa.int64())
    schema = pa.schema(
        [("step", pa.int64()), ("prompt_id", pa.int64()), ("sample", pa.int64())]
        + [(name, text) for name in ("question", "prompt", "answer", "truth")]
        + [("reward", number), ("failure", text), ("detail", text), ("parts", pa.map_(text, number))]
        + [("advantage", number), ("finish", text)]
        + [("oldest_version", pa.int64()), ("newest_version", pa.int64()), ("versions", tokens)]
        + [("tokens", tokens), ("sampled", pa.list_(pa.bool_()))]
        + [("logp", pa.list_(number)), ("policy_logp", pa.list_(number))]
    )
    # A lone surrogate, which a decoder may yield, is not UTF-8 and would end the run here.
    clean = [{k: _encodable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    parquet.write_table(pa.Table.from_pylist(clean, schema=schema), path)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


WRITERS = {"jsonl": _write_jsonl, "parquet": _write_parquet}
