"""The samplers of the reference implementation (k-diffusion) that Diffusers lacks, for models in EDM form.

The network's output F becomes the denoised image by D = c_skip x + c_out F (Karras et al. 2022, arXiv 2206.00364, table
1), and its timestep is c_noise = ln(sigma)/4; all of that, and the Karras noise levels, is `EDMEulerScheduler`'s. The
arithmetic is done in float32 at least; its coefficients are Python numbers, so that no step waits for an accelerator.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import EDMEulerScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: F401, see remote_code.py
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..utils.remote_code import RemoteCodeMixin


class EDMScheduler(RemoteCodeMixin, EDMEulerScheduler):
    """What the schedulers below share."""

    # Their configurations are taken over without a word about what has no meaning here.
    _compatibles = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]

    def check_config(self) -> None:
        # Diffusers takes values that it was not given by keyword for defaults, and another class would replace them by its
        # own when it takes over the configuration.
        self.register_to_config(_use_default_values=[])
        if self.config.final_sigmas_type != "zero":
            raise ValueError(
                f"{type(self).__name__} goes down to sigma 0 in its last step: final_sigmas_type must be 'zero', got "
                f"{self.config.final_sigmas_type!r}."
            )

    @property
    def init_noise_sigma(self) -> float:
        """The noise starts at sigma_max, as in the reference."""
        return self.config.sigma_max

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        """
        Set the noise levels of the steps.

        Args:
            num_inference_steps: of the configured schedule; left out with `sigmas`.
            device: for the timesteps.
            sigmas: noise levels to use as they are, decreasing; the step to 0 follows them.

        Raises:
            ValueError: for both or neither, and for sigmas that are not positive and decreasing.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("set_timesteps takes either num_inference_steps or sigmas.")
        if sigmas is not None:
            levels = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").reshape(-1)
            levels = levels[:-1] if len(levels) and levels[-1] == 0 else levels
            if not len(levels) or not levels.isfinite().all() or levels[-1] <= 0 or (levels.diff() >= 0).any():
                raise ValueError(f"sigmas must be positive, finite and decreasing, got {levels.tolist()}.")
            num_inference_steps = len(levels)
        super().set_timesteps(num_inference_steps, device=device)
        if sigmas is not None:
            self.sigmas = torch.cat((levels, levels.new_zeros(1)))
            self.timesteps = self.precondition_noise(levels.to(device))
        self.spread_timesteps()
        self.is_scale_input_called = False
        self.start_anew()

    def _compute_exponential_sigmas(self, ramp: Tensor, *args, **kwargs) -> Tensor:
        # Diffusers would begin the only step at sigma_min.
        if len(ramp) == 1:
            return ramp.new_full((1,), self.config.sigma_max)
        return super()._compute_exponential_sigmas(ramp, *args, **kwargs)

    def spread_timesteps(self) -> None:
        """Repeat the timesteps for a sampler that evaluates the network more than once a step."""

    def start_anew(self) -> None:
        """Forgets what earlier steps left behind."""

    def denoised(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """D and the sample, both float32 at least."""
        if self.num_inference_steps is None:
            raise ValueError("there are no timesteps yet; call set_timesteps first.")
        if self.step_index is None:
            self._init_step_index(timestep)
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        sigma = self.sigmas[self.step_index].item()
        return self.precondition_outputs(sample, model_output.to(sample.dtype), sigma), sample

    def finish(self, prev_sample: Tensor, dtype: torch.dtype, return_dict: bool) -> SchedulerOutput | tuple:
        self._step_index += 1
        prev_sample = prev_sample.to(dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)


class DPMSolverPP3MSDEScheduler(EDMScheduler):
    r"""
    DPM-Solver++(3M) SDE, the sampler of the HDiT paper: a multistep solver of third order for the diffusion SDE, one
    evaluation of the network a step (Lu et al. 2022, arXiv 2211.01095; the third-order SDE is k-diffusion's
    `sample_dpmpp_3m_sde`).

    With h = ln(sigma / sigma_next), h_eta = (1 + eta) h and the finite differences D1, D2 of the last three denoised
    images D over ln(sigma), in units of h, a step is

        x <- exp(-h_eta) x + (1 - exp(-h_eta)) D + phi2 D1 - phi3 D2 + s_noise sigma_next sqrt(1 - exp(-2 eta h)) noise,
        phi2 = (exp(-h_eta) - 1) / h_eta + 1,   phi3 = phi2 / h_eta - 1/2;

    the first step has D only, the second D and D1. The step to sigma 0 returns D and takes no noise.

    Args:
        sigma_min, sigma_max, sigma_data: of the training; the defaults are those of Diffusers.
        sigma_schedule, rho, num_train_timesteps, prediction_type: as in `EDMEulerScheduler`.
        eta: 1 for the SDE, 0 for the ODE; between and above, more or less noise.
        s_noise: factor of the noise.
        final_sigmas_type: "zero"; kept so that configurations of Diffusers' schedulers say it too.

    Raises:
        ValueError: for a negative eta, or another final_sigmas_type.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        eta: float = 1.0,
        s_noise: float = 1.0,
    ):
        super().__init__(
            sigma_min,
            sigma_max,
            sigma_data,
            sigma_schedule,
            num_train_timesteps,
            prediction_type,
            rho,
            final_sigmas_type,
        )
        self.check_config()
        if eta < 0:
            raise ValueError(f"eta must not be negative, got {eta}.")
        self.start_anew()

    def start_anew(self) -> None:
        self._history: list[tuple[float, Tensor]] = []  # (ln sigma, denoised) of the last steps, newest first

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple:
        """
        Args:
            model_output: F, the network's output for `scale_model_input(sample, timestep)`.
            timestep: c_noise; the step's number is counted, so only the first one is looked at.
            sample: x at this step's sigma.
            generator: one, or a list with one for each image; the image then does not depend on its batch.
            noise: unit-variance noise to use in place of the generator's.

        Returns:
            x at the next sigma, in the sample's dtype.
        """
        dtype = sample.dtype
        denoised, sample = self.denoised(model_output, timestep, sample)
        sigma, sigma_next = self.sigmas[self.step_index : self.step_index + 2].tolist()
        if sigma_next == 0:
            return self.finish(denoised, dtype, return_dict)
        h = math.log(sigma / sigma_next)
        h_eta = (1 + self.config.eta) * h
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        first, second = self.differences(math.log(sigma), denoised, h)
        prev = math.exp(-h_eta) * sample - math.expm1(-h_eta) * denoised
        if first is not None:
            prev = prev + phi_2 * first
        if second is not None:
            prev = prev - phi_3 * second
        if self.config.eta:
            if noise is None:
                noise = randn_tensor(denoised.shape, generator=generator, device=denoised.device, dtype=denoised.dtype)
            scale = self.config.s_noise * sigma_next * math.sqrt(-math.expm1(-2 * self.config.eta * h))
            prev = prev + scale * noise
        self._history = [(math.log(sigma), denoised), *self._history][:2]
        return self.finish(prev, dtype, return_dict)

    def differences(self, log_sigma: float, denoised: Tensor, h: float) -> tuple[Tensor | None, Tensor | None]:
        """D1 and D2, None where there are too few steps before this one."""
        if not self._history:
            return None, None
        log_sigma_1, denoised_1 = self._history[0]
        r_0 = (log_sigma_1 - log_sigma) / h
        slope = (denoised - denoised_1) / r_0
        if len(self._history) == 1:
            return slope, None
        log_sigma_2, denoised_2 = self._history[1]
        r_1 = (log_sigma_2 - log_sigma_1) / h
        second = (slope - (denoised_1 - denoised_2) / r_1) / (r_0 + r_1)
        return slope + r_0 * second, second


class EDMHeunScheduler(EDMScheduler):
    r"""
    Heun's method for the probability-flow ODE dx/dsigma = (x - D) / sigma (Karras et al. 2022, algorithm 1): second
    order, two evaluations a step but for the last one, which goes to sigma 0 by Euler's. No noise is added.

    `timesteps` has one entry for each evaluation, 2 n - 1 of them, as in Diffusers' `HeunDiscreteScheduler`.

    Args:
        sigma_min, sigma_max, sigma_data: of the training; the defaults are those of Diffusers.
        sigma_schedule, rho, num_train_timesteps, prediction_type, final_sigmas_type: as in
            `DPMSolverPP3MSDEScheduler`.

    Raises:
        ValueError: for a final_sigmas_type other than "zero".
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
    ):
        super().__init__(
            sigma_min,
            sigma_max,
            sigma_data,
            sigma_schedule,
            num_train_timesteps,
            prediction_type,
            rho,
            final_sigmas_type,
        )
        self.check_config()
        self.start_anew()

    def spread_timesteps(self) -> None:
        self.timesteps = torch.cat((self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)))
        self.sigmas = torch.cat((self.sigmas[:1], self.sigmas[1:-1].repeat_interleave(2), self.sigmas[-1:]))

    def start_anew(self) -> None:
        self._start: tuple[float, Tensor, Tensor] | None = None  # sigma, x and slope where the step began

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """
        Half a step: Euler's, then its correction.

        Args:
            model_output: F, the network's output for `scale_model_input(sample, timestep)`.
            timestep: c_noise; the evaluations are counted, so only the first one is looked at.
            sample: x at this evaluation's sigma.

        Returns:
            x at the next evaluation's sigma, in the sample's dtype.
        """
        dtype = sample.dtype
        denoised, sample = self.denoised(model_output, timestep, sample)
        sigma, sigma_next = self.sigmas[self.step_index : self.step_index + 2].tolist()
        if sigma_next == 0 and self._start is None:
            return self.finish(denoised, dtype, return_dict)
        slope = (sample - denoised) / sigma
        if self._start is None:
            self._start = (sigma, sample, slope)
            return self.finish(sample + (sigma_next - sigma) * slope, dtype, return_dict)
        sigma_start, sample_start, slope_start = self._start
        self._start = None
        prev = sample_start + (sigma - sigma_start) * (slope_start + slope) / 2
        return self.finish(prev, dtype, return_dict)
