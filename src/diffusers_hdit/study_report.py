"""The results of a study as a table (Markdown and csv) and a picture. What is not there yet is left out, and counted."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from .checkpoints import write_durably
from .studies import Row, Study


MEASURES = ("held-out loss", "kernel distance", "Fréchet distance")


def value_at(point: dict, measure: str) -> float | None:
    """A measure of a point of a result, None where it was not taken."""
    if measure == "held-out loss":
        return point.get("held_out", {}).get("loss")
    found = [d["value"] for d in point.get("distances", []) if d["name"] == NAMES[measure]]
    return found[0] if found else None


NAMES = {"kernel distance": "kernel_distance", "Fréchet distance": "frechet_distance"}


def final(result: dict, measure: str) -> float | None:
    """At the last point that has it."""
    values = [value_at(point, measure) for point in result["points"]]
    values = [value for value in values if value is not None]
    return values[-1] if values else None


def finals(results: dict[int, dict], measure: str) -> dict[int, float]:
    """{seed: value} of a row."""
    values = {seed: final(result, measure) for seed, result in results.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The sample's standard deviation; None where there are too few."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def differences(row: dict[int, float], first: dict[int, float]) -> list[float]:
    """To the first row, seed by seed: two runs of one seed see the same images and noise in the same order."""
    return [row[seed] - first[seed] for seed in sorted(set(row) & set(first))]


def show(values: Sequence[float], sign: str = "") -> str:
    """Mean ± deviation (how many), to two digits of the deviation."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "-"
    last = math.floor(math.log10(deviation)) - 1 if deviation else math.floor(math.log10(abs(mean) or 1)) - 3
    digits = min(6, max(0, -last))
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread} ({len(values)})"


