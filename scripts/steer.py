"""Steer a diffusion model towards a reward and keep the pictures.

The samples come from p(x0 | prompt) exp(λ r(x0, prompt)): a Feynman-Kac particle filter runs inside
the pipeline's own call, one population of particles a prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

import rewards
from steering import FeynmanKac, loading, runs, tiny
from steering.prompts import Prompt, read
from steering.settings import population_sizes, scored_steps

if TYPE_CHECKING:
    from steering import Steered

EXAMPLES = """\
examples:
  # the embedded model: no GPU, no network
  python scripts/steer.py 'the word "CRAB"' --model tiny-sd3 --reward ocr --compare

  # several prompts from a file, two rewards
  python scripts/steer.py --prompt-file prompts.txt --reward "clip(tiny) + 0.01*jpeg" \\
    --reward-scale 100

  # carry on where an interrupted run stopped
  python scripts/steer.py --prompt-file prompts.txt --reward-scale 100 --out out/many --resume

  # halve the population twice on the way, k = 8, 4, 2
  python scripts/steer.py "two red stars" --model tiny-sd --reward-scale 100 \\
    --num-scores 2 --funnel 4,2

  # a model from the hub or from a folder that pipe.save_pretrained() wrote
  python scripts/steer.py "a corgi" --model stabilityai/stable-diffusion-3.5-medium \\
    --reward-scale 100 --max-batch 4

a prompt file is text, one prompt a line, or .jsonl, one object a line:
  {"prompt": "a red circle", "seed": 3, "references": ["circle.png"]}
"""

FIELD_HELP = {
    "reward_scale": "λ, how hard the reward pulls: 10 suits rewards in [0, 1] such as ocr, 100 a "
    "CLIP cosine, which differs by hundredths",
    "potential": "what a score weighs by: difference, max, sum or immediate",
    "resampler": "multinomial, stratified, systematic, residual or ssp",
    "min_ess": "resample where the effective sample size is below this share of the particles",
    "num_scores": "steps to score on the way, besides the final image",
    "score_from": "first scored step, as a fraction of the steps",
    "score_to": "last scored step, as a fraction of the steps",
    "noise": "noise of each move: DDIM's eta (default: 1), or its share of sigma for flow models "
    "(default: 0.5)",
    "tempering": "how λ grows: none, linear or adaptive",
    "funnel": "particles left after each scored step, as in 8,4,2; empty keeps all",
}
# What may differ between a run and its continuation: it changes speed or memory, not the target.
NOT_COMPARED = {"out", "resume", "prompts", "prompt_file", "max_batch", "attention", "device"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (--help lists what there is)")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        return action.help if unsaid else f"{action.help} (default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    """Every option, grouped; the filter's come from the fields of FeynmanKac."""
    p = _Parser(
        prog="steer.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _add_inputs(p)
    group = p.add_argument_group("filter")
    group.add_argument("--particles", type=_count, default=8, help="k, particles a prompt")
    for field in dataclasses.fields(FeynmanKac):
        kind = _populations if field.name == "funnel" else type(field.default)
        kind = float if field.default is None else kind
        default = "" if field.name == "funnel" else field.default
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=kind, default=default, help=FIELD_HELP[field.name])
    _add_machine(p)
    return p


