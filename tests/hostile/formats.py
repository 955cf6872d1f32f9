"""The formats that the suite knows. Each is a valid sample, and the command that reads it."""

from __future__ import annotations

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from hipa_deploy.bundle.adaptor_swap import FOLDER, MANIFEST
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from tests.engines.engine_samples import put_engine, save_conv, write_bundle
from tests.engines.report_samples import a_report
from tests.hostile.harness import Format
from tests.swap_samples import scaled_weights, write_swap

PROMPT = "3d emoji of a red apple"
GENERATE = ("generate", "bundle", PROMPT, "--backend", "onnxruntime", "--out", "image.png")
DOCTOR = ("doctor", "bundle", "--backend", "onnxruntime")
ROWS = [
    {"text": "a red apple", "file_name": "0.png"},
    {"text": "a boat, at sea", "file_name": "1.png"},
    {"text": 'the "old" bridge', "file_name": "2.png"},
] * 4
SWAP = f"bundle/{FOLDER}/night"


def embedded_bundle(folder: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(BUNDLE, folder / "bundle")))


def with_swap(folder: Path) -> None:
    bundle = embedded_bundle(folder)
    write_swap(bundle, folder / SWAP, scaled_weights(bundle, 0.5))


def with_baked_prompts(folder: Path) -> None:
    """A bundle of two prompts, without text encoder and tokenizer."""
    bundle = embedded_bundle(folder)
    root = bundle.root
    (root / "prompts").mkdir()
    (root / "prompts/prompts.txt").write_text(f"{PROMPT}\nanother prompt\n")
    with np.load(root / "reference/tensors.npz") as tensors:
        context_1LD = tensors["context"]
    np.save(root / "prompts/contexts.npy", np.float16(np.concatenate([context_1LD] * 2)))
    for gone in ("text_encoder", "tokenizer"):
        shutil.rmtree(root / gone)

    def edit(manifest: dict[str, Any]) -> None:
        del manifest["stages"][0]
        kept = {}
        for name, sha256 in manifest["files"].items():
            if name.split("/")[0] not in ("text_encoder", "tokenizer"):
                kept[name] = sha256
        for name in ("prompts/prompts.txt", "prompts/contexts.npy"):
            kept[name] = file_sha256(root / name)
        manifest["files"] = kept

    _change(root / "hipa.json", edit)


def with_engine(folder: Path) -> None:
    save_conv(folder / "bundle/unet/model.onnx", np.float16)
    sidecar = put_engine(write_bundle(folder / "bundle"))
    for path in (sidecar, sidecar.with_suffix(".engine")):
        shutil.copy(path, folder / f"bundle/engines/unet{path.suffix}")


def two_reports(folder: Path) -> None:
    for name in ("report.json", "other.json"):
        (folder / name).write_text(a_report().model_dump_json())


def with_image(folder: Path) -> None:
    """A PNG, a JPEG and a WebP, with a colour profile and EXIF data."""
    image = Image.effect_noise((24, 20), 80).convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    for kind in ("png", "jpeg", "webp"):
        (folder / kind).mkdir()
        image.save(folder / kind / f"image.{kind}", icc_profile=profile, exif=exif)


def with_prompts(folder: Path) -> None:
    """Prompts in each format of a text."""
    (folder / "txt").mkdir()
    (folder / "txt/prompts.txt").write_text("\n".join(row["text"] for row in ROWS))
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        (folder / kind).mkdir()
        with (folder / kind / f"prompts.{kind}").open("w", newline="") as file:
            table = csv.DictWriter(file, ("text", "file_name"), delimiter=delimiter)
            table.writeheader()
            table.writerows(ROWS)


def with_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (folder / "p").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "p/prompts.parquet")


def with_dataset(folder: Path) -> None:
    """What ``save_to_disk`` of the package datasets writes."""
    import pyarrow

    dataset = folder / "d/prompts.d"
    dataset.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(dataset / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "1", "_split": "train"}
    (dataset / "state.json").write_text(json.dumps(state))


def with_captions(folder: Path) -> None:
    """Images with a table of captions."""
    (folder / "images").mkdir()
    lines = []
    for number in range(3):
        Image.new("RGB", (4, 4)).save(folder / f"images/{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a boat {number}"}))
    (folder / "images/metadata.jsonl").write_text("\n".join(lines))


