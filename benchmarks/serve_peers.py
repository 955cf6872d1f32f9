"""hipa-serve beside other servers of the same model: the included one, one step, 128x128, PNG.

    python benchmarks/serve_peers.py --folder /tmp/peers

No peer runs an adaptor in one step out of the box, so each gets the included base model with the
adaptor fused, one step of the adaptor's own scheduler without guidance, and a FastAPI route that
makes an image behind a lock: what their own documentation shows. The peers' packages are not ours:

    pip install openvino-genai    # brings openvino-tokenizers

All servers run at once and are asked in turn, so that all see the same machine. Each request has a
prompt that its server has not seen; rows of their own show hipa-serve with prompts that it
remembers. Processor time of the server a request says more than seconds on a machine that others
use. The folder gets an image of each.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from serve import PROMPTS, Client, figures

from hipa_deploy.embedded import ADAPTOR, MODEL
from hipa_deploy.engines.backends.available import faster_on_cpu

ROUNDS = 4
A_ROUND = 25  # requests of a server
COLD = 3  # of each round
TOGETHER = 8  # clients
EACH = 4  # requests of each of them
# OpenVINO GenAI computes in bfloat16 where the processor can, unless it is told otherwise.
PEERS = ("diffusers", "optimum-onnxruntime", "openvino-genai", "openvino-genai-float32")


def write_models(folder: Path) -> None:
    """The fused model for each peer."""
    import openvino
    from diffusers import LCMScheduler, StableDiffusionPipeline
    from openvino_tokenizers import convert_tokenizer
    from optimum.onnxruntime import ORTStableDiffusionPipeline
    from transformers import CLIPTokenizerFast

    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.load_lora_weights(ADAPTOR)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    # It starts the only step at the adaptor's timestep.
    pipe.scheduler = LCMScheduler.from_pretrained(ADAPTOR, subfolder="scheduler")
    pipe.save_pretrained(folder / "diffusers")
    ORTStableDiffusionPipeline.from_pretrained(
        str(folder / "diffusers"), export=True
    ).save_pretrained(folder / "optimum-onnxruntime")

    genai = folder / "openvino-genai"
    shutil.copytree(folder / "diffusers", genai, dirs_exist_ok=True)
    shutil.copytree(genai / "vae", genai / "vae_decoder", dirs_exist_ok=True)
    for part in ("text_encoder", "unet", "vae_decoder"):
        model = openvino.convert_model(folder / "optimum-onnxruntime" / part / "model.onnx")
        if part == "unet":
            take_integer_timestep(model)
        openvino.save_model(model, genai / part / "openvino_model.xml")
    words = CLIPTokenizerFast.from_pretrained(genai / "tokenizer")
    tokenizer = convert_tokenizer(words, with_detokenizer=False)
    openvino.save_model(tokenizer, genai / "tokenizer" / "openvino_tokenizer.xml")


def take_integer_timestep(model: Any) -> None:
    """Change a UNet's input to what OpenVINO GenAI gives: an int64 of shape [1]."""
    from openvino import Type, opset13

    number = opset13.parameter([1], Type.i64)
    number.output(0).set_names({"timestep"})
    scalar = opset13.convert(opset13.squeeze(number, opset13.constant([0])), "f32")
    (old,) = [one for one in model.get_parameters() if "timestep" in one.output(0).get_names()]
    old.output(0).replace(scalar.output(0))
    model.add_parameters([number])
    model.remove_parameter(old)
    model.validate_nodes_and_infer_types()


def maker(peer: str, folder: Path) -> Callable[[str, int], Any]:
    """A function from prompt and seed to an image of Pillow."""
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    if peer.startswith("openvino-genai"):
        import openvino_genai

        properties = {"INFERENCE_PRECISION_HINT": "f32"} if peer.endswith("float32") else {}
        model = str(folder / "openvino-genai")
        genai = openvino_genai.Text2ImagePipeline(model, "CPU", **properties)

        def with_openvino(prompt: str, seed: int) -> Any:
            random = openvino_genai.CppStdGenerator(seed)
            made = genai.generate(prompt, generator=random, num_images_per_prompt=1, **options)
            return Image.fromarray(made.data[0])

        return with_openvino

    import torch

    if peer == "diffusers":
        from diffusers import StableDiffusionPipeline as Pipeline
    else:
        from optimum.onnxruntime import ORTStableDiffusionPipeline as Pipeline
    pipe = Pipeline.from_pretrained(str(folder / peer))
    pipe.set_progress_bar_config(disable=True)

    def with_diffusers(prompt: str, seed: int) -> Any:
        random = torch.Generator().manual_seed(seed)
        return pipe(prompt, generator=random, **options).images[0]

    return with_diffusers


def serve_peer(peer: str, folder: Path, port: int) -> None:
    """The server of a peer, as its documentation would have it."""
    import threading

    import uvicorn
    from fastapi import FastAPI, Response
    from pydantic import BaseModel

    make = maker(peer, folder)
    make("warm", 0)
    lock = threading.Lock()
    app = FastAPI()

    class Fields(BaseModel):
        prompt: str
        seed: int

    def generate(fields: Fields) -> Response:
        with lock:
            image = make(fields.prompt, fields.seed)
        file = io.BytesIO()
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    # Annotations of a function's own classes cannot be looked up by their text.
    generate.__annotations__ = {"fields": Fields}
    app.post("/hipa/generate")(generate)
    uvicorn.run(app, port=port, log_level="warning")


