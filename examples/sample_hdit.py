"""Generate images with a saved pipeline: the same as `diffusers-hdit sample`; --help lists the flags.

python examples/sample_hdit.py --pipeline DIR --output grid.png
accelerate launch examples/sample_hdit.py --pipeline DIR --output FOLDER --num_images 50000 --batch_size auto
"""

from diffusers_hdit.evaluation.sample import main


if __name__ == "__main__":
    main()
