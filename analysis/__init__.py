"""Everything that looks inside a model, steers it or prunes it: pure functions over the taps and edits of ``models``.

Names are resolved on first use, so that importing the package costs nothing.
"""

import importlib

_EXPORTS = {
    "Calibration": "experts",
    "Contributions": "contributions",
    "Filtered": "heads",
    "Firings": "neurons",
    "Flow": "flows",
    "HeadScores": "heads",
    "HeadSet": "heads",
    "NeuronFile": "neuron_file",
    "Prompt": "prompts",
    "Prompts": "prompts",
    "SEGMENTS": "segments",
    "Selected": "neurons",
    "Selection": "neurons",
    "Stages": "flows",
    "Statistics": "experts",
    "Steer": "steering",
    "TOP_KEY": "heads",
    "ablate_window": "contributions",
    "activation_probabilities": "neurons",
    "add_samples": "heads",
    "answer_logprobs": "batches",
    "attention_flow": "flows",
    "attention_sums": "flows",
    "build_prompt": "prompts",
    "check_disjoint": "neurons",
    "check_gold": "heads",
    "check_head_sets": "heads",
    "check_skipped": "segments",
    "coarse_filter": "heads",
    "copy_score": "heads",
    "count_firings": "neurons",
    "deactivate": "neurons",
    "document_scores": "heads",
    "find_key": "segments",
    "fine_candidates": "heads",
    "firing_counter": "neurons",
    "from_question": "heads",
    "gold_recall": "heads",
    "head_set": "heads",
    "hide": "steering",
    "kape": "neurons",
    "knock_out": "flows",
    "knock_out_effects": "flows",
    "load_head_set": "heads",
    "logit_contributions": "contributions",
    "logit_lens": "contributions",
    "masked_picks": "experts",
    "mean_outputs": "contributions",
    "merge_experts": "experts",
    "mix": "experts",
    "neuron_lists": "neuron_file",
    "neuron_mask": "neuron_file",
    "overlap": "experts",
    "pad_labels": "segments",
    "pad_prompts": "prompts",
    "pasta": "steering",
    "prompt_segments": "segments",
    "question_attention": "heads",
    "random_sets": "neurons",
    "read_neurons": "neuron_file",
    "rewind": "steering",
    "saliency_flow": "flows",
    "saliency_probe": "flows",
    "saliency_scores": "flows",
    "save_head_set": "heads",
    "segment_sums": "flows",
    "select": "experts",
    "select_by": "experts",
    "select_neurons": "neurons",
    "site_means": "batches",
    "split_at_question": "prompts",
    "split_by_source": "neurons",
    "stage_boundaries": "flows",
    "statistics": "experts",
    "steer": "steering",
    "token_weight": "experts",
    "top_heads": "heads",
    "whole_layers": "heads",
    "window_effects": "contributions",
    "write_neurons": "neuron_file",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"analysis.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'analysis' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
