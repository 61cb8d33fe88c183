"""The Q-Former's network and the three losses of its first stage, held against LAVIS's own numbers and their laws."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from encoders import convert
from llm_stage.lavis import config_of, from_lavis, to_lavis
from llm_stage.qformer import QFormer, QFormerConfig
from llm_stage.qformer_folder import encoder_features, load_frozen_encoder
from llm_stage.qformer_losses import Pairs, gather_pairs, hard_negatives, itc_loss, stage1_loss
from llm_stage.qformer_retrieval import Candidates, Matches, best_by_itc, itc_scores, match_texts, sought
from mmkit.errors import DataError

GOLDEN = Path(__file__).parent / "golden" / "qformer"
LOSSES = ("itc", "itm", "itg")


def load_golden() -> dict[str, dict[str, Tensor]]:
    names = ("state_dict", "inputs", "outputs", "grads", "two_process", "retrieval")
    return {name: load_file(GOLDEN / f"{name}.safetensors") for name in names}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    return load_golden()


def made(golden: dict[str, dict[str, Tensor]], attention: str = "sdpa") -> QFormer:
    """LAVIS's tiny model as ours, asleep."""
    sizes = json.loads((GOLDEN / "config.json").read_text())
    state = from_lavis(golden["state_dict"], "golden")
    config = config_of(state, heads=sizes["heads"], pad=sizes["PAD"], cls=sizes["CLS"], sep=sizes["SEP"], dec=sizes["DEC"])
    model = QFormer(config)
    model.load_state_dict(state)
    model.qformer.set_attn_implementation(attention)
    return model.eval()


def pairs_of(golden: dict[str, dict[str, Tensor]], ids: Tensor | None = None, rows: slice = slice(None)) -> Pairs:
    inputs = golden["inputs"]
    image_ids = torch.arange(6) if ids is None else ids
    return Pairs(golden["outputs"]["image_embeds_raw"][rows], inputs["input_ids"][rows], inputs["attention_mask"][rows], image_ids[rows])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_output_is_lavis_own(golden: dict[str, Any], attention: str) -> None:
    model, outputs, inputs = made(golden, attention), golden["outputs"], golden["inputs"]
    with torch.no_grad():
        image = model.image_states(outputs["image_embeds_raw"])
        written = inputs["input_ids"].clone()
        written[:, 0] = model.config.dec
        queries, logits = model.queries_and_caption(image, written, inputs["attention_mask"])
        words = model.text(inputs["input_ids"], inputs["attention_mask"])
        close(image, outputs["image_embeds"])
        close(model.queries(image), outputs["query_output"])
        close(queries, outputs["query_output"])  # one pass for both: the queries do not see the text
        on_words = inputs["attention_mask"].bool()
        close(words[on_words], outputs["text_hidden"][on_words])
        close(model.image_embeddings(queries), outputs["image_feats"])
        close(model.text_embeddings(words), outputs["text_feat"])
        close(logits[on_words], outputs["lm_logits"][on_words])


@pytest.mark.parametrize("prefix", ["", "ids_"])
def test_losses_and_gradients_are_lavis_own(golden: dict[str, Any], prefix: str) -> None:
    model, inputs, outputs = made(golden), golden["inputs"], golden["outputs"]
    ids = inputs["image_ids"] if prefix else None
    drawn = (inputs[f"{prefix}neg_image_idx"], inputs[f"{prefix}neg_text_idx"])
    loss, terms = stage1_loss(model, pairs_of(golden, ids), torch.Generator(), negatives=drawn)
    for name in LOSSES:
        assert float(terms[name]) == pytest.approx(float(outputs[f"{prefix}loss_{name}"]), abs=1e-5), name
    loss.backward()
    expected = {key.removeprefix("ids/"): tensor for key, tensor in golden["grads"].items() if key.startswith("ids/") == bool(prefix)}
    compare_gradients(model, {key: tensor for key, tensor in expected.items() if not key.startswith("both_sides/")})


