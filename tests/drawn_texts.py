"""Pictures of texts, for the tests of what reads them."""

from PIL import Image, ImageDraw, ImageFont

WORDS = ["SUN", "MOON", "STOP", "FISH", "TREE", "JAZZ", "OPEN", "QUIZ", "BIRD", "LAMP"]


def picture(word: str, size: int = 18, side: int = 64, seed: int = 0) -> Image.Image:
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (side, side), [(250, 250, 245), (20, 25, 50)][seed % 2])
    colour = [(200, 30, 40), (245, 240, 90)][seed % 2]
    centre = (side // 2, side // 2 + seed % 5 - 2)
    ImageDraw.Draw(image).text(centre, word, fill=colour, font=font, anchor="mm")
    return image


def rows(
    *texts: tuple[int, list[str]], side: int, size: int, gap: int, slant: float = 0
) -> Image.Image:
    """Words in rows at the given heights, the whole turned by `slant` degrees."""
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (side, side), (250, 250, 245))
    for y, words in texts:
        x = side * 0.05
        for word in words:
            ImageDraw.Draw(image).text((x, y), word, fill=(20, 20, 60), font=font)
            x += font.getlength(word) + gap
    return image.rotate(slant, Image.Resampling.BICUBIC, fillcolor=(250, 250, 245))


DRAWN = {
    "one below another": rows((20, ["SLOW"]), (110, ["DOWN"]), side=200, size=40, gap=0),
    "words apart": rows(
        (40, ["SLOW", "DOWN"]), (150, ["NOW", "PLEASE"]), side=320, size=36, gap=60
    ),
    "a short word before a tall one": rows((150, ["ago", "Hello"]), side=512, size=90, gap=90),
    "small type": rows((6, ["ONE", "TWO"]), (15, ["SIX", "TEN"]), side=64, size=9, gap=14),
    "falling": rows(
        (130, ["RED", "BLUE"]), (220, ["SIX", "NINE"]), side=384, size=44, gap=80, slant=-12
    ),
    "rising": rows(
        (130, ["RED", "BLUE"]), (220, ["SIX", "NINE"]), side=384, size=44, gap=80, slant=12
    ),
}


READ = {
    "one below another": "SLOW DOWN",
    "words apart": "SLOW DOWN NOW PLEASE",
    "a short word before a tall one": "ago Hello",
    "small type": "ONE TWO SIX TEN",
    "falling": "RED BLUE SIX NINE",
    "rising": "RED BLUE SIX NINE",
}
