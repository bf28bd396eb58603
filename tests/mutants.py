"""Mutation test: plants one bug at a time, and checks that the tests named beside it fail.

    python tests/mutants.py            all of them (11 CPU-minutes, two at a time)
    python tests/mutants.py kl temp    those with one of these words in their name

Each mutant is one string of one source file, replaced in a copy of the repository: the working tree is never
touched. First the killing tests must pass on an unchanged copy. A mutant is killed when pytest reports a
failure (exit status 1); anything else, a syntax error among them, counts as survival.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PPO, LEARNING = "tests/test_ppo.py::test_", "tests/test_learning_ppo.py::test_"
DPO, REWARDS = "tests/test_dpo.py::test_", "tests/test_rewards.py::test_"
HUB, LORA = "tests/test_hub.py::test_", "tests/test_lora.py::test_"
TRITON = "tests/test_triton.py::test_"
DIST = "tests/test_dist.py::test_"  # two processes: a minute each
SLOTS, DECODE = "tests/test_slots.py::test_", "tests/test_decode.py::test_"
ORACLE = PPO + "first_gradient_is_the_oracle"  # knows the whole step, but takes 1 s and names no culprit

# (name, file, source, replacement, killing tests); a mutant of one line has its smallest direct test first
MUTANTS = [
    ("advantage sign", "train_ppo.py",
     "            adv = whiten(adv, mask)  #", "            adv = -whiten(adv, mask)  #",
     [LEARNING + "learns_to_answer_the_prompt"]),
    ("GAE: value one token late", "train_ppo.py",
     "+ gamma * next_value - value[:, t]", "+ gamma * next_value - value[:, t - 1]",
     [PPO + "gae_is_the_double_sum"]),
    ("GAE: next value of this token", "train_ppo.py",
     "delta = reward[:, t] + gamma * next_value", "delta = reward[:, t] + gamma * value[:, t]",
     [PPO + "golden_gae"]),
    ("GAE runs on behind the end", "train_ppo.py",
     "next_value = torch.where(inside, value[:, t], next_value)", "next_value = value[:, t]",
     [PPO + "gae_is_the_double_sum"]),
    ("inverted ratio", "train_ppo.py",
     "torch.where(mask, logp - old_logp, 0.0)", "torch.where(mask, old_logp - logp, 0.0)",
     [PPO + "policy_loss_branches"]),
    ("max for min in the policy loss", "train_ppo.py",
     "torch.maximum(unclipped, clipped)", "torch.minimum(unclipped, clipped)",
     [PPO + "policy_loss_branches"]),
    ("policy loss without a clip", "train_ppo.py",
     "-adv * ratio.clamp(1 - clip, 1 + clip)", "-adv * ratio",
     [PPO + "policy_loss_branches"]),
    ("max for min in the value loss", "train_ppo.py",
     "torch.maximum(error, clipped_error)", "torch.minimum(error, clipped_error)",
     [PPO + "value_loss_branches"]),
    ("KL sign", "train_ppo.py",
     "-beta * (logp - ref_logp)", "-beta * (ref_logp - logp)",
     [PPO + "reward_sums_to_score_less_kl"]),
    ("KL sign, seen by learning", "train_ppo.py",
     "-beta * (logp - ref_logp)", "-beta * (ref_logp - logp)",
     [LEARNING + "the_kl_penalty_draws_the_policy_to_the_reference"]),
    ("score on the last token but one", "train_ppo.py",
     "(tokens_left == 1)", "(tokens_left == 2)",
     [PPO + "score_stands_on_the_last_token_alone"]),
    ("no-EOS score inverted", "train_ppo.py",
     "torch.where(finished.bool(), score, no_eos_score)", "torch.where(finished.bool(), no_eos_score, score)",
     [PPO + "score_stands_on_the_last_token_alone"]),
    ("whitening: mean without the mask", "train_ppo.py",
     "mean = torch.where(mask, x, 0.0).sum() / n", "mean = x.mean()",
     [PPO + "golden_gae"]),
    ("whitening: unbiased variance", "train_ppo.py",
     "centred.square().sum() / n\n", "centred.square().sum() / (n - 1)\n",
     [PPO + "golden_whiten"]),
    ("adaptive beta runs away", "train_ppo.py",
     "kl / cfg.kl_target - 1", "1 - kl / cfg.kl_target",
     [PPO + "adaptive_beta"]),
    ("wrong grouping of prompts and rewards", "nanorlhf/generate.py",
     "[rows[g] for g in roll.group.tolist()]", "rows * n",
     [ORACLE, PPO + "log_line_is_what_happened"]),
    ("wrong grouping in the sampler", "nanorlhf/generate.py",
     "torch.arange(len(prompts)).repeat_interleave(n)", "torch.arange(len(prompts)).repeat(n)",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("advantages not permuted", "train_ppo.py",
     'minibatch["denom"] =',
     'minibatch["adv"] = adv[: len(rows_of)]\n                    minibatch["denom"] =',
     [PPO + "every_row_is_in_one_minibatch_and_its_own"]),
    ("returns not permuted", "train_ppo.py",
     'minibatch["denom"] =',
     'minibatch["ret"] = ret[: len(rows_of)]\n                    minibatch["denom"] =',
     [PPO + "every_row_is_in_one_minibatch_and_its_own"]),
    ("no zero_grad", "train_ppo.py",
     "                    opt.zero_grad()\n", "",
     [PPO + "gradients_do_not_accumulate_over_steps"]),
    ("denominator of the micro-batch", "train_ppo.py",
     'cfg.clip, batch["denom"])', "cfg.clip, chunk.sum())",
     [PPO + "microbatches_do_not_move_the_step"]),
    ("PPO: all tokens in every chunk's loss", "train_ppo.py",
     'batch["adv"], chunk, cfg.clip', 'batch["adv"], batch["mask"], cfg.clip',
     [PPO + "chunks_do_not_move_a_figure"]),
    ("GRPO: all tokens in every chunk's loss", "train_grpo.py",
     'batch["adv"], chunk, batch["w"]', 'batch["adv"], batch["mask"], batch["w"]',
     ["tests/test_grpo.py::test_chunks_do_not_move_a_figure"]),
    ("old log-probs recomputed", "train_ppo.py",
     'policy_loss(logp, batch["old_logp"],', "policy_loss(logp, logp.detach(),",
     [PPO + "old_logp_is_the_samplers"]),
    ("EOS unscored: mask by token id", "train_ppo.py",
     "mask = roll.mask  # (B, T)", "mask = roll.mask = roll.mask & (roll.tokens != tok.eos_id)",
     [ORACLE]),
    ("pad scored", "nanorlhf/data.py",
     "before_end = position < lengths[:, None]", "before_end = position < lengths[:, None] + 1",
     [PPO + "eos_is_scored_and_the_prompt_is_not"]),
    ("temperature forgotten in the update", "train_ppo.py",
     'batch["mask"], cfg.temperature, chunk_loss', 'batch["mask"], 1.0, chunk_loss',
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("temperature forgotten in the reference", "train_ppo.py",
     "roll.logp_under(ref, cfg.temperature,", "roll.logp_under(ref, 1.0,",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("temperature forgotten in the sampler's log-prob", "nanorlhf/sampling.py",
     "z = logits if temperature in (0, 1) else logits / temperature", "z = logits",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("log-probs one position late", "nanorlhf/model.py",
     "hidden = self(tokens[:, :-1], doc=doc)  #", "hidden = self(tokens, doc=doc)[:, 1:]  #",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("critic sees its own token", "nanorlhf/model.py",
     "        value = self.head(self.trunk(tokens[:, :-1]))\n        return F.pad(value, (1, 0)) * mask",
     "        return self.head(self.trunk(tokens)) * mask",
     [ORACLE]),
    ("critic is not trained", "train_ppo.py",
     "loss = pg_loss + VF_COEF * vf_loss", "loss = pg_loss + 0 * vf_loss",
     [PPO + "the_critic_learns"]),
    ("critic is the reward model itself", "nanorlhf/run/models.py",
     'critic = load_model("--critic_init",', 'critic = rm or load_model("--critic_init",',
     [PPO + "only_policy_and_critic_learn"]),
    ("reward model read before the end", "nanorlhf/model.py",
     "lengths - 1])", "lengths - 2])",
     [ORACLE]),
    ("reward model read at the padded end", "nanorlhf/rewards.py",
     "roll.lengths[rows]", "roll.lengths[rows] * 0 + roll.tokens.shape[1]",
     [ORACLE]),
    ("weights of rewards forgotten", "nanorlhf/rewards.py",
     "score += function.weight * part", "score += part",
     [PPO + "rewards_are_summed_with_their_weights"]),
    ("a reward function that hangs is not ended", "nanorlhf/run/worker.py",
     "        self._end()\n        return 0.0, why", "        return 0.0, why",
     [REWARDS + "what_a_reward_function_does_ends_with_the_call"]),
    ("a fork of the reward function answers too", "nanorlhf/run/worker.py",
     "if os.getpid() != me:", "if False:",
     [REWARDS + "what_a_reward_function_does_ends_with_the_call"]),
    ("children of the reward function stay", "nanorlhf/run/worker.py",
     "os.killpg(self.process.pid, signal.SIGKILL)", "pass",
     [REWARDS + "what_a_reward_function_does_ends_with_the_call"]),
    ("reward function outlives the trainer", "nanorlhf/run/worker.py",
     "threading.Thread(target=_end_with_parent, daemon=True).start()", "pass",
     [REWARDS + "a_killed_trainer_leaves_no_process"]),
    ("half of the calls may not fail", "nanorlhf/run/worker.py",
     "failures > len(pairs) / 2", "failures >= len(pairs) / 2",
     [REWARDS + "a_value_that_is_no_number_stops_the_run_at_once"]),
    ("one of two answers is enough", "nanorlhf/answers.py",
     "if len(answers) == 1 else None", "if answers else None",
     ["tests/test_tasks.py::test_final_answer"]),
    ("a row without an answer", "nanorlhf/answers.py",
     'if want is None or want == "":', "if False:",
     ["tests/test_tasks.py::test_a_row_that_nobody_could_answer_is_named"]),
    ("figures: a maximum is summed", "nanorlhf/metrics.py",
     "self[name] = max(self[name], value)", "self[name] += value",
     [DIST + "figures_are_added_up_but_for_the_largest"]),
    ("figures: samples of one prompt as independent", "nanorlhf/metrics.py",
     "mean_se(groups)", "mean_se(groups.flatten())",
     [PPO + "log_line_is_what_happened"]),
    ("standard error over samples, not over prompts", "nanorlhf/metrics.py",
     "reshape(len(x), -1).mean(1)", "flatten()",
     ["tests/test_evaluate.py::test_the_standard_error_is_over_prompts"]),
    ("rollout: selected rows with the rewards of others", "nanorlhf/rollout.py",
     "lambda x: x[index]",
     "lambda x: x[: len(index)] if x.dim() == 1 and x.is_floating_point() else x[index]",
     ["tests/test_rollout.py::test_select_carries_everything"]),
    ("rollout: rows that nobody computes", "nanorlhf/data.py",
     "rows = my_rows[part]", "rows = my_rows[part][:1]",
     ["tests/test_rollout.py::test_per_token_equals_one_big_call"]),
    ("reward model: samples of other pairs", "train_rm.py",
     "in test[:4] for", "in test[4:8] for",
     ["tests/test_rm.py::test_samples_are_held_out_pairs_with_the_rewards_of_the_saved_model"]),
    ("process reward: steps of the prompt too", "nanorlhf/model.py",
     "return last | (mask & torch.isin(", "return last | (torch.isin(",
     ["tests/test_prm.py::test_reward_is_the_product_over_the_steps"]),
    ("process loss: by the steps of a micro-batch", "train_prm.py",
     "step_loss(logit, label, denom), (2", "step_loss(logit, label, max(len(label), 1)), (2",
     ["tests/test_prm.py::test_process_loss_is_that_of_every_labelled_step"]),
    ("one pass: the whole mask as every chunk", "nanorlhf/model.py",
     "chunk = scatter(torch.ones_like(logp, dtype=torch.bool), part)", "chunk = mask",
     ["tests/test_model.py::test_logprobs_in_one_pass"]),
    ("one pass: figures of the first chunk alone", "nanorlhf/kernels/torch_backend.py",
     "for stats in chunks])", "for stats in chunks[:1]])",
     ["tests/test_kernels.py::test_one_value_of_each_figure_a_chunk"]),
    ("kernel: no temperature in the gradient", "nanorlhf/kernels/torch_backend.py",
     "        g = g / ctx.temperature\n        h = h / ctx.temperature\n", "",
     ["tests/test_kernels.py::test_logprob_gradcheck"]),
    ("kernel: target of another tile", "nanorlhf/kernels/torch_backend.py",
     "inside = (target >= 0) & (target < z.shape[1])", "inside = target >= 0",
     ["tests/test_kernels.py::test_logprob_is_the_oracle_float64"]),
    ("kernel: one pass without the entropy's gradient", "nanorlhf/kernels/torch_backend.py",
     "h / temperature if (h != 0).any() else None", "None",
     ["tests/test_kernels.py::test_one_pass_is_the_oracle_float64"]),
    ("kernel: one pass without what comes from upstream", "nanorlhf/kernels/torch_backend.py",
     "if up.is_cuda or up != 1:", "if False:",
     ["tests/test_kernels.py::test_one_pass_is_the_oracle_float64"]),
    ("Triton: the vocabulary's tail", "nanorlhf/kernels/triton_backend.py",
     "tl.where((cols < end)[None, :], z * scale, -float(\"inf\"))", "z * scale",
     [TRITON + "the_tail_of_the_vocabulary_is_masked"]),
    ("Triton: entropy without a gradient", "nanorlhf/kernels/triton_backend.py",
     "dz = -p * (up + up_entropy *", "dz = -p * (up + 0 * up_entropy *",
     [TRITON + "half_operands_keep_fp32_logits"]),
    ("Triton: the first row's upstream gradient", "nanorlhf/kernels/triton_backend.py",
     "up = _column(g, rows, inside)", "up = _column(g, 0 * rows, inside)",
     [TRITON + "half_operands_keep_fp32_logits"]),
    ("Triton: older sums not rescaled", "nanorlhf/kernels/triton_backend.py",
     "        s = factor * s + tl.sum(e, 1)\n    out", "        s = s + tl.sum(e, 1)\n    out",
     [TRITON + "half_operands_keep_fp32_logits"]),
    ("Triton: running maximum from 0", "nanorlhf/kernels/triton_backend.py",
     "return top, z - finite", "return finite, z - finite", [TRITON + "minus_infinity_in_the_bias"]),
    ("Triton: KL's gradient the other way round", "nanorlhf/kernels/triton_backend.py",
     "    if REVERSE:\n", "    if not REVERSE:\n", [TRITON + "half_operands_keep_fp32_logits"]),
    ("pairwise loss: sign", "train_rm.py",
     "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)",
     ["tests/test_rm.py::test_loss_is_minus_log_sigmoid"]),
    ("SFT: first response token unscored", "nanorlhf/data.py",
     "[True] * len(response_ids)", "[False] + [True] * (len(response_ids) - 1)",
     ["tests/test_data.py::test_encode_demonstration"]),
    ("SFT: EOS unscored", "nanorlhf/data.py",
     "[True] * len(response_ids)", "[True] * (len(response_ids) - 1) + [False]",
     ["tests/test_data.py::test_encode_demonstration"]),
    ("SFT: attention across packed documents", "nanorlhf/model.py",
     "same = start[:, :, None] == start[:, None]", "same = start[:, :, None] >= 0 * start[:, None]",
     ["tests/test_model.py::test_packed_documents_are_strangers"]),
    ("SFT: mask dropped", "nanorlhf/data.py",
     "tokens.to(device), mask.bool().to(device)", "tokens.to(device), (tokens != tok.pad_id).to(device)",
     ["tests/test_sft.py::test_mask_comes_from_lengths"]),
    ("DPO: EOS unscored", "nanorlhf/data.py",
     "before_end = position < lengths[:, None]", "before_end = position < lengths[:, None] - 1",
     ["tests/test_data.py::test_response_mask"]),
    ("tokenizer: control tokens in a chat's text", "nanorlhf/hub/chat.py",
     "while self.forbidden.search(", "while False and self.forbidden.search(",
     ["tests/test_tokenizer.py::test_a_user_cannot_write_control_tokens_into_a_chat"]),
    ("chats: an answer of weight 0 is learnt", "nanorlhf/tokenizer.py",
     ' or not message.get("train", True)', "",
     ["tests/test_tokenizer.py::test_answers_that_are_not_learnt"]),
    ("chats: a response that the template does not write", "nanorlhf/hub/chat.py",
     "require(opens,", "require(True,",
     ["tests/test_tokenizer.py::test_a_template_that_does_not_write_the_response_is_refused"]),
    ("formats: an answer stays in the prompt", "nanorlhf/hub/formats.py",
     'while want == "prompts" and turns', 'while False and turns',
     ["tests/test_formats.py::test_formats"]),
    ("tokenizer: the shortest added token first", "nanorlhf/tokenizer.py",
     "(-len(text), text)", "(len(text), text)",
     ["tests/test_tokenizer.py::test_the_longest_added_token_wins"]),
    ("tokenizer: any table of merges is taken", "nanorlhf/hub/tokenizer_files.py",
     "_need(tuple(parts) in listed", "_need(True",
     ["tests/test_tokenizer.py::test_merges_that_tiktoken_would_take_otherwise"]),
    ("tokenizer: no NFC", "nanorlhf/tokenizer.py",
     'part = unicodedata.normalize("NFC", part)', "pass",
     ["tests/test_tokenizer.py::test_golden_ids"]),
    ("DPO: sign", "train_dpo.py",
     "delta = h_w - h_l", "delta = h_l - h_w",
     [DPO + "golden_values_and_their_gradients", DPO + "learns_a_preference_that_depends_on_the_prompt"]),
    ("DPO: prompt scored", "nanorlhf/data.py",
     "[len(prompt) for prompt, _ in rows]", "[1 for _ in rows]",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: denominator of the micro-batch", "train_dpo.py",
     'losses.sum() / counts["acc"]', "losses.mean()",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: reference of other pairs", "train_dpo.py",
     "ref_logp[order]", "ref_logp[: len(order)]",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: z0 of the right responses", "train_dpo.py",
     "z0 = h[:, 1].mean()", "z0 = h[:, 0].mean()",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: worst against best", "train_dpo.py",
     "ids[best], ids[worst]", "ids[worst], ids[best]",
     [DPO + "a_reward_model_ranks"]),
    ("DPO: the reference does not follow the rounds", "train_dpo.py",
     "base.load_state_dict(policy.state_dict())", "pass",
     [DPO + "the_reference_of_a_round"]),
    ("DPO: self-judge without its reference", "train_dpo.py",
     "policy.logprobs(tokens, mask)[0] - ref.logprobs(tokens, mask)[0]", "policy.logprobs(tokens, mask)[0]",
     [DPO + "the_policy_judges_itself"]),
    ("KL of evaluate.py one token late", "evaluate.py",
     "before = tokens[:, :-1]", "before = tokens[:, 1:]",
     ["tests/test_evaluate.py::test_both_kl_figures_have_the_mean_that_enumeration_gives"]),
    ("slots: the same uniform at every step", "nanorlhf/kernels/slots.py",
     "self.batch.uniforms[row, t]", "self.batch.uniforms[row, 0 * t]",
     [SLOTS + "whatever_the_slots"]),
    ("slots: an ended row writes on", "nanorlhf/kernels/slots.py",
     "at = torch.where(alive, row, self.B)", "at = row", [SLOTS + "whatever_the_slots"]),
    ("slots: the cache of another prompt", "nanorlhf/kernels/slots.py",
     "self.batch.distinct[row] - first for row in rows", "0 for row in rows",
     [SLOTS + "whatever_the_slots"]),
    ("slots: a row that moves forgets how far it is", "nanorlhf/kernels/slots.py",
     "(self.last, self.row, self.pos, self.t, self.alive)", "(self.last, self.row, self.pos, self.alive)",
     [SLOTS + "whatever_the_slots"]),
    ("slots: one position short", "nanorlhf/kernels/slots.py",
     "while live < length:", "while live < length - 1:",
     [SLOTS + "whatever_the_slots"]),
    ("slots: the host waits in every step", "nanorlhf/kernels/slots.py",
     "(alive & ~logp.isfinite()).any()", "bool((alive & ~logp.isfinite()).any())",
     [SLOTS + "a_step_is_one_fixed_sequence"]),
    ("slots: a prompt is prefilled again for its next row", "nanorlhf/kernels/slots.py",
     "if batch.distinct[waiting[-1]] not in prefill.numbers:",
     "if True:\n                prefill.numbers = range(batch.distinct[waiting[-1]])",
     [SLOTS + "how_much_is_computed"]),
    ("cache: rows that leave take a position along", "nanorlhf/model.py",
     "self.kv[:, :, new, :, :live] = self.kv[:, :, old, :, :live]",
     "self.kv[:, :, new, :, : live - 1] = self.kv[:, :, old, :, : live - 1]",
     ["tests/test_model.py::test_cache_is_the_full_forward"]),
    ("decode kernel: every split reads from the start", "nanorlhf/kernels/triton_decode.py",
     "start = split * share", "start = 0 * share", [DECODE + "kernel_by_hand"]),
    ("decode kernel: beyond a row's own past", "nanorlhf/kernels/triton_decode.py",
     "z = tl.where((t < stop)[None, :], z, -float(\"inf\"))", "z = z", [DECODE + "kernel_by_hand"]),
    ("decode kernel: splits weigh the same", "nanorlhf/kernels/triton_decode.py",
     "factor = tl.exp(m - tl.max(m, 0))", "factor = tl.exp(m - m)", [DECODE + "kernel_by_hand"]),
    ("families: MLP behind the attention, not beside it", "nanorlhf/model.py",
     "mlp_input = x if self.parallel else attended", "mlp_input = attended",
     [HUB + "golden_outputs[pythia]", HUB + "golden_decoding[pythia]"]),
    ("families: exact GELU for its tanh form", "nanorlhf/model.py",
     '"tanh" if cfg.mlp == "gelu" else "none"', '"none"',
     [HUB + "golden_outputs[gpt2]"]),
    ("families: queries and keys not normed", "nanorlhf/model.py",
     "            q = self.q_norm(q)\n            k = self.k_norm(k)\n", "            pass\n",
     [HUB + "golden_outputs[qwen3]"]),
    ("families: the whole head rotates", "nanorlhf/model.py",
     "return int(self.head_dim * self.rope_share)", "return self.head_dim",
     [HUB + "golden_outputs[pythia]", "tests/test_model.py::test_a_share_of_the_channels_rotates"]),
    ("families: rotary scaling by the wrong end", "nanorlhf/model.py",
     "freq = keep * freq + (1 - keep) * freq / factor", "freq = (1 - keep) * freq + keep * freq / factor",
     [HUB + "golden_outputs[llama3]", "tests/test_model.py::test_longer_contexts_turn_slower"]),
    ("families: fused heads cut as GPT-2's", "nanorlhf/hub/weights.py",
     'if "query_key_value" in name:  # GPT-NeoX', "if False:  # GPT-NeoX",
     [HUB + "golden_outputs[pythia]", HUB + "golden_outputs[pythia_reward]"]),
    ("families: fused heads joined as GPT-2's", "nanorlhf/hub/weights.py",
     "torch.stack(heads, dim=1)", "torch.stack(heads)",
     [HUB + "golden_tensors_come_back[pythia]"]),
    ("padding of the vocabulary can be sampled", "nanorlhf/model.py",
     "weight[: self.n_ids]", "weight",
     [HUB + "padded_vocabulary"]),
    ("only one id ends a response", "nanorlhf/generate.py",
     "[eos_id, *model.stop_ids]", "[eos_id]",
     ["tests/test_generate.py::test_any_of_the_stop_ids_ends_a_row"]),
    ("LoRA: the reference is a copy", "nanorlhf/lora.py",
     "{id(p): p for p in model.parameters()}", "{}",
     [LORA + "the_reference_costs_nothing_and_never_moves"]),
    ("LoRA: saved without its scale", "nanorlhf/lora.py",
     "weight + scale * B @ A", "weight + B @ A",
     [LORA + "starts_as_the_base_and_merges_into_one[pythia]"]),
    ("processes: DDP averages gradients", "nanorlhf/run/dist.py",
     "torch_dist.all_reduce(p.grad)", "torch_dist.all_reduce(p.grad.div_(size()))",
     [DIST + "in_fp32_too[sft-ddp]"]),
    ("processes: FSDP2 averages gradients", "nanorlhf/run/sharding.py",
     "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(float(torch_dist.get_world_size()))",
     [DIST + "in_fp32_too[sft-fsdp]"]),
    ("processes: each has a denominator of its own", "train_sft.py",
     'sft_loss(logp, chunk, batch["denom"])', 'sft_loss(logp, chunk, batch["mask"].sum())',
     [DIST + "in_fp32_too[sft-ddp]"]),
    ("processes: all sample with the draws of the first", "nanorlhf/generate.py",
     "uniforms[first_row:]", "uniforms[: len(group)]",
     [DIST + "no_two_rows_share_their_draws"]),
    ("processes: sharded moments are not resumed", "nanorlhf/run/checkpoint.py",
     "moments[i][name] = sharding.shard_like(x, params[i])", "pass",
     [DIST + "killed_in_mid_run_and_resumed[fsdp]"]),
    ("processes: a sharded model's new head is another one", "nanorlhf/hub/folder.py",
     "modes.enter_context(_Drawing())", "pass",
     [DIST + "two_processes_take_the_steps_of_one[rm-fsdp]"]),
]  # fmt: skip


def pytest(root, tests):
    """Run the tests in a copy of the repository → exit status, output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def copy(root):
    """Sources and tests, and nothing else."""
    for name in ("nanorlhf", "tests", "bench"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, root / path.name)
    return root


