"""An app to play in: watch the particles of a run while they are drawn, in a browser.

One run at a time; people who come meanwhile wait in line. Needs the extra "app".
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

  # a model of your own to begin with, and at most 16 particles
  tilt app --model path/to/pipeline --max-particles 16

  # a reward of your own; those typed into the page import no code and open no files
  tilt app --reward my_module:my_reward

  # for others to reach: they may load any model that this machine can
  tilt app --host 0.0.0.0
"""


@dataclass
class App:
    """What the page begins with, and where it is."""

    model: str = setting(
        "tiny-sd3", NAME, f"hub id, folder, or {' or '.join(tiny.NAMES)}, to begin with"
    )
    lora: str | None = setting(None, optional(NAME), "LoRA to begin with: hub id, folder or file")
    reward: str | None = setting(None, optional(NAME), "reward to begin with")
    max_particles: int = setting(64, whole(1, MOST_PARTICLES), "the most that a run may have")
    host: str = setting("127.0.0.1", NAME, "address to listen at; by default this machine alone")
    port: int = setting(7860, whole(1, 65535), "port to listen at")
    device: str = setting("auto", NAME, "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = setting("auto", loading.DTYPE, loading.ABOUT_DTYPE)


OPTIONS = Options("tilt app", App, __doc__ or "", EXAMPLES)


def launch(app: App, root: Path) -> Any:
    """The running page; `root` holds the runs' folders and is all that it serves from disk."""
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
    except OSError as error:  # Gradio's own words name its environment variables
        raise ValueError(
            f"cannot listen at {app.host}, port {app.port} ({error}): try another --port"
        ) from None
    return page


def run(settings: App) -> None:
    """Open the page, and keep it until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tilt").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="tilt-app-") as root:
        started.say("starting the page")
        page = launch(settings, Path(root))
        with contextlib.suppress(KeyboardInterrupt):
            print(f"open {page.local_url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 after Ctrl-C; 2 for what was refused, in one sentence."""
    return of_command(OPTIONS, argv, run)
