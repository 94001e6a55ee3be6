"""A web app for trying prompts and rewards, which shows the particles of a run as they evolve.

It runs one request at a time; others wait in a queue. It needs the extra "app".
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.ranges import NAME, optional, setting, whole
from steering import tiny
from steering.arguments import MOST_PARTICLES
from tilt import loading, started
from tilt.app.run import Desk, Studio
from tilt.exit_status import of_command
from tilt.options import Options

EXAMPLES = """\
examples:
  # the embedded model: no GPU, no network; then open http://127.0.0.1:7860
  tilt app

  # another initial model, and at most 16 particles
  tilt app --model path/to/pipeline --max-particles 16

  # your own reward; rewards typed into the page cannot import code or open files
  tilt app --reward my_module:my_reward

  # make it accessible to others, who may load any model that this machine can load
  tilt app --host 0.0.0.0
"""


@dataclass
class App:
    """The initial values of the page, and its address."""

    model: str = setting(
        "tiny-sd3", NAME, f"initial model: hub id, folder, or {' or '.join(tiny.NAMES)}"
    )
    lora: str | None = setting(None, optional(NAME), "initial LoRA: hub id, folder or file")
    reward: str | None = setting(None, optional(NAME), "initial reward")
    max_particles: int = setting(64, whole(1, MOST_PARTICLES), "maximum particles of a run")
    host: str = setting("127.0.0.1", NAME, "address to listen on; by default only this machine")
    port: int = setting(7860, whole(1, 65535), "port to listen on")
    device: str = setting("auto", NAME, "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = setting("auto", loading.DTYPE, loading.ABOUT_DTYPE)


OPTIONS = Options("tilt app", App, __doc__ or "", EXAMPLES)


def launch(app: App, root: Path) -> Any:
    """Launch the page; it serves only files in `root`, which contains the folders of runs."""
    loading.check_name(app.model)
    device = loading.pick_device(app.device)
    studio = Studio(device, loading.pick_dtype(app.dtype, device), root)
    try:
        from tilt.app.page import THEME, build
        from tilt.app.view import CSS
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the app needs Gradio: pip install 'tilt-diffusion[app]'") from None
    page = build(Desk(studio.draw), app.model, app.lora, app.reward, app.max_particles)
    try:
        page.launch(
            server_name=app.host, server_port=app.port, share=False, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[],
            allowed_paths=[str(root)], theme=THEME, css=CSS,
            prevent_thread_lock=True, quiet=True,
        )  # fmt: skip
    except OSError as error:  # Gradio's own message names its environment variables
        raise ValueError(
            f"cannot listen on {app.host}, port {app.port} ({error}): try another --port"
        ) from None
    return page


def run(settings: App) -> None:
    """Launch the page, and serve it until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tilt").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="tilt-app-") as root:
        started.say("starting the page")
        page = launch(settings, Path(root))
        with contextlib.suppress(KeyboardInterrupt):
            print(f"open {page.local_url} (Ctrl-C stops it)", flush=True)
            threading.Event().wait()


def main(argv: Sequence[str]) -> int:
    """Return exit status 0 after Ctrl-C, or 2 for refused input or an OSError.

    Before the page is open, Ctrl-C is left to `started.run`, which gives 130.
    """
    return of_command(OPTIONS, argv, run)