def verdict(mutant):
    """Plant the bug in a copy → "killed", or what happened instead, and the seconds it took."""
    _, file, source, replacement, tests = mutant
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = copy(Path(folder) / "repo")
        text = (root / file).read_text("utf-8")
        (root / file).write_text(text.replace(source, replacement), "utf-8")
        status = [pytest(root, [test])[0] for test in tests]  # each of those named must fail by itself
    what = "killed" if set(status) == {1} else f"SURVIVED (pytest: {', '.join(map(str, status))})"
    return what, time.perf_counter() - start


def main(words):
    chosen = [m for m in MUTANTS if not words or any(w.lower() in m[0].lower() for w in words)]
    for name, file, source, _, _ in chosen:
        found = (ROOT / file).read_text("utf-8").count(source)
        if found != 1:
            return f"{name}: {file} holds {source!r} {found} times, must be once; update the list of mutants"
    tests = sorted({test for m in chosen for test in m[4]})
    with tempfile.TemporaryDirectory() as folder:
        status, output = pytest(copy(Path(folder) / "repo"), tests)
    if status != 0:
        return f"{output}\nthe killing tests must pass before a bug is planted (pytest: {status})"
    wide = [max(len(m[i]) for m in chosen) for i in (0, 1)]
    killed = 0
    with ThreadPoolExecutor(2) as pool:
        for (name, file, *_), (what, seconds) in zip(chosen, pool.map(verdict, chosen)):
            print(f"{name:<{wide[0]}}  {file:<{wide[1]}}  {seconds:5.1f} s  {what}", flush=True)
            killed += what == "killed"
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
