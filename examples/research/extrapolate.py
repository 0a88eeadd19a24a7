"""Draws images at sizes that a model was never trained at, and measures how far they are from real ones of each size.

    python examples/research/extrapolate.py rope_model additive_model --resolutions 32,48,64,96,128 --output_dir extrapolation

Each pipeline draws with both treatments of its positions: "fill" (every image's fill [-1, 1]) and "spacing" (they keep the
spacing of the trained size). With --finetune_steps each of them is trained at each new size for so many steps, too.
Writes results.json and results.md, a plot and strips of pictures.

Real images are views of the panoramas that come with the project, cut out at each size, or those of --real_dir, resized.
Distances are comparable at one size only: small images come to the feature network blurred, real ones as well.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from extrapolation import at_size, finetune, finetuning_args, set_treatment, treatments_of
from PIL import Image, ImageDraw
from study_report import check_matplotlib

from diffusers_hdit import HDiTModel, HDiTPipeline
from diffusers_hdit.data import load_images
from diffusers_hdit.evaluation import evaluator as evaluation
from diffusers_hdit.evaluation import metrics
from diffusers_hdit.utils.files import write_atomically


RESEARCH = Path(__file__).resolve().parent
DISTANCES = ("kernel_distance", "frechet_distance")
SHOWN = 8  # pictures in a strip
CELL = 128  # pixels that a picture is shown with, whatever its size


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pipelines = load_pipelines(args)
    extractor = metrics.load_extractor(args.feature_network, args.network_resolution)
    check_matplotlib()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results, pictures = [], {}
    for resolution in args.resolutions:
        real = open_images(args.real_dir, "real", 1, resolution, args)
        features = evaluation.reference_features(extractor, real, args.batch_size, output_dir / "cache")
        if args.real_dir is None:
            others = open_images(None, "others", 2, resolution, args)
            others = evaluation.reference_features(extractor, others, args.batch_size, output_dir / "cache")
        else:
            features, others = features[::2], features[1::2]
        pictures["real", resolution] = evaluation.real_images(real, range(min(SHOWN, len(real))))
        for name, pipeline in pipelines.items():
            for result, images in measure(name, pipeline, resolution, features, others, extractor, args):
                results.append(result)
                pictures[label(result), resolution] = images
                print(line_of(result), flush=True)
        write(results, pictures, args)
    print(f"Wrote results.json, results.md, distances.png and pictures-*.png to {args.output_dir}")


def measure(
    name: str, pipeline: HDiTPipeline, resolution: int, real: torch.Tensor, others: torch.Tensor, extractor, args
) -> Iterator[tuple]:
    """
    Results and the first pictures of all treatments at a size; at the trained one they are the same, and there is
    nothing to fine-tune. `others` are features of more real images: what real ones are apart.
    """
    floor = metrics.frechet_distance(*metrics.mean_and_covariance(others), *metrics.mean_and_covariance(real))
    trained_at = max(pipeline.transformer.sample_size)
    about = {"pipeline": name, "resolution": resolution, "trained_at": trained_at}
    about |= {"num_inference_steps": args.num_inference_steps, "seed": args.seed}
    treatments = treatments_of(pipeline.transformer)
    new = resolution != trained_at
    for treatment in treatments if new else ("fill",):
        set_treatment(pipeline.transformer, treatment)
        for steps in (0, args.finetune_steps) if new and args.finetune_steps else (0,):
            model = finetuned(name, pipeline, resolution, treatment, args) if steps else pipeline
            drawing = evaluation.Drawing(
                model,
                {},
                args.num_images,
                args.batch_size,
                args.num_inference_steps,
                seed=args.seed,
                size=(resolution, resolution),
            )
            drawn, images = evaluation.features_of(drawing, extractor, keep_images=True)
            distances = metrics.evaluate(drawn, real, DISTANCES, extractor)
            distances[1] |= {"floor": floor, "floor_images": len(others)}
            for same in (treatment,) if new else treatments:
                result = {**about, "treatment": same, "finetune_steps": steps, "metrics": distances}
                yield result, images[:SHOWN]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "pipeline",
        nargs="+",
        metavar="PIPELINE",
        help="folder with a saved HDiTPipeline, its name on the Hub, or NAME=either",
    )
    add("--output_dir", default="extrapolation")
    add("--resolutions", default="32,48,64,96,128", help="pixels, with commas")
    add("--real_dir", help="folder of real images, resized to each size; default: held-out views of the panoramas")
    add("--num_images", type=int, default=256, help="drawn at each size, and real views at each size")
    add("--num_inference_steps", type=int, default=32)
    add("--finetune_steps", type=int, default=0, help="also train at each new size for so many steps")
    add("--train_data_dir", help="folder of images to fine-tune with; default: views of the panoramas at each size")
    add("--train_batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=5e-4, help="of the fine-tuning")
    add("--ema_decay", type=float, default=0.99, help="of the fine-tuning")
    add("--feature_network", default="efficientnet-lite0", help="or module:function that returns a network")
    add("--network_resolution", type=int, help="resize images to this for the network; default: the network's own")
    add("--batch_size", type=int, default=32)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        args.resolutions = sorted({int(number) for number in args.resolutions.split(",")})
    except ValueError:
        parser.error(f"--resolutions are whole numbers with commas, such as 32,64; got {args.resolutions!r}.")
    least = {
        "num_images": SHOWN,
        "num_inference_steps": 1,
        "train_batch_size": 1,
        "batch_size": 1,
        "finetune_steps": 0,
    }
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name} must be at least {value}, got {getattr(args, name)}.")
    if args.train_data_dir and not args.finetune_steps:
        parser.error("--train_data_dir does nothing without --finetune_steps.")
    for folder in (args.real_dir, args.train_data_dir):
        if folder is not None and not Path(folder).is_dir():
            parser.error(f"there is no folder {folder!r}.")
    return args


def named(paths: list[str]) -> dict[str, str]:
    """
    {name: path}: of NAME=PATH, or by the names of their folders.

    Raises:
        ValueError: for two of one name.
    """
    pairs = [path.split("=", 1) if "=" in path else (Path(path).resolve().name, path) for path in paths]
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"two pipelines have one name: {', '.join(paths)}. Name them: rope=PATH additive=PATH.")
    return dict(pairs)


def load_pipelines(args: argparse.Namespace) -> dict[str, HDiTPipeline]:
    """
    Raises:
        ValueError: for a size that does not fit a model, and a model with conditions.
    """
    pipelines = {}
    for name, path in named(args.pipeline).items():
        pipeline = HDiTPipeline.from_pretrained(path)
        pipeline.to(PartialState().device)
        if not isinstance(pipeline.transformer, HDiTModel):
            raise ValueError(
                f"{path} has a {type(pipeline.transformer).__name__}; this is about the positions of HDiT."
            )
        config = pipeline.transformer.config
        if config.position_size is not None:
            raise ValueError(
                f"{path} was trained with position_size={config.position_size}; give the model before that."
            )
        if len(set(pipeline.transformer.sample_size)) > 1:
            raise ValueError(f"{path} was trained on images that are not square; --resolutions are of squares.")
        if config.num_classes or config.mapping_cond_dim or config.conditioning_channels:
            raise ValueError(f"{path} has classes or other conditions; this draws from models without.")
        for resolution in args.resolutions:
            pipeline.transformer.check_size(resolution, resolution)
        pipelines[name] = pipeline
    return pipelines


def open_images(folder: str | None, name: str, seed: int, resolution: int, args: argparse.Namespace):
    """The images of a folder, or views of the panoramas, at a size."""
    cache = Path(args.output_dir) / "cache"
    if folder is None:
        folder = Path(args.output_dir) / "views" / f"{name}-{resolution}"
        number = args.num_images if name != "train" else max(2000, args.num_images)
        command = ["--output_dir", folder, "--number", number, "--resolution", resolution, "--seed", seed]
        script = RESEARCH / "make_panorama_views.py"
        subprocess.run(list(map(str, [sys.executable, script, *command])), check=True, stdout=subprocess.DEVNULL)
    return load_images(train_data_dir=folder, resolution=resolution, center_crop=True, cache_dir=cache)


def finetuned(name: str, pipeline: HDiTPipeline, resolution: int, treatment: str, args) -> HDiTPipeline:
    """Trained on at a size; kept in finetuned/, and taken from there if it was trained alike."""
    folder = Path(args.output_dir) / "finetuned" / f"{name}-{treatment}-{resolution}".replace("/", "_")
    source = named(args.pipeline)[name]
    given = {name: getattr(args, name) for name in ("train_batch_size", "learning_rate", "seed")}
    given["ema_decay"] = [args.ema_decay]
    about = {**given, "steps": args.finetune_steps, "from": str(source), "data": args.train_data_dir}
    about["weights"] = weights_digest(pipeline.transformer)
    noted = folder / "finetuning.json"
    if folder.is_dir():
        if not noted.is_file() or json.loads(noted.read_text()) != about:
            raise ValueError(
                f"{folder} was fine-tuned with other settings, or from other weights: delete it, or give another "
                "--output_dir."
            )
        found = HDiTPipeline.from_pretrained(folder)
    else:
        dataset = open_images(args.train_data_dir, "train", 0, resolution, args)
        settings = finetuning_args(source, pipeline.scheduler.config.sigma_data, **given)
        network = at_size(pipeline.transformer, resolution, treatment)
        found = HDiTPipeline(finetune(network, dataset, args.finetune_steps, settings), pipeline.scheduler)
        partial = folder.with_name(f".partial-{folder.name}")
        found.save_pretrained(partial)
        write_atomically(partial / noted.name, json.dumps(about))
        os.replace(partial, folder)
    found.to(pipeline.device)
    return found


def weights_digest(network: HDiTModel) -> str:
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def label(result: dict) -> str:
    words = {"fill": "fills [-1, 1]", "spacing": "trained spacing"}[result["treatment"]]
    tuned = f", {result['finetune_steps']} steps more" if result["finetune_steps"] else ""
    return f"{result['pipeline']}, {words}{tuned}"


def value(result: dict, name: str) -> dict:
    return next(metric for metric in result["metrics"] if metric["name"] == name)


def line_of(result: dict) -> str:
    kernel, frechet = value(result, "kernel_distance"), value(result, "frechet_distance")
    return (
        f"{result['resolution']:>5} px  {label(result):<60} kernel distance {kernel['value']:.4f} ± "
        f"{kernel['standard_error']:.4f}  Fréchet distance {frechet['value']:.4g} (real ones: {frechet['floor']:.4g})"
    )


def write(results: list[dict], pictures: dict, args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    write_atomically(output_dir / "results.json", json.dumps(results, indent=1))
    write_atomically(output_dir / "results.md", table(results, args))
    draw_plot(results, output_dir / "distances.png")
    done = sorted({result["resolution"] for result in results})
    for resolution in done:
        rows = {name: images for (name, size), images in pictures.items() if size == resolution}
        draw_strip(rows, output_dir / f"pictures-{resolution}.png", resolution)


def table(results: list[dict], args: argparse.Namespace) -> str:
    first = results[0]["metrics"][0]
    text = ["| pixels | model | kernel distance | Fréchet distance | other real ones |", "|---|---|---|---|---|"]
    for result in results:
        kernel, frechet = value(result, "kernel_distance"), value(result, "frechet_distance")
        text.append(
            f"| {result['resolution']} | {label(result)} | {kernel['value']:.4f} ± {kernel['standard_error']:.4f} | "
            f"{frechet['value']:.4g} | {frechet['floor']:.4g} |"
        )
    text += [
        "",
        f"{first['images']} images drawn with {args.num_inference_steps} steps against {first['real_images']} real ones of "
        f"the same size, features of {first['feature_network']} at {first['network_resolution']} pixels. ±: standard "
        "error from the choice of drawn images. Compare at one size only. Fréchet distances of few images are much too "
        f"large; the last column is that of {results[0]['metrics'][1]['floor_images']} other real ones against the same "
        "real ones.",
    ]
    return "\n".join(text) + "\n"


def draw_plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys((r["pipeline"], r["treatment"], r["finetune_steps"]) for r in results))
    models = list(dict.fromkeys(r["pipeline"] for r in results))
    sizes = sorted({r["resolution"] for r in results})
    for key in names:
        own = [r for r in results if (r["pipeline"], r["treatment"], r["finetune_steps"]) == key]
        style = {
            "color": f"C{models.index(key[0])}",
            "linestyle": "-" if key[1] == "fill" else "--",
            "marker": "o" if not key[2] else "^",
            "alpha": 1.0 if not key[2] else 0.6,
        }
        x = [r["resolution"] for r in own]
        kernel = [value(r, "kernel_distance") for r in own]
        axes[0].errorbar(
            x,
            [k["value"] for k in kernel],
            [k["standard_error"] for k in kernel],
            capsize=3,
            label=label(own[0]),
            **style,
        )
        axes[1].plot(x, [value(r, "frechet_distance")["value"] for r in own], **style)
    floors = {r["resolution"]: value(r, "frechet_distance")["floor"] for r in results}
    axes[1].plot(sizes, [floors[size] for size in sizes], color="grey", linestyle=":", label="other real images")
    axes[1].legend(fontsize="small")
    for axis, name in zip(axes, ("kernel distance (± standard error)", "Fréchet distance"), strict=True):
        for size in {r["trained_at"] for r in results}:
            axis.axvline(size, color="grey", linewidth=0.8, alpha=0.6)
        axis.set(xlabel="size of the images (pixels); the vertical line: trained at", ylabel=name, xscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Sizes never trained at, each against real images of its size (not comparable between sizes)")
    figure.savefig(path, dpi=100)


def draw_strip(rows: dict[str, torch.Tensor], path: Path, resolution: int) -> None:
    """A row of pictures for each model, the real ones first, magnified without smoothing."""
    cell = max(1, CELL // resolution) * resolution
    text_height = 18
    strip = Image.new("RGB", (SHOWN * (cell + 2), len(rows) * (cell + 2 + text_height)), "white")
    pen = ImageDraw.Draw(strip)
    for i, (name, images) in enumerate(rows.items()):
        top = i * (cell + 2 + text_height)
        pen.text((2, top + 3), f"{name}, {resolution} pixels", fill="black")
        for j, image in enumerate(images):
            pixels = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((cell, cell), Image.Resampling.NEAREST)
            strip.paste(picture, (j * (cell + 2), top + text_height))
    strip.save(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
