"""Sounds: decode= makes waveforms of latents, and what is saved has the recorded score."""

# pyright: reportArgumentType=false

import itertools
import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import ROOT, blocks
from saved_runs import read
from zoo.accounts import ANIMALS, bare
from zoo.audio import RATE, waves
from zoo.building import call_of, pipeline_of
from zoo.checks import SCORED, Subject, fingerprint, own

import steering.run
import tilt.report
from steering import FeynmanKac, Steered, steer
from steering.call import PipelineCall
from steering.outputs import Sound, from_levels, levels, scaled, to_levels
from steering.weights import log_mean_exp
from tilt.report.media import opened

PROMPT = "rain on a roof"
PLAIN = FeynmanKac(reward_scale=0.0)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def loudness(waveforms, prompts):
    assert waveforms.ndim == 3
    return waveforms.square().mean((1, 2)).sqrt() * 10


def sound(name="StableAudio3Pipeline"):
    animal = ANIMALS[name]
    return Subject(pipeline_of(name, animal), call_of(name, animal), ("a red cube", "two dots"))


def run(it, settings=SCORED, reward=loudness, prompt=PROMPT, **more):
    given = {"decode": waves, "particles": 3, "progress": False} | more
    return steer(it.pipe, prompt, reward, settings=settings, **it.call, **given)


def read_wav(path: Path):
    """The waveform (channels, samples) and the rate, as other programs read 16 bits."""
    with wave.open(str(path), "rb") as file:
        content = file.readframes(file.getnframes())
        assert file.getsampwidth() == 2
        samples = np.frombuffer(content, "<i2").reshape(-1, file.getnchannels())
        return torch.from_numpy(samples.T.astype(np.float32) / 32768), file.getframerate()


# --- through the filter


@pytest.mark.parametrize("name", ["StableAudio3Pipeline", "AceStepPipeline", "AudioLDM2Pipeline"])
def test_sounds_are_resampled_and_the_pipeline_stays_as_it_was(name):
    it = sound(name)
    before = fingerprint(it.pipe)
    out = run(it)
    assert any(score.replaced.any() for score in out.lineage.scores)
    assert fingerprint(it.pipe) == before
    waveforms, rate = waves(out.latents[0])
    assert rate == RATE
    torch.testing.assert_close(out.rewards[0], loudness(waveforms, []), rtol=1e-3, atol=1e-3)
    assert out.lineage.scores[0].previews is None


def test_without_a_reward_the_sounds_are_those_of_the_pipelines_own_call():
    it = sound()
    pipe = it.pipe
    decode = lambda x: (pipe.vae.decode(x).sample, pipe.vae.config.sampling_rate)  # noqa: E731
    out = run(it, PLAIN, prompt="a red cube", decode=decode)
    theirs = own(it, out.manifest["settings"]["noise"], "pt", "count")
    ours = torch.stack([one.waveform for one in out.images[0]])[..., : theirs.shape[-1]]
    assert out.images[0][0].rate == 16
    torch.testing.assert_close(ours, theirs.clamp(-1, 32767 / 32768), rtol=0, atol=0.51 / 32768)


@pytest.mark.parametrize("more", [{}, {"prompts_per_call": 2}, {"max_batch": 2}])
def test_the_weights_are_those_of_the_saved_sounds(tmp_path, more):
    settings = FeynmanKac(reward_scale=7.0, min_ess=0.0)
    out = run(sound(), settings, prompt=["a red cube", "two dots"], **more)
    assert isinstance(out, Steered)
    manifest = json.loads((out.save(tmp_path) / "manifest.json").read_text(encoding="utf-8"))
    results = manifest["results"]
    assert results["files"][1] == ["0001-00.wav", "0001-01.wav", "0001-02.wav"]
    assert results["frames"] is None
    for i in range(2):
        found = [read_wav(tmp_path / name) for name in results["files"][i]]
        assert {rate for _, rate in found} == {RATE}
        waveforms = torch.stack([waveform for waveform, _ in found])
        assert torch.equal(waveforms, torch.stack([one.waveform for one in out.images[i]]))
        rewards = loudness(waveforms, [])
        torch.testing.assert_close(out.rewards[i], rewards, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            out.log_z[i], log_mean_exp(7 * rewards[None])[0], rtol=1e-5, atol=1e-5
        )
    best = out.best[0]
    best.save(tmp_path / "best.wav")
    assert torch.equal(read_wav(tmp_path / "best.wav")[0], best.waveform)


def test_every_level_of_16_bits_survives_and_louder_samples_are_clipped():
    every = torch.arange(-32768, 32768, dtype=torch.float32).div(32768).reshape(1, 2, -1)
    (one,) = from_levels(to_levels(every), 44100)
    assert torch.equal(one.waveform, every[0])
    assert torch.equal(scaled(levels([one])), every)
    loud = to_levels(torch.tensor([[[-2.0, 1.0, 3.0, 0.5]]]))
    assert loud.tolist() == [[[-32768, 32767, 32767, 16384]]]


def test_texts_beside_the_prompts_are_given_to_each_row():
    defaults = {"prompt": None, "lyrics": "", "vocal_language": "en"}
    call = PipelineCall({"lyrics": ["la", "li"]}, defaults, ("a", "b"))
    dealt = call.for_prompts([1], 3, [])
    assert dealt["prompt"] == ["b"] * 3
    assert dealt["lyrics"] == ["li"] * 3
    assert dealt["vocal_language"] == ["en"] * 3
    both = run(sound("AceStepPipeline"), PLAIN, prompt=["a", "b"], lyrics=["la", "li lu"])
    alone = run(sound("AceStepPipeline"), PLAIN, prompt="b", lyrics="li lu")
    assert torch.equal(both.latents[1], alone.latents[0])


