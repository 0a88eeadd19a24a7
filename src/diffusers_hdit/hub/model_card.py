"""Model cards: what the configuration says, what the training measured, and whatever somebody wrote by hand.

What is not known is left out. The written part stands between two marks and is renewed by each push; the text
around it, and metadata that is there already, stay as they are.
"""

import functools
import hashlib
import inspect
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import yaml

from ..evaluation.profiler import ModelProfile, profile_network
from ..models.baselines import DiTPixelModel, UNetPixelModel
from ..models.modeling_hdit import DESIGN_CHOICES, HDiTModel
from ..models.networks import network_class


METADATA_FILE = "training_facts.json"
SAMPLES_FILE = "samples.png"  # in the repository

_BEGIN = (
    "<!-- diffusers-hdit {digest}: from here to the next mark, push_to_hub writes. Your own text: above or below. -->"
)
_END = "<!-- diffusers-hdit: end -->"
_SECTION = re.compile(r"<!-- diffusers-hdit ([0-9a-f]{12}): .*? -->\n(.*?)\n" + re.escape(_END), re.DOTALL)
_METADATA = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)

_CITATION = """\
@inproceedings{crowson2024hourglass,
  title     = {Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers},
  author    = {Crowson, Katherine and Baumann, Stefan Andreas and Birch, Alex and Abraham, Tanishq Mathew and
               Kaplan, Daniel Z. and Shippole, Enrico},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.11605}
}"""
_DIT_CITATION = """\
@inproceedings{peebles2023dit,
  title     = {Scalable Diffusion Models with Transformers},
  author    = {Peebles, William and Xie, Saining},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year      = {2023},
  url       = {https://arxiv.org/abs/2212.09748}
}"""
_UNET_CITATION = """\
@inproceedings{ho2020denoising,
  title     = {Denoising Diffusion Probabilistic Models},
  author    = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020},
  url       = {https://arxiv.org/abs/2006.11239}
}"""
# What the card says a network is, its tag, and whom to cite.
_NETWORKS = {
    HDiTModel: ("a Hourglass Diffusion Transformer (HDiT)", "hdit", _CITATION),
    DiTPixelModel: (
        "a plain Diffusion Transformer (DiT), a baseline to compare the Hourglass Diffusion Transformer (HDiT) with, not "
        "an HDiT itself",
        "dit",
        _DIT_CITATION,
    ),
    UNetPixelModel: (
        "a U-Net, a baseline to compare the Hourglass Diffusion Transformer (HDiT) with, not an HDiT itself",
        "unet",
        _UNET_CITATION,
    ),
}


