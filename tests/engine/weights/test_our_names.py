"""Our names: what they say of a model's kind, and which of them are for masking."""

from simmim.weights.our_names import count_numbers, kind_of, masking_names


def test_a_decoder_makes_a_masked_model_and_a_head_a_classifier() -> None:
    assert kind_of({"decoder.0.weight": 0, "head.weight": 0}) == "simmim"
    assert kind_of({"head.weight": 0}) == "classifier"
    assert kind_of({"encoder.norm.weight": 0}) == "encoder"


def test_mask_token_and_decoder_are_for_masking_and_the_norm_of_the_mean_for_a_head() -> None:
    names = ("encoder.norm.bias", "encoder.mask_token", "decoder.0.bias", "fc_norm.bias")
    state = dict.fromkeys(names)
    assert masking_names(state, "classifier") == ["encoder.mask_token", "decoder.0.bias"]
    assert masking_names(state, "encoder") == list(names[1:])


def test_numbers_are_counted_to_the_largest_at_the_start_of_a_name() -> None:
    names = ["layers.2.blocks.9", "layers.10.x", "a.layers.40."]
    assert count_numbers(names, r"layers\.(\d+)\.") == 11
    assert count_numbers([], r"layers\.(\d+)\.") == 0
