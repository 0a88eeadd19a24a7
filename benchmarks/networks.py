"""Whole networks: the presets, and HDiT beside Diffusers' DiT and U-Net of as many parameters."""

import itertools
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, EDMDPMSolverMultistepScheduler, UNet2DModel
from measure import Bench, Samples, Table, free_memory, matmul_rate, parameters_of
from torch import Tensor, nn

from diffusers_hdit import HDiTModel, HDiTPipeline, diffusion, presets
from diffusers_hdit.evaluation.profiler import profile_model
from diffusers_hdit.training.ema import EMAWeights
from diffusers_hdit.training.optimization import clipped_step, make_optimizer


# bfloat16 with float32 sums, without sparsity, by the makers' data sheets, operations a second.
NAMED_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# Images at once: (CPU, GPU).
BATCHES = {
    "tiny": (16, 512), "oxford-flowers-256": (4, 64), "imagenet-128": (2, 128), "imagenet-256": (1, 64),
    "ffhq-1024": (1, 16),
}  # fmt: skip
STEPS = 50


# ----------------------------------------------------------------------------------------------------------------------
# What is called


def images(bench: Bench, batch: int, size: int) -> Iterable[Tensor]:
    make = lambda: torch.randn(batch, 3, size, size, device=bench.device)  # noqa: E731
    return bench.rotating(make, 12 * batch * size**2)


def forward_call(bench: Bench, network, batch: int, size: int) -> Callable[[], object]:
    """Forward without gradients, in the precision that networks sample in on this device."""
    samples, cast = images(bench, batch, size), bench.dtype

    @torch.no_grad()
    def call():
        return network(next(samples).to(cast))

    return call


def gradient_call(bench: Bench, network, parameters: list, batch: int, size: int) -> Callable[[], object]:
    """Forward and backward of the squared output, autocast to bfloat16 on a GPU."""
    samples = images(bench, batch, size)

    def call():
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
            output = network(next(samples))
        torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)

    return call


def training_call(bench: Bench, model: nn.Module, network, batch: int, size: int, classes: int | None = None):
    """
    What an optimizer step of the training example computes: loss, gradients, clipping, AdamW, average.

    Args:
        model: what holds the weights.
        network: the model itself, or that model compiled.
    """
    args = SimpleNamespace(
        learning_rate=1e-5, adam_weight_decay=0.01, mapping_lr_scale=1 / 3, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, use_8bit_adam=False,
    )  # fmt: skip
    if isinstance(model, HDiTModel):
        optimizer = make_optimizer(model, args, bench.device)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True)
    averages, accelerator = EMAWeights(model), Accelerator(cpu=bench.device.type == "cpu")
    samples, noises = images(bench, batch, size), images(bench, batch, size)
    sigma = diffusion.sigma_from_uniform(diffusion.stratified_uniform(batch), image_size=size).float()
    sigma = sigma.to(bench.device)
    conditions = {"class_labels": torch.randint(classes, (batch,), device=bench.device)} if classes else {}

    def call():
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
            loss = diffusion.loss(network, next(samples), next(noises), sigma, **conditions).mean()
        loss.backward()
        clipped_step(accelerator, model, optimizer, loss.detach(), 1.0)
        optimizer.zero_grad(set_to_none=True)
        averages.step()

    return call


def sampling_call(bench: Bench, model: HDiTModel, batch: int) -> Callable[[], object]:
    pipe = HDiTPipeline(model, EDMDPMSolverMultistepScheduler(sigma_min=0.01, sigma_max=160.0))
    pipe.set_progress_bar_config(disable=True)
    seeds = itertools.count()

    def call(steps: int = STEPS):
        generator = torch.Generator(bench.device).manual_seed(next(seeds))
        return pipe(num_images_per_prompt=batch, num_inference_steps=steps, generator=generator, output_type="latent")

    call(2)  # what is long is measured once: it must be warm, and compiled
    return call


