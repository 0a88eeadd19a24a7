"""Trains every row of one study or more, evaluates it, and writes tables and plots.

    python examples/research/run_study.py attention positions --output_dir studies --processes 2

STUDY is a name in examples/research/studies or a JSON file (`study.py` says what is in it). Rows that several
studies share are trained once. Interrupted, the same command goes on where it was, and its tables are the same.
Without --train_data_dir the images are views of the panoramas that come with the project.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
from pathlib import Path

import study_report
import torch
from study import Study, check_features, read_study
from study_runs import Run, carry_out, reference_features

from diffusers_hdit.data import load_images
from diffusers_hdit.utils.files import write_atomically


RESEARCH = Path(__file__).resolve().parent
HELD_OUT_SEED = 1  # of the views; the ones trained on have 0


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Everything that can be refused is refused here, before anything is written or trained.
    studies = [read_study(path, data_identity(args), args.seeds) for path in study_paths(args.study)]
    for study in studies:
        check_features(study.evaluation)
    study_report.check_matplotlib()
    check_alike(studies, args)
    runs = list_runs(studies, args)
    print(plan(studies, runs))
    if args.dry_run:
        return
    failed = []
    try:
        if not args.report_only:
            prepare_data(studies[0], args)
            failed = train_all(runs, args.processes, args.max_minutes)
    finally:
        for study in studies:
            for path in study_report.write(
                study, results_of(study, runs), Path(args.output_dir), {(run.row.identity, run.seed) for run in failed}
            ):
                print(f"Wrote {path}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} runs failed: {', '.join(str(run.folder) for run in failed)}; log.txt in each says why. The "
            "tables have the others. The same command tries them again."
        )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", nargs="+", metavar="STUDY", help=f"{', '.join(known_studies())}, or a JSON file")
    add("--output_dir", required=True, help="for tables and plots; runs/ in it has the trainings")
    add("--processes", type=int, default=1, help="rows that are trained at once")
    add("--threads", type=int, help="of a process; default: the cores shared out")
    add("--seeds", type=int, nargs="+", help="in place of those that the studies name")
    add("--train_data_dir", help="folder of images to train on; needs --held_out_dir")
    add("--held_out_dir", help="folder of other images: for the held-out loss, and to measure distances from")
    add("--max_minutes", type=float, help="begin no run after this; the same command goes on with the others")
    add("--dry_run", action="store_true", help="say what would be done, and end")
    add("--report_only", action="store_true", help="train nothing; tables and plots of what is there")
    args = parser.parse_args(argv)
    if args.processes < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--processes and --threads must be at least 1.")
    if (args.train_data_dir is None) != (args.held_out_dir is None):
        parser.error("give --train_data_dir and --held_out_dir, or neither.")
    for folder in (args.train_data_dir, args.held_out_dir):
        if folder is not None and not Path(folder).is_dir():
            parser.error(f"there is no folder {folder!r}.")
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.processes)
    return args


def known_studies() -> list[str]:
    return sorted(path.stem for path in (RESEARCH / "studies").glob("*.json") if path.stem != "base")


def study_paths(names: list[str]) -> list[Path]:
    paths = [Path(name) if name.endswith(".json") else RESEARCH / "studies" / f"{name}.json" for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise ValueError(
                f"there is no study {name!r}; there are {', '.join(known_studies())}, or name a JSON file."
            )
    if len({path.stem for path in paths}) != len(paths):
        raise ValueError(f"two of the studies have one name: {', '.join(names)}.")
    return paths


def data_identity(args: argparse.Namespace) -> str:
    """Of given folders, where they lie and what the files are called; of the views the base says it."""
    if args.train_data_dir is None:
        return ""
    folders = [Path(args.train_data_dir).resolve(), Path(args.held_out_dir).resolve()]
    return repr([(str(f), sorted((p.name, p.stat().st_size) for p in f.rglob("*") if p.is_file())) for f in folders])


def check_alike(studies: list[Study], args: argparse.Namespace) -> None:
    """One folder has one set of images."""
    for study in studies:
        if args.train_data_dir is not None:
            study.data = {"folder": args.held_out_dir}
        if study.data != studies[0].data:
            raise ValueError(
                f"{study.name} and {studies[0].name} have other views: {study.data}, {studies[0].data}. Run them one by "
                "one, each with an --output_dir of its own."
            )


def list_runs(studies: list[Study], args: argparse.Namespace) -> list[Run]:
    """Each once; all rows with their first seed, then with their second, and so on."""
    output_dir = Path(args.output_dir)
    data = output_dir / "data"
    found: dict[Path, tuple[int, Run]] = {}
    for study in studies:
        for row in study.rows:
            for i, seed in enumerate(row.seeds):
                folder = run_folder(output_dir, row, seed)
                run = Run(
                    row,
                    seed,
                    folder,
                    study.evaluation,
                    Path(args.train_data_dir or data / "train"),
                    Path(args.held_out_dir or data / "held_out"),
                    output_dir / "cache",
                    RESEARCH.parent / "train_hdit.py",
                    args.threads,
                )
                found.setdefault(run.result_path, (i, run))
    return [run for _, run in sorted(found.values(), key=lambda pair: pair[0])]


def run_folder(output_dir: Path, row, seed: int) -> Path:
    return output_dir / "runs" / f"{row.identity}-seed{seed}"


def plan(studies: list[Study], runs: list[Run]) -> str:
    done = sum(run.read_result() is not None for run in runs)
    lines = []
    for study in studies:
        lines.append(f"{study.name}: {study.title}; budget {study.budget}")
        for row in study.rows:
            lines.append(
                f"  {row.name:<32} {row.parameters / 1e6:6.2f}M parameters {row.macs / 1e6:8.1f} MMAC {row.images:>9,} "
                f"images {row.flops:9.3g} FLOPs  seeds {' '.join(map(str, row.seeds))}  {row.identity}"
            )
    total = sum(run.row.flops for run in runs)
    return "\n".join([*lines, f"{len(runs)} runs, {done} of them done; {total:.3g} FLOPs of training in all"])


def prepare_data(study: Study, args: argparse.Namespace) -> None:
    """The views, unless images were given; then the features of the held-out ones, once for all processes."""
    output_dir = Path(args.output_dir)
    folders = {"train": ("views", 0), "held_out": ("held_out_views", HELD_OUT_SEED)}
    for name, (number, seed) in folders.items() if args.train_data_dir is None else ():
        settings = {"number": study.data[number], "resolution": study.data["resolution"], "seed": seed}
        done = output_dir / "data" / f"{name}-complete"
        if done.is_file():
            check_views(done, output_dir / "data" / name, settings)
            continue
        command = [sys.executable, RESEARCH / "make_panorama_views.py", "--output_dir", output_dir / "data" / name]
        command += [part for key, value in settings.items() for part in (f"--{key}", value)]
        subprocess.run(list(map(str, command)), check=True)
        write_atomically(done, json.dumps(settings))
    torch.set_num_threads(args.threads)
    for folder in (
        args.train_data_dir or output_dir / "data" / "train",
        args.held_out_dir or output_dir / "data" / "held_out",
    ):
        size = study.rows[0].training["model"]["sample_size"]
        images = load_images(train_data_dir=folder, resolution=size, center_crop=True, cache_dir=output_dir / "cache")
    reference_features(check_features(study.evaluation), images, output_dir / "cache")


def check_views(done: Path, folder: Path, settings: dict) -> None:
    """
    Raises:
        ValueError: for a folder with views of other settings.
    """
    text = done.read_text()
    # Earlier versions wrote nothing into the file.
    found = json.loads(text) if text.strip() else {**settings, "number": len(list(folder.glob("*.png")))}
    if found != settings:
        raise ValueError(f"{folder} has views of other settings, {found}, not {settings}: give another --output_dir.")


def train_all(runs: list[Run], processes: int, max_minutes: float | None = None) -> list[Run]:
    """In processes of their own, which begin as copies of one that has imported everything; returns those that failed."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(
            ["diffusers_hdit.study_runs", "accelerate", "datasets", "diffusers.optimization"]
        )
    waiting = [run for run in runs if run.read_result() is None]
    total, began, finished, failed, active = len(waiting), time.time(), 0, [], {}
    while waiting or active:
        if max_minutes is not None and waiting and time.time() - began > 60 * max_minutes:
            print(f"{max_minutes:g} minutes are over: {len(waiting)} runs were not begun.")
            waiting = []
        while waiting and len(active) < processes:
            run = waiting.pop(0)
            process = context.Process(target=carry_out, args=(run,))
            process.start()
            active[process.sentinel] = (process, run)
        # Nothing is active if the time was over at once.
        for sentinel in multiprocessing.connection.wait(list(active)) if active else ():
            process, run = active.pop(sentinel)
            process.join()
            finished += 1
            if run.read_result() is None:
                failed.append(run)
            minutes = (time.time() - began) / 60
            print(
                f"{finished} of {total}, {minutes:.1f} min: {run.row.name}, seed {run.seed}"
                + (f" FAILED: {run.folder / 'log.txt'}" if run in failed else ""),
                flush=True,
            )
    return failed


def results_of(study: Study, runs: list[Run]) -> dict[str, dict[int, dict]]:
    """{row: {seed: result}} of the runs that are done."""
    by_folder = {run.folder: run for run in runs if run.evaluation == study.evaluation}
    results = {}
    for row in study.rows:
        found = {}
        for seed in row.seeds:
            folder = next(f for f in by_folder if f.name == f"{row.identity}-seed{seed}")
            result = by_folder[folder].read_result()
            if result is not None:
                found[seed] = result
        results[row.name] = found
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here.")
