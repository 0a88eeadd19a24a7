"""Train a Hourglass Diffusion Transformer, or a baseline, on your images, and save it as a pipeline.

    accelerate launch examples/train_hdit.py --config examples/configs/tiny.json --output_dir DIR [any flag]

A config is a JSON object whose keys are the flags below, plus "model": arguments of HDiTModel (or of the network that
--model_type names), and "scheduler": sigma_min, sigma_max, sigma_data. Flags override the config, the config overrides the
preset. DIR gets the pipeline with the averaged (EMA) weights, checkpoint-STEP folders, samples/ with grids of generated
images, and metrics.jsonl. To resume an interrupted run, run the same command again.

The code is in the package, so that `accelerate launch -m diffusers_hdit.training` does the same without this file.
Read it in this order:

    training/config.py        every flag, with its default, domain and help
    training/trainer.py       the run: prepare, resume, the loop, checkpoints, validation, the saved pipeline
    training/objective.py     what is random in a step, and the loss (`diffusion.py` has its mathematics)
    training/optimization.py  parameter groups, AdamW, clipping and the optimizer step
"""

from diffusers_hdit.training.__main__ import main


if __name__ == "__main__":
    main(description=__doc__)
