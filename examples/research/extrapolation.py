"""A trained network at sizes that it was not trained at: with which positions, and how it is trained on for a few steps."""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_hdit.data import make_loader
from diffusers_hdit.models.ablations import PatchInWithPositions
from diffusers_hdit.models.modeling_hdit import HDiTModel
from diffusers_hdit.training.config import parse_args
from diffusers_hdit.training.ema import EMAWeights
from diffusers_hdit.training.objective import sample_and_compute_loss, seed_dropout
from diffusers_hdit.training.optimization import make_optimizer


# Two ways to place the tokens of another size; see `HDiTModel.set_position_size`.
TREATMENTS = ("fill", "spacing")


def treatments_of(network: HDiTModel) -> tuple[str, ...]:
    """Those that differ for this network: without positions there is nothing to treat."""
    return TREATMENTS if network.config.position_embedding != "none" else ("fill",)


def set_treatment(network: HDiTModel, treatment: str) -> None:
    """
    Args:
        treatment: "fill", positions of every image fill [-1, 1]; or "spacing", they keep the trained images' spacing.
    """
    if treatment not in TREATMENTS:
        raise ValueError(f"treatment must be one of {', '.join(map(repr, TREATMENTS))}; got {treatment!r}.")
    network.set_position_size(network.config.sample_size if treatment == "spacing" else None)


def at_size(network: HDiTModel, resolution: int, treatment: str) -> HDiTModel:
    """
    A copy whose sample_size is `resolution` and whose positions are those that `network` would have there, to be trained
    on: additive ones become learned ones of the new size.

    Raises:
        ValueError: for a size that does not fit the network.
    """
    network.check_size(resolution, resolution)
    set_treatment(network, treatment)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    if isinstance(network.patch_in, PatchInWithPositions):
        tokens = (resolution // patch for patch in network.patch_size)
        weights["patch_in.positions"] = network.patch_in.positions_for(*tokens).detach().clone()
        config["position_size"] = None
    copy = HDiTModel(**{**config, "sample_size": resolution})
    copy.load_state_dict(weights)
    return copy.to(network.device)


# What a fine-tuning takes from the training before it, where that says so.
KEPT = ("noise_density", "noise_density_params", "loss_weighting", "random_flip", "mapping_lr_scale", "max_grad_norm",
        "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")  # fmt: skip


def finetuning_args(pipeline_dir: Path, sigma_data: float, **given) -> argparse.Namespace:
    """The flags of `examples/train_hdit.py`: `given`, over those of KEPT that the training noted, over the defaults."""
    args = parse_args(["--output_dir", "unused", "--train_data_dir", "unused"])
    noted = Path(pipeline_dir) / "training_args.json"
    before = json.loads(noted.read_text()) if noted.is_file() else {}
    for name, value in {**{name: before[name] for name in KEPT if name in before}, **given}.items():
        setattr(args, name, value)
    args.sigma_data = sigma_data
    return args


def finetune(network: HDiTModel, dataset, steps: int, args: argparse.Namespace) -> HDiTModel:
    """
    Trains the network for `steps` steps of args.train_batch_size images, in its dtype on its device, and gives it the
    averaged weights.

    Raises:
        ValueError: for a network with conditions other than the noise level.
    """
    if network.config.num_classes or network.config.mapping_cond_dim or network.config.conditioning_channels:
        raise ValueError(
            "only networks without classes and other conditions can be fine-tuned here; train this one with "
            "examples/train_hdit.py at the new --resolution."
        )
    device = network.device
    optimizer = make_optimizer(network, args, device)
    averages = EMAWeights(network, args.ema_decay)
    batches = iter(make_loader(dataset, batch_size=args.train_batch_size, seed=args.seed))
    network.train()
    draws = {"num_classes": None, "image_size": max(dataset.resolution), "strata": {}, "args": args}
    if network.config.get("self_conditioning"):
        draws["self_conditioning"] = True
    for _ in tqdm(range(steps), desc="fine-tuning", unit="step"):
        batch = next(batches)
        seed_dropout(args.seed, batch["number"][0].item())
        losses, _ = sample_and_compute_loss(network, batch, device, **draws)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages.step()
    network.load_state_dict(averages.full_state_dict())
    return network.eval()
