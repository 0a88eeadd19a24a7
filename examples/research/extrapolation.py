"""A trained network at sizes that it was not trained at: how its positions are set, and how it is fine-tuned there."""

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_hdit.data import make_loader
from diffusers_hdit.models.ablations import PatchInWithPositions
from diffusers_hdit.models.modeling_hdit import HDiTModel
from diffusers_hdit.training.config import TrainingConfig
from diffusers_hdit.training.ema import EMAWeights
from diffusers_hdit.training.objective import sample_and_compute_loss, seed_dropout
from diffusers_hdit.training.optimization import make_optimizer


# Two ways to place the tokens of another size; see `HDiTModel.set_position_size`.
TREATMENTS = ("fill", "spacing")


def treatments_of(network: HDiTModel) -> tuple[str, ...]:
    """Return the treatments that differ for this network: without positions there is only one."""
    return TREATMENTS if network.config.position_embedding != "none" else ("fill",)


def set_treatment(network: HDiTModel, treatment: str) -> None:
    """
    Set how the network places tokens at other sizes than its own.

    Args:
        treatment: "fill", positions of every image fill [-1, 1]; or "spacing", they keep the trained images' spacing.
    """
    if treatment not in TREATMENTS:
        raise ValueError(f"treatment must be one of {', '.join(map(repr, TREATMENTS))}; got {treatment!r}.")
    network.set_position_size(network.config.sample_size if treatment == "spacing" else None)


def at_size(network: HDiTModel, resolution: int, treatment: str) -> HDiTModel:
    """
    Return a copy to be fine-tuned, whose sample_size is `resolution` and whose positions are those that `network` has
    there; additive ones become learned ones of the new size.

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


# Settings that a fine-tuning takes over from the training.
KEPT = ("noise_density", "noise_density_params", "loss_weighting", "random_flip", "mapping_lr_scale", "max_grad_norm",
        "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")  # fmt: skip


def finetuning_config(pipeline_dir: Path, sigma_data: float, **settings) -> TrainingConfig:
    """Return a configuration with these settings, those of KEPT that the training had, and defaults."""
    saved = Path(pipeline_dir) / "training_args.json"
    trained = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    kept = {name: trained[name] for name in KEPT if name in trained}
    return TrainingConfig.from_sources(config={**kept, **settings, "scheduler": {"sigma_data": sigma_data}})


def finetune(network: HDiTModel, dataset, steps: int, config: TrainingConfig) -> HDiTModel:
    """
    Train the network for `steps` steps of config.train_batch_size images, in its dtype on its device, and return it with
    the EMA weights.

    Raises:
        ValueError: for a network with conditions other than the noise level.
    """
    if network.config.num_classes or network.config.mapping_cond_dim or network.config.conditioning_channels:
        raise ValueError(
            "only networks without classes and other conditions can be fine-tuned here; train this one with "
            "examples/train_hdit.py at the new --resolution."
        )
    device = network.device
    optimizer = make_optimizer(network, config, device)
    ema = EMAWeights(network, config.ema_decay)
    batches = iter(make_loader(dataset, batch_size=config.train_batch_size, seed=config.seed))
    network.train()
    for _ in tqdm(range(steps), desc="fine-tuning", unit="step"):
        batch = next(batches)
        seed_dropout(config.seed, batch["number"][0].item())
        losses, _ = sample_and_compute_loss(
            network,
            batch,
            device,
            config,
            num_classes=None,
            image_size=max(dataset.resolution),
            strata={},
            self_conditioning=bool(network.config.get("self_conditioning")),
        )
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step()
    network.load_state_dict(ema.full_state_dict())
    return network.eval()