@dataclass
class TrainingMetadata:
    """
    What a training knows of itself. None means not known; the card then says nothing of it.

    Attributes:
        dataset: its name, as the training was told; `dataset_id` if that is an id on the Hub.
        images: number of images in it.
        steps, images_seen, batch_size: of the optimizer, over all devices.
        runs: `{"hardware": str, "seconds": float}` for each uninterrupted part, validation and saving included.
        final_loss, final_loss_steps: mean of the training loss over the last so many steps.
        metrics: `{"name", "value", "feature_network", "images"}` of each distance that was computed.
        samples: `{"file", "images", "steps", "seed"}` of the grid of samples, the file relative to the folder; and
            `"selected": False` if nobody chose among them.
    """

    dataset: str | None = None
    dataset_id: str | None = None
    images: int | None = None
    steps: int | None = None
    images_seen: int | None = None
    batch_size: int | None = None
    noise_density: str | None = None
    loss_weighting: str | None = None
    learning_rate: float | None = None
    label_dropout: float | None = None
    ema_decay: float | None = None
    mixed_precision: str | None = None
    seed: int | None = None
    runs: list | None = None
    final_loss: float | None = None
    final_loss_steps: int | None = None
    metrics: list | None = None
    samples: dict | None = None

    def __post_init__(self):
        for metric in self.metrics or []:
            missing = {"name", "value", "feature_network", "images"} - set(metric)
            if missing:
                raise ValueError(
                    f"the metric {metric} lacks {', '.join(sorted(missing))}. A distance means nothing without the "
                    "network whose features it compares and the number of images."
                )

    def save(self, folder: Path) -> None:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        (Path(folder) / METADATA_FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrainingMetadata | None":
        """
        What `save` wrote into the folder; None if there is nothing.

        Raises:
            ValueError: for a file that holds something else.
        """
        path = Path(folder) / METADATA_FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not readable JSON: {error}") from error
        unknown = set(found) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{str(path)!r} has unknown fields: {', '.join(sorted(unknown))}.")
        return cls(**found)


# ----------------------------------------------------------------------------------------------------------------------
# The written part


def card_section(
    repo_id: str,
    model_config: dict,
    scheduler_config: dict,
    pipeline_config: dict,
    training_metadata: TrainingMetadata | None,
    license: str | None,
) -> str:
    """
    The written part of the card, without its marks.

    Args:
        model_config, scheduler_config, pipeline_config: as in the folder's JSON files.
        training_metadata: of the training; None if nothing is known of it.
        license: of the weights; None if nobody said.
    """
    classes = {int(i): name for i, name in (pipeline_config.get("id2label") or {}).items()}
    parts = [
        introduction(model_config, training_metadata),
        usage(repo_id, classes, pipeline_name(pipeline_config)),
        model_table(model_config, scheduler_config, classes),
        training_table(training_metadata, from_k_diffusion=pipeline_config.get("k_diffusion_config") is not None),
        evaluation(training_metadata),
        limits(model_config, training_metadata),
        licence(license),
        f"## Citation\n\n```bibtex\n{_NETWORKS[network_class(model_config)][2]}\n```",
    ]
    return "\n\n".join(parts)


def introduction(config: dict, training_metadata: TrainingMetadata | None) -> str:
    height, width = pair(config["sample_size"])
    kind = "Class-conditional image generation" if config.get("num_classes") else "Unconditional image generation"
    kind = "Super-resolution" if config.get("conditioning_channels") else kind
    text = (
        f"{kind} at {height}×{width}, directly in pixels, with {_NETWORKS[network_class(config)][0]}, for "
        "[Diffusers](https://huggingface.co/docs/diffusers)."
    )
    if training_metadata is not None and training_metadata.samples:
        samples = training_metadata.samples
        text += f"\n\n![{samples['images']} images generated by this model]({SAMPLES_FILE})\n\n" + (
            f"{samples['images']} images, {samples['steps']} steps, seed {samples['seed']}"
            f"{', not selected' if samples.get('selected') is False else ''}."
        )
    return text


def pipeline_name(pipeline_config: dict) -> str:
    name = pipeline_config.get("_class_name", "HDiTPipeline")
    return name[-1] if isinstance(name, list) else name


# What a pipeline is called with first.
_ARGUMENTS = {
    "HDiTImg2ImgPipeline": "image=image, strength=0.6, ",
    "HDiTInpaintPipeline": "image=image, mask_image=mask, ",
    "HDiTUpscalePipeline": "image=image, ",
}


def usage(repo_id: str, classes: dict[int, str], pipeline: str) -> str:
    label = f"class_labels={json.dumps(next(iter(classes.values())), ensure_ascii=False)}, " if classes else ""
    arguments = f"{_ARGUMENTS.get(pipeline, '')}{label}num_inference_steps=50"
    inputs = ""
    if pipeline in _ARGUMENTS:
        inputs = 'image = Image.open("image.png").convert("RGB")\n'
    if pipeline == "HDiTInpaintPipeline":
        inputs += 'mask = Image.open("mask.png")  # white is generated anew\n'
    # A subclass of somebody's own is loaded with the class that is known.
    pipeline = pipeline if pipeline in _ARGUMENTS else "HDiTPipeline"
    pil = "from PIL import Image\n" if inputs else ""
    return f"""\
## Use

```python
{pil}from diffusers_hdit import {pipeline}  # the package diffusers-hdit

{inputs}pipe = {pipeline}.from_pretrained("{repo_id}")
image = pipe({arguments}).images[0]
```

Without the package, with the code in this repository; read it first, it runs on your machine:

```python
{pil}from diffusers import DiffusionPipeline

{inputs}pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
image = pipe({arguments}).images[0]
```"""


def model_table(config: dict, scheduler_config: dict, classes: dict[int, str]) -> str:
    levels, profile = measure(json.dumps(config, sort_keys=True))
    height, width = pair(config["sample_size"])
    rows = [
        ("network", network_class(config).__name__),
        ("parameters", f"{profile.parameters / 1e6:.1f} M"),
        ("multiply-accumulates", f"{billions(profile.macs)} G for one image and step"),
        ("resolution", f"{height}×{width}, {config['in_channels']} channels"),
        ("sigma", f"{scheduler_config['sigma_min']} to {scheduler_config['sigma_max']}, "
                  f"sigma_data {scheduler_config['sigma_data']}"),
    ]  # fmt: skip
    if config.get("num_classes"):
        names = ", ".join(list(classes.values())[:30]) + (", ..." if len(classes) > 30 else "")
        rows.append(("classes", f"{config['num_classes']}{': ' if names else ''}{names}"))
    if config.get("mapping_cond_dim"):
        rows.append(("vector condition", f"{config['mapping_cond_dim']} numbers"))
    if config.get("conditioning_channels"):
        rows.append(("conditioning image", f"{config['conditioning_channels']} channels"))
    exchanged = [
        f"{name}={config[name]!r}" for name, (paper, *_) in DESIGN_CHOICES.items() if config.get(name, paper) != paper
    ]
    if exchanged:
        rows.append(("not as in the paper", ", ".join(exchanged)))
    lines = ["## Model", "", *table(("", ""), rows), ""]
    if not levels:
        return "\n".join(lines).rstrip()
    what = {
        "neighborhood": "neighborhood {0.kernel_size}×{0.kernel_size}",
        "sliding_window": "sliding window {0.kernel_size}×{0.kernel_size}",
        "shifted_window": "shifted window {0.window_size}×{0.window_size}",
        **{name: name for name in ("global", "axial", "none")},
    }
    rows = [
        (i, what[level.type].format(level), row.name.split()[-1], level.width, level.depth, billions(row.macs))
        for i, (level, row) in enumerate(zip(levels, profile.levels, strict=False))
    ]
    return "\n".join(lines + table(("level", "attention", "tokens", "width", "depth", "GMAC"), rows))


def training_table(training_metadata: TrainingMetadata | None, from_k_diffusion: bool) -> str:
    if training_metadata is None:
        origin = "The weights come from a checkpoint of the reference implementation, k-diffusion. "
        return f"## Training\n\n{origin if from_k_diffusion else ''}How they were trained is not recorded here."
    runs = training_metadata.runs or []
    rows = [
        ("dataset", training_metadata.dataset),
        ("images in it", number(training_metadata.images)),
        ("steps", number(training_metadata.steps)),
        ("images seen", number(training_metadata.images_seen)),
        ("images a step", number(training_metadata.batch_size)),
        ("noise density", training_metadata.noise_density),
        ("loss weighting", training_metadata.loss_weighting),
        ("learning rate", training_metadata.learning_rate),
        ("labels dropped", training_metadata.label_dropout),
        ("decay of the averaged weights", training_metadata.ema_decay),
        ("precision", {"no": "float32"}.get(training_metadata.mixed_precision, training_metadata.mixed_precision)),
        ("seed", training_metadata.seed),
        ("hardware", ", then ".join(dict.fromkeys(run["hardware"] for run in runs)) or None),
        ("time", f"{duration(sum(run['seconds'] for run in runs))}, validation and saving included" if runs else None),
    ]
    if training_metadata.final_loss is not None:
        rows.append(
            (
                "training loss",
                f"{training_metadata.final_loss:.4f}, mean of the last {training_metadata.final_loss_steps} steps",
            )
        )
    known = [(name, value) for name, value in rows if value is not None]
    lines = ["## Training", "", *table(("", ""), known)]
    if training_metadata.ema_decay is not None:
        lines += ["", "The weights are the averaged (EMA) ones."]
    return "\n".join(lines)


def evaluation(training_metadata: TrainingMetadata | None) -> str:
    metrics = training_metadata.metrics if training_metadata is not None else None
    if not metrics:
        return "## Evaluation\n\nNo metric is recorded here."
    rows = [(m["name"], m["value"], m["feature_network"], number(m["images"])) for m in metrics]
    return "\n".join(["## Evaluation", "", *table(("metric", "value", "feature network", "images"), rows)])


def limits(config: dict, training_metadata: TrainingMetadata | None) -> str:
    height, width = pair(config["sample_size"])
    sizes = ": other sizes run, but nothing is recorded here of how they look"
    if network_class(config) is DiTPixelModel:
        sizes = ", and refuses other sizes"
    what = (
        f"those in {training_metadata.dataset}"
        if training_metadata is not None and training_metadata.dataset
        else "those it was trained on"
    )
    return (
        "## Intended use and limits\n\n"
        f"For research and experiments with image generation. It generates images like {what}, with their biases, and "
        f"may repeat some of them; it knows no text. It is made for {height}×{width}{sizes}. There is no filter on what it "
        "generates."
    )


def licence(license: str | None) -> str:
    weights = f"Weights: {license}." if license else "Weights: nobody has stated a licence; ask before you use them."
    return f"## Licence\n\n{weights} The Python files in this repository are from diffusers-hdit: Apache-2.0."


# ----------------------------------------------------------------------------------------------------------------------
# The whole card


def make_card(existing: str | None, repo_id: str, section: str, metadata: dict) -> str:
    """
    A card with the written part renewed and all else kept.

    Args:
        existing: the card that is there, or None.
        section: see `card_section`.
        metadata: see `card_metadata`; what is there already stays, tags and datasets are added, a license is replaced.

    Raises:
        ValueError: if the existing card's metadata is not readable YAML.
    """
    there, body = read_card(existing, repo_id)
    header = {**metadata, **there}
    for name in ("tags", "datasets"):
        values = [there[name]] if isinstance(there.get(name), str) else list(there.get(name) or [])
        values += [value for value in metadata.get(name, []) if value not in values]
        if values:
            header[name] = values
    if "license" in metadata:
        header["license"] = metadata["license"]
    header = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{merge(body, section, title=repo_id.split('/')[-1]).strip()}\n"


def read_card(card: str | None, repo_id: str) -> tuple[dict, str]:
    """Metadata and text of a card; raises as `make_card` says."""
    card = (card or "").replace("\r\n", "\n")
    match = _METADATA.match(card)
    try:
        metadata = (yaml.safe_load(match[1]) if match else None) or {}
        if not isinstance(metadata, dict):
            raise yaml.YAMLError("it is not a mapping")
    except yaml.YAMLError as error:
        raise ValueError(
            f"the metadata of the README.md in {repo_id!r} is not readable YAML: {error}. Repair it there, then push again."
        ) from error
    return metadata, card[match.end() :] if match else card


def card_metadata(
    model_config: dict, training_metadata: TrainingMetadata | None, license: str | None, pipeline: str = "HDiTPipeline"
) -> dict:
    """The YAML header as a dictionary."""
    conditional = bool(model_config.get("num_classes"))
    kind = "class-conditional-image-generation" if conditional else "unconditional-image-generation"
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image" if pipeline in _ARGUMENTS else "unconditional-image-generation",
        "tags": ["diffusers", _NETWORKS[network_class(model_config)][1], kind],
    }
    if license:
        metadata["license"] = license
    if training_metadata is not None and training_metadata.dataset_id:
        metadata["datasets"] = [training_metadata.dataset_id]
    return metadata


