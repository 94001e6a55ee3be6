"""The OCR reward by Tesseract, a program of its own."""

import shutil
import sys

import numpy as np
import pytest
import torch
from drawn_texts import DRAWN, READ, WORDS, picture

import rewards
from rewards.backends import ocr_engines
from rewards.backends.ocr_engines import Tesseract
from rewards.images import to_images
from rewards.models.ocr import OcrReward

TSV = "\n".join(
    [
        "level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext",
        "1\t1\t0\t0\t0\t0\t0\t0\t256\t256\t-1\t",
        "4\t1\t1\t1\t1\t0\t10\t120\t90\t30\t-1\t",
        "5\t1\t1\t1\t1\t1\t10\t120\t90\t30\t91\tNOW",
        "4\t1\t2\t1\t1\t0\t10\t20\t200\t30\t-1\t",
        "5\t1\t2\t1\t1\t1\t10\t20\t90\t30\t96\tSLOW",
        '5\t1\t2\t1\t1\t2\t120\t20\t90\t30\t12\t"DOWN',
        "5\t1\t2\t1\t1\t3\t120\t20\t90\t30\t95\t ",
        "",
    ]
)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a `tesseract` on the PATH whose body is the given Python."""

    def write(body: str) -> None:
        file = tmp_path / "tesseract"
        file.write_text(f"#!{sys.executable}\nimport io, os, sys, time\n{body}\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return write


def test_tesseract_gets_a_png_on_stdin_and_one_thread(program, tmp_path):
    program(
        f"""
sys.path[:] = {sys.path!r}
from PIL import Image
image = Image.open(io.BytesIO(sys.stdin.buffer.read()))
print(image.format, *image.size, os.environ["OMP_THREAD_LIMIT"], *sys.argv[1:],
      sep="\\n", file=open({str(tmp_path / "said")!r}, "w"))
print({TSV!r}, end="")
"""
    )
    assert Tesseract()(np.zeros((64, 100, 3), np.uint8)) == 'SLOW "DOWN NOW'
    said = (tmp_path / "said").read_text().split()
    assert said[:4] == ["PNG", "400", "256", "1"]
    settings = "-l eng --oem 1 --psm 11 -c tessedit_create_tsv=1"
    assert " ".join(said[4:]) == f"stdin stdout {settings}"
    for shape, size in (((256, 300), ["600", "512"]), ((700, 600), ["600", "700"])):
        Tesseract()(np.zeros((*shape, 3), np.uint8))
        assert (tmp_path / "said").read_text().split()[1:3] == size
    OcrReward(engine="tesseract", psm=7, upscale=1).read(torch.zeros(1, 3, 20, 10))
    said = (tmp_path / "said").read_text().split()
    assert said[1:3] == ["10", "20"]
    assert said[said.index("--psm") + 1] == "7"


def test_a_tesseract_that_fails_or_hangs_is_an_error_and_not_an_empty_text(program, monkeypatch):
    picture = np.zeros((8, 8, 3), np.uint8)
    program("sys.stderr.write('Could not load\\nany languages\\n'); sys.exit(1)")
    with pytest.raises(RuntimeError, match="failed with code 1: any languages"):
        Tesseract()(picture)
    program("sys.exit(3)")
    with pytest.raises(RuntimeError, match="code 3: nothing"):
        Tesseract()(picture)
    program("time.sleep(30)")
    monkeypatch.setattr(ocr_engines, "TIMEOUT", 0.2)
    with pytest.raises(TimeoutError, match=r"over 0\.2 s for an image of 8 × 8"):
        Tesseract()(picture)


def test_a_missing_tesseract_names_the_debian_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt install tesseract-ocr"):
        rewards.load("ocr(engine=tesseract)")


needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="the program tesseract is not installed"
)


@needs_tesseract
def test_tesseract_reads_rendered_words_and_their_order():
    shown = [picture(word, 16 + i % 5, seed=i) for i, word in enumerate(WORDS[:5])]
    prompts = [f'the word "{word}"' for word in WORDS[:5]]
    reward = rewards.load("ocr(mode=exact, engine=tesseract)")
    assert str(reward) == "ocr(mode=exact, engine=tesseract)"
    assert reward(to_images(shown), prompts).mean() >= 0.8
    for name in ("one below another", "words apart", "a short word before a tall one"):
        assert Tesseract()(np.array(DRAWN[name])) == READ[name]
    assert OcrReward(engine="tesseract").read(torch.ones(1, 3, 64, 64)) == [""]


@needs_tesseract
def test_small_type_is_enlarged_for_tesseract():
    shown = to_images([picture(word, 8, seed=0) for word in WORDS[:5]])
    prompts = [f'"{word}"' for word in WORDS[:5]]
    large = OcrReward("exact", engine="tesseract")(shown, prompts).mean()
    small = OcrReward("exact", engine="tesseract", upscale=1)(shown, prompts).mean()
    assert large >= 0.7
    assert small <= 0.4
