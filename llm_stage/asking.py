"""What a model is shown of a benchmark's question: its picture, another one, a grey one or none, and the words."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llm_stage.benchmark_files import VqaItem
from llm_stage.benchmarks import Benchmark
from llm_stage.chat_format import Turn
from llm_stage.generate import ChatRequest
from mmkit.images import open_image

BLANK_SIZE, BLANK_COLOUR = (336, 336), (127, 127, 127)  # one size for all, since the shape of a picture tells something of it


def request_for(item: VqaItem, benchmark: Benchmark, images: Path | str, where: str = "") -> ChatRequest:
    """The request of one question, as its benchmark or control asks it.

    Args:
        item: As `benchmarks.controlled` gives it; one whose `image` is "" is asked in words alone.
        benchmark: Its words, and which control it is.
        images: Folder that picture names are relative to; not looked at where the picture is blank.
        where: Of the question, for the message about a broken picture.

    Raises:
        ImageError: The picture cannot be read.
    """
    words = benchmark.ask(item.question)
    if not item.image:
        return ChatRequest(turns=[Turn("user", words)])
    image = (
        Image.new("RGB", BLANK_SIZE, BLANK_COLOUR) if benchmark.control == "blank" else open_image(Path(images) / item.image, where=where)
    )
    return ChatRequest(turns=[Turn("user", f"<image>\n{words}")], images=[image])
