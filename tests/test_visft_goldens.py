"""The heads against numbers of the authors' own classes (tests/golden/visft)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from encoders.coco_classes import COCO_IDS, Classes
from encoders.heads.caption import CaptionConfig, CaptionHead
from encoders.heads.detection import LOSS_WEIGHTS, DetectionConfig, DetectionHead
from encoders.heads.official import read_official_head, to_official
from encoders.heads.segmentation import SegmentationConfig, SegmentationHead

GOLDEN = Path(__file__).parent / "golden" / "visft"
OUT = {"rtol": 0, "atol": 2e-5}  # the goldens' own tolerance
LOSS = 1e-5  # relative


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "heads_io.safetensors")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "heads_expected.json").read_text())


FILES = {"detection": "det_head", "segmentation": "seg_head", "caption": "cap_head"}


def head(task: str) -> Any:
    return read_official_head(GOLDEN / f"{FILES[task]}.safetensors", task, attention_heads=4).eval()


def test_detection_gives_the_authors_logits_boxes_matches_and_losses(io: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    detection, want = head("detection"), expected["detection"]
    logits, boxes = detection.outputs(io["det.features"], io["det.valid_mask"].bool())
    torch.testing.assert_close(logits, io["det.logits"], **OUT)
    torch.testing.assert_close(boxes, io["det.boxes"], **OUT)
    wanted = [
        {"class_labels": torch.tensor(t["labels"], dtype=torch.int64), "boxes": torch.tensor(t["boxes_cxcywh"]).reshape(-1, 4)}
        for t in want["targets"]
    ]
    targets = [{"labels": torch.tensor([COCO_IDS.index(i) for i in t["labels"]], dtype=torch.int64)} for t in want["targets"]]
    counts = detection.counts(targets)
    assert counts["boxes"] == 4
    total = 0.0
    for layer, layer_want in enumerate(want["per_layer"]):
        matched = detection.match(logits[layer], boxes[layer], wanted)
        pairs = [[list(pair) for pair in zip(q.tolist(), t.tolist(), strict=True)] for q, t in matched]
        assert pairs == layer_want["matches_query_target"]
        terms = detection.layer_loss(logits[layer], boxes[layer], wanted, counts)
        found = {"loss_ce": terms["class"], "loss_bbox": terms["box"], "loss_giou": terms["giou"]}
        for name, value in found.items():
            assert float(value.detach()) == pytest.approx(layer_want[name], rel=LOSS), (layer, name)
        total += sum(LOSS_WEIGHTS[name] * float(value.detach()) for name, value in terms.items())
    assert total == pytest.approx(want["total_weighted"], rel=LOSS)


def test_segmentation_gives_the_authors_maps_and_logits(io: dict[str, torch.Tensor]) -> None:
    segmentation = head("segmentation")
    pixels = segmentation.network.pixel_decoder([io["seg.features"]])
    torch.testing.assert_close(pixels.multi_scale_features[0], io["seg.encoder_map"], **OUT)
    torch.testing.assert_close(pixels.mask_features, io["seg.mask_features"], **OUT)
    classes, masks = segmentation.outputs(io["seg.features"])
    torch.testing.assert_close(classes, io["seg.class_logits"], **OUT)
    torch.testing.assert_close(masks, io["seg.mask_logits"], **OUT)


def test_captions_give_the_authors_logits_attention_and_losses(io: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    caption, want = head("caption"), expected["caption"]
    assert (caption.vocabulary.start, caption.vocabulary.end, caption.vocabulary.pad) == (want["start_id"], want["end_id"], want["pad_id"])
    torch.testing.assert_close(caption.pool(io["cap.features"]), io["cap.pooled"], **OUT)
    tokens, lengths = io["cap.tokens"].long(), io["cap.lengths"].long()
    logits, alphas = caption.outputs(io["cap.pooled"], tokens, lengths)
    steps = logits.shape[1]
    torch.testing.assert_close(logits, io["cap.logits"][:, :steps], **OUT)
    torch.testing.assert_close(alphas, io["cap.alphas"][:, :steps], **OUT)
    assert not io["cap.logits"][:, steps:].any()
    with torch.no_grad():
        loss, terms = caption(io["cap.features"], [{"tokens": row[None]} for row in tokens])
    assert float(terms["words"]) == pytest.approx(want["loss_ce"], rel=LOSS)
    assert float(terms["attention"]) == pytest.approx(want["loss_doubly_stochastic"], rel=LOSS)
    assert float(loss) == pytest.approx(want["loss_total"], rel=LOSS)


def authors_file(task: str) -> dict[str, torch.Tensor]:
    """The golden file as the authors write it: segmentation twice (only one half is in the repository)."""
    table = load_file(GOLDEN / f"{FILES[task]}.safetensors")
    for plain, again in (("segment_pixel_decoder", "segment_head.pixel_decoder"), ("segment_predictor", "segment_head.predictor")):
        table |= {name.replace(plain, again): tensor for name, tensor in table.items() if f".{plain}." in name}
    return table


@pytest.mark.parametrize("task", FILES)
def test_an_authors_file_comes_back_as_it_was(task: str, tmp_path: Path) -> None:
    there = authors_file(task)
    torch.save({"model": there}, tmp_path / "heads.pt")
    back = to_official(read_official_head(tmp_path / "heads.pt", task, attention_heads=4))
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in there.items())


NAMES = [str(number) for number in COCO_IDS]


@pytest.mark.parametrize(
    "width, sizes", [(1408, (8_761_312, 13_650_833, 12_956_691)), (1792, (8_810_464, 13_847_441, 14_136_723))], ids=["vit_g", "vit_e"]
)
def test_parameters_are_as_many_as_in_the_paper(width: int, sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        heads = [
            DetectionHead(DetectionConfig(width, Classes.raw_ids(COCO_IDS, NAMES))),
            SegmentationHead(SegmentationConfig(width, Classes.contiguous(COCO_IDS, NAMES))),
            CaptionHead(CaptionConfig(width, tuple(f"w{n}" for n in range(9490 - 4)))),
        ]
    assert tuple(sum(parameter.numel() for parameter in each.parameters()) for each in heads) == sizes
