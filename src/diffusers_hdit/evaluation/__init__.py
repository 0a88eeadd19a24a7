"""Generating images, measuring them against real ones, and counting what a model costs."""

# Here, since command lines offer them before PyTorch is imported.
METRICS = ("fid", "kid", "inception_score", "cmmd", "kernel_distance", "frechet_distance", "precision", "recall",
           "near_copies")  # fmt: skip
FEATURE_NETWORKS = ("efficientnet-lite0", "inception-v3", "dinov2", "clip")
