"""Report the results of a study as tables (Markdown and CSV) and a plot. Runs that are missing are named."""

import csv
import io
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from study import Row, Study

from diffusers_hdit.utils.files import write_atomically


LOG_FROM = 4  # times as many images in one row as in another: a linear axis would squeeze the latter
MEASURES = ("held-out loss", "kernel distance", "Fréchet distance")


def value_at(point: dict, measure: str) -> float | None:
    """Return a measure at a point of a result, None if it was not taken there."""
    if measure == "held-out loss":
        return point.get("held_out", {}).get("loss")
    found = [d["value"] for d in point.get("distances", []) if d["name"] == NAMES[measure]]
    return found[0] if found else None


NAMES = {"kernel distance": "kernel_distance", "Fréchet distance": "frechet_distance"}


def final(result: dict, measure: str) -> float | None:
    """Return a measure at the last point that has it."""
    values = [value_at(point, measure) for point in result["points"]]
    values = [value for value in values if value is not None]
    return values[-1] if values else None


def finals(results: dict[int, dict], measure: str) -> dict[int, float]:
    """Return {seed: final value} of a row."""
    values = {seed: final(result, measure) for seed, result in results.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample's standard deviation; None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def differences(row: dict[int, float], first: dict[int, float]) -> list[float]:
    """Return the differences to the first row, seed by seed: runs of one seed see the same images and noise in the same order."""
    return [row[seed] - first[seed] for seed in sorted(set(row) & set(first))]


def show(values: Sequence[float], sign: str = "") -> str:
    """Return "mean ± deviation (how many)", to two digits of the deviation."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "-"
    last = math.floor(math.log10(deviation)) - 1 if deviation else math.floor(math.log10(abs(mean) or 1)) - 3
    digits = min(6, max(0, -last))
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread} ({len(values)})"


def same_sign(values: Sequence[float]) -> str:
    """Say in how many seeds the difference has its mean's sign: deviations of two or three values say little."""
    if len(values) < 2:
        return ""
    below = statistics.fmean(values) < 0
    agree = sum((value < 0) == below for value in values)
    return f", {'lower' if below else 'higher'} in {agree} of {len(values)}"


def missing(study: Study, results: dict[str, dict[int, dict]], failed: Collection[tuple[str, int]]) -> list[str]:
    """Return a line for the runs that failed and one for the others without a result; `failed` has (identity, seed)."""
    lines = []
    for word, wanted in (("failed", True), ("no result yet", False)):
        named = []
        for row in study.rows:
            seeds = [s for s in row.seeds if s not in results[row.name] and ((row.identity, s) in failed) == wanted]
            if seeds:
                named.append(f"{row.name} seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
        if named:
            lines += [f"{word.capitalize()}: {'; '.join(named)}. The means are without them.", ""]
    return lines


def table(study: Study, results: dict[str, dict[int, dict]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table; `results` is {row: {seed: result}}."""
    header = ["row", "parameters", "MMAC / image", "images", "training FLOPs"]
    for measure in MEASURES:
        header += [measure, "difference"]
    header = header[:-1]  # differences of Fréchet distances of few images mean nothing
    with_paper = any(row.paper is not None for row in study.rows)
    lines = []
    for row in study.rows:
        line = [row.name, f"{row.parameters:,}", f"{row.macs / 1e6:.1f}", f"{row.images:,}", f"{row.flops:.3g}"]
        for measure in MEASURES:
            values = finals(results[row.name], measure)
            line.append(show([values[seed] for seed in sorted(values)]))
            if measure != "Fréchet distance":
                first = finals(results[study.rows[0].name], measure)
                paired = differences(values, first)
                line.append("" if row is study.rows[0] else show(paired, "+") + same_sign(paired))
        lines.append(line + ([row.paper or ""] if with_paper else []))
    return header + (["paper"] if with_paper else []), lines


def markdown(study: Study, results: dict[str, dict[int, dict]], failed: Collection[tuple[str, int]] = ()) -> str:
    header, lines = table(study, results)
    done, wanted = sum(map(len, results.values())), sum(len(row.seeds) for row in study.rows)
    evaluation, data = study.evaluation, study.data
    budget = next(iter(study.budget))
    text = [f"# {study.title}", "", study.question, ""] if study.question else [f"# {study.title}", ""]
    if done < wanted:
        text += [f"**Not finished: {done} of {wanted} runs.**", ""]
        text += missing(study, results, failed)
    for line in (header, ["---"] * len(header), *lines):
        text.append(f"| {' | '.join(line)} |")
    text += [
        "",
        f"Mean ± standard deviation over seeds (how many). Equal {'images' if budget == 'images' else 'training FLOPs'} "
        f"for all rows. Differences are to the first row, seed by seed, and in how many seeds they have that sign. "
        "Smaller is better. The deviation is of the training alone: all runs share the held-out images, the noise of the "
        "loss and of sampling, and the real images, so that what another choice of these would change is not in it. That "
        "of two or three seeds is itself very uncertain.",
        "",
        f"Held-out loss: soft-min-snr, of EMA weights, on {evaluation['loss_images']} images that were not trained on, "
        f"each at {evaluation['noise_levels']} noise levels, the same noise for every row.",
        "",
        f"Distances: {evaluation['images']} images generated with {evaluation['num_inference_steps']} steps against "
        f"{reference(data)}, features of {evaluation['feature_network']} at "
        f"{evaluation['network_resolution']} pixels (bicubic, antialiased). They are no FIDs, and the Fréchet distance "
        f"of so few images is much too large: compare it inside this table only.",
    ]
    return "\n".join(text) + "\n"


def reference(data: dict) -> str:
    """Describe what the distances are measured against."""
    if "folder" in data:
        return f"the images of {data['folder']}"
    return f"{data['held_out_views']} held-out views of the 18 places, {data['resolution']} pixels"


def csv_of_rows(study: Study, results: dict[str, dict[int, dict]]) -> str:
    columns = ["row", "parameters", "macs_per_image", "images", "training_flops", "identity"]
    for measure in MEASURES:
        columns += [f"{measure}{end}" for end in (" mean", " sd", " n", " difference mean", " difference sd")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*columns, "paper"])
    for row in study.rows:
        line = [row.name, row.parameters, row.macs, row.images, row.flops, row.identity]
        for measure in MEASURES:
            values = finals(results[row.name], measure)
            first = finals(results[study.rows[0].name], measure)
            line += [*mean_and_deviation(list(values.values())), len(values)]
            line += mean_and_deviation(differences(values, first))
        writer.writerow(["" if value is None else value for value in [*line, row.paper]])
    return file.getvalue()


def csv_of_points(study: Study, results: dict[str, dict[int, dict]]) -> str:
    """Return a CSV with a line for each point of each run."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "seed", "images", "training_flops", *MEASURES])
    for row in study.rows:
        for seed, result in sorted(results[row.name].items()):
            for point in result["points"]:
                values = [value_at(point, measure) for measure in MEASURES]
                line = [row.name, seed, point["images"], point["flops"], *values]
                writer.writerow(["" if value is None else value for value in line])
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# The plot


def curve(row_results: dict[int, dict], measure: str, against: str) -> tuple[list[float], list[float], list[float]]:
    """Return the places of the points, and mean and standard deviation over seeds at each (0 of one seed)."""
    by_place: dict[float, list[float]] = {}
    for result in row_results.values():
        for point in result["points"]:
            value = value_at(point, measure)
            if value is not None:
                by_place.setdefault(point[against], []).append(value)
    places = sorted(by_place)
    pairs = [mean_and_deviation(by_place[place]) for place in places]
    return places, [mean for mean, _ in pairs], [deviation or 0.0 for _, deviation in pairs]


def training_curve(row_results: dict[int, dict], window: int) -> tuple[list[float], list[float]]:
    """Return numbers of images, and the mean loss over seeds, then over `window` reports."""
    by_images: dict[float, list[float]] = {}
    for result in row_results.values():
        for images, loss in result["training_loss"]:
            if loss is not None:
                by_images.setdefault(images, []).append(loss)
    images = sorted(by_images)
    means = [statistics.fmean(by_images[n]) for n in images]
    smooth = [statistics.fmean(means[max(0, i + 1 - window) : i + 1]) for i in range(len(means))]
    return images, smooth


def errors_by_level(row_results: dict[int, dict]) -> tuple[list[float], list[float]]:
    """Return noise levels, and the mean over seeds of the final held-out error at each."""
    last = [result["points"][-1]["held_out"] for result in row_results.values()]
    return last[0]["sigma"], [statistics.fmean(values) for values in zip(*(h["error"] for h in last), strict=True)]


def errors_against(
    row_results: dict[int, dict], first: dict[int, dict]
) -> tuple[list[float], list[float], list[float]]:
    """Return noise levels, and mean and deviation over common seeds of the error's difference to the first row's, in %."""
    seeds = sorted(set(row_results) & set(first))
    if not seeds:
        return [], [], []
    ratios = []
    for seed in seeds:
        (sigma, values), (_, reference) = (errors_by_level({seed: r[seed]}) for r in (row_results, first))
        ratios.append([100 * (a / b - 1) for a, b in zip(values, reference, strict=True)])
    pairs = [mean_and_deviation(values) for values in zip(*ratios, strict=True)]
    return sigma, [mean for mean, _ in pairs], [deviation or 0.0 for _, deviation in pairs]


def with_common_seeds(results: dict[str, dict[int, dict]]) -> dict[str, dict[int, dict]]:
    """Leave out seeds that some row has no result of, since their curves are not comparable; unless none would be left."""
    common = set.intersection(*(set(found) for found in results.values() if found))
    if not common:
        return results
    return {row: {seed: r for seed, r in found.items() if seed in common} for row, found in results.items()}


def save_plot(study: Study, results: dict[str, dict[int, dict]], path: Path) -> None:
    """
    Plot held-out loss and kernel distance against images and against training FLOPs, the training loss, and the held-out error
    by noise level relative to the first row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    results = with_common_seeds(results)
    rows = [row for row in study.rows if results[row.name]]
    colors = {row.name: f"C{i % 10}" for i, row in enumerate(study.rows)}
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for line, measure in enumerate(("held-out loss", "kernel distance")):
        for column, against in enumerate(("images", "flops")):
            axis = axes[line, column]
            for row in rows:
                plot_curve(axis, row, results[row.name], measure, against, colors[row.name])
            unit = "training images" if against == "images" else "training FLOPs (forward and backward)"
            axis.set(xlabel=unit, ylabel=f"{measure}{' (soft-min-snr, EMA)' if line == 0 else ' (EMA)'}")
            # Unbiased kernel distances can be negative.
            axis.set_yscale("log" if line == 0 else "linear")
    for row in rows:
        images, losses = training_curve(results[row.name], window=10)
        begin = min(9, len(images) // 2)  # a mean of few reports is noisy, but a short training has no others
        marker = "o" if len(images) - begin < 3 else None
        axes[0, 2].plot(images[begin:], losses[begin:], color=colors[row.name], linewidth=1.2, marker=marker)
    axes[0, 2].set(xlabel="training images", ylabel="training loss (own weighting, running mean)")
    axes[0, 2].set_yscale("log")
    if results[study.rows[0].name]:
        for row in rows:
            sigma, ratio, deviations = errors_against(results[row.name], results[study.rows[0].name])
            axes[1, 2].errorbar(sigma, ratio, deviations, color=colors[row.name], marker=".", capsize=2, linewidth=1.2)
    axes[1, 2].set(
        xlabel="noise level sigma",
        ylabel=f"held-out error against {study.rows[0].name} (%)",
        xscale="log",
    )
    for axis in (axes[0, 0], axes[0, 1], axes[0, 2]):
        # Plain numbers: less than a decade has no power of ten to show.
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    for axis in (*axes[:, 0], axes[0, 2]):
        if max(row.images for row in rows) > LOG_FROM * min(row.images for row in rows):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in axes.flat:
        axis.grid(alpha=0.3, which="both")
    handles = [axes[0, 0].plot([], [], color=colors[row.name], marker="o", label=row.name)[0] for row in rows]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, max(1, len(rows))))
    seeds = sorted({seed for row in rows for seed in results[row.name]})
    bars = "bars: standard deviation over seeds" if len(seeds) > 1 else "only seed"
    figure.suptitle(f"{study.title} ({bars} {', '.join(map(str, seeds))})")
    figure.savefig(path, dpi=100)


def plot_curve(axis, row: Row, row_results: dict[int, dict], measure: str, against: str, color: str) -> None:
    places, means, deviations = curve(row_results, measure, against)
    if places:
        axis.errorbar(places, means, yerr=deviations, color=color, marker="o", markersize=4, capsize=3, linewidth=1.2)


def check_matplotlib() -> None:
    """Raise ImportError if matplotlib is not installed, before any work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('this needs matplotlib: pip install "diffusers-hdit[train]"') from error


def write(
    study: Study,
    results: dict[str, dict[int, dict]],
    output_dir: Path,
    failed: Collection[tuple[str, int]] = (),
) -> list[Path]:
    """Write NAME.md, NAME.csv, NAME-points.csv and, if any run is finished, NAME.png; `failed` has (identity, seed)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [output_dir / f"{study.name}{end}" for end in (".md", ".csv", "-points.csv", ".png")]
    for path, text in zip(
        paths,
        (markdown(study, results, failed), csv_of_rows(study, results), csv_of_points(study, results)),
        strict=False,
    ):
        write_atomically(path, text)
    if not any(results.values()):
        return paths[:3]
    save_plot(study, results, paths[3])
    return paths
