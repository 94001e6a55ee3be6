"""The app's page in Gradio: a form on the left, results on the right."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr  # pyright: ignore[reportMissingImports]

import rewards
from steering import FeynmanKac, tiny
from steering.lineage import Moment
from steering.potentials import POTENTIALS
from tilt.app import inputs, view
from tilt.app.run import Desk, Done, Ended, Event, Loading, Waiting

__all__ = ["THEME", "build"]

THEME = gr.themes.Default(  # with fonts of Gradio or the system, so no network is needed
    primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)  # fmt: skip
HEAD = """<h1>Tilt</h1><p>Several images are generated together. At a score, images with low
rewards may be replaced by copies of better ones.</p>"""
FIRST_PROMPT = "a red circle above a blue square"


def build(desk: Desk, model: str, lora: str | None, reward: str | None, most: int) -> Any:
    """Return the page, to be launched; the arguments are the form's initial values and its limit.

    The reward given here may import code and open files; one typed into the page may not.
    """
    with gr.Blocks(title="Tilt", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEAD, elem_classes="tilt-head")
        with gr.Row():
            with gr.Column(min_width=320):
                form, run, stop, status = _form(model, lora, reward, most)
            with gr.Column(min_width=320, scale=2):
                pictures = gr.HTML(elem_id="pictures")
                scores = gr.HTML(elem_classes="tilt-scores", elem_id="scores")
    names = list(form)

    def on_run(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        try:
            wish = inputs.parse(dict(zip(names, values, strict=True)), most, trusted=reward)
        except ValueError as error:
            yield {status: view.message(str(error), "refused")}
            return
        yield {
            status: view.progress("Starting"), pictures: "", scores: "",
            run: gr.update(interactive=False), stop: gr.update(interactive=True),
        }  # fmt: skip
        with contextlib.closing(desk.run(_session(request), wish)) as events:
            for shown in _shown(events):
                yield {{"status": status, "pictures": pictures, "scores": scores}[part]: text
                       for part, text in shown.items()} or gr.skip()  # fmt: skip
        yield {
            run: gr.update(interactive=True),
            stop: gr.update(interactive=False, value="Stop"),
        }

    def on_stop(request: gr.Request) -> Any:
        desk.stop(_session(request))
        return gr.update(interactive=False, value="Stopping after this step")

    def on_leave(request: gr.Request) -> None:
        desk.stop(_session(request))

    with page:
        # no limit here, since `desk` has the queue, which includes runs that are still ending
        gr.on(
            [run.click, form["prompt"].submit], on_run, [*form.values()],
            [status, pictures, scores, run, stop], concurrency_limit=None,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        stop.click(
            on_stop, None, stop, queue=False, show_progress="hidden", api_visibility="private"
        )
        # the browser may leave without closing its stream of events
        page.unload(on_leave)
    return page


def _session(request: Any) -> str:
    return str(request.session_hash)


def _shown(events: Iterator[Event | None]) -> Iterator[dict[str, str]]:
    """Yield the changes of the page for each event; {} lets Gradio check for its client."""
    began, before = time.monotonic(), None
    scores = ""
    for event in events:
        if event is None:
            yield {}
        elif isinstance(event, Waiting):
            began = time.monotonic()
            others = "one run comes" if event.ahead == 1 else f"{event.ahead} runs come"
            yield {"status": view.progress(f"Waiting: {others} first")}
        elif isinstance(event, Loading):
            yield {"status": view.progress(event.what)}
        elif isinstance(event, Moment):
            shown = {"status": _progress(event)}
            if event.score is not None:
                # only appended to, so that Gradio sends only the new part
                scores = scores or view.LEGEND
                scores += view.score(event.score, event.num_steps, before)
                before, shown["scores"] = event.score, scores
            yield shown
        elif isinstance(event, Ended):
            kind = "stopped" if event.stopped else "refused"
            yield {"status": view.message(event.sentence, kind)}
        elif isinstance(event, Done):
            seconds = time.monotonic() - began
            yield {
                "status": view.message("Finished.", "note"),
                "pictures": view.pictures(event, view.file_link, seconds),
            }


def _progress(moment: Moment) -> str:
    done, total = moment.step + 1, moment.num_steps
    what = f"Step {done} of {total}" if done < total else "Decoding and scoring the images"
    return view.progress(what, done, total)


def _form(model: str, lora: str | None, reward: str | None, most: int) -> tuple[Any, ...]:
    """Return the inputs by their names in `inputs.parse`, the two buttons, and the status line."""
    form: dict[str, Any] = {
        "prompt": gr.Textbox(
            FIRST_PROMPT,
            label="Prompt",
            lines=1,
            max_lines=4,
            elem_id="prompt",
            max_length=2000,
        )
    }
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run", min_width=120)
        stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=120)
    status = gr.HTML(elem_classes="tilt-status", elem_id="status")
    first = reward or inputs.default_reward(model)
    form["reward"] = gr.Textbox(
        first, label="Reward", elem_id="reward", info="a sum such as clip + 0.5*ocr(mode=strict)"
    )
    with gr.Accordion("Build a reward", open=False):
        chosen, weights = _builder()
    with gr.Accordion("Model", open=False):
        form["model"] = gr.Dropdown(
            [*dict.fromkeys([model, *tiny.NAMES])], value=model, allow_custom_value=True,
            label="Model", info="embedded, a folder that pipe.save_pretrained() wrote, or a hub id",
            elem_id="model",
        )  # fmt: skip
        form["lora"] = gr.Textbox(
            lora, label="LoRA", info="a folder or a hub id; none if empty", elem_id="lora"
        )
        # text, because an empty Number has the value 0
        for name, label in (("steps", "Steps"), ("guidance", "Guidance")):
            form[name] = gr.Textbox(label=label, info="the model's default if empty", elem_id=name)
    with gr.Accordion("Filter", open=False):
        form |= _filter(most)
    _join(form["reward"], form["model"], chosen, weights)
    return form, run, stop, status


def _filter(most: int) -> dict[str, Any]:
    default = FeynmanKac()
    k = min(8, most)
    return {
        "particles": _number("Particles", k, f"number of images, up to {most}", "particles"),
        "reward_scale": _number(
            "λ", default.reward_scale, "a reward higher by 1/λ makes an image e times as likely"
        ),
        "potential": gr.Dropdown(
            [*POTENTIALS],
            value=default.potential,
            label="Potential",
            info="how scores become weights",
        ),
        "num_scores": _number(
            "Scores", default.num_scores, "scored steps, besides the final score", "num_scores"
        ),
        "min_ess": _number(
            "Least ESS", default.min_ess,
            "resample below this fraction of the particles; 0 never does (best of k)",
        ),
        "seed": _number("Seed", 0, "the same seed gives the same images"),
    }  # fmt: skip


def _number(label: str, value: float, info: str, name: str | None = None) -> Any:
    # without minimum and maximum, since parse() reports values out of range on the page
    return gr.Number(value, label=label, info=info, elem_id=name)


def _builder() -> tuple[Any, dict[str, Any]]:
    """Return a selection of rewards, and a weight for each, which is shown if it is selected."""
    choices = [(f"{name}: {about}", name) for name, about in rewards.available().items()]
    chosen = gr.CheckboxGroup(choices, label="Rewards", elem_id="chosen")
    weights = {
        name: gr.Number(1.0, label=f"Weight of {name}", visible=False, elem_id=f"weight-{name}")
        for name in rewards.available()
    }
    return chosen, weights


def _join(reward: Any, model: Any, chosen: Any, weights: dict[str, Any]) -> None:
    """Let the builder write the spec into the reward's field, which may also be edited."""
    names = list(weights)

    def write(picked: list[str], model: str, *numbers: float | None) -> Any:
        given = dict(zip(names, numbers, strict=True))
        try:
            return inputs.spec_of({name: given[name] for name in picked}, model)
        except ValueError:  # a weight that is not typed completely
            return gr.skip()

    def show(picked: list[str]) -> list[Any]:
        return [gr.update(visible=name in picked) for name in names]

    # always_last: selections during a pending update are not lost
    quiet = {
        "queue": False, "show_progress": "hidden", "api_visibility": "private",
        "trigger_mode": "always_last",
    }  # fmt: skip
    chosen.change(show, chosen, [*weights.values()], **quiet)
    parts = [chosen, model, *weights.values()]
    gr.on([part.input for part in [chosen, *weights.values()]], write, parts, reward, **quiet)
    model.change(inputs.default_reward, model, reward, **quiet)