def hdit_of_image(model) -> Callable[[Tensor], Tensor]:
    return lambda sample: model(sample, 0.3, return_dict=False)[0]


def dit_of_image(model) -> Callable[[Tensor], Tensor]:
    def run(sample: Tensor) -> Tensor:
        steps = torch.full((len(sample),), 300, device=sample.device)
        return model(sample, steps, torch.zeros_like(steps), return_dict=False)[0]

    return run


def unet_of_image(model) -> Callable[[Tensor], Tensor]:
    return lambda sample: model(sample, 300, return_dict=False)[0]


# ----------------------------------------------------------------------------------------------------------------------
# (c) presets


def presets_table(bench: Bench) -> Table:
    names = ["tiny"] if bench.quick else presets.names()
    rate = matmul_rate(bench, bench.dtype)
    name_of_gpu = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    named = next((peak for name, peak in NAMED_PEAKS.items() if name in name_of_gpu), None)
    table = Table(
        "presets",
        f"The presets, forward and sampling in {bench.dtype}",
        [
            "preset",
            "what",
            "batch",
            "ms",
            "images/s",
            "utilisation",
            "of the named peak",
            "peak memory, GiB",
            "an image, GiB",
        ],
        notes=[
            "Training is loss, gradients, clipping, AdamW and a moving average on images that are on the device"
            + (", autocast to bfloat16. " if bench.device.type == "cuda" else ", float32. ")
            + f"Sampling is {STEPS} steps of DPM-Solver++ (2M). Utilisation: multiply-accumulates of the network (of the "
            "keys that a query sees), 2 operations each, 3 times as many in training, over the rate of a large matrix "
            f"product measured in this run, {rate / 1e12:.2f} TFLOP/s"
            + (f"; named peak {named / 1e12:.0f} TFLOP/s." if named else ".")
            + (
                " Memory is not measured on a CPU."
                if bench.device.type == "cpu"
                else " Memory of an image: what a call takes at its peak beyond what stays, gradients among it, over the "
                "batch."
            )
        ],
    )
    for name in names:
        config = presets.load(name)["model"]
        batch = 2 if bench.quick else BATCHES[name][bench.device.type == "cuda"]
        profile = profile_model(config)
        flops, parameters = 2 * profile.macs * batch, profile.parameters
        guess = 0.0
        for what, factor, make in preset_calls(bench, name, config, batch):
            why, predicted = None, guess * {1: 0, 3: 4, STEPS: STEPS}[factor]
            if predicted > bench.limit * (15 if factor == STEPS else 2):
                why = f"not run: about {predicted:.0f} s"
            elif factor == 3 and 16 * parameters > free_memory(bench.device) / 2:
                why = "not run: too little memory"
            else:
                bench.forget()
                try:
                    call = make()
                    seconds = preset_times(bench, call, factor)
                except torch.OutOfMemoryError:
                    why = "out of memory"
            if why:
                table.add(name, what, batch, why, *[None] * 5)
                continue
            guess = guess or seconds.median
            done = flops * factor / seconds.median
            table.add(
                name, what, batch, seconds, batch / seconds.median, f"{done / rate:.0%}",
                f"{done / named:.0%}" if named else None, *memory_cells(bench, batch),
            )  # fmt: skip
            del call
    return table


def memory_cells(bench: Bench, batch: int) -> tuple[float | None, float | None]:
    """GiB at the peak since `forget`, and how much of it comes and goes with a call, for each image."""
    if bench.device.type != "cuda":
        return None, None
    peak, kept = torch.cuda.max_memory_allocated(bench.device), torch.cuda.memory_allocated(bench.device)
    return (peak - bench.own_bytes) / 2**30, (peak - kept) / batch / 2**30


def preset_times(bench: Bench, call, factor: int) -> Samples:
    """A whole sampling is long enough to be measured once or twice."""
    if factor < STEPS:
        return bench.turns({"": call}, bench.seconds / 2)[""]
    first = bench.time(call)
    rounds = min(3, int(bench.seconds / first))
    return Samples([bench.time(call) for _ in range(rounds)] or [first])


