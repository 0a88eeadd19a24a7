"""Draws the pictures of docs/sampling.md and measures its tables, with the demo's model or one like it.

    python examples/research/make_gallery.py --pipeline demo/pipeline [--upscale_pipeline DIR] --output_dir docs/images/sampling

Pictures are PNGs; the tables go to tables.md beside them. --only NAME ... draws some of them.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from PIL import Image
from torch import Tensor

from diffusers_hdit import (
    DPMSolverPP3MSDEScheduler,
    EDMHeunScheduler,
    HDiTImg2ImgPipeline,
    HDiTInpaintPipeline,
    HDiTPipeline,
    HDiTUpscalePipeline,
    probability_flow,
    upscaling,
)
from diffusers_hdit.data import load_images
from diffusers_hdit.evaluation.image_grid import image_grid


FACES = Path(__file__).parents[1] / "data" / "fluent_faces_64.png"
STEPS = (10, 20, 50)
CELL = 64
REFERENCE_STEPS = 2000


def samplers(config) -> dict[str, object]:
    """Name -> scheduler with these noise levels."""
    config = {name: config[name] for name in ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")}

    def multistep(**kwargs):
        return EDMDPMSolverMultistepScheduler.from_config(config, **kwargs)

    return {
        "Euler": EDMEulerScheduler.from_config(config),
        "Heun": EDMHeunScheduler.from_config(config),
        "DPM++ 2M": multistep(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"),
        "DPM++ 3M": DPMSolverPP3MSDEScheduler.from_config(config, eta=0.0),
        "DPM++ 2M SDE": multistep(algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint"),
        "DPM++ 3M SDE": DPMSolverPP3MSDEScheduler.from_config(config),
    }


def as_pipeline(cls: type, pipe: HDiTPipeline, **components) -> HDiTPipeline:
    made = cls.from_pipe(pipe, **components)
    made.set_progress_bar_config(disable=True)
    return made


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def labels(pipe: HDiTPipeline, count: int) -> list[int] | None:
    classes = pipe.transformer.config.num_classes
    return None if classes is None else [i * classes // count % classes for i in range(count)]


def real_images(pipe: HDiTPipeline, count: int) -> Tensor:
    """Evenly taken faces, `(count, 3, H, W)` from 0 to 1."""
    size = pipe.transformer.sample_size
    dataset = load_images(train_data_dir=FACES, resolution=size, in_channels=3, center_crop=True)
    # Not the first of each stretch: docs/sampling.md's upscaler was trained without number 5, 15, 25, ...
    return torch.stack([dataset[10 * i + 5]["image"] for i in range(count)]) / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images.clamp(0, 1)]


def save(picture: Image.Image, path: Path) -> None:
    # 256 colours are enough for what is looked at here, and a third of the bytes.
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_samplers(pipe: HDiTPipeline) -> Image.Image:
    faces = 4
    lines = []
    for name, scheduler in samplers(pipe.scheduler.config).items():
        pipe = as_pipeline(HDiTPipeline, pipe, scheduler=scheduler)
        row = []
        for steps in STEPS:
            row += pipe(labels(pipe, faces), num_inference_steps=steps, generator=generators(faces)).images
        lines.append((name, row))
    return image_grid(lines, CELL, [f"{STEPS[i // faces]} steps" if i % faces == 0 else "" for i in range(3 * faces)])


def draw_guidance(pipe: HDiTPipeline) -> Image.Image:
    settings = {
        "1 (none)": {},
        "2": {"guidance_scale": 2.0},
        "4": {"guidance_scale": 4.0},
        "8": {"guidance_scale": 8.0},
        "8, sigma 0.2 to 5": {"guidance_scale": 8.0, "guidance_interval": (0.2, 5.0)},
        "8, rescale 0.7": {"guidance_scale": 8.0, "guidance_rescale": 0.7},
        "8, projected": {"guidance_scale": 8.0, "adaptive_projection": True},
        "8, projected, r = 5": {
            "guidance_scale": 8.0,
            "adaptive_projection": {"norm_threshold": 5.0, "momentum": -0.5},
        },
    }
    lines = []
    for name, arguments in settings.items():
        lines.append((name, pipe(labels(pipe, 9), generator=generators(9), **arguments).images))
    return image_grid(lines, CELL)


def draw_img2img(pipe: HDiTPipeline) -> Image.Image:
    pipe = as_pipeline(HDiTImg2ImgPipeline, pipe)
    strengths = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
    images = real_images(pipe, 5)
    drawn = [pipe(images, strength=s, generator=generators(5)).images for s in strengths]
    lines = [("", [image, *(column[i] for column in drawn)]) for i, image in enumerate(to_pil(images))]
    return image_grid(lines, CELL, ["image", *map(str, strengths)])


def draw_inpainting(pipe: HDiTPipeline) -> Image.Image:
    pipe = as_pipeline(HDiTInpaintPipeline, pipe)
    images = real_images(pipe, 5)
    height, width = images.shape[-2:]
    masks = torch.zeros(5, 1, height, width)
    masks[0, :, height // 2 :] = 1  # below
    masks[1, :, :, : width // 2] = 1  # left
    masks[2, :, : height // 2] = 1  # above
    masks[3, :, height // 4 : -height // 4, width // 4 : -width // 4] = 1  # middle
    masks[4, :, :, width // 2 :] = 1  # right
    hidden = torch.where(masks.bool(), torch.tensor(0.5), images)
    columns = [to_pil(images), to_pil(hidden)]
    for samples, seed in ((1, 0), (1, 1), (10, 0), (10, 1)):
        columns.append(
            pipe(images, masks, jump_length=10, jump_n_sample=samples, generator=generators(5, seed)).images
        )
    lines = [("", [column[i] for column in columns]) for i in range(5)]
    return image_grid(lines, CELL, ["image", "known", "1 run", "", "10 runs", ""])


def draw_upscaling(pipe: HDiTUpscalePipeline) -> Image.Image:
    factor = pipe.config.upscale_factor
    images = real_images(pipe, 6)
    small = upscaling.downscale(2 * images - 1, factor) / 2 + 0.5
    size = images.shape[-1], images.shape[-2]
    columns = [
        [image.resize(size, Image.Resampling.NEAREST) for image in to_pil(small)],
        [image.resize(size, Image.Resampling.BICUBIC) for image in to_pil(small)],
        *(pipe(small, generator=generators(6, seed)).images for seed in range(3)),
        pipe(small, noise_level=0.3, generator=generators(6)).images,
        to_pil(images),
    ]
    lines = [("", [column[i] for column in columns]) for i in range(6)]
    return image_grid(lines, CELL, ["small", "bicubic", "drawn", "again", "again", "noise 0.3", "real"])


def draw_interpolation(pipe: HDiTPipeline) -> Image.Image:
    pipe = as_pipeline(HDiTPipeline, pipe, scheduler=EDMHeunScheduler.from_config(pipe.scheduler.config))
    shape = (1, 3, *pipe.transformer.sample_size)
    weights = torch.linspace(0, 1, 9)
    lines = []
    for row in range(4):
        a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(2 * row + i)) for i in range(2))
        noises = probability_flow.slerp(a.expand(9, -1, -1, -1), b.expand(9, -1, -1, -1), weights)
        label = labels(pipe, 4)
        label = None if label is None else [label[row]] * 9
        lines.append(("", pipe(label, latents=noises, num_inference_steps=25).images))
    return image_grid(lines, CELL)


def draw_sizes(pipe: HDiTPipeline) -> Image.Image:
    height, width = pipe.transformer.sample_size
    pictures = []
    for factors in ((1, 1), (1, 1.5), (1.5, 1), (1.5, 1.5), (1, 2)):
        size = {"height": int(height * factors[0]), "width": int(width * factors[1])}
        pictures.append(pipe(labels(pipe, 4), **size, guidance_scale=2.0, generator=generators(4)).images)
    columns = [max(row[0].width for row in pictures) * 2 + 4] * 4
    sheet = Image.new("RGB", (sum(columns) + 4, sum(2 * row[0].height + 4 for row in pictures) + 4), "white")
    top = 4
    for row in pictures:
        for i, image in enumerate(row):
            enlarged = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (4 + i * columns[0], top))
        top += 2 * row[0].height + 4
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Tables


class OnePath(DPMSolverPP3MSDEScheduler):
    """DPM-Solver++(3M) SDE with the noise of one Brownian path, whatever the number of steps.

    The noise of a step from sigma to sigma_next is sigma_next² (W(1/sigma_next²) - W(1/sigma²)) for a Brownian motion W.
    """

    path: dict[float, Tensor]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, noise=None):
        sigma, following = self.sigmas[self.step_index : self.step_index + 2].tolist()
        if following:
            noise = (self.path[following] - self.path[sigma]) / (following**-2 - sigma**-2) ** 0.5
        return super().step(model_output, timestep, sample, generator, return_dict, noise)

    def prepare(self, step_counts, shape) -> "OnePath":
        levels = set()
        for steps in step_counts:
            self.set_timesteps(steps)
            levels |= set(self.sigmas[:-1].tolist())
        generator, value, earlier = torch.Generator().manual_seed(1), torch.zeros(shape), None
        self.path = {}
        for sigma in sorted(levels, reverse=True):
            if earlier is not None:
                value = value + (sigma**-2 - earlier**-2) ** 0.5 * torch.randn(shape, generator=generator)
            self.path[sigma], earlier = value, sigma
        return self


def sampler_table(pipe: HDiTPipeline, count: int = 8) -> Iterator[str]:
    shape = (count, 3, *pipe.transformer.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    config = pipe.scheduler.config
    found = {name: s for name, s in samplers(config).items() if not name.endswith("SDE")}
    found["DPM++ 3M SDE"] = OnePath.from_config(found["DPM++ 3M"].config, eta=1.0).prepare(
        (*STEPS, 100, REFERENCE_STEPS), shape
    )

    def draw(scheduler, steps: int) -> tuple[Tensor, float]:
        pipe.scheduler = scheduler
        began = time.process_time()
        image = pipe(labels(pipe, count), latents=noise, num_inference_steps=steps, output_type="latent").images
        return image, time.process_time() - began

    ode = draw(found["DPM++ 3M"], REFERENCE_STEPS)[0]
    sde = draw(found["DPM++ 3M SDE"], REFERENCE_STEPS)[0]
    draw(found["Euler"], STEPS[0])  # the first call takes longer
    yield f"| sampler | steps | evaluations | error, grey levels | CPU seconds for {count} images |"
    yield "|---|---|---|---|---|"
    for name, scheduler in found.items():
        for steps in (*STEPS, 100):
            image, seconds = draw(scheduler, steps)
            error = 127.5 * (image - (sde if name.endswith("SDE") else ode)).square().mean().sqrt().item()
            evaluations = 2 * steps - 1 if name == "Heun" else steps
            yield f"| {name} | {steps} | {evaluations} | {error:.2f} | {seconds:.2f} |"


def cache_table(pipe: HDiTPipeline, count: int = 8) -> Iterator[str]:
    pipe.scheduler = DPMSolverPP3MSDEScheduler.from_config(pipe.scheduler.config, eta=0.0)
    blocks = list(pipe.transformer.transformer_blocks)
    runs = [0]
    hooks = [b.attn.to_q.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1)) for b in blocks]

    def draw() -> tuple[Tensor, float]:
        runs[0], began = 0, time.process_time()
        image = pipe(labels(pipe, count), generator=generators(count), output_type="latent").images
        return image, time.process_time() - began

    draw()
    plain, seconds = draw()
    yield f"| cache | attention layers of the middle level run | difference, grey levels | CPU seconds for {count} images |"
    yield "|---|---|---|---|"
    yield f"| none | {runs[0]} | 0 | {seconds:.2f} |"
    configs = [(f"FirstBlockCache, threshold {t}", FirstBlockCacheConfig(threshold=t)) for t in (0.05, 0.1, 0.2)]
    for interval in (2, 3):
        settings = {"cache_interval": interval, "disable_cache_before_step": 5, "taylor_factors_dtype": torch.float32}
        configs.append((f"TaylorSeer, interval {interval}", TaylorSeerCacheConfig(**settings)))
    for name, config in configs:
        pipe.transformer.enable_cache(config)
        image, seconds = draw()
        pipe.transformer.disable_cache()
        difference = 127.5 * (image - plain).square().mean().sqrt().item()
        yield f"| {name} | {runs[0]} | {difference:.2f} | {seconds:.2f} |"
    for hook in hooks:
        hook.remove()


def flow_table(pipe: HDiTPipeline, count: int = 8) -> Iterator[str]:
    low, high = pipe.scheduler.config.sigma_min, pipe.scheduler.config.sigma_max
    images = 2 * real_images(pipe, count) - 1
    denoiser = probability_flow.denoiser_of(pipe)
    yield "| steps | evaluations, there and back | round trip, grey levels | bits per dimension |"
    yield "|---|---|---|---|"
    for steps in (20, 50, 100):
        noise = probability_flow.image_to_noise(denoiser, images, low, high, steps)
        back = probability_flow.noise_to_image(denoiser, noise, low, high, steps)
        error = 127.5 * (back - images).square().mean().sqrt().item()
        generator = torch.Generator().manual_seed(0)
        likelihood = probability_flow.log_likelihood(denoiser, images, low, high, steps, generator=generator)
        bits = probability_flow.bits_per_dimension(likelihood, images.shape[1:]).mean().item()
        yield f"| {steps} | {8 * steps} | {error:.2f} | {bits:.2f} |"


# ----------------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable] = {
    "samplers": draw_samplers,
    "guidance": draw_guidance,
    "img2img": draw_img2img,
    "inpainting": draw_inpainting,
    "interpolation": draw_interpolation,
    "sizes": draw_sizes,
}
TABLES = {"errors": sampler_table, "caches": cache_table, "flow": flow_table}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="what make demo trained: demo/pipeline")
    parser.add_argument("--upscale_pipeline", help="folder of an HDiTUpscalePipeline; without it, no upscaling")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--only", nargs="+", choices=[*PICTURES, "upscaling", *TABLES], help="default: all")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    def wanted(name: str) -> bool:
        return args.only is None or name in args.only

    def fresh() -> HDiTPipeline:
        pipe = HDiTPipeline.from_pretrained(args.pipeline)
        pipe.scheduler = DPMSolverPP3MSDEScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    for name, draw in PICTURES.items():
        if wanted(name):
            save(draw(fresh()), folder / f"{name}.png")
    if args.upscale_pipeline and wanted("upscaling"):
        pipe = HDiTUpscalePipeline.from_pretrained(args.upscale_pipeline)
        pipe.set_progress_bar_config(disable=True)
        save(draw_upscaling(pipe), folder / "upscaling.png")
    lines = []
    for name, table in TABLES.items():
        if wanted(name):
            for line in table(fresh()):
                print(line, flush=True)
                lines.append(line)
            lines.append("")
    if lines:
        (folder / "tables.md").write_text("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
