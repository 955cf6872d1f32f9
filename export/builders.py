"""The stages' modules, each built after PyTorch FP32 has given the reference tensors that it is judged by."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn

from hipa_deploy.bundle.manifest import DecoderInfo, EncoderInfo
from hipa_deploy.export.graph.fold import fold_timestep
from hipa_deploy.export.graph.modules import (
    TORCH_DTYPES,
    Generator,
    GenericDecoder,
    GenericUNet,
    OneStepDecoder,
    OneStepEncoder,
    OneStepUNet,
    TextEncoderStage,
    TinyDecoder,
    TinyEncoder,
    from_uint8,
    seen_by_unet,
    to_uint8,
)
from hipa_deploy.export.job import ExportJob, at_moment
from hipa_deploy.export.merge import merge_adaptor, merge_encoder_adaptor
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.hashing import folder_sha256
from hipa_deploy.models.decoder_folder import vae_sha256
from hipa_deploy.tasks import STEP_INPUTS, finish_latents, is_inpainting_unet, start_latents


def text_encoder_stage(job: ExportJob) -> nn.Module:
    """The text encoder; leaves 'context'."""
    encoder = job.base.text_encoder()
    job.reference["context"] = encoder(
        torch.from_numpy(job.reference["tokens"])
    ).last_hidden_state.numpy()
    return TextEncoderStage(encoder, TORCH_DTYPES[job.specs["text_encoder"].outputs[0].dtype])


def encoder_stage(job: ExportJob) -> nn.Module:
    """The encoder that was asked for, after its general form has given the reference latents."""
    sample_BCHW, folder = (
        from_uint8(torch.from_numpy(job.reference["image"])) * 2 - 1,
        job.options.encoder,
    )
    if folder:
        tiny = job.base.tiny_encoder(folder)
        job.encoder = EncoderInfo(
            kind="tiny", name=folder.resolve().name, sha256=folder_sha256(folder)
        )
        source_BCHW = tiny.encode(sample_BCHW).latents
        module: nn.Module = TinyEncoder(tiny)
    else:
        vae = job.base.vae()
        merged = merge_encoder_adaptor(vae, job.options.adaptor, job.options.adaptor_scale)
        sha256 = vae_sha256(job.base.folder)
        job.encoder = EncoderInfo(kind="full", name="vae", sha256=sha256, adaptor_sha256=merged)
        source_BCHW = vae.encode(sample_BCHW).latent_dist.mean * job.step.scaling_factor
        module = OneStepEncoder(vae)
    job.reference["source"] = source_BCHW.numpy()
    return module


def _general_unet(job: ExportJob) -> UNet2DConditionModel:
    """The merged UNet, after its general form has given the references: its output, and the latents to decode."""
    unet = job.base.unet(job.plan.task)
    if job.options.adaptor:
        job.adaptor = merge_adaptor(unet, job.options.adaptor, job.options.adaptor_scale)
    for number, (timestep, alpha_bar) in enumerate(job.moments):
        output_BCHW, latents_BCHW = _general_step(job, unet, timestep, alpha_bar)
        job.reference |= {
            at_moment("output", number): output_BCHW,
            at_moment("latents", number): latents_BCHW,
        }
    return unet


def _general_step(
    job: ExportJob, unet: UNet2DConditionModel, timestep: int, alpha_bar: float
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the task in PyTorch FP32: the UNet's output, and the latents to decode."""
    task = job.plan.task
    concatenates = is_inpainting_unet(unet.config.in_channels, job.step.latent_shape[0])
    given = {name: job.reference[name] for name in STEP_INPUTS[task]}
    start_BCHW = start_latents(task, given, alpha_bar, concatenates=concatenates)
    start, context = torch.from_numpy(start_BCHW), torch.from_numpy(job.reference["context"])
    sample = seen_by_unet(
        start, {n: torch.from_numpy(v) for n, v in given.items()}, concatenates=concatenates
    )
    output_BCHW = unet(sample, timestep, context, return_dict=False)[0].numpy()
    x0_BCHW = predict_x0(start_BCHW, output_BCHW, alpha_bar, job.step.prediction_type)
    return output_BCHW, finish_latents(task, x0_BCHW, given)


def unet_stage(job: ExportJob) -> OneStepUNet:
    """The UNet with its timesteps folded; leaves 'output' and 'latents'."""
    unet = _general_unet(job)
    fold_timestep(unet, *(timestep for timestep, _ in job.moments))
    return OneStepUNet(unet, job.step, job.plan.task, job.plan.strengths)


def generic_unet_stage(job: ExportJob) -> nn.Module:
    """The UNet as it is; leaves 'output', 'latents' and 'timestep'."""
    unet = _general_unet(job)
    job.reference["timestep"] = job.given["timestep"] = np.asarray([job.step.timestep])
    return GenericUNet(unet)


def decoder_stage(job: ExportJob) -> OneStepDecoder | TinyDecoder:
    """The decoder that was asked for, after its general form has given the reference images."""
    folder = job.options.decoder
    vae: AutoencoderTiny | AutoencoderKL
    if folder:
        vae = job.base.tiny_decoder(folder)
        job.decoder = DecoderInfo(
            kind="tiny", name=folder.resolve().name, sha256=folder_sha256(folder)
        )
    else:
        vae = _general_vae(job)
    for number in range(len(job.moments)):
        latents_BCHW = torch.from_numpy(job.reference[at_moment("latents", number)])
        sample_BCHW = vae.decode(
            latents_BCHW if folder else latents_BCHW / job.step.scaling_factor
        ).sample
        job.reference[at_moment("images", number)] = to_uint8(sample_BCHW / 2 + 0.5).numpy()
    return TinyDecoder(vae) if isinstance(vae, AutoencoderTiny) else OneStepDecoder(vae)


def _general_vae(job: ExportJob) -> AutoencoderKL:
    job.decoder = DecoderInfo(kind="full", name="vae", sha256=vae_sha256(job.base.folder))
    return job.base.vae()


def generator_stage(job: ExportJob) -> nn.Module:
    """UNet and decoder; leaves what both do."""
    unet = unet_stage(job)
    return Generator(unet, decoder_stage(job))


def generic_decoder_stage(job: ExportJob) -> nn.Module:
    """Fed as the runtime feeds it: x0 of what the UNet in ONNX gave."""
    vae, step = _general_vae(job), job.step
    for tensors in (job.reference, job.given):
        x0_BCHW = predict_x0(
            tensors["noise"], tensors["output"], step.alpha_bar, step.prediction_type
        )
        tensors["latent_sample"] = x0_BCHW / np.float32(step.scaling_factor)
    sample_BCHW = vae.decode(torch.from_numpy(job.reference["latent_sample"]), return_dict=False)[0]
    job.reference |= {
        "sample": sample_BCHW.numpy(),
        "images": to_uint8(sample_BCHW / 2 + 0.5).numpy(),
    }
    return GenericDecoder(vae)
