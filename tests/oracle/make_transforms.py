"""Writes tests/data/transforms: settings as timm and Hugging Face save them, and what their own code makes of pictures.

    python tests/oracle/make_transforms.py      # needs timm, transformers, torch, torchvision, pillow, safetensors
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

DATA = Path(__file__).parents[1] / "data"
OUT = DATA / "transforms"
PICTURES = ["photo.jpg", "rgb.png", "tall.png", "small.png"]


def timm_settings():
    base = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 40, 40]}
    for filter in ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"):
        yield f"timm_{filter}", {**base, "interpolation": filter, "crop_pct": 0.875, "crop_mode": "center"}
    yield "timm_squash", {**base, "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "squash"}
    yield "timm_whole", {**base, "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
    yield "timm_border", {**base, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "border"}
    wide = {**base, "input_size": [3, 23, 38], "interpolation": "bicubic", "crop_pct": 0.9}
    for mode in ("center", "squash", "border"):
        yield f"timm_wide_{mode}", {**wide, "crop_mode": mode}
    grey = {"input_size": [1, 24, 24], "mean": [0.45], "std": [0.225], "interpolation": "bilinear", "crop_pct": 0.875}
    yield "timm_grey", {**grey, "crop_mode": "center"}
    yield "timm_grey_border", {**grey, "crop_mode": "border"}


def hugging_face_settings():
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    yield "hf_vit", "ViTImageProcessorPil", {"size": {"height": 40, "width": 40}, "resample": 2, **half}
    yield "hf_clip", "CLIPImageProcessorPil", {
        "size": {"shortest_edge": 41}, "crop_size": {"height": 40, "width": 40}, "resample": 3, **imagenet,
    }
    yield "hf_convnext", "ConvNextImageProcessorPil", {
        "size": {"shortest_edge": 40}, "crop_pct": 0.875, "resample": 3, **imagenet,
    }
    yield "hf_wide", "ViTImageProcessorPil", {"size": {"height": 23, "width": 38}, "resample": 2, **half}
    yield "hf_wide_crop", "CLIPImageProcessorPil", {
        "size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 41}, "resample": 3, **imagenet,
    }
    yield "hf_unresized", "CLIPImageProcessorPil", {
        "do_resize": False, "crop_size": {"height": 41, "width": 38}, "resample": 3, **imagenet,
    }
    yield "hf_unscaled", "ViTImageProcessorPil", {
        "size": {"height": 40, "width": 40}, "resample": 1, "do_rescale": False,
        "image_mean": [123.5, 116.25, 103.0], "image_std": [58.0, 57.0, 57.5],
    }


def written_by_hand():
    """Settings as published files have them: numbers for sizes, older names, and what is left out."""
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    yield "hf_deit_numbers", "DeiTFeatureExtractor", {"size": 46, "crop_size": 40, "do_center_crop": True, **imagenet}
    yield "hf_convnext_numbers", "ConvNextFeatureExtractor", {"size": 40, "crop_pct": 0.875, **imagenet}
    yield "hf_mobilevit", "MobileViTFeatureExtractor", {"size": 44, "crop_size": 40, "do_flip_channel_order": True}
    yield "hf_levit", "LevitImageProcessor", {
        "size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}, **imagenet,
    }
    yield "hf_clip_defaults", "CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 40, **half}
    yield "hf_bit", "BitImageProcessor", {"size": {"shortest_edge": 46}, "crop_size": {"height": 40, "width": 40}, **half}
    yield "hf_mobilenet", "MobileNetV2ImageProcessor", {"size": {"shortest_edge": 46}, "crop_size": 40, **half}
    yield "hf_siglip", "SiglipImageProcessorFast", {"size": {"height": 40, "width": 40}, **half}


def main():
    import transformers

    OUT.mkdir(parents=True, exist_ok=True)
    pictures = {name: Image.open(DATA / "pixels" / name).convert("RGB") for name in PICTURES}
    expected = {}
    for name, settings in timm_settings():
        (OUT / f"{name}.json").write_text(json.dumps({"architecture": "any", "pretrained_cfg": settings}, indent=1) + "\n")
        config = timm.data.resolve_data_config(pretrained_cfg={**settings, "fixed_input_size": False})
        transform = timm.data.create_transform(**config)
        for picture, image in pictures.items():
            # As timm's own loader does with the mode that the channels ask for.
            image = image.convert("L") if settings["input_size"][0] == 1 else image
            expected[f"{name}@{picture}"] = transform(image).contiguous()
    for name, kind, settings in hugging_face_settings():
        processor = getattr(transformers, kind, None) or getattr(transformers, kind.removesuffix("Pil"))
        processor = processor(**settings)
        saved = json.loads(processor.to_json_string())
        (OUT / f"{name}.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
        for picture, image in pictures.items():
            values = processor(image, return_tensors="np")["pixel_values"][0]
            expected[f"{name}@{picture}"] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        print(name, type(processor).__name__, sorted(saved))
    for name, kind, settings in written_by_hand():
        key = "feature_extractor_type" if kind.endswith("FeatureExtractor") else "image_processor_type"
        (OUT / f"{name}.json").write_text(json.dumps({key: kind, **settings}, indent=1) + "\n")
        base = kind.removesuffix("FeatureExtractor").removesuffix("ImageProcessor").removesuffix("ImageProcessorFast")
        processor = getattr(transformers, f"{base}ImageProcessorPil")(**settings)
        for picture, image in pictures.items():
            values = processor(image, return_tensors="np")["pixel_values"][0]
            expected[f"{name}@{picture}"] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    save_file(expected, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
