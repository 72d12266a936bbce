#include "tiny_architectures.hpp"

namespace tiny_gguf {

const std::map<std::string, std::string>& groups() {
  static const std::map<std::string, std::string> all = {
      // Keys.
      {"layer_norms", "attention.layer_norm_epsilon=rms_eps"},
      {"window", "attention.sliding_window=window"},
      {"window_list", "attention.sliding_window=window attention.sliding_window_pattern={w}"},
      {"sections", "rope.dimension_sections=[half-2*side,side,side,0]"},  // time, row, column
      {"moe", "expert_count=experts expert_used_count=2 expert_feed_forward_length=expert"},
      {"moe_only", "expert_count=experts expert_used_count=2 feed_forward_length=expert"},  // no width for dense layers
      {"shared_moe", "@moe expert_shared_count=1 expert_shared_feed_forward_length=expert"},
      {"late_moe", "@shared_moe leading_dense_block_count=lead"},
      {"delta",
       "ssm.conv_kernel=4 ssm.inner_size=q ssm.state_size=hd ssm.time_step_rank=heads ssm.group_count=kv_heads"},
      {"mamba2", "ssm.conv_kernel=4 ssm.inner_size=2*d ssm.state_size=16 ssm.time_step_rank=heads ssm.group_count=2"},
      {"latent",  // 16 without positions and 8 with, read from 32
       "attention.head_count_kv=1 attention.q_lora_rank=32 attention.kv_lora_rank=32 attention.key_length=40 "
       "attention.value_length=32 attention.key_length_mla=24 attention.value_length_mla=16 rope.dimension_count=8"},
      // Outside the layers.
      {"ends", "e:token_embd/d,vocabulary n:output_norm/d h:output/d,vocabulary"},
      {"own_ends", "e:token_embd/d,vocabulary n:output_norm/d H:output/d,vocabulary"},
      {"tied_ends", "e:token_embd/d,vocabulary n:output_norm/d"},
      {"shifted_ends", "e:token_embd/d,vocabulary l:output_norm/d h:output/d,vocabulary"},
      {"own_shifted_ends", "e:token_embd/d,vocabulary l:output_norm/d H:output/d,vocabulary"},
      // Attention.
      {"qkv", "p:attn_q/d,q p:attn_k/d,kv w:attn_v/d,kv"},
      {"qkv_biases", "b:attn_q/q b:attn_k/kv b:attn_v/kv"},
      {"fused", "p:attn_qkv/d,q+2*kv"},
      {"fused_bias", "b:attn_qkv/q+2*kv"},
      {"out", "w:attn_output/q,d"},
      {"out_bias", "b:attn_output/d"},
      {"norms", "k:attn_q_norm/hd k:attn_k_norm/hd"},
      {"flat_norms", "n:attn_q_norm/hd n:attn_k_norm/hd"},  // where products are not divided by a root
      // Feed-forward networks.
      {"gated", "w:ffn_gate/d,ffn w:ffn_up/d,ffn w:ffn_down/ffn,d"},
      {"gated_in_one", "w:ffn_up/d,2*ffn w:ffn_down/ffn,d"},
      {"plain", "w:ffn_up/d,ffn w:ffn_down/ffn,d"},
      {"plain_biases", "b:ffn_up/ffn b:ffn_down/d"},
      {"experts",
       "w:ffn_gate_inp/d,experts w:ffn_gate_exps/d,expert,experts w:ffn_up_exps/d,expert,experts "
       "w:ffn_down_exps/expert,d,experts"},
      {"balance", "b:exp_probs_b/experts"},
      {"shared", "w:ffn_gate_shexp/d,expert w:ffn_up_shexp/d,expert w:ffn_down_shexp/expert,d"},
      {"mixture", "d?@gated e?@experts e?@shared"},
      // Whole layers.
      {"llama", "n:attn_norm/d @qkv @out n:ffn_norm/d @gated"},
      {"llama_norms", "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @gated"},
      {"llama_moe", "n:attn_norm/d @qkv @out n:ffn_norm/d @mixture"},
      {"llama_norms_moe", "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @mixture"},
      {"gpt", "l:attn_norm/d @fused @fused_bias @out @out_bias l:ffn_norm/d @plain @plain_biases"},
      {"mamba2_layer",
       "w:ssm_in/d,4*d+64+heads c:ssm_conv1d/4,2*d+64 b:ssm_conv1d/2*d+64 b:ssm_dt/heads -:ssm_a!/1,heads "
       "n:ssm_d!/1,heads n:ssm_norm/d,2 w:ssm_out/2*d,d"},
      {"latent_keys",
       "n:attn_kv_a_norm/32 w:attn_kv_a_mqa/d,40 p:attn_k_b/16,32,heads w:attn_v_b/32,16,heads "
       "w:attn_output/heads*16,d"},
      {"latent_queries", "n:attn_q_a_norm/32 w:attn_q_a/d,32 p:attn_q_b/32,heads*24"},
      {"short_convolution", "c:shortconv.conv/3,d w:shortconv.in_proj/d,3*d w:shortconv.out_proj/d,d"},
      {"delta_layer",  // a gated delta rule, and gated attention now and then
       "n:attn_norm/d n:post_attention_norm/d f?p:attn_q/d,2*q f?p:attn_k/d,kv f?w:attn_v/d,kv f?@out f?@norms "
       "r?w:attn_qkv/d,2*kv+q r?w:attn_gate/d,q r?c:ssm_conv1d/4,2*kv+q r?b:ssm_dt/heads r?-:ssm_a!/heads "
       "r?n:ssm_norm/hd r?w:ssm_out/q,d"},
      {"delta_inputs", "r?w:ssm_beta/d,heads r?w:ssm_alpha/d,heads"},
      {"weighed_shared", "v:ffn_gate_inp_shexp/d @shared"},
  };
  return all;
}

const std::vector<Architecture>& table() {
  static const std::vector<Architecture> all = {
      {"llama", "f", "d", "", "@ends R?f:rope_freqs/half",
       "n:attn_norm/d @qkv B?@qkv_biases @out B?@out_bias n:ffn_norm/d @gated"},
      {"qwen", "f", "d", "feed_forward_length=2*ffn", "@own_ends",  // the key counts gate and up
       "n:attn_norm/d @fused @fused_bias @out n:ffn_norm/d @gated", "kv_heads=heads"},
      {"qwen2", "f", "d", "", "@ends", "n:attn_norm/d @qkv @qkv_biases @out n:ffn_norm/d @gated"},
      {"qwen2vl", "f", "d", "@sections", "@ends", "n:attn_norm/d @qkv @qkv_biases @out n:ffn_norm/d @gated"},
      {"qwen2moe", "f", "e", "@shared_moe", "@own_ends",
       "n:attn_norm/d @qkv @qkv_biases @out n:ffn_norm/d @experts @weighed_shared"},
      {"qwen3", "f", "d", "", "@ends", "@llama_norms"},
      {"qwen3moe", "f", "e", "@moe", "@ends", "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @experts"},
      {"qwen3vl", "f", "d", "@sections", "@ends", "@llama_norms"},
      {"qwen3vlmoe", "f", "e", "@moe @sections", "@ends", "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @experts"},
      {"qwen3next", "rrrf", "e", "@shared_moe @delta", "@ends",
       "@delta_layer r?w:ssm_ba/d,2*heads @experts @weighed_shared"},
      {"qwen35", "rrrf", "d", "@delta @sections", "@ends", "@delta_layer @delta_inputs @gated"},
      {"qwen35moe", "rrrf", "e", "@shared_moe @delta @sections", "@ends",
       "@delta_layer @delta_inputs @experts @weighed_shared"},
      // The windows of llama4 are chunks of 8192 tokens, those of smallthinker have 4096, whatever a file says; exaone4
      // has windows in models of 64 layers only.
      {"llama4", "wwwn", "de", "@moe interleave_moe_layer_step=2", "@ends", "@llama_moe"},
      {"gemma", "f", "d", "", "@tied_ends", "@llama"},
      {"gemma2", "wf", "d", "@window", "@tied_ends",
       "n:attn_norm/d @qkv @out n:post_attention_norm/d n:ffn_norm/d @gated n:post_ffw_norm/d"},
      {"gemma3", "wwwwwf", "d", "@window", "@ends",
       "n:attn_norm/d @qkv @out @norms n:post_attention_norm/d n:ffn_norm/d @gated n:post_ffw_norm/d"},
      {"gemma3n", "wwwwf", "d", "@window",
       "@ends w:altup_proj/d,d,3 w:altup_unembd_proj/d,d,3 e:per_layer_token_embd/256*layers,vocabulary "
       "w:per_layer_model_proj/d,256*layers n:per_layer_proj_norm/256",
       "n:attn_norm/d @qkv @out @flat_norms n:post_attention_norm/d n:ffn_norm/d @gated n:post_ffw_norm/d "
       "w:inp_gate/d,256 w:proj/256,d n:post_norm/d c:altup_correct_coef/4,4 n:altup_correct_scale/d "
       "c:altup_predict_coef/4,16 w:altup_router/d,4 n:altup_router_norm/d w:laurel_l/d,64 w:laurel_r/64,d "
       "n:laurel_post_norm/d"},
      {"gemma4", "wwwwf", "d",
       "@window_list embedding_length_per_layer_input=0 P?embedding_length_per_layer_input=32 "
       "attention.key_length=2*hd attention.value_length=2*hd "
       "attention.key_length_swa=hd attention.value_length_swa=hd rope.dimension_count=2*hd "
       "rope.dimension_count_swa=hd",
       "@ends f:rope_freqs/hd P?e:per_layer_token_embd/32*layers,vocabulary P?w:per_layer_model_proj/d,32*layers "
       "P?n:per_layer_proj_norm/32",
       "P?w:inp_gate/d,32 P?w:proj/32,d P?n:post_norm/d n:attn_norm/d w?@qkv w?@out w?@flat_norms f?w:attn_q/d,2*q "
       "f?w:attn_k/d,2*kv f?w:attn_v/d,2*kv "
       "f?w:attn_output/2*q,d f?n:attn_q_norm/2*hd f?n:attn_k_norm/2*hd n:post_attention_norm/d n:layer_output_scale/1 "
       "n:ffn_norm/d @gated n:post_ffw_norm/d"},
      {"glm4", "f", "d", "@sections", "@ends",
       "n:attn_norm/d @qkv @qkv_biases @out n:post_attention_norm/d n:ffn_norm/d @gated_in_one n:post_ffw_norm/d"},
      {"glm4moe", "f", "d|e", "@late_moe @sections", "@ends",
       "n:attn_norm/d @qkv @qkv_biases @out @norms n:post_attention_norm/d @mixture e?@balance"},
      {"chatglm", "f", "d", "rope.dimension_count=half", "@ends",
       "n:attn_norm/d @fused @fused_bias @out n:ffn_norm/d @gated_in_one"},
      {"deepseek", "f", "d|e", "@late_moe", "@ends", "@llama_moe"},
      {"deepseek2", "f", "d|e", "@late_moe @latent", "@ends",
       "n:attn_norm/d @latent_queries @latent_keys n:ffn_norm/d @mixture e?@balance"},
      {"deepseek2-ocr", "f", "d|e", "@late_moe", "@ends", "@llama_moe", "kv_heads=heads"},
      {"granite", "f", "d", "logit_scale=2.0 residual_scale=0.5 embedding_scale=1.5 attention.scale=0.2", "@ends",
       "@llama"},
      {"granitemoe", "f", "e",
       "@moe_only expert_shared_feed_forward_length=expert logit_scale=2.0 residual_scale=0.5 embedding_scale=1.5 "
       "attention.scale=0.2",
       "@ends", "@llama_moe"},
      {"granite_swa", "wwwf", "d", "@window_list logit_scale=2.0 residual_scale=0.5 embedding_scale=1.5", "@ends",
       "n:attn_norm/d @qkv @out v:attn_sinks/heads n:ffn_norm/d @gated"},
      {"hunyuan-dense", "f", "d", "", "@ends", "@llama_norms"},
      {"hunyuan-moe", "f", "e", "@shared_moe feed_forward_length=expert", "@ends", "@llama_norms_moe"},
      {"hunyuan_vl", "f", "d", "rope.dimension_sections=[half/4,half/4,half/4,half/4]", "@ends", "@llama_norms"},
      {"hy_v3", "f", "d|e", "@late_moe", "@ends",
       "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @mixture e?v:exp_probs_b!/experts"},
      {"ernie4_5", "f", "d", "", "@ends", "@llama"},
      {"ernie4_5-moe", "f", "d|e", "@late_moe interleave_moe_layer_step=1", "@ends", "@llama_moe e?@balance"},
      {"paddleocr", "f", "d", "@sections", "@ends", "@llama"},
      {"internlm2", "f", "d", "", "@own_ends", "@llama"},
      {"phi2", "f", "d", "@layer_norms rope.dimension_count=half", "@own_shifted_ends b:output/vocabulary",
       "l:attn_norm/d @fused @fused_bias @out @out_bias @plain @plain_biases"},
      {"phi3", "f", "d", "", "@ends", "n:attn_norm/d @fused @out n:ffn_norm/d @gated_in_one"},
      {"phimoe", "f", "e", "@moe_only", "@own_shifted_ends b:output/vocabulary",
       "l:attn_norm/d @qkv @qkv_biases @out @out_bias l:ffn_norm/d @experts"},
      {"olmo", "f", "d", "@layer_norms attention.clamp_kqv=8.0", "e:token_embd/d,vocabulary h:output/d,vocabulary",
       "@qkv @out @gated"},
      {"olmo2", "wwwf", "d", "@window", "@own_ends",
       "@qkv @out k:attn_q_norm/q k:attn_k_norm/kv n:post_attention_norm/d @gated n:post_ffw_norm/d"},
      {"olmoe", "f", "e", "@moe_only", "@own_ends",
       "n:attn_norm/d @qkv @out k:attn_q_norm/q k:attn_k_norm/kv n:ffn_norm/d @experts", "kv_heads=heads"},
      {"command-r", "f", "d", "@layer_norms logit_scale=0.5", "@tied_ends", "n:attn_norm/d @qkv @out @gated"},
      {"cohere2", "wwwn", "d", "@layer_norms @window logit_scale=0.5", "@tied_ends", "n:attn_norm/d @qkv @out @gated"},
      {"cohere2moe", "nwww", "d|e", "@late_moe @layer_norms @window logit_scale=0.5", "@ends",
       "n:attn_norm/d @qkv @out @mixture"},
      {"exaone", "f", "d", "", "@ends", "@llama"},
      {"exaone4", "f", "d", "", "@ends", "@qkv @out @norms n:post_attention_norm/d @gated n:post_ffw_norm/d"},
      {"exaone-moe", "wwwn", "d|e", "@late_moe @window expert_gating_func=2", "@own_ends",
       "@llama_norms_moe e?@balance"},
      {"falcon", "f", "d", "@layer_norms", "@shifted_ends", "l:attn_norm/d @fused @out @plain"},
      {"starcoder", "f", "d", "@layer_norms", "@shifted_ends e:position_embd/d,context", "@gpt"},
      {"starcoder2", "f", "d", "@layer_norms", "@shifted_ends",
       "l:attn_norm/d @qkv @qkv_biases @out @out_bias l:ffn_norm/d @plain @plain_biases"},
      {"stablelm", "f", "d", "@layer_norms rope.dimension_count=half", "@own_shifted_ends",
       "l:attn_norm/d @qkv @qkv_biases @out l:ffn_norm/d @gated"},
      {"smollm3", "fffn", "d", "", "@ends", "@llama"},
      {"smallthinker", "nwww", "e", "@moe @window expert_gating_func=2", "@ends",
       "n:attn_norm/d @qkv @out n:ffn_norm/d @experts"},
      {"seed_oss", "f", "d", "", "@ends", "n:attn_norm/d @qkv @qkv_biases @out n:post_attention_norm/d @gated"},
      {"nemotron", "f", "d", "@layer_norms rope.dimension_count=half", "@own_shifted_ends",
       "l:attn_norm/d @qkv @out l:ffn_norm/d @plain"},
      {"orion", "f", "d", "@layer_norms", "@own_shifted_ends", "l:attn_norm/d @qkv @out l:ffn_norm/d @gated"},
      {"baichuan", "f", "d", "", "@own_ends", "@llama", "layers=32"},  // 40 layers, the 13B, have no rotary positions
      {"xverse", "f", "d", "", "@own_ends", "@llama"},
      {"arcee", "f", "d", "", "@ends", "n:attn_norm/d @qkv @out n:ffn_norm/d @plain"},
      {"arctic", "f", "e", "@moe_only", "@ends",
       "n:attn_norm/d @qkv @out n:ffn_norm/d w:ffn_gate/d,d w:ffn_up/d,d w:ffn_down/d,d n:ffn_norm_exps/d @experts"},
      {"deci", "f", "d", "", "@ends", "@llama"},
      {"dbrx", "f", "e", "@moe_only @layer_norms attention.clamp_kqv=8.0", "@own_ends",
       "n:attn_norm/d @fused @out n:attn_output_norm/d @experts"},
      {"dots1", "f", "d|e", "@late_moe expert_gating_func=2", "@own_ends", "@llama_norms_moe e?@balance",
       "kv_heads=heads"},
      {"bailingmoe", "f", "e", "@shared_moe", "@own_ends", "@llama_moe"},
      {"bailingmoe2", "f", "d|e", "@late_moe expert_gating_func=2", "@own_ends",
       "n:attn_norm/d @fused @out @norms n:ffn_norm/d @mixture e?@balance"},
      {"plamo", "f", "d", "", "@own_ends", "n:attn_norm/d @qkv @out @gated"},
      {"plamo3", "wwwf", "d", "@window attention.sliding_window_pattern=4", "@ends",
       "n:attn_norm/d @fused @out @norms n:post_attention_norm!/d n:ffn_norm/d @gated_in_one n:post_ffw_norm!/d"},
      {"codeshell", "f", "d", "@layer_norms", "@own_shifted_ends", "@gpt"},
      {"gptneox", "f", "d", "@layer_norms use_parallel_residual=true", "@own_shifted_ends", "@gpt"},
      {"gpt2", "f", "d", "@layer_norms", "@shifted_ends e:position_embd/d,context", "@gpt"},
      {"bloom", "f", "d", "@layer_norms", "@shifted_ends l:token_embd_norm/d", "@gpt"},
      {"mpt", "f", "d", "@layer_norms attention.max_alibi_bias=8.0", "@ends",
       "n:attn_norm/d @fused @out n:ffn_norm/d @plain"},
      {"jais", "f", "d", "@layer_norms attention.max_alibi_bias=8.0", "@own_shifted_ends",
       "l:attn_norm/d @fused @fused_bias @out @out_bias l:ffn_norm/d @gated @plain_biases b:ffn_gate/ffn"},
      {"jais2", "f", "d", "@layer_norms", "@shifted_ends",
       "l:attn_norm/d @qkv @qkv_biases @out @out_bias l:ffn_norm/d @plain @plain_biases"},
      {"refact", "f", "d", "", "@ends", "@llama"},
      {"grovemoe", "f", "e", "@moe expert_chunk_feed_forward_length=32 expert_group_scale=0.5 experts_per_group=2",
       "@ends",
       "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @experts w:ffn_gate_chexps/d,32,experts/2 "
       "w:ffn_up_chexps/d,32,experts/2 w:ffn_down_chexps/32,d,experts/2"},
      {"openelm", "f", "d", "", "@tied_ends", "n:attn_norm/d @fused @out @norms n:ffn_norm/d @gated"},
      // llama.cpp forbids it the tokens of pictures, 4 to 8195.
      {"chameleon", "f", "d", "", "@ends",
       "n:attn_norm/d @qkv @out k:attn_q_norm/hd,heads k:attn_k_norm/hd,kv_heads n:ffn_norm/d @gated",
       "vocabulary>=8448"},
      {"laguna", "fwww", "d|e", "@late_moe @window", "@ends",
       "n:attn_norm/d @qkv @out @norms w:attn_gate/d,heads n:ffn_norm/d @mixture e?@balance"},
      {"maple", "wwwf", "e", "@moe @window_list swiglu_clamp_exp=7.0", "@own_ends",
       "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @experts"},
      {"gpt-oss", "wf", "e", "@moe @window", "@own_ends",
       "n:attn_norm/d @qkv @qkv_biases @out @out_bias v:attn_sinks/heads n:post_attention_norm/d @experts "
       "b:ffn_gate_inp/experts b:ffn_gate_exps/expert,experts b:ffn_up_exps/expert,experts b:ffn_down_exps/d,experts"},
      {"mistral3", "f", "d", "", "@ends", "@llama"},
      {"lfm2", "rrf", "d", "attention.head_count_kv={f*kv_heads} shortconv.l_cache=3",
       "e:token_embd/d,vocabulary n:token_embd_norm/d h:output/d,vocabulary",
       "n:attn_norm/d f?@qkv f?@out f?@norms r?@short_convolution n:ffn_norm/d @gated"},
      {"lfm2moe", "rrf", "d|e",
       "@late_moe attention.head_count_kv={f*kv_heads} shortconv.l_cache=3 expert_gating_func=2",
       "e:token_embd/d,vocabulary n:token_embd_norm/d h:output/d,vocabulary",
       "n:attn_norm/d f?@qkv f?@out f?@norms r?@short_convolution n:ffn_norm/d d?@gated e?@experts e?@balance"},
      {"cogvlm", "f", "d", "", "@ends",  // other weights for rows of embeddings than for tokens
       "n:attn_norm/d @fused @out p:vis_attn_qkv/d,3*q w:vis_attn_output/q,d n:ffn_norm/d @gated w:vis_gate/d,ffn "
       "w:vis_up/d,ffn w:vis_down/ffn,d",
       "kv_heads=heads"},
      {"minicpm", "f", "d", "", "@ends", "@llama"},
      {"minicpm3", "f", "d",
       "attention.q_lora_rank=32 attention.kv_lora_rank=32 attention.key_length=24 attention.value_length=16 "
       "rope.dimension_count=8",
       "@ends",
       "n:attn_norm/d n:attn_q_a_norm/32 n:attn_kv_a_norm/32 w:attn_q_a/d,32 p:attn_q_b/32,heads*24 "
       "w:attn_kv_a_mqa/d,40 p:attn_kv_b/32,heads*32 w:attn_output/heads*16,d n:ffn_norm/d @gated",
       "kv_heads=heads"},
      {"afmoe", "wwwn", "d|e", "@late_moe @window", "@ends",
       "n:attn_norm/d n:post_attention_norm/d @qkv @out @norms w:attn_gate/d,q n:ffn_norm/d n:post_ffw_norm/d @mixture "
       "e?@balance"},
      {"muse-glimmer", "wwwn", "d", "@window logit_scale=0.5", "@own_ends",
       "n:attn_norm/d n:post_attention_norm/d @qkv @out @norms w:attn_gate/d,q n:ffn_norm/d n:post_ffw_norm/d @gated"},
      {"falcon-h1", "h", "d", "@mamba2", "@ends", "n:attn_norm/d @qkv @out @mamba2_layer n:ffn_norm!/d @gated"},
      {"mimo2", "fwww", "d|e", "@moe @window_list", "@own_ends",
       "n:attn_norm/d @qkv @out w?v:attn_sinks/heads n:ffn_norm/d d?@gated e?@experts e?@balance"},
      {"step35", "fwww", "d|e", "@shared_moe @window_list", "@own_ends",
       "n:attn_norm/d @qkv @out @norms w:attn_gate/d,heads n:ffn_norm/d @mixture e?@balance"},
      {"apertus", "f", "d", "/xielu.alpha_n=0.8 /xielu.alpha_p=0.8 /xielu.beta=0.5 /xielu.eps=-0.000001", "@own_ends",
       "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @plain"},
      {"bitnet", "f", "d", "", "@tied_ends",
       "n:attn_norm/d @qkv n:attn_sub_norm/d @out n:ffn_norm/d n:ffn_sub_norm/ffn @gated"},
      {"grok", "f", "e", "@moe", "@ends",
       "n:attn_norm/d @qkv @out n:attn_output_norm/d n:ffn_norm/d @experts n:post_ffw_norm/d"},
      {"minimax-m2", "f", "e", "@moe feed_forward_length=expert expert_gating_func=2", "@own_ends",
       "n:attn_norm/d @qkv @out k:attn_q_norm/q k:attn_k_norm/kv n:ffn_norm/d @experts @balance"},
      {"minimax-01", "rrrf", "e", "@moe_only full_attention_interval=4 residual_scale=1.0", "@ends",
       "n:attn_norm/d f?@qkv r?n:attn_norm_2/q r?w:attn_qkv/d,3*q r?w:attn_gate/d,q @out n:ffn_norm/d @experts"},
      {"mellum", "wwwf", "e", "@moe @window", "@own_ends", "n:attn_norm/d @qkv @out @norms n:ffn_norm/d @experts"},
      {"nanbeige", "f", "d", "", "@ends", "@llama"},
      {"pangu-embedded", "f", "d", "", "@ends", "n:attn_norm/d @qkv @qkv_biases @out @out_bias n:ffn_norm/d @gated"},
      {"talkie", "f", "d", "logit_scale=0.5", "e:token_embd/d,vocabulary H:output/d,vocabulary",
       "@qkv @out k:attn_q_norm/1,heads @gated n:layer_output_scale/1"},
      {"spark2_5", "wwwf", "d", "@window_list", "@ends",
       "n:attn_norm/d @qkv w:attn_gate/d,heads @out n:ffn_norm/d @gated"},
      {"maincoder", "f", "d", "", "@ends", "@llama_norms"},
      {"mistral4", "f", "d|e", "@late_moe @latent", "@ends",
       "n:attn_norm/d @latent_queries @latent_keys n:ffn_norm/d @mixture e?@balance"},
      // It attends to so many keys as no prompt of the tests has, so that a masked one takes no other's place.
      {"deepseek32", "f", "d|e",
       "@late_moe @latent expert_gating_func=2 attention.indexer.head_count=4 attention.indexer.key_length=64 "
       "attention.indexer.top_k=512",
       "@ends",
       "n:attn_norm/d @latent_queries @latent_keys l:indexer.k_norm/64 w:indexer.proj/d,4 w:indexer.attn_k/d,64 "
       "w:indexer.attn_q_b/32,256 n:ffn_norm/d @mixture e?@balance"},
      {"granitehybrid", "rrrf", "d",
       "@mamba2 attention.head_count_kv={f*kv_heads} logit_scale=2.0 residual_scale=0.5 embedding_scale=1.5", "@ends",
       "n:attn_norm/d r?@mamba2_layer f?@qkv f?@out n:ffn_norm/d @gated"},
      {"nemotron_h", "rxfx", "d",
       "@mamba2 @layer_norms attention.head_count_kv={f*kv_heads} feed_forward_length={x*ffn}", "@ends",
       "n:attn_norm/d r?@mamba2_layer f?@qkv f?@out x?@plain"},
      {"nemotron_h_moe", "rxfx", "e",
       "@shared_moe @mamba2 @layer_norms attention.head_count_kv={f*kv_heads} feed_forward_length={x*ffn}", "@ends",
       "n:attn_norm/d r?@mamba2_layer f?@qkv f?@out x?w:ffn_gate_inp/d,experts x?@balance "
       "x?w:ffn_up_exps/d,expert,experts x?w:ffn_down_exps/expert,d,experts x?w:ffn_up_shexp/d,expert "
       "x?w:ffn_down_shexp/expert,d"},
      {"jamba", "rrrf", "d",
       "attention.head_count_kv={f*kv_heads} ssm.conv_kernel=4 ssm.inner_size=2*d ssm.state_size=16 "
       "ssm.time_step_rank=heads",
       "@ends",
       "n:attn_norm/d f?@qkv f?@out r?w:ssm_in/d,4*d r?c:ssm_conv1d/4,2*d r?b:ssm_conv1d/2*d r?w:ssm_x/2*d,heads+32 "
       "r?n:ssm_dt_norm/heads r?w:ssm_dt/heads,2*d r?b:ssm_dt/2*d r?n:ssm_b_norm/16 r?n:ssm_c_norm/16 "
       "r?-:ssm_a!/16,2*d r?n:ssm_d!/2*d r?w:ssm_out/2*d,d n:ffn_norm/d @gated"},
      {"plamo2", "rf", "d",
       "attention.head_count_kv={f*kv_heads} ssm.conv_kernel=4 ssm.inner_size=2*d ssm.state_size=16 "
       "ssm.time_step_rank=heads ssm.group_count=0",
       "@ends",
       "n:attn_norm/d f?@fused f?k:attn_q_norm/hd,heads f?k:attn_k_norm/hd,kv_heads f?@out r?w:ssm_in/d,4*d "
       "r?c:ssm_conv1d/4,2*d r?w:ssm_x/2*d,96 r?w:ssm_dt/64,heads r?b:ssm_dt/heads r?-:ssm_a!/heads r?n:ssm_d!/heads "
       "r?n:ssm_dt_norm!/64 r?n:ssm_b_norm!/16 r?n:ssm_c_norm!/16 r?w:ssm_out/2*d,d n:post_attention_norm!/d "
       "n:ffn_norm/d @gated_in_one n:post_ffw_norm!/d"},
      {"kimi-linear", "rrrf", "d|e",
       "@late_moe @latent attention.head_count_kv={f} kda.head_dim=hd ssm.conv_kernel=4 expert_gating_func=2",
       "@own_ends",
       "n:attn_norm/d f?p:attn_q/d,heads*24 f?@latent_keys r?p:attn_q/d,q r?p:attn_k/d,q r?w:attn_v/d,q "
       "r?c:ssm_conv1d_q/4,1,q r?c:ssm_conv1d_k/4,1,q r?c:ssm_conv1d_v/4,1,q r?w:ssm_f_a/d,hd r?w:ssm_f_b/hd,q "
       "r?w:ssm_beta/d,heads r?-:ssm_a!/1,heads r?b:ssm_dt/q r?w:ssm_g_a/d,hd r?w:ssm_g_b/hd,q r?n:ssm_norm/hd "
       "r?@out n:ffn_norm/d @mixture e?@balance"},
  };
  return all;
}

}  // namespace tiny_gguf