def test_a_step_computes_an_images_keys_once_and_a_re_ranking_too(golden: dict[str, Any], raw: Tensor) -> None:
    model, rows = made(golden), []
    for name, module in model.named_modules():
        if name.endswith(("crossattention.attention.key", "crossattention.attention.value")):
            module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    layers = sum(hasattr(layer, "crossattention") for layer in model.qformer.encoder.layer)
    stage1_loss(model, pairs_of(golden), torch.Generator().manual_seed(0))
    assert rows == [6] * 2 * layers
    rows.clear()
    theirs = golden["retrieval"]
    states = model.image_states(raw)[0].detach()
    match_texts(model, states, theirs["input_ids"], theirs["attention_mask"], torch.arange(12), batch_size=5)
    assert rows == [1] * 2 * layers


def compare_gradients(model: QFormer, expected: dict[str, Tensor], least: int = 3) -> None:
    named = from_lavis(expected, "golden gradients")
    compared = 0
    for name, parameter in model.named_parameters():
        if name not in named or name.endswith("key.bias") or float(named[name].norm()) < 1e-4:
            continue
        difference = float((parameter.grad - named[name]).norm() / named[name].norm())
        assert difference < 2e-5, (name, difference)
        compared += 1
    assert compared >= least


def test_gradients_into_both_sides_are_an_option(golden: dict[str, Any]) -> None:
    model, inputs = made(golden), golden["inputs"]
    drawn = (inputs["neg_image_idx"], inputs["neg_text_idx"])
    loss, _ = stage1_loss(model, pairs_of(golden), torch.Generator(), both_sides=True, negatives=drawn)
    loss.backward()
    compare_gradients(model, {k.removeprefix("both_sides/"): v for k, v in golden["grads"].items() if k.startswith("both_sides/")}, least=1)


