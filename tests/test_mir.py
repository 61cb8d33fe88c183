"""MIR: laws of the distance and of the normalisation, an independent computation of the definition, and the command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from llava_tiny import tiny_llm, tiny_tower, write_data, write_parts

from llm_stage import eval_mir
from llm_stage.llava import build_llava
from llm_stage.mir import PairBatch, frechet_distance, modality_integration_rate, token_masks, trace_of_root
from llm_stage.train_llava import main as train
from mmkit.errors import ConfigError, DataError
from mmkit.report_data import read_runs

IMAGE = 9  # id of the placeholder in these tests
WIDTH, LAYERS = 6, 3


class Given:
    """A model whose hidden states are given: [rows, tokens, width] for each layer."""

    def __init__(self, states: list[torch.Tensor]) -> None:
        text = SimpleNamespace(hidden_size=states[0].shape[-1], num_hidden_layers=len(states))
        self.config, self.device = SimpleNamespace(text_config=text, image_token_id=IMAGE), torch.device("cpu")
        self.states = states

    def __call__(self, input_ids, attention_mask, rows, **_):
        return SimpleNamespace(hidden_states=[None, *(state[rows] for state in self.states)])


def mir_of(states, image_tokens=200, groups=1, **settings):
    """MIR of given states, two rows a batch, the first tokens of each row being the image's."""
    rows, length = states[0].shape[:2]
    ids = torch.zeros(2, length, dtype=torch.long)
    ids[:, :image_tokens] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batches = [PairBatch({**inputs, "rows": torch.tensor([row, row + 1])}, [row % groups, (row + 1) % groups]) for row in range(0, rows, 2)]
    return modality_integration_rate(Given(states), lambda: batches, groups=groups, **settings)


def normal_states(seed=0, layers=LAYERS, rows=4, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, tokens, WIDTH, generator=generator) + 1 for _ in range(layers)]


# -- the distance ----------------------------------------------------------------------------------------------------------------------


def covariance(seed, rank=WIDTH):
    factors = np.random.default_rng(seed).normal(size=(WIDTH, rank))
    return torch.from_numpy(factors @ factors.T)


@pytest.mark.parametrize("ranks", [(6, 6), (6, 2), (3, 2)])
def test_the_root_is_scipys(ranks) -> None:
    a, b = covariance(1, ranks[0]), covariance(2, ranks[1])
    expected = np.trace(scipy.linalg.sqrtm(a.numpy() @ b.numpy() + 0j)).real
    assert trace_of_root(a, b) == pytest.approx(expected, abs=1e-5 * float(a.trace()))  # roots of zeros are of order sqrt(rounding)
    assert trace_of_root(a, a) == pytest.approx(float(a.trace()), rel=1e-6)


def test_the_distance_is_symmetric_and_zero_only_between_equals() -> None:
    means, covariances = (torch.ones(WIDTH).double(), torch.zeros(WIDTH).double()), (covariance(1), covariance(2))
    there, back = frechet_distance(means, covariances), frechet_distance(means[::-1], covariances[::-1])
    assert there == pytest.approx(back)
    assert there[1] == WIDTH
    assert there[0] > WIDTH
    assert frechet_distance((means[0], means[0]), (covariances[0], covariances[0]))[0] == pytest.approx(0, abs=1e-6)


# -- the rate --------------------------------------------------------------------------------------------------------------------------


def test_equal_sets_of_tokens_have_no_distance() -> None:
    states = normal_states()
    for state in states:
        state[:, 200:] = state[:, :200]
    found = mir_of(states)
    assert sum(layer.distance for layer in found.layers) < 1e-6
    assert found.value < -6


def test_a_growing_offset_grows_the_rate() -> None:
    values = []
    for offset in (0.0, 0.5, 1.0, 4.0):
        states = normal_states()
        for state in states:
            state[:, :200] += offset
        values.append(mir_of(states).value)
    assert values == sorted(values)
    assert values[-1] > values[0] + 1


def test_the_scale_of_a_layer_counts_for_nothing() -> None:
    states = normal_states()
    states[1][:, :200] *= 2
    plain, scaled = mir_of(states), mir_of([states[0], states[1] * 1000, states[2] * 0.01])
    assert scaled.value == pytest.approx(plain.value, rel=1e-5)
    alone = [state.clone() for state in states]
    alone[1][:, :200] *= 10  # image tokens alone: that is a gap
    assert mir_of(alone).value > plain.value


def test_outliers_do_not_count() -> None:
    states = normal_states(layers=1)
    plain = mir_of(states)
    states[0][0, 300] = 1e4  # an attention sink among the text tokens
    states[0][1, 5] = 1e4
    spoilt = mir_of(states)
    raw = [found.layers[0].distance * found.layers[0].norms["text"] ** 2 for found in (plain, spoilt)]  # the scale is taken before
    assert spoilt.layers[0].outliers == {"vision": 1, "text": 1}
    assert raw[1] == pytest.approx(raw[0], rel=0.05)  # two tokens of 1600 are missing


