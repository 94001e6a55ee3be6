"""Put trained weights into the packages: fp16 safetensors, configurations and a size check.

python -m scripts.tiny.export --run runs/tiny
python -m scripts.tiny.export --run runs/tiny --mix runs/slips --share 0.75
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..parser import parser_of
from .cards import GRID, ROOT

LIMIT = 24_000_000  # bytes of all embedded weights together
PIPELINES = ("tiny-sd3", "tiny-sd")


def export_folder(source: Path, target: Path) -> None:
    """Copy a diffusers or transformers folder with its weights rounded to fp16.

    The configurations say float32, so that both libraries compute in float32 unless told otherwise
    (transformers 5 would take the dtype of the file).
    """
    for old in target.glob("*"):
        if old.name not in ("README.md", GRID):  # written by evaluate and grids
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(source, target, dirs_exist_ok=True)
    for file in target.rglob("*.safetensors"):
        weights = {name: value.half() for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors lets only the owner read it
    for file in target.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if config.get("_class_name") == "AutoencoderTiny":
            config.pop("block_out_channels", None)  # diffusers writes it and refuses to read it
        if "dtype" in config or "torch_dtype" in config:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def mix(folder: Path, other: Path, share: float) -> None:
    """Move the weights in `folder` by `share` of the way to those of the same names in `other`."""
    for file in folder.rglob("*.safetensors"):
        ours, theirs = load_file(file), load_file(other / file.relative_to(folder))
        mixed = {name: ours[name].float().lerp(theirs[name].float(), share).half() for name in ours}
        save_file(mixed, file, metadata={"format": "pt"})
        file.chmod(0o644)


def embedded_bytes() -> int:
    """The size of all embedded weights."""
    files = [*ROOT.glob("steering/tiny/**/*.safetensors"), *ROOT.glob("rewards/**/*.safetensors")]
    return sum(file.stat().st_size for file in files)


def main(argv: list[str] | None = None) -> None:
    """Export everything that the run folder holds."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--mix", type=Path, help="another run: average the pipelines with its own")
    parser.add_argument(
        "--share", type=float, default=0.75, help="share of the other run in that average"
    )
    args = parser.parse_args(argv)
    for name in (*PIPELINES, "preview"):
        if (args.run / name).is_dir():
            export_folder(args.run / name, ROOT / "steering" / "tiny" / name)
        if args.mix is not None and name in PIPELINES:
            mix(ROOT / "steering" / "tiny" / name, args.mix / name, args.share)
    for name in ("clip", "dino", "aesthetic"):
        if (args.run / name).is_dir():
            export_folder(args.run / name, ROOT / "rewards" / "tiny" / name)
    size = embedded_bytes()
    print(f"embedded weights: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"{size} bytes of weights are over the limit of {LIMIT}")


if __name__ == "__main__":
    main()