def _add_inputs(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompts", nargs="*", default=[], metavar="PROMPT", help="what to draw")
    p.add_argument("--prompt-file", type=Path, help="more prompts: .txt or .jsonl, see below")
    p.add_argument("--out", type=Path, help="folder; by default out/ and the time of day")
    p.add_argument("--resume", action="store_true", help="skip what --out has already finished")
    p.add_argument("--compare", action="store_true", help="plain and best of k at the same seeds")
    group = p.add_argument_group("model and reward")
    names = " or ".join(tiny.NAMES)
    group.add_argument("--model", default="tiny-sd3", help=f"hub id, folder, or {names}")
    group.add_argument("--lora", help="LoRA weights to load: hub id, folder or file")
    known = ", ".join(rewards.available())
    spec = f"{known}, or a sum such as 'clip + 0.5*ocr(mode=strict)'"
    group.add_argument(
        "--reward", help=f"{spec} (default: clip, or clip(tiny) for an embedded model)"
    )
    group.add_argument(
        "--preview",
        default="auto",
        help="an AutoencoderTiny (folder or hub id) that decodes for the scores on the way; none; "
        "auto: that of an embedded model, none for others",
    )
    group = p.add_argument_group("the pipeline's call (by default its own values)")
    group.add_argument("--steps", type=_count, help="denoising steps")
    group.add_argument("--guidance-scale", type=float, help="classifier-free guidance")
    group.add_argument("--negative-prompt", help="what to keep away from")
    group.add_argument("--height", type=_count, help="pixels")
    group.add_argument("--width", type=_count, help="pixels")
    group.add_argument("--seed", type=int, default=0, help="a line of a .jsonl may set its own")


def _add_machine(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    dtype = "of the networks; auto: float32 on a CPU, else a half type"
    add("--dtype", default="auto", choices=["auto", *loading.DTYPES], help=dtype)
    attention = "auto, sdpa, xformers, or another backend of diffusers"
    add("--attention", default="auto", help=attention)
    add("--max-batch", type=_count, help="rows that the network evaluates at once")
    add("--prompts-per-call", type=_count, default=1, help="prompts in one batch")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a whole number of 1 or more")
    return int(text)


def _populations(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(",") if part.strip())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ValueError, with the nearest name, for a flag that does not exist."""
    p = parser()
    args, unknown = p.parse_known_intermixed_args(argv)
    for flag in unknown:
        near = difflib.get_close_matches(flag.partition("=")[0], p._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise ValueError(f"there is no option {flag}: {hint}")
    return args


def open_folder(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Path:
    """Make --out, with all that it takes to repeat the run; or check it, where it is resumed."""
    if args.resume and args.out is None:
        raise ValueError("--resume needs --out, the folder of the run to carry on")
    out = args.out or Path("out") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    manifest = {
        "settings": {name: value for name, value in vars(args).items() if name not in NOT_COMPARED},
        "prompts": [dataclasses.asdict(prompt) for prompt in prompts],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    runs.open_run(out, manifest, resume=args.resume)
    return out


@dataclasses.dataclass(frozen=True)
class Share:
    """The prompts of one seed, in batches that share a call of the pipeline and a folder."""

    seed: int
    prompts: list[Prompt]
    batches: dict[Path, Sequence[int]]  # folder -> which of `prompts`

    def pending(self) -> dict[Path, Sequence[int]]:
        return {folder: which for folder, which in self.batches.items() if not folder.exists()}


def divide(out: Path, prompts: Sequence[Prompt], size: int) -> list[Share]:
    """The prompts by seed, at most `size` a batch."""
    of_seed: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        of_seed.setdefault(prompt.seed or 0, []).append(index)
    shares = []
    for seed, indices in of_seed.items():
        batches = {}
        for start in range(0, len(indices), size):
            first = indices[start]
            folder = out / runs.folder_name(first, prompts[first].text)
            batches[folder] = range(start, min(start + size, len(indices)))
        shares.append(Share(seed, [prompts[i] for i in indices], batches))
    return shares


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Those of the command line, then those of the file, each with its seed."""
    prompts = [Prompt(text) for text in args.prompts]
    prompts += read(args.prompt_file) if args.prompt_file else []
    if not prompts:
        raise ValueError("there is no prompt: write one or more, or name a --prompt-file")
    return [p if p.seed is not None else dataclasses.replace(p, seed=args.seed) for p in prompts]


def call_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of the pipeline's own call; an embedded model has defaults of its own."""
    if (args.height is None) != (args.width is None):
        raise ValueError("--height and --width go together: some pipelines ignore one alone")
    given = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
    }
    defaults = tiny.call_defaults(args.model) if args.model in tiny.NAMES else {}
    return defaults | {name: value for name, value in given.items() if value is not None}


def check_window(settings: FeynmanKac, args: argparse.Namespace, call: dict[str, Any]) -> None:
    """Refuse a window without steps, or a funnel that does not fit, before a model is loaded."""
    from steering.observer import needs_scores

    if "num_inference_steps" in call and needs_scores(settings, args.particles):
        scored = scored_steps(call["num_inference_steps"], settings)
        population_sizes(args.particles, len(scored), settings)


def start(
    args: argparse.Namespace, settings: FeynmanKac, reward: Any, shares: Sequence[Share]
) -> Iterator[tuple[Path, dict[str, Steered]]]:
    """Load the model and check everything; what it returns then steers a batch at a time."""
    from steering.pipeline import steer_each

    device = loading.pick_device(args.device)
    dtype = loading.DTYPES[args.dtype]
    pipe = loading.load_pipeline(args.model, dtype, args.lora).to(device)
    preview = loading.load_preview(args.preview, args.model, dtype)
    loading.set_attention(pipe, args.attention)
    pipe.set_progress_bar_config(disable=True)  # steer_each() has a bar over all prompts

    def begin(share: Share, settings: FeynmanKac, progress: bool) -> Iterator[Steered]:
        pictures = [
            [Image.open(name).convert("RGB") for name in prompt.references]
            for prompt in share.prompts
        ]
        return steer_each(
            pipe,
            [prompt.text for prompt in share.prompts],
            reward,
            args.particles,
            settings,
            seed=share.seed,
            preview=None if preview is None else preview.to(device),
            max_batch=args.max_batch,
            prompts_per_call=args.prompts_per_call,
            progress=progress,
            references=pictures if any(pictures) else None,
            only=[i for which in share.pending().values() for i in which],
            **call_keywords(args),
        )

    # Without resampling the chain is the plain one: particle 0 is the plain sample, and the one of
    # highest reward the best of k.
    plain = dataclasses.replace(settings, min_ess=0.0, funnel=())
    kinds = {"steered": settings} | ({"plain": plain} if args.compare else {})
    begun = [
        (share, {kind: begin(share, kinds[kind], kind == "steered") for kind in kinds})
        for share in shares
    ]
    return (
        (folder, {kind: next(results) for kind, results in streams.items()})
        for share, streams in begun
        for folder in share.pending()
    )


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot work, the cheapest check first; then steer what is not finished yet."""
    prompts = read_prompts(args)
    settings = FeynmanKac(**{name: getattr(args, name) for name in FIELD_HELP})
    check_window(settings, args, call_keywords(args))
    loading.check_name(args.model)
    device = loading.pick_device(args.device)
    # by their names, so that a continuation on another machine cannot mix what auto stands for
    args.dtype = str(loading.pick_dtype(args.dtype, device)).removeprefix("torch.")
    args.reward = args.reward or ("clip(tiny)" if args.model in tiny.NAMES else "clip")
    reward = rewards.load(args.reward, device)
    reward.check([prompt.text for prompt in prompts])
    out = open_folder(args, prompts)
    shares = divide(out, prompts, args.prompts_per_call)
    folders = sorted(folder for share in shares for folder in share.batches)
    shares = [share for share in shares if share.pending()]
    try:
        if shares:
            total = sum(len(share.pending()) for share in shares)
            keep_all(start(args, settings, reward, shares), total)
    except KeyboardInterrupt:
        done = sum(folder.exists() for folder in folders)
        print(
            f"steer.py: interrupted; {done} of {len(folders)} are finished and kept: "
            f"repeat the command with --out {out} --resume to carry on",
            file=sys.stderr,
        )
        return 130
    for path in runs.draw(out, folders):
        print(path)
    return 0


def keep_all(work: Iterator[tuple[Path, dict[str, Steered]]], total: int) -> None:
    """Save each result when it is there and say how it went and how long the rest will take."""
    began = time.monotonic()
    for done, (folder, results) in enumerate(work, 1):
        runs.keep(folder, results)
        left = (time.monotonic() - began) / done * (total - done)
        tqdm.write(f"{done}/{total}, {_duration(left)} left: {_summary(results)}  {folder}")


def _summary(results: dict[str, Steered]) -> str:
    """Rewards, each a mean over the batch's prompts."""
    best = results["steered"].rewards.amax(1).mean().item()
    if "plain" not in results:
        return f"best reward {best:.3g}"
    plain = results["plain"].rewards
    k, first = plain.shape[1], plain[:, 0].mean().item()
    return f"plain {first:.3g}, best of {k} {plain.amax(1).mean().item():.3g}, steered {best:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence; 130 after Ctrl-C."""
    try:
        return run(parse(argv))
    except ValueError as error:
        print(f"steer.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("steer.py: interrupted before anything was finished", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
