"""An app to play in: watch the particles of a run while they are drawn, in a browser.

One run at a time; people who come meanwhile wait in line. Needs the extra "app".
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering import tiny
from steering.arguments import MOST_PARTICLES
from tilt import loading, started
from tilt.app.run import Desk, Studio
from tilt.options import PORT, Parser, Whole, check_words, one_line

EXAMPLES = """\
examples:
  # the embedded model: no GPU, no network; then open http://127.0.0.1:7860
  tilt app

  # a model of your own to begin with, and at most 16 particles
  tilt app --model path/to/pipeline --max-particles 16

  # a reward of your own; those typed into the page import no code and open no files
  tilt app --reward my_module:my_reward

  # for others to reach: they may load any model that this machine can
  tilt app --host 0.0.0.0
"""


def parser() -> argparse.ArgumentParser:
    """Every option of the app."""
    p = Parser(
        prog="tilt app", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = " or ".join(tiny.NAMES)
    p.add_argument("--model", default="tiny-sd3", help=f"hub id, folder, or {names}, to begin with")
    p.add_argument("--lora", help="LoRA to begin with: hub id, folder or file")
    p.add_argument("--reward", help="reward to begin with")
    p.add_argument(
        "--max-particles",
        type=Whole(1, MOST_PARTICLES),
        default=64,
        help="the most that a run may have",
    )
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine)"
    )
    p.add_argument(
        "--port", type=PORT, default=7860, help="port to listen at (default: %(default)s)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    p.add_argument("--dtype", default="auto", choices=["auto", *loading.DTYPES])
    return p


def launch(args: argparse.Namespace, root: Path) -> Any:
    """The running page; `root` holds the runs' folders and is all that it serves from disk."""
    loading.check_name(args.model)
    device = loading.pick_device(args.device)
    studio = Studio(device, loading.pick_dtype(args.dtype, device), root)
    try:
        from tilt.app.page import THEME, build
        from tilt.app.view import CSS
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the app needs Gradio: pip install 'tilt-diffusion[app]'") from None
    page = build(Desk(studio.draw), args.model, args.lora, args.reward, args.max_particles)
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=False, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[],
            allowed_paths=[str(root)], theme=THEME, css=CSS,
            prevent_thread_lock=True, quiet=True,
        )  # fmt: skip
    except OSError as error:  # Gradio's own words name its environment variables
        raise ValueError(
            f"cannot listen at {args.host}, port {args.port} ({error}): try another --port"
        ) from None
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after Ctrl-C; 2 for what was refused, in one sentence.

    130 after a Ctrl-C before the page was there.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        check_words(words)
        args = parser().parse_args(words)
    except ValueError as error:
        print(f"tilt app: {one_line(error)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tilt").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="tilt-app-") as root:
        try:
            started.say("starting the page")
            page = launch(args, Path(root))
        except ValueError as error:
            print(f"tilt app: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("tilt app: interrupted before it began", file=sys.stderr)
            return 130
        with contextlib.suppress(KeyboardInterrupt):
            print(f"open {page.local_url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    return 0
