"""Fifty real steps of `simmim pretrain` on images of a folder, data path included."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bench.gpu_stages.stage import PRELOAD, Emit, is_tiny


def run(emit: Emit, seconds: float) -> None:
    """Emit the steps' losses and the images per second of the last lines of a run.

    Raises:
        RuntimeError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos, output = Path(folder) / "photos", Path(folder) / "run"
        photos.mkdir()
        draw, count = np.random.default_rng(0), 32 if is_tiny() else 1024
        for number in range(count):
            small = draw.integers(0, 256, (14, 18, 3), np.uint8)
            image = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
            image.save(photos / f"{number:05d}.jpg", quality=90)
        batch, steps = (8, 6) if is_tiny() else (128, 50)
        code = (
            "import importlib, os, sys;"
            f"name = os.environ.get('{PRELOAD}'); name and importlib.import_module(name);"
            "from simmim.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        flags = [f"--data.path={photos}", f"--output={output}", f"--train.steps={steps}",
                 f"--train.batch_size={batch}", "--device=cuda", "--log.every_steps=5",
                 "--log.picture_every_steps=-1"]  # fmt: skip
        command = [sys.executable, "-c", code, "pretrain", "swin_base_192_100ep", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 60))
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-1500:])
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        log = (output / "log.txt").read_text().splitlines()
        emit("log", lines=[line for line in log if "cuda_graph" in line or "backend" in line])
        for row in rows[4::5]:
            emit("row", **{k: row[k] for k in ("step", "loss", "images_per_s", "data_wait")})
