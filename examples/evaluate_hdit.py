"""Compare a pipeline's images with real ones: the same as `diffusers-hdit evaluate`; --help lists the flags.

accelerate launch examples/evaluate_hdit.py --pipeline DIR --train_data_dir my_images --num_images 5000 --output FILE
"""

from diffusers_hdit.evaluation.evaluate import main


if __name__ == "__main__":
    main()
