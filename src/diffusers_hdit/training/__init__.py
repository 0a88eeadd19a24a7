"""Training: `accelerate launch -m diffusers_hdit.training`, `diffusers-hdit train`, or `TrainingConfig` and `trainer.train`."""
