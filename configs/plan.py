"""Published models at published sizes, to be planned on a pod without weights, data or a TPU.

jaxrec plan --config=plan:qwen3_8b_grpo --topology=v5e:16x16
jaxrec plan --config=plan:qwen3_30b_a3b_grpo --topology=v6e:16x16
jaxrec plan --config=plan:deepseek_v3_decode --topology=v5p:8x8x8
"""

from ml_collections import ConfigDict

VARIANTS = ("qwen3_8b_grpo", "qwen3_30b_a3b_grpo", "deepseek_v3_decode")

# The fields of each model's public config.json that give its shape; those that are null there are left out.
_QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "attention_bias": False, "use_sliding_window": False, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": (), "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "attention_bias": False, "use_sliding_window": False,
    "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_DEEPSEEK_V3 = {  # without its quantization_config: planned in bfloat16
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "moe_layer_freq": 1, "first_k_dense_replace": 3, "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def get_config(variant: str = "qwen3_8b_grpo") -> ConfigDict:
    c = ConfigDict()
    c.system = "plan"
    c.variant = variant
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})  # devices per axis; one may be -1 (the rest)
    c.programs = ("update", "decode")  # of score, update, prefill, decode

    c.model = ConfigDict()
    c.model.path = ""  # folder with a config.json to plan instead; no weights are read
    c.model.fields = ConfigDict(_QWEN3_8B)
    c.model.dtype = "bfloat16"  # of activations
    c.model.weights = "float32"  # as the trainer holds them; Adam's moments are as wide
    c.model.remat = "block"  # recompute blocks in the backward pass
    c.model.moe_form = "auto"  # how experts are run, see models.moe

    c.rl = ConfigDict()  # see rl.GRPOConfig
    c.rl.prompts_per_step = 128
    c.rl.group_size = 8
    c.rl.minibatches = 1
    c.rl.micro_batches = 4
    c.rl.kl_coef = 0.0
    # Every piece sums a gradient of the head over all chips: as few as memory allows.
    c.rl.logprob_chunk = 1024
    c.rl.log_entropy = False

    c.rollout = ConfigDict()
    c.rollout.max_prompt = 1024  # tokens
    c.rollout.max_total = 4096  # tokens, prompt and response
    c.rollout.max_new = 3072  # tokens per segment
    c.rollout.turns = 1  # segments per row
    c.rollout.top_p = 1.0

    if variant == "qwen3_30b_a3b_grpo":
        c.model.fields = ConfigDict(_QWEN3_30B_A3B)
        c.mesh.expert = 16
    elif variant == "deepseek_v3_decode":
        c.model.fields = ConfigDict(_DEEPSEEK_V3)
        c.model.weights = "bfloat16"
        c.programs = ("decode",)
        c.mesh.update({"fsdp": 1, "expert": -1, "tensor": 8})
        c.rl.prompts_per_step = 64
        c.rollout.max_prompt = 4096
        c.rollout.max_total = 8192
        c.rollout.max_new = 4096
    return c
