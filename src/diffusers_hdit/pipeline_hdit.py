"""Sampling: labels -> noise levels -> noise -> denoised step by step -> images."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Optional, Union

import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .modeling_hdit import HDiTModel
from .remote_code import PipelineCarriesCode, package_module


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Labels = int | str | Sequence[int] | Sequence[str] | Tensor


class HDiTPipeline(PipelineCarriesCode, DiffusionPipeline):
    r"""
    Draws images with a Hourglass Diffusion Transformer, directly in pixels.

    Args:
        transformer (`HDiTModel`): the network.
        scheduler: an EDM scheduler of Diffusers, holding sigma_min, sigma_max and sigma_data of the training.
        id2label (`dict[int, str]`, *optional*): names of the classes.
        condition_columns (`dict[str, list]`, *optional*): for a model whose `mapping_cond` was made of named numbers:
            their "names", and "mean" and "std" in the training set, in the order of the vector.
        k_diffusion_config (`dict`, *optional*): the reference's configuration, if the weights came from there.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: HDiTModel,
        # Written as Diffusers 0.36 can read them when it loads a pipeline; it passes over `A | B`.
        scheduler: Union[EDMDPMSolverMultistepScheduler, EDMEulerScheduler],  # noqa: UP007
        id2label: Optional[dict] = None,  # noqa: UP045
        condition_columns: Optional[dict] = None,  # noqa: UP045
        k_diffusion_config: Optional[dict] = None,  # noqa: UP045
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            id2label=id2label, condition_columns=condition_columns, k_diffusion_config=k_diffusion_config
        )
        # The images are the latents: nothing is scaled up.
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    # ------------------------------------------------------------------------------------------------------------------
    # Labels

    @property
    def id2label(self) -> dict[int, str]:
        """Class number -> name; empty for a model without names."""
        return {int(i): name for i, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, labels: str | Sequence[str]) -> list[int]:
        """
        The numbers of the classes with these names.

        Raises:
            ValueError: for a name that is not in `id2label`, with the names that are close or all of them.
        """
        label2id = {name: i for i, name in self.id2label.items()}
        labels = [labels] if isinstance(labels, str) else list(labels)
        for label in labels:
            if label not in label2id:
                known = ", ".join(map(repr, list(label2id)[:20])) or "none, this model's classes have numbers only"
                more = ", ..." if len(label2id) > 20 else ""
                raise ValueError(f"there is no class {label!r}; the classes are: {known}{more}.")
        return [label2id[label] for label in labels]

    def encode_conditions(
        self, class_labels: Labels | None, mapping_cond: Tensor | Mapping | None, num_images_per_prompt: int
    ) -> tuple[dict[str, Tensor], int]:
        """What the network is called with besides the image, on the pipeline's device, and the number of images."""
        encoded = {
            "class_labels": self.encode_labels(class_labels),
            "mapping_cond": self.encode_mapping_cond(mapping_cond),
        }
        encoded = {name: value for name, value in encoded.items() if value is not None}
        batch_size = max((len(value) for value in encoded.values()), default=1)
        for name, value in encoded.items():
            if len(value) not in (1, batch_size):
                raise ValueError(f"{len(value)} {name} were given, but {batch_size} of the other condition.")
            value = value.expand(batch_size, *value.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)
            encoded[name] = value.to(self._execution_device)
        return encoded, batch_size * num_images_per_prompt

    def encode_labels(self, class_labels: Labels | None) -> Tensor | None:
        """Class numbers `(B,)`, all checked; None for a model without classes."""
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            return None if num_classes is None else torch.tensor([num_classes])
        if num_classes is None:
            raise ValueError("class_labels were given, but this model was trained without classes. Leave them out.")
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("class_labels is empty; give at least one, or None to draw without a label.")
        ids = [
            self.get_label_ids(label)[0] if isinstance(label, str) else operator.index(label) for label in class_labels
        ]
        for i in ids:
            if not 0 <= i <= num_classes:
                raise ValueError(
                    f"class label {i} is out of range: this model has the classes 0 to {num_classes - 1}, "
                    f"and {num_classes} for no label."
                )
        return torch.tensor(ids)

    def encode_mapping_cond(
        self, mapping_cond: Tensor | Mapping[str, float | Sequence[float]] | None
    ) -> Tensor | None:
        """The vector condition `(B, D)` in float32, checked; named numbers are put in order and normalised."""
        dim = self.transformer.config.mapping_cond_dim
        if mapping_cond is None:
            return None
        if not dim:
            raise ValueError("mapping_cond was given, but this model has mapping_cond_dim=0. Leave it out.")
        if isinstance(mapping_cond, Mapping):
            columns = self.config.condition_columns or {"names": []}
            if set(mapping_cond) != set(columns["names"]):
                raise ValueError(
                    f"mapping_cond names {sorted(mapping_cond)}, but this model was trained on the columns "
                    f"{columns['names']}. Give a value for each of these, or pass a tensor."
                )
            values = [torch.as_tensor(mapping_cond[name], dtype=torch.float32) for name in columns["names"]]
            values = torch.stack(torch.broadcast_tensors(*map(torch.atleast_1d, values)), dim=1)
            mapping_cond = (values - torch.tensor(columns["mean"])) / torch.tensor(columns["std"])
        mapping_cond = torch.as_tensor(mapping_cond, dtype=torch.float32)
        if mapping_cond.ndim != 2 or mapping_cond.shape[1] != dim:
            raise ValueError(f"mapping_cond must have shape (batch, {dim}), got {tuple(mapping_cond.shape)}.")
        return mapping_cond

    # ------------------------------------------------------------------------------------------------------------------
    # Checks, before any work

    def check_inputs(
        self,
        num_inference_steps,
        num_images_per_prompt,
        guidance_interval,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(map(repr, OUTPUT_TYPES))}; got {output_type!r}.")
        channels = self.transformer.config.out_channels or self.transformer.config.in_channels
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(f"PIL has no images of {channels} channels; use output_type='np', 'pt' or 'latent'.")
        if channels != self.transformer.config.in_channels:
            raise ValueError(
                f"this pipeline draws with a model of as many output as input channels; this one has {channels} and "
                f"{self.transformer.config.in_channels}."
            )
        if guidance_interval is not None:
            low, high = guidance_interval
            if not 0 <= low < high:
                raise ValueError(
                    f"guidance_interval must be (sigma_lo, sigma_hi), 0 <= lo < hi; got {guidance_interval}."
                )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be in {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )
        if getattr(self.scheduler.config, "sigma_data", None) is None:
            raise ValueError(
                f"{type(self.scheduler).__name__} is not an EDM scheduler (it has no sigma_data). Use for instance "
                "EDMDPMSolverMultistepScheduler or EDMEulerScheduler."
            )

    def prepare_latents(self, latents, batch_size, height, width, generator) -> Tensor:
        """Unit-variance noise `(B, C, H, W)`, float32 on the pipeline's device."""
        shape = (batch_size, self.transformer.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} images; give one for each, or one."
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, torch.float32)

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        mapping_cond: Tensor | Mapping[str, float | Sequence[float]] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as in all pipelines of Diffusers)
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            class_labels: a class by number or by name, or a list of them; None draws without a label.
            num_images_per_prompt: images for each label.
            height, width: size in pixels, by default that of the training (or of `latents`).
            num_inference_steps: evaluations of the network.
            mapping_cond: vector condition `(B, D)`, or `{name: value}` for a model trained on named columns.
            guidance_scale: w of classifier-free guidance, D_uncond + w (D_cond - D_uncond) (Ho & Salimans 2022, arXiv
                2207.12598). The unconditional half of the batch has no label and a zero `mapping_cond`. 1 means none.
            guidance_interval: `(sigma_lo, sigma_hi)`: guide only where sigma_lo < sigma <= sigma_hi (Kynkäänniemi et
                al. 2024, arXiv 2404.07724); elsewhere the network sees each image once.
            generator: one, or a list with one for each image.
            latents: unit-variance noise `(B, C, H, W)` to start from; multiplied by the first sigma here.
            output_type: "pil"; "np" `(B, H, W, C)` or "pt" `(B, C, H, W)` in [0, 1]; or "latent", in [-1, 1] but
                neither clamped nor rounded.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each step; may
                return a dict with changed latents.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with them.

        Raises:
            ValueError: for wrong arguments, before the first evaluation.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            num_inference_steps,
            num_images_per_prompt,
            guidance_interval,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if guidance_scale != 1.0 and class_labels is None and mapping_cond is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels or a mapping_cond to guide towards.")
        if latents is not None and class_labels is None and mapping_cond is None:
            num_images_per_prompt = len(latents)
        conditions, batch_size = self.encode_conditions(class_labels, mapping_cond, num_images_per_prompt)
        default = self.transformer.sample_size if latents is None else latents.shape[-2:]
        height, width = default[0] if height is None else height, default[1] if width is None else width
        self.transformer.check_size(height, width)
        latents = self.prepare_latents(latents, batch_size, height, width, generator)

        self._guidance_scale, self._guidance_interval = guidance_scale, guidance_interval
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        # The first sigma itself: the schedulers' init_noise_sigma, sqrt(sigma² + 1), is not where EDM samplers start.
        latents = latents * self.scheduler.sigmas[0].item()
        callback = None
        if callback_on_step_end is not None:
            callback = functools.partial(self.call_back, callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self.denoise(latents, conditions, generator, callback)

        images = latents if output_type == "latent" else self.image_processor.postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(self, latents: Tensor, conditions: dict[str, Tensor], generator, callback: Callable | None) -> Tensor:
        """Runs the scheduler from its first timestep to its last; `latents` are at its first noise level."""
        # Read once: a look at a tensor on an accelerator in the loop would make every step wait.
        sigmas, timesteps = self.scheduler.sigmas.tolist(), self.scheduler.timesteps
        self._interrupt, self._num_timesteps = False, len(timesteps)
        step_kwargs = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator
        low, high = self._guidance_interval or (-1.0, float("inf"))

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                model_input = self.scheduler.scale_model_input(latents, t)
                guided = self.guidance_scale != 1.0 and low < sigmas[i] <= high
                output = (self.predict_guided if guided else self.predict)(model_input, t, conditions)
                latents = self.scheduler.step(output, t, latents, **step_kwargs)[0]
                if callback is not None:
                    latents = callback(i, t, latents)
                progress_bar.update()
        return latents

    def call_back(self, function: Callable, names: list[str], step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """Calls the user's function after a step; the latents it returns take the place of the others."""
        tensors = {"latents": latents}
        changed = function(self, step, timestep, {name: tensors[name] for name in names}) or {}
        return changed.get("latents", latents)

    def predict(self, model_input: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """F in float32: the solver's arithmetic must not inherit the model's dtype."""
        return self.transformer(model_input, timestep, **conditions, return_dict=False)[0].float()

    def predict_guided(self, model_input: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Both halves in one call. Guiding F is guiding D: the map between them is affine, and the same for both."""
        no_conditions = {
            "class_labels": lambda labels: torch.full_like(labels, self.transformer.config.num_classes),
            "mapping_cond": torch.zeros_like,
        }
        both = {name: torch.cat((no_conditions[name](value), value)) for name, value in conditions.items()}
        uncond, cond = self.predict(torch.cat((model_input, model_input)), timestep, both).chunk(2)
        return torch.lerp(uncond, cond, self.guidance_scale)

    # ------------------------------------------------------------------------------------------------------------------
    # The reference's checkpoints

    @classmethod
    def from_k_diffusion(
        cls,
        checkpoint: str | PathLike | Mapping[str, Tensor],
        config: str | PathLike | dict | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> "HDiTPipeline":
        """
        A pipeline from a checkpoint of the reference implementation (k-diffusion, `image_transformer_v2`).

        Args:
            checkpoint: a `.safetensors` for inference, a training `.pth` (its EMA weights are taken), or a state dict.
            config: the reference's configuration, a dict or a JSON file; by default the one inside the checkpoint.
            torch_dtype: dtype of the weights, float32 by default.

        Raises:
            ValueError: for a file that can't be read, a configuration of another network, or weights that do not fit it.
        """
        return package_module("convert_k_diffusion").load_pipeline(checkpoint, config, torch_dtype, pipeline_class=cls)

    def save_k_diffusion(self, path: str | PathLike) -> None:
        """Writes the weights and their configuration as a `.safetensors` that the reference loads."""
        package_module("convert_k_diffusion").save_pipeline(self, path)

    # ------------------------------------------------------------------------------------------------------------------
    # The Hub

    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """
        Uploads what inference needs, and a model card, to the Hugging Face Hub; in one commit, tried again if need be.

        Text that somebody wrote into the repository's card stays. Weights of an earlier push that these replace go.

        Args:
            repo_id: "user/name"; made if it is not there.
            commit_message, private, token, create_pr, variant: as in Diffusers. `private=True` and a repository that is
                public already is an error.
            revision: branch to push to, made if it is not there.
            max_shard_size: larger weights are split, for instance "5GB".
            license: of the weights, for the card, for instance "cc-by-4.0".
            facts: `model_card.TrainingFacts` of the training, for the card; without it, the card says nothing of that.
            samples: a PIL image for the card, described by `facts.samples`.

        Returns:
            `huggingface_hub.CommitInfo`, the URL of the commit.

        Raises:
            ValueError: for arguments that can't be, before anything is uploaded.
            ImportError: in code that came with a repository, where the package is not installed.
            huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, or fails again and again.
        """
        return package_module("hub").push_pipeline(self, repo_id, *args, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike, *args, push_to_hub: bool = False, **kwargs):
        """As in Diffusers; `push_to_hub=True` then calls `push_to_hub(repo_id=...)` with the other arguments."""
        hub = ("repo_id", "commit_message", "private", "token", "create_pr", "revision", "license")
        hub = {name: kwargs.pop(name) for name in hub if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            repo_id = hub.pop("repo_id", None) or Path(save_directory).resolve().name
            package_module("hub").push_folder(save_directory, repo_id, **hub)
