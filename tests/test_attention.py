"""steering.attention: PyTorch's own, and xformers by name where it works.

No wheel of xformers runs on a CPU, so a package of that name stands in for it; diffusers' switches,
processors and dispatcher are the real ones.
"""

import importlib
import subprocess
import sys
import textwrap
from typing import Any

import diffusers
import pytest
import tiny_parts
import tiny_pipelines
import torch
from diffusers.models import attention as diffusers_attention
from diffusers.models import attention_dispatch, attention_processor
from diffusers.utils import import_utils
from test_seams import ROOT

from steering import attention
from steering.networks import networks

COMPUTES = """
    import torch.nn.functional as F
    calls = []
    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert attn_bias is None and p == 0.0 and op is None
        calls.append(tuple(q.shape))
        if q.ndim == 3:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
"""
NOISY = """
    import logging, warnings
    warnings.warn("xFormers was built for another torch")
    logging.getLogger("xformers").warning("xFormers can't load C++/CUDA extensions")
    logging.getLogger("xformers.ops").warning("A matching Triton is not available")
    def memory_efficient_attention(*args, **kwargs):
        warnings.warn("called")
        raise NotImplementedError("No operator found for memory_efficient_attention_forward")
"""
# another scale, no number, and only the first rows right: what a wrong build might give
WRONG = [
    COMPUTES.replace("scale=scale)", "scale=0.5)"),
    COMPUTES.replace("scale=scale)", "scale=float('nan'))"),
    COMPUTES.replace("scale=scale)", "scale=scale).contiguous()[:, :1]"),
]
CPU = torch.device("cpu")


def install(folder, ops):
    """An xformers with these `ops` in a folder, with the metadata that diffusers looks for."""
    (folder / "xformers").mkdir()
    (folder / "xformers" / "__init__.py").write_text("from . import ops\n")
    (folder / "xformers" / "ops.py").write_text(textwrap.dedent(ops))
    (folder / "xformers-0.0.99.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.99\n"
    (folder / "xformers-0.0.99.dist-info" / "METADATA").write_text(metadata)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """use(ops): as if diffusers had been imported with that xformers there, and CPUs were GPUs."""

    def used(ops):
        install(tmp_path, ops)
        monkeypatch.syspath_prepend(tmp_path)
        with attention._quietly():
            module = importlib.import_module("xformers")
        monkeypatch.setattr(import_utils, "_xformers_available", True)
        monkeypatch.setattr(attention_processor, "xformers", module)
        monkeypatch.setattr(diffusers_attention, "xops", module)
        monkeypatch.setattr(attention_dispatch, "xops", module.ops)
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
        monkeypatch.setattr(attention, "_XFORMERS_DEVICES", ("cpu",))
        return module.ops

    attention.xformers_works.cache_clear()
    yield used
    attention.xformers_works.cache_clear()
    for name in ("xformers", "xformers.ops"):
        sys.modules.pop(name, None)


@pytest.fixture
def switch(monkeypatch):
    """set_attention(), where the older switch believes that there is a GPU, and tries the CPU."""
    randn = torch.randn

    def switched(pipe, name):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            on_cpu = {"device": "cpu"}
            patch.setattr(torch, "randn", lambda *size, **given: randn(*size, **(given | on_cpu)))
            attention.set_attention(pipe, name)

    return switched


def latents(pipe, keywords):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, output_type="latent", **keywords)[0]


@pytest.mark.parametrize("family", ["sd", "sdxl", "controlnet", "sd3", "flux"])
def test_xformers_is_used_and_gives_the_same_latents(family, use, switch):
    ops = use(COMPUTES)
    pipe, keywords = tiny_pipelines.family(family)
    before = latents(pipe, keywords)
    assert ops.calls == []
    switch(pipe, "xformers")
    ops.calls.clear()
    after = latents(pipe, keywords)
    found: dict[str, Any] = dict(networks(pipe))
    layers = sum(len(network.attn_processors) for network in found.values())
    steps = len(pipe.scheduler.timesteps)
    assert len(ops.calls) == steps * layers
    # an order of float32 sums apart, through 6 steps
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())


def test_dual_attention_of_sd35_too(use, switch):
    ops = use(COMPUTES)
    pipe, keywords = tiny_pipelines.family("sd3")
    config = {**pipe.transformer.config, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    pipe.transformer = tiny_parts.seeded(diffusers.SD3Transformer2DModel, config)
    before = latents(pipe, keywords)
    switch(pipe, "xformers")
    after = latents(pipe, keywords)
    assert ops.calls
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())


@pytest.mark.parametrize("family", ["sana", "pixart"])
def test_a_network_that_xformers_may_change_keeps_its_own(family, use, switch, caplog):
    """The older switch would put softmax attention in place of Sana's linear one."""
    ops = use(COMPUTES)
    pipe, keywords = tiny_pipelines.family(family)
    before = latents(pipe, keywords)
    switch(pipe, "xformers")
    ops.calls.clear()
    assert torch.equal(latents(pipe, keywords), before)
    assert ops.calls == []
    said = "xformers cannot be used here; transformer uses PyTorch's attention"
    assert caplog.text.count(said) == 1


