"""The paper's models by name (Crowson et al. 2024, table 7), and a tiny one for laptops.

The paper's table prints a mapping width of 768 for all models; its parameter counts only fit the widths below.
"""

import copy


_SCHEDULER = {"sigma_min": 0.01, "sigma_max": 160.0, "sigma_data": 0.5}
_TRAINING = {
    "noise_density": "cosine-interpolated",
    "loss_weighting": "soft-min-snr",
    "learning_rate": 5e-4,
    "mapping_lr_scale": 1 / 3,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "adam_weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
    "label_dropout": 0.1,
    "augment_prob": 0.0,
}

_PRESETS = {
    "tiny": {
        "model": {
            "sample_size": 32,
            "patch_size": 2,
            "widths": [64, 128, 256],
            "depths": [1, 1, 4],
            "mapping_width": 128,
        },
        "training": {"learning_rate": 1e-3, "ema_decay": 0.998},
    },
    "oxford-flowers-256": {
        "model": {
            "sample_size": 256,
            "widths": [128, 256, 512],
            "depths": [2, 2, 4],
            "num_classes": 102,
        },
    },
    "imagenet-128": {
        "model": {
            "sample_size": 128,
            "widths": [384, 768],
            "depths": [2, 11],
            "mapping_depth": 1,
            "mapping_width": 768,
            "num_classes": 1000,
        },
        "training": {"train_batch_size": 256},
    },
    "imagenet-256": {
        "model": {
            "sample_size": 256,
            "widths": [384, 768, 1536],
            "depths": [2, 2, 16],
            "num_classes": 1000,
        },
        "training": {"train_batch_size": 256},
    },
    "ffhq-1024": {
        "model": {
            "sample_size": 1024,
            "widths": [128, 256, 384, 768, 1024],
            "depths": [2, 2, 2, 2, 2],
            "attention_types": ["neighborhood", "neighborhood", "neighborhood", "global", "global"],
            "dropout": [0.0, 0.0, 0.0, 0.0, 0.1],
        },
        "training": {"augment_prob": 0.12},
    },
}


def names() -> list[str]:
    """The names that `load` and `HDiTModel.from_preset` know."""
    return list(_PRESETS)


def load(name: str) -> dict:
    """
    `{"model": ..., "scheduler": ..., "training": ...}`: arguments of `HDiTModel`, of the scheduler, and of the training
    example, a fresh copy.

    Raises:
        ValueError: for a name that is not in `names()`.
    """
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(map(repr, _PRESETS))}.")
    preset = copy.deepcopy(_PRESETS[name])
    return {
        "model": preset["model"],
        "scheduler": dict(_SCHEDULER),
        "training": {**_TRAINING, **preset.get("training", {})},
    }
