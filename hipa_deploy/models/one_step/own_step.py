"""HiPA's own step in diffusers: the scheduler beside an adaptor or in a bundle."""

from __future__ import annotations

from typing import Any


def one_step_scheduler(schedule: dict[str, Any], timestep: int) -> Any:
    """A diffusers scheduler whose single step is exactly the x0 formula at ``timestep``.

    DDIMScheduler at the last timestep; LCMScheduler at any other. A pipeline takes the step with
    ``num_inference_steps=1`` from the second half of the schedule, and with
    ``timesteps=[timestep]`` from anywhere but the last timestep.

    Args:
        schedule: The noise schedule, as ``ModelConfig.schedule``.
        timestep: Where the step starts.

    Example:
        >>> scheduler = one_step_scheduler({"beta_schedule": "scaled_linear"}, 600)
        >>> scheduler.set_timesteps(1)
        >>> scheduler.timesteps
        tensor([600])

    """
    from diffusers import DDIMScheduler, LCMScheduler

    length = schedule.get("num_train_timesteps", 1000)
    if timestep == length - 1:
        # The defaults would leave residual noise (set_alpha_to_one=False) or start elsewhere.
        return DDIMScheduler(
            **schedule,
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
            steps_offset=0,
        )
    # LCM makes no use of the offset and the spacing. DDIMScheduler, made of the same settings,
    # takes the same step. All are named: for the others diffusers takes a class's own defaults.
    settings: dict[str, Any] = {
        "timestep_spacing": "leading",
        "steps_offset": timestep,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
    if _is_first(timestep, length):
        # LCM divides the schedule into so many steps and starts at the last of them: with as many
        # steps as there are timesteps up to this one, each is one timestep long.
        settings["original_inference_steps"] = timestep + 1
    return LCMScheduler(**schedule, **settings)


def _is_first(timestep: int, length: int) -> bool:
    """Whether LCMScheduler can start at ``timestep`` without being told in each call.

    It rounds the length of its steps down, so that they are one timestep long only if there are
    more of them than half the timesteps.
    """
    return length // (timestep + 1) == 1
