"""The denoising loop that all pipelines share: a scheduler's steps, with guidance and jumps."""

import contextlib
import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .guidance import Guidance


class Denoising:
    """A mixin of pipelines with `scheduler`, `transformer` and `guidance_model`, in front of `DiffusionPipeline`."""

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        """Set the scheduler's timesteps; an exponential schedule of one step begins at sigma_max, not as in Diffusers."""
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        if num_inference_steps == 1 and scheduler.config.get("sigma_schedule") == "exponential":
            scheduler.sigmas[0] = scheduler.config.sigma_max
            scheduler.timesteps = scheduler.precondition_noise(scheduler.sigmas[:1]).to(scheduler.timesteps)

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def noise(self, shape: tuple[int, ...], generator) -> Tensor:
        return randn_tensor(tuple(shape), generator=generator, device=self._execution_device, dtype=torch.float32)

    def runs(self, first: int, last: int, jump_length: int, jump_n_sample: int) -> list[range]:
        """
        Return the evaluations from step `first` up to step `last`: one run or, with jumps, as RePaint does (Lugmayr et al.
        2022, arXiv 2201.09865, section 4.2), stretches of `jump_length` steps, counted from the end, each run
        `jump_n_sample` times, but for the first one.
        """
        edges = sorted({first, *range(last, first, -jump_length)}) if jump_n_sample > 1 else [first, last]
        steps = [range(edges[0], edges[1])]
        for begin, end in zip(edges[1:-1], edges[2:], strict=True):
            steps += [range(begin, end)] * jump_n_sample
        order = self.scheduler.order
        count = len(self.scheduler.timesteps)
        merged = [range(order * run.start, min(order * run.stop, count)) for run in steps]
        runs = merged[:1]
        for run in merged[1:]:
            # Without a jump in between they are one run, and a multistep solver remembers its last steps.
            if run.start == runs[-1].stop and run.start < run.stop:
                runs[-1] = range(runs[-1].start, run.stop)
            else:
                runs.append(run)
        return runs

    def denoise(
        self,
        latents: Tensor,
        conditions: dict[str, Tensor],
        guidance: Guidance | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable | None = None,
        *,
        runs: Sequence[range] | None = None,
        before_step: Callable | None = None,
    ) -> Tensor:
        """
        Run the scheduler, whose timesteps are set.

        A network with self_conditioning sees the denoised image of the evaluation before, the guided one where there is
        guidance: zeros at the first one and after a jump.

        Args:
            latents: `(B, C, H, W)` at the noise level of the first evaluation.
            conditions: further arguments of the network, see `encode_conditions`.
            callback: called as `callback(step, timestep, latents)` after each evaluation; returns the latents.
            runs: the evaluations, by their index among the scheduler's timesteps; all of them if not given. Where a run
                begins before the last one ended, noise brings the latents back up to its noise level.
            before_step: called as `before_step(evaluation, latents)` before each of them; returns the latents.
        """
        guidance = guidance or Guidance()
        self.reset_caches()  # of a call that raised an error
        # Read once: a look at a tensor on an accelerator in the loop would make every step wait.
        sigmas, timesteps = self.scheduler.sigmas.tolist(), self.scheduler.timesteps
        runs = runs or [range(len(timesteps))]
        self._interrupt, self._num_timesteps = False, sum(map(len, runs))
        step_kwargs = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator
        nothing = {"self_cond": torch.zeros_like(latents)} if self.transformer.config.get("self_conditioning") else {}
        earlier = nothing

        step, level = 0, runs[0].start
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for run in runs:
                if run.start != level and not self.interrupt:
                    latents = self.jump(latents, sigmas[level], sigmas[run.start], generator)
                    # Of less noise than there is now: the network never saw such an estimate.
                    guidance.running, earlier = None, nothing
                # Set, not searched: the schedulers would search for the timestep on the accelerator.
                self.scheduler.set_begin_index(run.start)
                for i in run:
                    if self.interrupt:
                        continue
                    if before_step is not None:
                        latents = before_step(i, latents)
                    t = timesteps[i]
                    output = self.predict(latents, t, sigmas[i], conditions | earlier, guidance)
                    if earlier:
                        earlier = {"self_cond": self.scheduler.precondition_outputs(latents, output, sigmas[i])}
                    latents = self.scheduler.step(output, t, latents, **step_kwargs)[0]
                    if callback is not None:
                        latents = callback(step, t, latents)
                    step += 1
                    progress_bar.update()
                level = run.stop
        return latents

    def jump(self, latents: Tensor, sigma: float, sigma_up: float, generator) -> Tensor:
        """Add noise up to a higher level; the scheduler and caches forget the steps before."""
        # Without a device: its sigmas would be read back from there.
        self.set_timesteps(self.scheduler.num_inference_steps)
        self.reset_caches()
        return latents + (sigma_up**2 - sigma**2) ** 0.5 * self.noise(latents.shape, generator)

    def reset_caches(self) -> None:
        for model in (self.transformer, self.guidance_model):
            if model is not None and model.is_cache_enabled:
                model._reset_stateful_cache()

    # ------------------------------------------------------------------------------------------------------------------
    # One evaluation

    def weak_conditions(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions of the prediction to guide away from."""
        if self.guidance_model is None:
            nothing = {
                "class_labels": lambda labels: torch.full_like(labels, self.transformer.config.num_classes),
                "mapping_cond": torch.zeros_like,
                "conditioning_image": lambda image: image,
                "self_cond": lambda image: image,
            }
            return {name: nothing[name](value) for name, value in conditions.items()}
        config = self.guidance_model.config
        takes = {
            "class_labels": config.num_classes,
            "mapping_cond": config.mapping_cond_dim,
            "conditioning_image": config.conditioning_channels,
            "self_cond": config.get("self_conditioning"),
        }
        return {name: value for name, value in conditions.items() if takes[name]}

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        sigma: float,
        conditions: dict[str, Tensor],
        guidance: Guidance,
    ) -> Tensor:
        """Return F for the scheduler, guided where it has to be."""
        # The outputs of the step before may go, if the network is compiled to CUDA graphs.
        torch.compiler.cudagraph_mark_step_begin()
        model_input = self.scheduler.scale_model_input(latents, timestep)
        if not guidance.at(sigma):
            return self.evaluate(self.transformer, "plain", model_input, timestep, conditions)
        weak_conditions = self.weak_conditions(conditions)
        if self.guidance_model is not None:
            weak = self.evaluate(self.guidance_model, "weak", model_input, timestep, weak_conditions)
            strong = self.evaluate(self.transformer, "plain", model_input, timestep, conditions)
        else:
            both = {name: torch.cat((weak_conditions[name], value)) for name, value in conditions.items()}
            model_input = torch.cat((model_input, model_input))
            weak, strong = self.evaluate(self.transformer, "guided", model_input, timestep, both).chunk(2)
        if guidance.is_linear:
            # Guiding F is guiding D: the map between them is affine, and the same for both.
            return guidance(weak, strong)
        to_denoised = self.scheduler.precondition_outputs
        guided = guidance(to_denoised(latents, weak, sigma), to_denoised(latents, strong, sigma))
        # Back to F, D = c_skip x + c_out F.
        return (guided - to_denoised(latents, 0.0, sigma)) / to_denoised(0.0, 1.0, sigma)

    def evaluate(self, model, context: str, model_input, timestep, conditions: dict[str, Tensor]) -> Tensor:
        """Return F in float32: the solver's arithmetic must not inherit the model's dtype."""
        # Batches of different sizes must not share what Diffusers' caches keep.
        with model.cache_context(context) if model.is_cache_enabled else contextlib.nullcontext():
            return model(model_input, timestep, **conditions, return_dict=False)[0].float()