def merge(body: str, section: str, title: str) -> str:
    """The body of a card with its written part renewed. Changes that somebody made inside of it move below."""
    digest = hashlib.sha256(section.encode()).hexdigest()[:12]
    written = f"{_BEGIN.format(digest=digest)}\n{section}\n{_END}"
    match = _SECTION.search(body)
    if match is None:
        return f"{body.strip() or f'# {title}'}\n\n{written}"
    if hashlib.sha256(match[2].encode()).hexdigest()[:12] != match[1]:
        written += f"\n\n# As edited before the last push\n\n{match[2].strip()}"
    return body[: match.start()] + written + body[match.end() :]


# ----------------------------------------------------------------------------------------------------------------------
# Parts


@functools.lru_cache(maxsize=4)
def measure(config: str) -> tuple[list, ModelProfile]:
    """Levels (none of a baseline) and costs of a model configuration, given as JSON."""
    config = json.loads(config)
    network = network_class(config)
    known = inspect.signature(network.__init__).parameters
    config = {name: value for name, value in config.items() if name in known}
    with torch.device("meta"):
        levels = getattr(network(**config), "levels", [])
    return levels, profile_network(network, config)


def table(head: tuple, rows: list[tuple]) -> list[str]:
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def billions(value: int) -> str:
    return f"{value / 1e9:.1f}" if value >= 1e10 else f"{value / 1e9:.3g}"


def number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"


def pair(size: int | list) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