def preset_calls(bench: Bench, name: str, config: dict, batch: int):
    """(what, forward passes that it counts for, function that makes the call) of a preset."""

    def model(dtype: torch.dtype) -> HDiTModel:
        torch.manual_seed(0)
        return bench.ready(HDiTModel(**config), dtype)

    def forward(compiled: bool):
        network = model(bench.dtype).eval()
        network = torch.compile(network, mode=bench.compile_mode) if compiled else network
        return forward_call(bench, hdit_of_image(network), batch, config["sample_size"])

    def training(compiled: bool, levels=()):
        network = model(torch.float32).train()
        network.set_gradient_checkpointing_levels(levels)
        run = torch.compile(network, mode=bench.compile_mode) if compiled else network
        return training_call(bench, network, run, batch, config["sample_size"], config.get("num_classes"))

    def sampling(compiled: bool):
        network = model(bench.dtype).eval()
        if compiled:
            network.compile(mode=bench.compile_mode)
        return sampling_call(bench, network, batch)

    yield "forward", 1, lambda: forward(False)
    yield "training step", 3, lambda: training(False)
    yield f"{STEPS} steps", STEPS, lambda: sampling(False)
    if bench.compile_mode:
        yield "forward, compiled", 1, lambda: forward(True)
        yield "training step, compiled", 3, lambda: training(True)
        yield f"{STEPS} steps, compiled", STEPS, lambda: sampling(True)
    if name == "ffhq-1024":
        yield "training step, levels 0 and 1 checkpointed", 3, lambda: training(False, (0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# (d) resolution, (e) U-Net


def nearest(wanted: int, build: Callable[..., nn.Module], choices: Iterable) -> object:
    """The choice whose network has the number of parameters nearest to the wanted one; without allocating any."""

    def difference(choice) -> int:
        with torch.device("meta"):
            return abs(parameters_of(build(choice)) - wanted)

    return min(choices, key=difference)


def hourglass(size: int, base: int) -> dict:
    """As in the paper, a level more for twice the resolution: 16×16 tokens in the middle, patch 4."""
    outer = max(0, size.bit_length() - (64).bit_length())
    widths = [max(base, 4 * base >> (outer - i)) for i in range(outer)]
    return {"sample_size": size, "patch_size": 4, "widths": [*widths, 4 * base], "depths": [2] * outer + [8]}


def resolution_table(bench: Bench) -> Table:
    base = 16 if bench.quick else 128
    heads = {"attention_head_dim": 16} if bench.quick else {}
    sizes = (64, 128) if bench.quick else (64, 128, 256, 512, 1024)
    batch = 1 if bench.device.type == "cpu" else 4
    table = Table(
        "resolution",
        f"From {sizes[0]}² to {sizes[-1]}² pixels at patch 4, batch {batch}, {bench.dtype}",
        ["pixels", "network", "parameters, M", "forward, ms", "over HDiT", "forward + backward, ms", "over HDiT"],
        notes=[
            "HDiT has a level more for twice the resolution and always 16×16 tokens in the middle; DiT is "
            "DiTTransformer2DModel of Diffusers at patch 4, of the width and depth that come nearest in parameters. "
            f"A call that would take more than {bench.limit:g} s by the size before, or did, is left out."
        ],
    )
    last: dict[tuple[str, bool], float] = {}
    for size in sizes:
        models = {"HDiT": HDiTModel(**hourglass(size, base), mapping_width=2 * base, **heads)}
        wanted, dim = parameters_of(models["HDiT"]), heads.get("attention_head_dim", 64)

        # Its table of positions is no parameter, and slow to make for large images.
        def dit(choice, size=64, dim=dim):
            count, layers = choice
            return DiTTransformer2DModel(
                num_attention_heads=count, attention_head_dim=dim, in_channels=3, num_layers=layers, sample_size=size,
                patch_size=4, num_embeds_ada_norm=1,
            )  # fmt: skip

        choice = nearest(wanted, dit, itertools.product(range(2, 13), range(6, 17, 2)))
        models[f"DiT, {choice[0] * dim} wide, {choice[1]} blocks"] = dit(choice, size)
        compare(bench, table, f"{size}²", models, batch, size, last)
        bench.forget()
    return table


def unet_table(bench: Bench) -> Table:
    channels = (32, 32, 64, 64) if bench.quick else (128, 128, 256, 256, 512, 512)
    inner = len(channels) - 3
    batch = 2 if bench.device.type == "cpu" else 16
    table = Table(
        "unet",
        f"Beside UNet2DModel as train_unconditional.py of Diffusers makes it, batch {batch}, {bench.dtype}",
        ["pixels", "network", "parameters, M", "forward, ms", "over HDiT", "forward + backward, ms", "over HDiT"],
        notes=["The U-Net's channels are smaller in a quick run."] if bench.quick else [],
    )
    for size, patch, levels in ((64, 2, 2),) if bench.quick else ((64, 2, 2), (64, 4, 1), (256, 4, 3)):
        unet = UNet2DModel(
            sample_size=size, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=channels,
            down_block_types=["DownBlock2D"] * (inner + 1) + ["AttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * (inner + 1),
        )  # fmt: skip
        width = 64 if bench.quick else 768

        def hdit(depth, size=size, patch=patch, levels=levels, width=width):
            widths = [max(64, width >> (levels - 1 - i)) for i in range(levels)]
            return HDiTModel(
                sample_size=size, patch_size=patch, widths=widths, depths=[2] * (levels - 1) + [depth]
            )  # fmt: skip

        depth = nearest(parameters_of(unet), hdit, range(1, 33))
        models = {f"HDiT, patch {patch}": hdit(depth), "UNet2DModel": unet}
        compare(bench, table, f"{size}²", models, batch, size, {})
        bench.forget()
    return table


def compare(bench: Bench, table: Table, label: str, models: dict[str, nn.Module], batch: int, size: int, last: dict):
    """Adds a row a network to the table; the first network is the one that the others are compared with.

    `last` holds the seconds of the size before, half as long a side, and is brought up to date.
    """
    results: dict[str, dict[bool, object]] = {name: {} for name in models}
    wrappers = {
        HDiTModel: (hdit_of_image, 4),
        DiTTransformer2DModel: (dit_of_image, 16),
        UNet2DModel: (unet_of_image, 4),
    }
    for train in (False, True):
        calls = {}
        for name, model in models.items():
            wrap, growth = wrappers[type(model)]
            predicted = last.get((type(model), train), 0.0) * growth
            if predicted > 3 * bench.limit:
                results[name][train] = "not run" if predicted == math.inf else f"not run: up to {predicted:.0f} s"
                last[type(model), train] = predicted
                continue
            model = bench.ready(model, torch.float32 if train else bench.dtype).train(train)
            make = gradient_call if train else forward_call
            arguments = [list(model.parameters())] if train else []
            call = make(bench, wrap(model), *arguments, batch, size)
            try:
                last[type(model), train] = bench.once(call)
            except torch.OutOfMemoryError:
                last[type(model), train], results[name][train] = math.inf, "out of memory"
                continue
            if last[type(model), train] > bench.limit:
                results[name][train] = f"{last[type(model), train]:.1f} s, one cold call"
            else:
                calls[name] = call
        for name, times in bench.turns(calls).items():
            results[name][train] = times
    first = next(iter(models))
    for name, model in models.items():
        cells = []
        for train in (False, True):
            own, other = results[name][train], results[first][train]
            both = name != first and isinstance(own, Samples) and isinstance(other, Samples)
            cells += [own, own.over(other) if both else None]
        table.add(label, name, parameters_of(model) / 1e6, *cells)