def start(command: list[str], port: int) -> psutil.Process:
    """A server in a process of its own, once it answers."""
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(command, stderr=log)
        while True:
            time.sleep(0.3)
            if process.poll() is not None:
                log.seek(0)
                sys.exit(log.read().decode())
            try:
                asyncio.run(Client(f"http://127.0.0.1:{port}").ask(0))
                return process
            except (OSError, EOFError, AssertionError):
                continue


def write_first_images(ports: dict[str, int], folder: Path) -> None:
    """One image of each server as a file, to look at; all must have the same size."""
    sizes = {}
    for name, port in ports.items():
        head = {"content-type": "application/json", "accept": "image/png"}
        body = json.dumps({"prompt": PROMPTS[0], "seed": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/hipa/generate", body, head)
        with urllib.request.urlopen(request) as answer:
            image = Image.open(answer)
            image.save(folder / f"{name}.png")
        sizes[name] = image.size
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"the servers' images differ in size, so no time compares: {sizes}")


async def measure(
    asked: dict[str, tuple[str, list[str]]], processes: dict[str, psutil.Process]
) -> dict[str, Any]:
    """Requests one by one, then from several clients, in turn in every round.

    Args:
        asked: For each row of the result, the server and the prompts that it is asked for.
        processes: The servers, by their address.

    """
    alone: dict[str, list[float]] = {row: [] for row in asked}
    cpu: dict[str, list[float]] = {row: [] for row in asked}
    rates: dict[str, list[float]] = {row: [] for row in asked}
    for number in range(ROUNDS):
        first = number * (A_ROUND + TOGETHER * EACH)
        for row, (url, prompts) in asked.items():
            client = Client(url, prompts)
            used = 0.0
            for turn in range(A_ROUND):
                if turn == COLD:
                    used = cpu_seconds(processes[url])
                begun = time.perf_counter()
                status, _ = await client.ask(first + turn)
                assert status == 200, row
                if turn >= COLD:
                    alone[row].append((time.perf_counter() - begun) * 1000)
            used = cpu_seconds(processes[url]) - used
            cpu[row].append(used / (A_ROUND - COLD) * 1000)
            client.close()
            begun = time.perf_counter()
            starts = range(first + A_ROUND, first + A_ROUND + TOGETHER * EACH, EACH)
            await asyncio.gather(*[several(url, prompts, start) for start in starts])
            rates[row].append(TOGETHER * EACH / (time.perf_counter() - begun))
    found = {}
    for row in asked:
        found[row] = {
            **figures(alone[row]),
            "cpu_ms_a_request": round(statistics.median(cpu[row]), 1),
            "images_per_second_8_clients": round(statistics.median(rates[row]), 1),
        }
    return found


async def several(url: str, prompts: list[str], first: int) -> None:
    """The requests of one of several clients."""
    client = Client(url, prompts)
    for seed in range(first, first + EACH):
        await client.ask(seed)
    client.close()


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the peers' models")
    parser.add_argument("--serve", nargs=2, metavar=("PEER", "PORT"), help="used by this script")
    parser.add_argument("--bundle", default="emoji")
    arguments = parser.parse_args()
    if arguments.serve:
        serve_peer(arguments.serve[0], arguments.folder, int(arguments.serve[1]))
        return
    if not (arguments.folder / "openvino-genai" / "tokenizer" / "openvino_tokenizer.xml").exists():
        write_models(arguments.folder)
    commands = {}
    rounded = faster_on_cpu()
    for backend in ("onnxruntime", "openvino", *([rounded] if rounded else [])):
        commands[f"hipa-serve, {backend}"] = [
            "-m", "hipa_deploy", "serve", arguments.bundle, "--backend", backend, "--port",
        ]  # fmt: skip
    for peer in PEERS:
        commands[peer] = [__file__, "--folder", str(arguments.folder), "--serve", peer]
    asked = {}
    processes = {}
    ports = {}
    try:
        for name, command in commands.items():
            port = free_port()
            ports[name] = port
            url = f"http://127.0.0.1:{port}"
            processes[url] = start([sys.executable, *command, str(port)], port)
            asked[name] = (url, new_prompts())
            if name.startswith("hipa-serve"):
                asked[f"{name}, the prompt's context remembered"] = (url, PROMPTS)
        write_first_images(ports, arguments.folder)
        found = asyncio.run(measure(asked, processes))
    finally:
        for process in processes.values():
            process.terminate()
    facts = {"cores": os.cpu_count(), "load_average": os.getloadavg()}
    print(json.dumps({**found, **facts}, indent=2))


def new_prompts() -> list[str]:
    """As many prompts as one row asks for, none of them twice.

    hipa-serve remembers what its text encoder made of a prompt. The peers do not, so a prompt that
    comes again would compare something else.
    """
    count = ROUNDS * (A_ROUND + TOGETHER * EACH)
    return [f"{PROMPTS[number % len(PROMPTS)]}, picture {number}" for number in range(count)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
