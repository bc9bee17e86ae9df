"""What the benchmarks' command lines share."""

import argparse

import machine
from shape import QWEN, Shape, small


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--hidden", type=int, default=256, help="width of the model")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--vocab", type=int, default=2048)
    made.add_argument("--shape", choices=sorted(QWEN), help="a Qwen2.5 shape in bf16 instead, weights random")
    made.add_argument("--device", default="cpu", help="cpu, or an accelerator such as cuda")
    made.add_argument("--threads", type=int, default=machine.cores(), help="CPU threads of each contender")
    made.add_argument("--prompts", type=int, default=8, help="prompts at a time")
    made.add_argument("--answers", type=int, default=8, help="answers to each prompt")
    made.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    made.add_argument("--rounds", type=int, default=3, help="processes of each contender, alternating")
    made.add_argument("--repeats", type=int, default=3, help="timed repetitions in each process")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--cases", help="comma-separated; all of them unless given")
    made.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="CONTENDER=PATH",
        help="interpreter of a contender that is installed elsewhere, such as vllm_engine=.venv-vllm/bin/python",
    )
    made.add_argument("--out", help="folder of the results; benchmarks/results unless given")
    return made


def shape(args: argparse.Namespace) -> Shape:
    return QWEN[args.shape] if args.shape else small(args.hidden, args.layers, args.vocab)


def pythons(args: argparse.Namespace) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in args.python)


def chosen(args: argparse.Namespace, cases: list[str]) -> list[str]:
    """The cases to run, in their order."""
    wanted = args.cases.split(",") if args.cases else cases
    unknown = sorted(set(wanted) - set(cases))
    if unknown:
        raise SystemExit(f"--cases {','.join(unknown)}: there are {','.join(cases)}")
    return [case for case in cases if case in wanted]
