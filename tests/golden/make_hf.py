"""Writes the golden folders beside it: tiny random models as transformers saves them, and what they compute.

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/make_hf.py

The folders here were made with exactly these versions on a CPU; expected.json says so too. Every setting that
could be ignored in silence (norm epsilons, rotary base, widths) differs from its default, and all parameters,
biases and norms included, are far from their usual start.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers as hf

HERE = Path(__file__).parent
V, D, L, T = 29, 16, 2, 12
NORMS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")  # "norm" ends "layernorm" too
LLAMA = dict(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=L, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=T, rms_norm_eps=1e-2, pad_token_id=V - 1,
             rope_parameters={"rope_type": "default", "rope_theta": 50.0})  # fmt: skip
SMALL = dict(num_hidden_layers=1, hidden_size=8, intermediate_size=12, num_attention_heads=2,
             num_key_value_heads=1)
LLAMA3 = dict(rope_type="llama3", rope_theta=50.0, factor=4.0, low_freq_factor=0.1, high_freq_factor=0.5,
              original_max_position_embeddings=6)  # one channel as it was, two in between, one slowed down
NEOX = dict(vocab_size=V, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=T, layer_norm_eps=1e-2, pad_token_id=V - 1,
            rope_parameters={"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5})
GPT2 = dict(vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=T, layer_norm_epsilon=1e-2,
            pad_token_id=V - 1, bos_token_id=V - 2, eos_token_id=V - 2)  # fmt: skip
MODELS = {
    "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "llama_bias_reward": hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**LLAMA | dict(num_hidden_layers=1), head_dim=8, attention_bias=True, mlp_bias=True,
                       num_labels=1)),
    "llama3": hf.LlamaForCausalLM(
        hf.LlamaConfig(**LLAMA | SMALL | dict(head_dim=8, rope_parameters=LLAMA3), tie_word_embeddings=True)),
    "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA | SMALL)),
    "qwen3": hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA | SMALL, head_dim=8, tie_word_embeddings=True)),
    "pythia": hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**NEOX)),
    "pythia_reward": hf.GPTNeoXForSequenceClassification(hf.GPTNeoXConfig(**NEOX, num_labels=1)),
}  # fmt: skip

torch.manual_seed(0)
tokens = torch.randint(V - 2, (2, T))
expected = {"transformers": hf.__version__, "torch": torch.__version__, "tokens": tokens.tolist()}
for name, model in MODELS.items():
    for key, p in model.named_parameters():
        p.data.normal_(1.0 if key.endswith(NORMS) else 0.0, 0.4)
    with torch.no_grad():  # a GPT → logits (2, T, V); a reward model → scores (2,), at the last token
        out = model.eval()(tokens).logits.squeeze(-1).double().numpy().round(6)
    expected[name] = out.tolist()
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
(HERE / "expected.json").write_text(json.dumps(expected) + "\n")