def test_another_processor_in_a_known_network_keeps_it_from_xformers(use, switch):
    use(COMPUTES)
    pipe, _ = tiny_pipelines.family("sd3")
    pipe.transformer.fuse_qkv_projections()
    before = pipe.transformer.attn_processors
    switch(pipe, "xformers")
    assert pipe.transformer.attn_processors == before


def test_a_compiled_network_is_known_by_what_was_compiled(use, switch):
    use(COMPUTES)
    pipe, _ = tiny_pipelines.family("sd")
    compiled: Any = torch.compile(pipe.unet, backend="eager")
    pipe.unet = compiled
    switch(pipe, "xformers")
    processors = compiled.attn_processors.values()
    assert {type(item).__name__ for item in processors} == {"XFormersAttnProcessor"}


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_compute_attention_work(dtype, dispatched, use):
    ops = use(COMPUTES)
    assert attention.xformers_works(CPU, dtype, dispatched)
    tried = len(ops.calls)
    assert tried >= 5
    assert attention.xformers_works(CPU, dtype, dispatched)
    assert len(ops.calls) == tried  # once


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("ops", [NOISY, *WRONG])
def test_kernels_that_fail_or_give_other_numbers_do_not_work(ops, dispatched, use):
    use(ops)
    assert not attention.xformers_works(CPU, torch.float32, dispatched)


@pytest.mark.parametrize("ops", [COMPUTES, NOISY])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_auto_keeps_the_attention_that_the_pipeline_has(family, ops, use, switch, caplog):
    """PyTorch's own, though xformers would work: it was slower on the GPU where both were timed."""
    called = use(ops)
    pipe, keywords = tiny_pipelines.family(family)
    before = latents(pipe, keywords)
    switch(pipe, "auto")
    assert torch.equal(latents(pipe, keywords), before)
    assert getattr(called, "calls", []) == []
    assert caplog.text == ""


def test_auto_does_not_look_for_xformers(monkeypatch, tmp_path):
    install(tmp_path, "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    pipe, _ = tiny_pipelines.family("sd")
    attention.set_attention(pipe, "auto")
    assert "xformers" not in sys.modules


def test_auto_leaves_a_backend_that_was_chosen_before():
    pipe, _ = tiny_pipelines.family("flux")
    attention.set_attention(pipe, "_native_math")
    attention.set_attention(pipe, "auto")
    assert backends(pipe) == {"_native_math"}


def backends(pipe) -> set[str]:
    processors = pipe.transformer.attn_processors.values()
    return {item._attention_backend.value for item in processors}


def test_a_backend_of_one_network_is_not_that_of_all_others(use):
    use(COMPUTES)
    pipe, _ = tiny_pipelines.family("flux")
    attention.set_attention(pipe, "_native_math")
    assert backends(pipe) == {"_native_math"}
    active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert active == "native"


@pytest.fixture
def unimported(monkeypatch):
    """As before diffusers' models are imported, on a machine with a GPU."""
    monkeypatch.delitem(sys.modules, "diffusers.models.attention_processor")
    monkeypatch.setattr(import_utils, "_xformers_available", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    for name in ("xformers", "xformers.ops"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("unimported")
@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "ImportError", "AttributeError"])
def test_an_import_that_fails_is_kept_from_diffusers(error, tmp_path, monkeypatch, caplog):
    install(tmp_path, f"raise {error}('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    attention.shield()
    assert not import_utils.is_xformers_available()
    assert caplog.text == ""


@pytest.mark.usefixtures("unimported")
def test_an_import_that_talks_is_not_heard(tmp_path, monkeypatch, caplog):
    install(tmp_path, NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    attention.shield()
    assert import_utils.is_xformers_available()  # nothing is taken from who calls it by himself
    assert caplog.text == ""


@pytest.mark.usefixtures("unimported")
def test_a_machine_without_cuda_is_spared_the_import(tmp_path, monkeypatch):
    install(tmp_path, COMPUTES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    attention.shield()
    assert not import_utils.is_xformers_available()
    assert "xformers" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["raise OSError('libcudart.so.99')", NOISY])
def test_steering_imports_without_a_word(ops, tmp_path):
    """In a process of its own, with diffusers' own import of xformers."""
    install(tmp_path, ops)
    program = textwrap.dedent(
        """
        import sys, torch, warnings
        warnings.simplefilter("error")
        torch.cuda.is_available = lambda: True
        import steering
        assert "xformers" not in sys.modules
        from steering import steer
        from tilt import loading
        pipe = loading.load_pipeline("tiny-sd", torch.float32)
        loading.set_attention(pipe, "auto")
        """
    )
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