def with_coco(folder: Path) -> None:
    """Images and captions in the layout of MS-COCO, and a part of their features."""
    (folder / "coco/annotations").mkdir(parents=True)
    (folder / "coco/val2017").mkdir()
    images = []
    captions = []
    for number in range(6):
        name = f"{number:012d}.jpg"
        Image.new("RGB", (4, 4)).save(folder / "coco/val2017" / name)
        images.append({"id": number, "file_name": name})
        captions.append({"id": number, "image_id": number, "caption": f"a boat {number}"})
    content = {"images": images, "annotations": captions}
    (folder / "coco/annotations/captions_val2017.json").write_text(json.dumps(content))
    np.savez(folder / "coco/part-00000.npz", features=np.zeros((6, 2048), np.float32))


def _change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def bundle_hashes(folder: Path) -> None:
    """Correct the hashes of the bundle's manifest."""
    _correct(folder / "bundle", folder / "bundle/hipa.json")


def swap_hashes(folder: Path) -> None:
    """Correct the hashes of the swap's manifest."""
    _correct(folder / SWAP, folder / SWAP / MANIFEST)


def _correct(root: Path, manifest: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for name in content["files"]:
            path = root / name
            # A file of 40 GB would take minutes, and its size is refused before its hash.
            if path.is_file() and path.stat().st_size < 10**9:
                content["files"][name] = file_sha256(path)

    _change(manifest, edit)


def _read(reader: str, folder: str) -> tuple[str, ...]:
    return ("read", f"tests.hostile.readers:{reader}", folder)


def _prompts(folder: str) -> tuple[str, ...]:
    return _read("prompts", folder)


TABLES_OF_ARROW: list[Format] = []
if find_spec("pyarrow") is not None:
    TABLES_OF_ARROW += [
        Format("parquet", with_parquet, "p/prompts.parquet", "bytes", _prompts("p")),
        Format("dataset", with_dataset, "d/prompts.d/data.arrow", "bytes", _prompts("d")),
        Format("dataset's state", with_dataset, "d/prompts.d/state.json", "json", _prompts("d")),
    ]

FORMATS = (
    Format("manifest", embedded_bundle, "bundle/hipa.json", "json", GENERATE),
    Format(
        "tokenizer",
        embedded_bundle,
        "bundle/tokenizer/tokenizer.json",
        "json",
        GENERATE,
        bundle_hashes,
    ),
    Format("unet", embedded_bundle, "bundle/unet/model.onnx", "onnx", GENERATE, bundle_hashes),
    Format("swap", with_swap, f"{SWAP}/swap.json", "json", (*GENERATE, "--adaptor", "night")),
    Format(
        "swap weights",
        with_swap,
        f"{SWAP}/weights.npz",
        "npz",
        (*GENERATE, "--adaptor", "night"),
        swap_hashes,
    ),
    Format(
        "reference tensors",
        embedded_bundle,
        "bundle/reference/tensors.npz",
        "npz",
        DOCTOR,
        bundle_hashes,
    ),
    Format(
        "reference prompts",
        embedded_bundle,
        "bundle/reference/prompts.json",
        "json",
        DOCTOR,
        bundle_hashes,
    ),
    Format(
        "baked contexts",
        with_baked_prompts,
        "bundle/prompts/contexts.npy",
        "npy",
        GENERATE,
        bundle_hashes,
    ),
    Format(
        "baked prompts",
        with_baked_prompts,
        "bundle/prompts/prompts.txt",
        "text",
        GENERATE,
        bundle_hashes,
    ),
    Format(
        "sidecar",
        with_engine,
        "bundle/engines/unet.json",
        "json",
        ("doctor", "bundle/engines/unet.json"),
    ),
    Format(
        "latency report",
        two_reports,
        "report.json",
        "json",
        ("profile", "compare", "other.json", "report.json"),
    ),
    *(
        Format(f"{kind} image", with_image, f"{kind}/image.{kind}", "image", _read("image", kind))
        for kind in ("png", "jpeg", "webp")
    ),
    *(
        Format(f"{kind} prompts", with_prompts, f"{kind}/prompts.{kind}", "table", _prompts(kind))
        for kind in ("txt", "csv", "tsv")
    ),
    *TABLES_OF_ARROW,
    Format(
        "captions", with_captions, "images/metadata.jsonl", "table", _read("captions", "images")
    ),
    Format(
        "COCO's captions",
        with_coco,
        "coco/annotations/captions_val2017.json",
        "json",
        _read("coco", "coco"),
    ),
    Format(
        "features of COCO",
        with_coco,
        "coco/part-00000.npz",
        "npz",
        _read("coco_features", "coco"),
    ),
)
