import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from distil_whisper import attention, steps
from distil_whisper.attention import BY_PRODUCTS, attend
from distil_whisper.models import load_whisper
from distil_whisper.rules import Rules

SDPA = "distil_whisper.attention.scaled_dot_product_attention"


def heads(queries=600, keys=700, dtype=torch.bfloat16, loud=0.25):
    """Queries, keys and values of 2 windows and 3 heads; loud is how they are scaled."""
    draw = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    some, others, values = (torch.randn(2, 3, size, 16, generator=draw).to(dtype) for size in sizes)
    return some * loud, others, values


@pytest.fixture
def fused(monkeypatch):
    """The shapes of queries that torch's fused kernel is given."""
    seen = []

    def kernel(queries, *others, **options):
        seen.append(tuple(queries.shape))
        return scaled_dot_product_attention(queries, *others, **options)

    monkeypatch.setattr(SDPA, kernel)
    monkeypatch.setattr(attention, "BFLOAT16", True)
    monkeypatch.setattr(attention, "AMX", False)
    return seen


@pytest.mark.parametrize("queries", [1, 250, 600])
@pytest.mark.parametrize(("loud", "bound"), [(0.25, 0.005), (1.5, 0.02)])
def test_products_find_what_the_formula_finds(fused, queries, loud, bound):
    """In as many parts as the queries need; scores of up to 4, and of up to 25, which bfloat16 rounds to 0.06."""
    given = heads(queries, loud=loud)
    exact = scaled_dot_product_attention(*(states.float() for states in given), scale=1.0)
    found = attend(*given)
    assert not fused and found.dtype == torch.bfloat16
    assert (found - exact).norm() / exact.norm() < bound
    seen = torch.rand(2, 1, queries, 700, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[..., 0] = True
    exact = scaled_dot_product_attention(*(states.float() for states in given), seen, scale=1.0)
    found = attend(*given, mask=torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -torch.inf))
    assert not fused and (found - exact).norm() / exact.norm() < bound


def test_when_the_fused_kernel_is_used(fused, monkeypatch):
    """For float32 and the order of tokens; with AMX also for many queries; always on other CPUs."""
    queries, keys, values = heads()
    few = queries[:, :, :5]
    attend(*(states.float() for states in heads()))
    attend(queries, keys, values, causal=True)
    assert len(fused) == 2
    monkeypatch.setattr(attention, "AMX", True)
    attend(queries, keys, values)
    assert len(fused) == 3
    attend(few, keys, values)
    attend(few, keys, values, mask=torch.zeros(5, 700, dtype=torch.bfloat16))
    assert len(fused) == 3
    monkeypatch.setattr(attention, "BFLOAT16", False)
    attend(few, keys, values)
    assert len(fused) == 4


@pytest.fixture(scope="module")
def pair(toy_teacher):
    """One model with products, one with torch's kernel."""
    return [
        load_whisper(str(toy_teacher), dtype="bfloat16", attn_type=asked, device="cpu").model
        for asked in (None, "sdpa")
    ]


def test_what_a_model_is_loaded_with(pair, toy_teacher):
    assert [model.config._attn_implementation for model in pair] == [BY_PRODUCTS, "sdpa"]
    exact = load_whisper(str(toy_teacher), device="cpu").model
    assert exact.config._attn_implementation == "sdpa"


@pytest.fixture
def products(fused, monkeypatch):
    """How often attention went by products."""
    found = []
    monkeypatch.setattr(attention, "attend", lambda *given: found.append(given[0].shape[2]) or attend(*given))
    return found


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_says_the_same_with_products(pair, products, gradients):
    """The encoder, a decoder whose tokens may not look ahead, and padding that nobody may look at."""
    draw = torch.Generator().manual_seed(1)
    config = pair[0].config
    mels, frames = config.num_mel_bins, 2 * config.max_source_positions
    features = torch.randn(2, mels, frames, generator=draw, dtype=torch.bfloat16)
    tokens = torch.randint(0, 50, (2, 9), generator=draw)
    seen = torch.ones_like(tokens)
    seen[0, :4] = 0
    for mask in (None, seen):
        with torch.set_grad_enabled(gradients):
            told = {"input_features": features, "decoder_input_ids": tokens, "decoder_attention_mask": mask}
            ours, theirs = (model(**told).logits.float() for model in pair)
        assert (ours - theirs)[1].norm() / theirs[1].norm() < 0.02
        assert (ours - theirs)[0, 4:].norm() / theirs[0, 4:].norm() < 0.02
        assert ours.requires_grad == gradients
    # the encoder's layers and those that hear, twice each
    layers = [config.max_source_positions] * config.encoder_layers + [9] * config.decoder_layers
    assert products == ([] if gradients else 2 * layers)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_works_with_products(pair, products, num_beams):
    config = pair[0].config
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, dtype=torch.bfloat16)
    for model in pair:
        told = {"language": "hi", "task": "transcribe", "num_beams": num_beams, "max_new_tokens": 5}
        assert model.generate(features, **told).shape[1] <= 5
    assert products.count(1) >= 2 * config.decoder_layers  # both attentions of each step


def test_our_search_attends_by_products(pair, monkeypatch):
    model, seen = pair[0], []
    monkeypatch.setattr(steps, "attend", lambda *given: seen.append(given[0].shape[2]) or attend(*given))
    encoded = torch.zeros(2, model.config.max_source_positions, model.config.d_model, dtype=torch.bfloat16)
    with torch.no_grad():
        rules = Rules(model.generation_config, model.config.vocab_size, 9, 10, False, "cpu")
        decode = steps.DecoderSteps(model, rules, encoded, 5)
        decode.first([1, 2, 3])
        decode.next(rules.nothing_said(2))
    assert seen == [3] * 2 * model.config.decoder_layers + [1] * 2 * model.config.decoder_layers


def test_a_checkpoint_does_not_name_products(pair, tmp_path):
    """Other programs do not know them."""
    pair[0].save_pretrained(tmp_path)
    assert BY_PRODUCTS not in (tmp_path / "config.json").read_text()