@pytest.mark.parametrize("ids", ["plain", "ids"])
def test_two_ranks_are_one(ids: str, golden: dict[str, Any], tmp_path: Path, child_environment: dict[str, str], free_port: int) -> None:
    """ITC, ITM and their gradients also equal LAVIS's own run of two processes; its ITG is a mean of means, ours of all words."""
    environment = {**child_environment, "PYTHONPATH": f"{Path(__file__).parent}:{child_environment['PYTHONPATH']}"}
    words = [sys.executable, str(Path(__file__).parent / "qformer_ranks.py")]
    ranks = [subprocess.Popen([*words, str(rank), str(free_port), str(tmp_path), ids], env=environment) for rank in range(2)]
    assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    prefix = "ids_" if ids == "ids" else ""
    found = [load_file(tmp_path / f"{prefix}{rank}.safetensors") for rank in range(2)]
    theirs, outputs = golden["two_process"], golden["outputs"]
    mean = (found[0]["losses"] + found[1]["losses"]) / 2
    expected = torch.stack([outputs[f"{prefix}loss_{name}"] for name in LOSSES] + [outputs[f"{prefix}loss"]])
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0]["losses"][:2], theirs[f"{prefix}rank_losses"][0, :2], rtol=0, atol=1e-5)
    for lavis, ours in (
        ("vision_proj.weight", "vision_projection.weight"),
        ("text_proj.weight", "text_projection.weight"),
        ("temp", "temp"),
    ):
        difference = (found[0][f"grad/{ours}"] - theirs[f"{prefix}grad/{lavis}"]).norm() / theirs[f"{prefix}grad/{lavis}"].norm()
        assert float(difference) < 2e-5, ours
    one = made(golden)
    inputs = golden["inputs"]
    drawn = (inputs[f"{prefix}neg_image_idx"], inputs[f"{prefix}neg_text_idx"])
    stage1_loss(one, pairs_of(golden, inputs["image_ids"] if prefix else None), torch.Generator(), negatives=drawn)[0].backward()
    for name, parameter in one.named_parameters():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(found[0][f"grad/{name}"], parameter.grad, rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def raw(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What the encoder gives for the retrieval's images: LAVIS's file of three blocks, converted, its last but one block read."""
    folder = tmp_path_factory.mktemp("eva")
    sizes = {"img_size": 42, "patch_size": 14, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 279 / 64}
    convert.eva([str(GOLDEN / "eva_vit.safetensors"), str(folder / "vit"), "--model", "eva_vit_g", "--model_args", json.dumps(sizes)])
    encoder = load_frozen_encoder(str(folder / "vit"), -2)
    first = encoder_features(encoder, golden["inputs"]["pixel_values"], -2)
    close(first, golden["outputs"]["image_embeds_raw"])
    return encoder_features(encoder, golden["retrieval"]["pixel_values"], -2)


def reranked(
    model: QFormer, states: Tensor, ids: Tensor, mask: Tensor, by_image: Candidates, by_text: Candidates, k: int
) -> tuple[Candidates, Candidates]:
    """Both ways, re-ranked."""
    texts = sought(by_image, by_text, k)
    logits = [match_texts(model, image, ids, mask, some, batch_size=3) for image, some in zip(states, texts, strict=True)]
    found = Matches(texts, logits, len(ids))
    return found.rerank(by_image, k, of_images=True), found.rerank(by_text, k, of_images=False)


def test_scores_and_reranked_scores_are_lavis_own(golden: dict[str, Any], raw: Tensor) -> None:
    model, theirs = made(golden), golden["retrieval"]
    ids, mask = theirs["input_ids"], theirs["attention_mask"]
    with torch.no_grad():
        states = model.image_states(raw)
        images, texts = model.image_embeddings(model.queries(states)), model.text_embeddings(model.text(ids, mask))
        close(itc_scores(images, texts), theirs["itc_cos"])
        close(torch.stack([model.match(states[i : i + 1], ids, mask)[:, 1] for i in range(6)]), theirs["itm_logit_all"])
    by_image, by_text = best_by_itc(images, texts, 12)
    texts_found, images_found = reranked(model, states, ids, mask, by_image, by_text, k=4)
    close(texts_found.score[:, :4], theirs["score_i2t"].gather(1, texts_found.index[:, :4]))
    close(images_found.score[:, :4], theirs["score_t2i"].gather(1, images_found.index[:, :4]))
    assert [sorted(row) for row in texts_found.index.tolist()] == [list(range(12))] * 6
    assert bool((texts_found.score[:, 4:] < texts_found.score[:, 3:4]).all())
    places = images_found.ranks([[row // 2] for row in range(12)], 6)
    official = json.loads((GOLDEN / "retrieval_metrics.json").read_text())
    assert 100 * sum(place < 1 for place in places) / 12 == pytest.approx(official["itc_then_itm"]["img_r1"])
    itc = by_image.ranks([[2 * image, 2 * image + 1] for image in range(6)], 12)
    for k in (1, 5, 10):
        assert 100 * float((itc < k).mean()) == pytest.approx(official["itc_only"][f"txt_r{k}"])
    back = by_text.ranks([[text // 2] for text in range(12)], 6)
    assert 100 * float((back < 5).mean()) == pytest.approx(official["itc_only"]["img_r5"])


def test_reranking_all_is_the_full_ranking_and_more_than_there_are_is_all(golden: dict[str, Any], raw: Tensor) -> None:
    model, theirs = made(golden), golden["retrieval"]
    ids, mask = theirs["input_ids"], theirs["attention_mask"]
    with torch.no_grad():
        states = model.image_states(raw)
        images, texts = model.image_embeddings(model.queries(states)), model.text_embeddings(model.text(ids, mask))
    by_image, by_text = best_by_itc(images, texts, 99)
    whole = theirs["itc_cos"] + theirs["itm_logit_all"]
    texts_found, images_found = reranked(model, states, ids, mask, by_image, by_text, k=99)
    assert texts_found.index.tolist() == whole.argsort(dim=1, descending=True).tolist()
    assert images_found.index.tolist() == whole.T.argsort(dim=1, descending=True).tolist()


def test_a_pair_sought_both_ways_is_matched_once_and_one_that_was_not_is_named() -> None:
    by_image = Candidates(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.9, 0.5], [0.8, 0.1]]))
    by_text = Candidates(torch.tensor([[0, 1], [0, 1], [1, 0]]), torch.tensor([[0.5, 0.1], [0.7, 0.6], [0.9, 0.1]]))
    texts = sought(by_image, by_text, 1)
    assert [some.tolist() for some in texts] == [[0, 1, 2], [1, 2]]
    found = Matches(texts, [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])], 3)
    assert found.rerank(by_text, 1, of_images=False).score[:, 0].tolist() == pytest.approx([1.5, 2.7, 5.9])
    with pytest.raises(DataError, match="were not matched"):
        found.rerank(by_text, 2, of_images=False)


def test_negatives_are_drawn_as_often_as_lavis_draws_them(golden: dict[str, Any]) -> None:
    """Chi-square over 4,000 draws, per row: 4 degrees of freedom, 12 rows; 25 is passed by chance once in 1,700."""
    model, outputs = made(golden), golden["outputs"]
    everyone = gather_pairs(pairs_of(golden), 0)
    scores = outputs["sim_cos"] / model.temp.detach()
    noise, times = torch.Generator().manual_seed(3), 4000
    found = [torch.zeros(6, 6), torch.zeros(6, 6)]
    for _ in range(times):
        for counts, drawn in zip(found, hard_negatives(scores, scores.T, everyone, noise), strict=True):
            counts[torch.arange(6), drawn] += 1
    for counts, name in zip(found, ("neg_image_prob", "neg_text_prob"), strict=True):
        expected = outputs[name] * times
        off = ~torch.eye(6, dtype=torch.bool)
        chi = torch.where(off & (expected > 1), (counts - expected) ** 2 / expected.clamp_min(1e-9), 0.0).sum(dim=1)
        assert float(counts.diagonal().sum()) == 0
        assert float(chi.max()) < 25


def test_a_negative_is_never_a_positive_and_rows_without_one_count_nothing(golden: dict[str, Any]) -> None:
    model, inputs = made(golden), golden["inputs"]
    noise = torch.Generator().manual_seed(0)
    ids = inputs["image_ids"]
    everyone = gather_pairs(pairs_of(golden, ids), 0)
    for _ in range(50):
        for drawn in hard_negatives(torch.zeros(6, 6), torch.zeros(6, 6), everyone, noise):
            assert not bool((ids[drawn] == ids).any())
    alone = pairs_of(golden, torch.zeros(6, dtype=torch.int64))
    _, terms = stage1_loss(model, alone, noise)
    with torch.no_grad():
        logits = model.match(model.image_states(alone.features), alone.ids, alone.mask)
    assert float(terms["itm"]) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.ones(6, dtype=torch.int64))), abs=1e-5
    )


def test_equal_captions_are_no_negatives_of_each_other(golden: dict[str, Any]) -> None:
    pairs = pairs_of(golden)
    twice = Pairs(pairs.features, pairs.ids[[0, 0, 2, 3, 4, 5]], pairs.mask[[0, 0, 2, 3, 4, 5]], pairs.image_ids)
    positive = gather_pairs(twice, 0).positive
    assert bool(positive[0, 1])
    assert bool(positive[1, 0])
    assert int(positive.sum()) == 8


def test_a_head_that_knows_nothing_says_ln_2_and_equal_scores_say_ln_n(golden: dict[str, Any]) -> None:
    model = made(golden)
    torch.nn.init.zeros_(model.itm_head.weight)
    torch.nn.init.zeros_(model.itm_head.bias)
    _, terms = stage1_loss(model, pairs_of(golden), torch.Generator().manual_seed(0))
    assert float(terms["itm"]) == pytest.approx(0.693147, abs=1e-5)
    rows = torch.nn.functional.normalize(torch.ones(6, 16), dim=-1)
    loss, _, _ = itc_loss(rows[:, None].expand(6, 8, 16), rows, torch.tensor(0.07), torch.eye(6, dtype=torch.bool))
    assert float(loss) == pytest.approx(1.791759, abs=1e-5)


def test_padding_and_the_order_of_image_tokens_change_nothing(golden: dict[str, Any]) -> None:
    model, pairs = made(golden), pairs_of(golden)
    drawn = (golden["inputs"]["neg_image_idx"], golden["inputs"]["neg_text_idx"])
    before, _ = stage1_loss(model, pairs, torch.Generator(), negatives=drawn)
    padded = Pairs(
        pairs.features[:, torch.randperm(10)],
        torch.nn.functional.pad(pairs.ids, (0, 5)).masked_fill(
            torch.nn.functional.pad(pairs.mask, (0, 5)) == 0, 77
        ),  # what pads hold is free
        torch.nn.functional.pad(pairs.mask, (0, 5)),
        pairs.image_ids,
    )
    after, _ = stage1_loss(model, padded, torch.Generator(), negatives=drawn)
    assert float(after) == pytest.approx(float(before), abs=2e-5)


def test_words_see_their_past_and_the_image_and_queries_see_no_word(golden: dict[str, Any]) -> None:
    model, pairs = made(golden), pairs_of(golden)
    with torch.no_grad():
        image = model.image_states(pairs.features)
        ids = pairs.ids.clone()
        queries, logits = model.queries_and_caption(image, ids, pairs.mask)
        ids[0, 5] = 50 if int(ids[0, 5]) != 50 else 51
        other_queries, other = model.queries_and_caption(image, ids, pairs.mask)
        _, moved = model.queries_and_caption(image.roll(1, 0), pairs.ids, pairs.mask)
    assert torch.equal(queries, other_queries)
    assert torch.equal(logits[0, :5], other[0, :5])
    assert not torch.equal(logits[0, 5:], other[0, 5:])
    assert not torch.allclose(moved, logits, atol=1e-3)


def test_greedy_captions_are_lavis_own(golden: dict[str, Any]) -> None:
    model, outputs = made(golden), golden["outputs"]
    object.__setattr__(model.config, "sep", 118)  # the golden run did not stop at [SEP]
    ids = model.caption(model.image_states(outputs["image_embeds_raw"]), max_new_tokens=11)
    assert torch.equal(ids, outputs["greedy_ids"])


def test_no_two_queries_begin_alike_and_their_feed_forward_begins_as_the_texts() -> None:
    config = QFormerConfig(
        24, width=32, layers=2, heads=4, feed_forward=48, queries=8, vocabulary=40, positions=16, joint_width=8, dec=39, cls=1, sep=2
    )
    model = QFormer(config)
    rows = model.query_tokens.detach()[0]
    assert float(torch.cdist(rows, rows).masked_fill(torch.eye(8, dtype=torch.bool), 9).min()) > 0.05
    for layer in model.qformer.encoder.layer:
        assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
        assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
    assert 0.015 < float(model.qformer.encoder.layer[0].crossattention.attention.key.weight.std()) < 0.025


@pytest.mark.parametrize("width, count", [(1408, 186_705_470), (1024, 183_165_758), (768, 180_805_950)])
def test_parameters_are_as_many_as_in_the_paper(width: int, count: int) -> None:
    with torch.device("meta"):
        model = QFormer(QFormerConfig(width))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_lavis_names_in_and_out_are_the_same_file(golden: dict[str, Any]) -> None:
    back = to_lavis(made(golden))
    assert sorted(back) == sorted(golden["state_dict"])
    for key, tensor in golden["state_dict"].items():
        assert torch.equal(back[key], tensor), key


def test_tokens_of_another_width_and_strange_keys_are_refused_by_name(golden: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\[B, n, 64\].*\[2, 10, 65\]"):
        made(golden).image_states(torch.zeros(2, 10, 65))
    with pytest.raises(Exception, match=r"'head\.weight' is no weight"):
        from_lavis({**golden["state_dict"], "head.weight": torch.zeros(1)}, "x.pth")