def table(study: Study, results: dict[str, dict[int, dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for people; `results` is {row: {seed: result}}."""
    header = ["row", "parameters", "MMAC / image", "images", "training FLOPs"]
    for measure in MEASURES:
        header += [measure, "difference"]
    header = header[:-1]  # Fréchet distances of few images are no good to subtract
    with_paper = any(row.paper is not None for row in study.rows)
    lines = []
    for row in study.rows:
        line = [row.name, f"{row.parameters:,}", f"{row.macs / 1e6:.1f}", f"{row.images:,}", f"{row.flops:.3g}"]
        for measure in MEASURES:
            values = finals(results[row.name], measure)
            line.append(show([values[seed] for seed in sorted(values)]))
            if measure != "Fréchet distance":
                first = finals(results[study.rows[0].name], measure)
                line.append("" if row is study.rows[0] else show(differences(values, first), "+"))
        lines.append(line + ([row.paper or ""] if with_paper else []))
    return header + (["paper"] if with_paper else []), lines


def markdown(study: Study, results: dict[str, dict[int, dict]]) -> str:
    header, lines = table(study, results)
    done, wanted = sum(map(len, results.values())), sum(len(row.seeds) for row in study.rows)
    evaluation, data = study.evaluation, study.data
    budget = next(iter(study.budget))
    text = [f"# {study.title}", "", study.question, ""] if study.question else [f"# {study.title}", ""]
    if done < wanted:
        text += [f"**Not finished: {done} of {wanted} runs.**", ""]
    for line in (header, ["---"] * len(header), *lines):
        text.append(f"| {' | '.join(line)} |")
    text += [
        "",
        f"Mean ± standard deviation over seeds (how many). Equal {'images' if budget == 'images' else 'training FLOPs'} "
        f"for all rows. Differences are to the first row, seed by seed. Smaller is better.",
        "",
        f"Held-out loss: soft-min-snr, of EMA weights, on {evaluation['loss_images']} images that were not trained on, "
        f"each at {evaluation['noise_levels']} noise levels, the same noise for every row.",
        "",
        f"Distances: {evaluation['images']} images drawn with {evaluation['num_inference_steps']} steps against "
        f"{reference(data)}, features of {evaluation['feature_network']} at "
        f"{evaluation['network_resolution']} pixels (bicubic, antialiased). They are no FIDs, and the Fréchet distance "
        f"of so few images is much too large: compare it inside this table only.",
    ]
    return "\n".join(text) + "\n"


def reference(data: dict) -> str:
    """What the distances are measured against."""
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
    """A line for each point of each run."""
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
# The picture


def curve(row_results: dict[int, dict], measure: str, against: str) -> tuple[list[float], list[float], list[float]]:
    """Mean over seeds at each point, and the standard deviation (0 of one seed)."""
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
    """Mean over seeds, then a running mean over `window` reports."""
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
    """Noise levels, and the mean over seeds of the held-out error at each, at the end."""
    last = [result["points"][-1]["held_out"] for result in row_results.values()]
    return last[0]["sigma"], [statistics.fmean(values) for values in zip(*(h["error"] for h in last), strict=True)]


def draw(study: Study, results: dict[str, dict[int, dict]], path: Path) -> None:
    """
    Held-out loss and kernel distance against images and against training FLOPs, the training loss, and the held-out error
    by noise level relative to the first row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, StrMethodFormatter

    rows = [row for row in study.rows if results[row.name]]
    colors = {row.name: f"C{i % 10}" for i, row in enumerate(study.rows)}
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for line, measure in enumerate(("held-out loss", "kernel distance")):
        for column, against in enumerate(("images", "flops")):
            axis = axes[line, column]
            for row in rows:
                draw_curve(axis, row, results[row.name], measure, against, colors[row.name])
            unit = "training images" if against == "images" else "training FLOPs (forward and backward)"
            axis.set(xlabel=unit, ylabel=f"{measure}{' (soft-min-snr, EMA)' if line == 0 else ' (EMA)'}")
            # Unbiased kernel distances can be negative.
            axis.set_yscale("log" if line == 0 else "linear")
    for row in rows:
        images, losses = training_curve(results[row.name], window=10)
        axes[0, 2].plot(images[9:], losses[9:], color=colors[row.name], linewidth=1.2)
    axes[0, 2].set(xlabel="training images", ylabel="training loss (own weighting, running mean)")
    axes[0, 2].set_yscale("log")
    if results[study.rows[0].name]:
        _, reference_errors = errors_by_level(results[study.rows[0].name])
        for row in rows:
            sigma, values = errors_by_level(results[row.name])
            ratio = [100 * (a / b - 1) for a, b in zip(values, reference_errors, strict=True)]
            axes[1, 2].plot(sigma, ratio, color=colors[row.name], marker=".", linewidth=1.2)
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
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in axes.flat:
        axis.grid(alpha=0.3, which="both")
    handles = [axes[0, 0].plot([], [], color=colors[row.name], marker="o", label=row.name)[0] for row in rows]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, max(1, len(rows))))
    figure.suptitle(f"{study.title} (bars: standard deviation over seeds)")
    figure.savefig(path, dpi=100)


def draw_curve(axis, row: Row, row_results: dict[int, dict], measure: str, against: str, color: str) -> None:
    places, means, deviations = curve(row_results, measure, against)
    if places:
        axis.errorbar(places, means, yerr=deviations, color=color, marker="o", markersize=4, capsize=3, linewidth=1.2)


def write(study: Study, results: dict[str, dict[int, dict]], output_dir: Path) -> list[Path]:
    """NAME.md, NAME.csv, NAME-points.csv and, if any run is done, NAME.png."""
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [output_dir / f"{study.name}{end}" for end in (".md", ".csv", "-points.csv", ".png")]
    for path, text in zip(
        paths, (markdown(study, results), csv_of_rows(study, results), csv_of_points(study, results)), strict=False
    ):
        write_durably(path, text)
    if not any(results.values()):
        return paths[:3]
    draw(study, results, paths[3])
    return paths