# --- what is refused


def test_what_makes_sound_needs_a_decode_of_its_own():
    with pytest.raises(ValueError, match=r"AceStepPipeline generates sound; pass steer\(\) deco"):
        steer(bare("AceStepPipeline"), PROMPT, loudness, progress=False)
    with pytest.raises(ValueError, match="LTX2Pipeline generates sound beside images, with lat"):
        steer(bare("LTX2Pipeline"), PROMPT, loudness, decode=waves, progress=False)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda x: waves(x)[0], r"returned \(2, 2, 32\) for 2 latents; .* a pair of waveforms"),
        (lambda x: (waves(x)[0][0], RATE), r"returned \(\(2, 32\), 8000\) for 2 latents"),
        (lambda x: (waves(x)[0], 8000.0), r"returned \(\(2, 2, 32\), 8000.0\) for 2 latents"),
        (lambda x: (waves(x)[0], None), r"returned \(\(2, 2, 32\), None\) for 2 latents"),
        (lambda x: None, "returned None for 2 latents"),
        (lambda x: "a.wav", "returned str for 2 latents"),
        (lambda x: (waves(x)[0].mul(32767).short(), RATE), "returned values of torch.int16; ret"),
    ],
)
def test_what_is_no_pair_of_waveforms_and_rate_is_refused(made, said):
    with pytest.raises(ValueError, match=f"decode= {said}"):
        run(sound(), decode=made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, cut: (x[..., cut:], RATE), r"\(2, 32\) at 8000 Hz and \(2, 24\) at 8000 Hz"),
        (lambda x, cut: (x, RATE + cut), r"\(2, 32\) at 8000 Hz and \(2, 32\) at 8008 Hz"),
    ],
)
def test_sounds_of_several_lengths_or_rates_are_refused(monkeypatch, change, said):
    monkeypatch.setattr(steering.run, "DECODE_CHUNK", 1)
    number = itertools.count()
    with pytest.raises(ValueError, match=f"decode= returned {said} in one run; return one shape"):
        run(sound(), decode=lambda x: change(waves(x)[0], 8 * (next(number) == 2)))


def test_a_decode_that_makes_one_sound_of_several_latents_is_refused_before_the_first_step():
    it = sound()
    steps = []
    decode = lambda x: (waves(x)[0][:1], RATE)  # noqa: E731
    with pytest.raises(ValueError, match=r"decode= returned \(\(1, 2, 32\), 8000\) for 2 latents"):
        run(it, PLAIN, decode=decode, watch=steps.append)
    assert not steps


@pytest.mark.parametrize("more", [{"preview_size": 0.5}, {"preview": torch.nn.Identity()}])
def test_a_preview_that_decode_would_replace_is_refused(more):
    said = "decode= also makes the images scored|preview= is a Identity"
    with pytest.raises(ValueError, match=said):
        run(sound(), **more)


def test_frames_of_sounds_are_refused():
    with pytest.raises(ValueError, match="there are no videos of several frames here"):
        run(sound(), score_frames=2)


def test_a_reward_of_another_shape_is_named_with_waveforms():
    with pytest.raises(ValueError, match=r"returned shape \(3, 2\) for 3 waveforms; return one"):
        run(sound(), reward=lambda waveforms, prompts: waveforms.mean(2))


def test_a_momentum_that_does_not_follow_the_particles_is_refused():
    """ACE-Step keeps one, in a variable of its call, where guidance is used."""
    it = sound("AceStepPipeline")
    call = it.call | {"guidance_scale": 4.0}
    with pytest.raises(ValueError, match=r"keeps a momentum .* pass guidance_scale=1.0, or Feyn"):
        run(Subject(it.pipe, call))
    best_of_k = FeynmanKac(reward_scale=7.0, min_ess=0.0)
    assert run(Subject(it.pipe, call), best_of_k).rewards.isfinite().all()


# --- reports and docs


def test_the_report_shows_waveforms_that_link_to_the_sounds(tmp_path):
    out = run(sound())
    page = read(tilt.report.write(out.save(tmp_path)))
    hrefs = [attrs["href"] for attrs, _ in page.all("a")]
    assert {f"./0000-{j:02d}.wav" for j in range(3)} <= set(hrefs)


def test_the_picture_of_a_sound_is_as_high_as_it_is_loud(tmp_path):
    waveform = torch.zeros(2, 999)
    waveform[1, 500:] = -0.5
    Sound(waveform, RATE).save(tmp_path / "a.wav")
    ink = np.asarray(opened(tmp_path / "a.wav").convert("L")) < 200
    assert ink[:, :120].sum(0).max() == 1
    assert ink[:, 140:].sum(0).min() == pytest.approx(32, abs=1)  # a quarter of 128
    (tmp_path / "a.wav").write_bytes(b"RIFFnonsense")
    with pytest.raises(ValueError, match=r"a.wav is no readable sound \(.*\); write it again"):
        opened(tmp_path / "a.wav")
    Sound(torch.zeros(1, 0), RATE).save(tmp_path / "none.wav")
    assert opened(tmp_path / "none.wav").size == (256, 128)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "steering.md").read_text(encoding="utf-8")
    (example,) = [body for _, body in blocks(text.partition("## Sounds")[2]) if "decode" in body]
    names = {"pipe": sound().pipe}
    exec(compile(example, "steering.md", "exec"), names)
    waveform, rate = read_wav(tmp_path / "rain.wav")
    assert rate == 16
    assert waveform.shape == (2, 32)
    best = names["out"].rewards.max().item()
    assert names["loudness"](waveform[None], [PROMPT]).item() == pytest.approx(best, rel=1e-5)
