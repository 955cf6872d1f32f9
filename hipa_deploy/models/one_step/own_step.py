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
    # DDIM could start at any timestep by its offset, but a pipeline of diffusers sets the offset of
    # the scheduler that it is loaded with to 1. LCM makes no use of the offset. It stands here so
    # that DDIMScheduler, made of the same file, takes the same step. LCM's own defaults are named
    # too: from_config would give DDIM its own in their place.
    settings: dict[str, Any] = {
        "timestep_spacing": "leading",
        "steps_offset": timestep,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
    # LCM divides the schedule into so many steps, whose length it rounds down, and starts at the
    # last of them. With as many steps as there are timesteps up to this one, and a length of 1,
    # that is this timestep.
    if length // (timestep + 1) == 1:
        settings["original_inference_steps"] = timestep + 1
    return LCMScheduler(**schedule, **settings)