def test_it_is_what_the_definition_says() -> None:
    states = normal_states(rows=2)
    states[2][:, :200] = states[2][:, :200] * 1.5 + 2
    states[0][0, 7] *= 50
    total = 0.0
    for state in states:
        vision, text = (part.reshape(-1, WIDTH).double().numpy() for part in (state[:, :200], state[:, 200:]))
        scale = 1 / np.linalg.norm(text, axis=1).mean()
        kept = []
        for tokens in (vision * scale, text * scale):
            norms = np.linalg.norm(tokens, axis=1)
            kept.append(tokens[np.abs(norms - torch.from_numpy(norms).median().item()) <= 3 * norms.std(ddof=1)])
        (m, s), (n, t) = ((tokens.mean(0), np.cov(tokens, rowvar=False)) for tokens in kept)
        total += ((m - n) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert mir_of(states).value == pytest.approx(math.log10(total), rel=1e-6)


def test_several_passes_are_as_one_and_groups_change_the_interval_alone() -> None:
    states = normal_states(rows=8)
    states[0][:, :200] += 1
    one = mir_of(states)
    many = mir_of(states, groups=4, memory=1)
    assert many.value == pytest.approx(one.value, rel=1e-9)
    assert math.isnan(one.standard_error)
    assert 0 < many.standard_error < 0.2
    assert [layer.layer for layer in many.layers] == [1, 2, 3]


def test_text_is_what_stands_behind_the_image() -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, 4, 5, 0], [IMAGE, 2, IMAGE, 3, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])
    found = token_masks(ids, mask, IMAGE)
    assert found["text"].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert found["vision"].sum().item() == 4
    with pytest.raises(DataError, match="row 1 of the batch has no text token"):
        token_masks(torch.tensor([[IMAGE, 1], [1, IMAGE]]), torch.ones(2, 2, dtype=torch.long), IMAGE)


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    model, processor = build_llava(tiny_tower(), tiny_llm())
    generator = torch.Generator().manual_seed(0)
    pixels, token = torch.randn(4, 3, 32, 32, generator=generator), model.config.image_token_id
    rows = [[token] * 16 + torch.randint(5, 200, (length,), generator=generator).tolist() for length in (30, 12, 25, 8)]

    def batches(size):
        for begin in range(0, 4, size):
            part = rows[begin : begin + size]
            longest = max(map(len, part))
            ids = torch.tensor([row + [processor.tokenizer.pad_token_id] * (longest - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
            inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[begin : begin + size]}
            yield PairBatch(inputs, [(begin + row) % 2 for row in range(len(part))])

    alone, together = (modality_integration_rate(model, lambda size=size: batches(size), groups=2) for size in (1, 4))
    assert together.value == pytest.approx(alone.value, rel=1e-5)
    assert len(alone.layers) == 2


# -- the command -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mir")
    write_parts(folder)
    write_data(folder, rows=24, text_only_every=4)
    words = ["--stage", 1, "--encoder", folder / "encoder", "--llm", folder / "llm", "--json", folder / "data.json"]
    words += ["--images", folder / "images", "--steps", 2, "--micro_batch_size", 4, "--check_saving", "false"]
    train([str(word) for word in [*words, "--output_dir", folder / "runs" / "stage1"]])
    return folder


def arguments(world, out, texts="data.json", *more):
    words = ["--model", world / "runs" / "stage1" / "model", "--texts", world / texts, "--images", world / "images", "--out", out]
    return [str(word) for word in [*words, "--pairs", 12, "--groups", 3, *more]]


def test_the_command_writes_an_evaluation_that_reports_leave_out_of_their_tables(world, tmp_path) -> None:
    out = eval_mir.main(arguments(world, world / "runs" / "stage1" / "mir"))
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["benchmark"], summary["n"], len(summary["layers"])) == ("mir", 12, 2)
    low, high = summary["metrics"]["mir"]["ci95"]
    assert low < summary["metrics"]["mir"]["value"] < high
    assert json.loads((out / "manifest.json").read_text())["state"] == "finished"
    report = read_runs([world / "runs"])
    assert report.evaluations == []
    assert report.notes[0].startswith("stage1/mir: mir ")
    again = eval_mir.main([*arguments(world, tmp_path / "again"), "--batch_size", "1"])
    assert json.loads((again / "summary.json").read_text())["metrics"]["mir"]["value"] == pytest.approx(
        summary["metrics"]["mir"]["value"], rel=1e-4
    )
    with pytest.raises(DataError, match="--overwrite"):
        eval_mir.main(arguments(world, out))


def test_texts_come_from_captions_and_from_lines(world, tmp_path) -> None:
    names = sorted(path.name for path in (world / "images").iterdir())
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    captions = [{"image_id": number, "caption": f"it is number {number}"} for number in range(len(names))]
    (world / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (world / "lines.txt").write_text("\n".join(f"it is number {number}\n" for number in range(len(names))))
    for texts in ("captions.json", "lines.txt"):
        out = eval_mir.main(arguments(world, tmp_path / texts, texts, "--template", "vicuna_v1"))
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["n"], summary["protocol"]["template"]) == (12, "vicuna_v1")


@pytest.mark.parametrize(
    "more, kind, message",
    [
        (["--groups", "1"], ConfigError, "groups from 2"),
        (["--max_length", "16"], ConfigError, "no text is left"),
        (["--images", "nowhere"], ConfigError, "no folder"),
        (["--texts", "nothing.json"], DataError, "no conversations file"),
    ],
)
def test_what_cannot_be_measured_leaves_nothing_behind(world, tmp_path, more, kind, message) -> None:
    with pytest.raises(kind, match=message):
        eval_mir.main(arguments(world, tmp_path / "out", "data.json", *more))
    assert not (tmp_path / "out").exists()
