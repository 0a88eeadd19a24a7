"""All measurements of speed, as tables in Markdown and JSON.

    python benchmarks/run.py [--quick] [--device cpu|cuda] [--json FILE] [--only backends,parts,...] [--backend tiled]

    a  backends    neighborhood attention: every backend, dense, and NATTEN itself
    b  parts       a block by its parts, against what the machine copies and multiplies
    c  presets     forward, training step, sampling: images/s, utilisation, memory
    d  resolution  HDiT beside a plain DiT of as many parameters, 64² to 1024² pixels
    e  unet        HDiT beside the U-Net of Diffusers' training example
    f  matmuls     a network beside its matrix products, and beside the reference's way of writing it
       natten      NATTEN's own path at 64×64 tokens
    g  imports     import times
       loading     from_pretrained beside reading the file

Every table says what it measures; benchmarks/README.md says what to install, and how to read them.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import measure
import torch


# This checkout, not a package that happens to be installed.
sys.path.insert(0, str(measure.SOURCE))
from diffusers_hdit.ops.neighborhood_attention import BACKENDS
from diffusers_hdit.utils.memory import keep_freed_memory


# Letter, name, the module and the function that makes the table.
TABLES = [
    ("a", "backends", "backends", "backends_table"),
    ("b", "parts", "parts", "parts_table"),
    ("c", "presets", "networks", "presets_table"),
    ("d", "resolution", "networks", "resolution_table"),
    ("e", "unet", "networks", "unet_table"),
    ("f", "matmuls", "against_matmuls", "matmuls_table"),
    ("f", "natten", "against_matmuls", "natten_table"),
    ("g", "imports", "startup", "imports_table"),
    ("g", "loading", "startup", "loading_table"),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured; written after each table")
    parser.add_argument("--only", type=table_names, metavar="NAMES", help="letters or names, with commas")
    parser.add_argument(
        "--compile",
        choices=["none", "default", "reduce-overhead", "max-autotune"],
        help="mode of torch.compile in presets and matmuls (default on a GPU: default; on a CPU: none)",
    )
    parser.add_argument(
        "--backend", choices=["auto", *BACKENDS], default="auto", help="of neighborhood attention, in b to f"
    )
    parser.add_argument("--threads", type=int, help="of the processor; by default PyTorch's choice")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given, but PyTorch finds no CUDA device. Use --device cpu.")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: the folder of {args.json} does not exist. Make it first.")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}.")
    if args.compile is None:
        args.compile = "default" if args.device == "cuda" and not args.quick else "none"
    return args


def table_names(text: str) -> list[str]:
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    known = {word for letter, name, *_ in TABLES for word in (letter, name)}
    if not wanted or not known.issuperset(wanted):
        allowed = ", ".join(f"{letter} ({name})" for letter, name, *_ in TABLES)
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are {allowed}, by letter or name, with commas between.")
    return wanted


def make_bench(args: argparse.Namespace) -> measure.Bench:
    compile_mode = None if args.compile == "none" else args.compile
    bench = measure.Bench(torch.device(args.device), args.quick, compile_mode, args.backend)
    if args.quick:
        bench.seconds, bench.limit = 0.1, 2.0
    elif args.device == "cuda":
        bench.seconds, bench.limit = 3.0, 5.0
    return bench


def run_tables(args: argparse.Namespace) -> list[measure.Table]:
    bench = make_bench(args)
    header = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {**measure.machine(bench.device), "memory_kept": keep_freed_memory()},
        "versions": measure.versions(),
    }
    print("\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items()), flush=True)
    tables, begin = [], time.perf_counter()
    for letter, name, module, function in TABLES:
        if args.only and not {letter, name} & set(args.only):
            continue
        torch.manual_seed(0)
        table = getattr(__import__(module), function)(bench)
        tables.append(table)
        print(f"\n{table.markdown()}\n\n({time.perf_counter() - begin:.0f} s so far)", flush=True)
        if args.json:
            text = json.dumps({**header, "tables": [table.to_json() for table in tables]}, indent=1)
            args.json.write_text(text + "\n")
    return tables


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # FlexAttention inside of NATTEN, and what compilers say, would come between the tables.
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from diffusers.utils import logging

    logging.set_verbosity_error()
    run_tables(args)


if __name__ == "__main__":
    main()
